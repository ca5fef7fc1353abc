"""How derivatives of gradients are taken: forward over reverse, or reverse over reverse.

Forward over reverse is cheaper. Functions with a `custom_vjp`, such as jaxopt's solvers, have no derivative in forward
mode. What is differentiated here is always a gradient. So its derivative is symmetric, and one pullback,
v ↦ ∇⟨gradient, v⟩, gives the same product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

FORWARD = "forward_over_reverse"
REVERSE = "reverse_over_reverse"


def check_hvp(hvp: Any) -> None:
    """Raises ValueError unless `hvp` is one of the two ways."""
    if hvp not in (FORWARD, REVERSE):
        raise ValueError(f"hvp: expected {FORWARD!r} or {REVERSE!r}, got {hvp!r}")


def check_forward(loss: Callable[[PyTree], Array], at: PyTree, jaxpr: Any, *, twice: bool) -> None:
    """Raises where forward mode meets a `custom_vjp`; under jit JAX says so only when it compiles, far from here.

    Args:
      loss: (point) -> scalar.
      at: the point; may be traced.
      jaxpr: of the loss there.
      twice: whether forward mode is applied to the loss's gradient and not to the loss itself. In the gradient,
        functions with a derivative may have taken the place of the `custom_vjp`.

    Raises:
      TypeError: naming the argument to change.
    """
    if not _holds(jaxpr, "custom_vjp_call"):
        return
    fn = jax.grad(loss) if twice else loss
    vectors = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)), jnp.result_type(leaf)), at)
    try:
        # What JAX would refuse to compile, it refuses to trace under vmap.
        jax.eval_shape(jax.vmap(lambda vector: jax.jvp(fn, (at,), (vector,))[1]), vectors)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"hvp: {FORWARD!r} differentiates the problem's functions in forward mode too, and one of them has a "
            f"custom_vjp, which gives reverse mode only (as jaxopt's solvers do); pass hvp={REVERSE!r}"
        ) from error


def _holds(jaxpr: Any, name: str) -> bool:
    """Whether a jaxpr, or one inside it, holds a primitive whose name starts with `name`."""
    return any(
        equation.primitive.name.startswith(name) or any(_holds(inner, name) for inner in inner_jaxprs(equation.params))
        for equation in jaxpr.eqns
    )


def inner_jaxprs(value: Any) -> list[Any]:
    """The jaxprs in an equation's parameters."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in inner_jaxprs(item)]
    inner = getattr(value, "jaxpr", value)
    return [inner] if hasattr(inner, "eqns") else []


def hessian_product(gradient: Callable[[PyTree], PyTree], at: PyTree, vector: PyTree, hvp: str) -> PyTree:
    """The derivative of a gradient along a vector like its argument."""
    if hvp == REVERSE:
        return jax.vjp(gradient, at)[1](vector)[0]
    return jax.jvp(gradient, (at,), (vector,))[1]


def hessian_map(
    gradient: Callable[[PyTree], Any], at: PyTree, hvp: str
) -> tuple[PyTree, Callable[[PyTree], PyTree], Any]:
    """The gradient with its aux, and v ↦ its derivative along v as a pytree; what v does not affect is computed once.

    Args:
      gradient: (point) -> (gradient, aux).
      at: the point.
      hvp: how the derivative is taken.

    Returns:
      Gradient, map, aux.
    """
    if hvp == REVERSE:
        slope, pullback, aux = jax.vjp(gradient, at, has_aux=True)
        return slope, Partial(_first, pullback), aux
    return jax.linearize(gradient, at, has_aux=True)


def taylor(
    fn: Callable[[PyTree], tuple[PyTree, Any]], at: PyTree, hvp: str
) -> tuple[PyTree, Callable[[PyTree], PyTree], Any]:
    """The value of `fn` -> (value, aux) at a point, its first-order Taylor polynomial there, and aux."""
    if hvp == REVERSE:
        value, pullback, aux = jax.vjp(fn, at, has_aux=True)
        # A linear map's own pullback is its transpose, wherever it is taken.
        transposed = jax.vjp(pullback, jax.tree.map(jnp.zeros_like, value))[1]

        def rate(change: PyTree) -> PyTree:
            return transposed((change,))[0]

    else:
        value, rate, aux = jax.linearize(fn, at, has_aux=True)

    def polynomial(point: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, value, rate(jax.tree.map(jnp.subtract, point, at)))

    return value, polynomial, aux


def _first(pullback: Callable[[PyTree], Any], vector: PyTree) -> PyTree:
    return pullback(vector)[0]
