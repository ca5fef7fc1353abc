"""Checks of arguments, with messages on what was expected and what was given."""

from __future__ import annotations

import contextlib
import functools
import inspect
import reprlib
import typing
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

P = ParamSpec("P")
T = TypeVar("T")


def concrete(*trees: PyTree) -> bool:
    """Whether every leaf has a value now, which is not so under jit, vmap and grad."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def is_array(value: Any) -> bool:
    """Whether `value` is an array or a number, and not a pytree or anything else."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic, int, float))


def described(value: Any) -> str:
    """What `value` is, for error messages."""
    if not is_array(value):
        return f"{type(value).__name__} {value!r}"
    return f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"


def leaf_name(root: str, path: Any) -> str:
    """Name of a pytree's leaf for error messages, as in `tasks.support['x']`."""
    return root + jax.tree_util.keystr(path)


def is_half(value: Any) -> bool:
    """Whether an array holds floating-point numbers of less than 32 bits."""
    dtype = jnp.result_type(value)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize < 4


def refuse_half(tree: PyTree, name: str) -> None:
    """Raises TypeError, naming the leaf, where a leaf is in half precision, in which no Hessian can be solved."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if is_array(leaf) and is_half(leaf):
            raise TypeError(
                f"{leaf_name(name, path)}: expected float32 or float64, got {jnp.result_type(leaf)}; cast it, or use "
                "scoring.score, which does"
            )


def check_batch_size(batch_size: int | None) -> None:
    """Raises ValueError unless `batch_size` is None or a positive integer."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: expected None or a positive integer, got {batch_size!r}")


def check_mesh(mesh: Mesh | None) -> None:
    """Raises TypeError unless `mesh` is None or a mesh of devices."""
    if mesh is not None and not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected None or a jax.sharding.Mesh, got {mesh!r}")


def check_finite(name: str, tree: PyTree) -> None:
    """Raises ValueError, naming the leaf, unless all numbers are finite, as far as they have values now."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if concrete(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(f"{leaf_name(name, path)}: expected finite numbers, got NaN or infinity")


def check_finite_floats(name: str, value: Any) -> None:
    """Raises unless an array holds floating-point numbers, finite ones as far as they have values now."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise TypeError(f"{name}: expected floating-point numbers, got {jnp.result_type(value)}")
    check_finite(name, value)


def check_precision(precision: Any) -> None:
    """Raises ValueError unless `precision` is None or one that JAX knows for matrix products."""
    if precision is None:
        return
    try:
        with jax.default_matmul_precision(precision):
            return
    except (ValueError, TypeError):
        known = "None or one of jax.default_matmul_precision, as 'highest'"
        raise ValueError(f"precision: expected {known}, got {precision!r}") from None


def traced_at(precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """The setting for all tracing, the user's functions included: a precision of matrix products; None for JAX's."""
    return contextlib.nullcontext() if precision is None else jax.default_matmul_precision(precision)


def at_own_precision(method: Callable[P, T]) -> Callable[P, T]:
    """A method that traces at its object's `precision`, whoever calls it and when."""

    @functools.wraps(method)
    def traced(*args: P.args, **kwargs: P.kwargs) -> T:
        owner: Any = args[0]
        with traced_at(owner.precision):
            return method(*args, **kwargs)

    return traced


def check_positive(name: str, value: Any, *, integer: bool = False) -> None:
    """Raises ValueError unless `value` is positive (and an integer); traced values cannot be checked."""
    if isinstance(value, jax.core.Tracer):
        return
    kind = "a positive integer" if integer else "a positive number"
    valid = not isinstance(value, (str, bool)) and jnp.ndim(value) == 0 and (not integer or isinstance(value, int))
    if not valid or not float(value) > 0:
        raise ValueError(f"{name}: expected {kind}, got {value!r}")


def check_damping(damping: Any) -> None:
    """Raises unless `damping` is a non-negative scalar; traced values cannot be checked."""
    if isinstance(damping, str) or jnp.ndim(damping) != 0:
        raise ValueError(f"damping: expected a non-negative number, got {damping!r}")
    if concrete(damping) and not float(damping) >= 0.0:
        raise ValueError(f"damping: expected a non-negative number, got {damping!r}")


def check_function(name: str, value: Any, expected: str, *arguments: Any, **keywords: Any) -> None:
    """Raises TypeError unless `value` can be called with that many arguments, by its signature where it shows one."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function {expected}, got {reprlib.repr(value)}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"{name}: expected a function {expected}, got one of {signature}: {error}") from None


@contextlib.contextmanager
def calling(name: str, signature: str) -> Iterator[None]:
    """Adds how a function is called to an error that arguments of the wrong kind may have caused."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        # If functions call each other, the innermost is meant.
        if not getattr(error, "__notes__", None):
            error.add_note(f"{name} is called as {name}{signature}")
            if "'list'" in str(error):
                error.add_note("a list of numbers is a pytree of numbers, and no array: make it one by jnp.asarray")
        raise
    except NameError as error:
        if "axis name" in str(error) and not getattr(error, "__notes__", None):
            error.add_note(
                f"{name} is a function of one task alone: tasks that see each other, as through a shared pool or "
                "statistics over tasks, have no scores of their own; put what is shared and not scored into a "
                "metainfluence.PerTask of each, or make one task of those that share"
            )
        raise


def check_scalar(value: Any, name: str) -> Array:
    """Raises ValueError unless `value` is a real scalar."""
    if not is_array(value) or jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(f"{name}: expected a real scalar, got {described(value)}")
    return value


def check_arrays(tree: PyTree, name: str) -> None:
    """Raises TypeError, naming the leaf, unless all leaves are arrays or numbers; random keys are arrays too."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(leaf):
            raise TypeError(
                f"{leaf_name(name, path)}: expected an array, got {type(leaf).__name__} {reprlib.repr(leaf)}; leave "
                "what is not differentiated out of this pytree, as equinox.partition(model, equinox.is_inexact_array) "
                "and flax.nnx.split(model, nnx.Param, ...) do"
            )


def check_floating(tree: PyTree, name: str) -> None:
    """Raises, naming the leaf, unless there are leaves and all of them are floating-point arrays."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name}: expected at least one array, got a pytree without leaves")
    check_arrays(tree, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{leaf_name(name, path)}: expected floating-point numbers, got {jnp.result_type(leaf)}; leave what is "
                "not differentiated out of this pytree"
            )


def check_losses(losses: Any, count: int, name: str) -> Array:
    """Raises ValueError unless `losses` is one number per example."""
    if not is_array(losses) or jnp.shape(losses) != (count,):
        raise ValueError(
            f"{name}: expected one loss per example, shape ({count},), got {described(losses)}; "
            "metainfluence.per_example turns a mean-reduced loss into one per example"
        )
    return losses


def maker(fn: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that makes a function: a call that mixes the two up is told how both are called.

    The Protocol named in the maker's return annotation says how the made function is called.
    """
    signature = inspect.signature(fn)
    first = ", ".join(
        name for name, each in signature.parameters.items() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    )

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            usage = f"{fn.__name__}({first}, …){_call_of(fn)}"
            raise TypeError(f"{fn.__name__}: {error}; it makes a function, which takes the data: {usage}") from None
        return fn(*args, **kwargs)

    return run


def _call_of(fn: Callable[..., Any]) -> str:
    """The arguments without a default of what a maker returns, such as "(meta_params, tasks)"."""
    made = typing.get_type_hints(fn)["return"]
    parameters = list(inspect.signature(made.__call__).parameters.values())[1:]
    needed = [each for each in parameters if each.default is inspect.Parameter.empty]
    names = ["*" * (each.kind is inspect.Parameter.VAR_POSITIONAL) + each.name for each in needed]
    return f"({', '.join(names)})"
