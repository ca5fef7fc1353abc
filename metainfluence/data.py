"""Tasks, data weights, padding and removal.

A *task* is a support set, from which the task's parameters are adapted, and a query set, on which they are judged.
Stacked tasks carry one more leading axis on every leaf. The *data weights* `w` say how much every datum counts in the
outer objective: 1 by default, 0 for a datum that is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from metainfluence._checks import check_finite_floats, concrete, leaf_name, refuse_half

__all__ = ["PerTask", "Task", "Weights", "drop", "stack_tasks", "unit_weights"]

PIECE = "of a stream take a piece: list(itertools.islice(stream, 100))"


class Task(NamedTuple):
    """One task, or stacked tasks with a leading axis `[T]` on every leaf.

    Attributes:
      support: pytree of arrays `[n_support, ...]`; any dtype, integers and PRNG keys included. What belongs to the task
        but is not an example goes into a `PerTask`.
      query: pytree of arrays `[n_query, ...]`, likewise.
      support_mask: `[n_support]` booleans, False on padding; None where every example is real.
      query_mask: `[n_query]` booleans, False on padding; None where every example is real.
    """

    support: PyTree
    query: PyTree
    support_mask: Bool[Array, "*T n_support"] | None = None
    query_mask: Bool[Array, "*T n_query"] | None = None


class PerTask(NamedTuple):
    """What belongs to a task but is not an example, such as coordinates or a PRNG key: a node in `support` or `query`.

    The problem's functions receive it unchanged. It may stand anywhere in the pytree, has no weights, is not padded,
    and has the same shapes in all tasks.

    Attributes:
      value: pytree of arrays of any shape; in stacked tasks they have a leading axis `[T]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> def task(offset):
      ...     return mi.Task((), {"y": jnp.asarray([1.0, 3.0]), "offset": mi.PerTask(jnp.asarray(offset))})
      >>> def losses(params, m, query):
      ...     return (m + query["offset"].value - query["y"]) ** 2
      >>> problem = mi.bilevel(losses, mi.adaptation.closed_form(lambda m, support, coefficients: m))
      >>> tasks = mi.stack_tasks([task(0.0), task(-1.0)])
      >>> tasks.query["offset"].value.shape, float(mi.total_objective(problem)(jnp.asarray(2.0), tasks))
      ((2,), 1.5)
    """

    value: PyTree


def _is_per_task(node: Any) -> bool:
    return isinstance(node, PerTask)


def map_examples(function: Callable[..., Any], side: PyTree) -> PyTree:
    """`jax.tree.map` over the arrays of examples; each `PerTask` stays as it is."""
    return jax.tree.map(lambda leaf: leaf if _is_per_task(leaf) else function(leaf), side, is_leaf=_is_per_task)


def examples_of(side: PyTree) -> PyTree:
    """The side with None in place of each `PerTask`."""
    return jax.tree.map(lambda leaf: None if _is_per_task(leaf) else leaf, side, is_leaf=_is_per_task)


def repeated(side: PyTree) -> PyTree:
    """The side of stacked tasks with each `PerTask` repeated for every example, `[T, n, ...]`."""
    lead = next((jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(examples_of(side))), ())

    def at_examples(node: Any) -> Any:
        if not lead or not _is_per_task(node):
            return node
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:, None], (*lead, *jnp.shape(leaf)[1:])), node)

    return jax.tree.map(at_examples, side, is_leaf=_is_per_task)


def leaves_by_kind(side: PyTree) -> list[tuple[Any, Any, bool]]:
    """Path and array of every leaf, and whether it holds examples."""
    examples = {path for path, _ in jax.tree_util.tree_leaves_with_path(examples_of(side))}
    return [(path, leaf, path in examples) for path, leaf in jax.tree_util.tree_leaves_with_path(side)]


class Weights(NamedTuple):
    """Data weights of stacked tasks; those of a single task lack the leading axis.

    Attributes:
      task: `[T]`, the weight w_k of each task in the outer objective.
      support: `[T, n_support]`, the weight u_kj of each support example in the inner objective.
      query: `[T, n_query]`, the weight v_kj of each query example in its task's loss.
    """

    task: Float[Array, "*T"]
    support: Float[Array, "*T n_support"]
    query: Float[Array, "*T n_query"]


class Sizes(NamedTuple):
    """Leading axes of the tasks (`()` for a single one), and numbers of support and of query examples."""

    lead: tuple[int, ...]
    support: int
    query: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the `Weights`."""
        return {"task": self.lead, "support": (*self.lead, self.support), "query": (*self.lead, self.query)}


def _lead(name: str, tree: PyTree, mask: Any, axes: int) -> tuple[int, ...]:
    """Checks that all leaves and the mask share their first `axes` axes, and returns these."""
    lead: tuple[int, ...] | None = None
    refuse_half(tree, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(examples_of(tree)):
        shape = jnp.shape(leaf)
        if len(shape) < axes:
            hint = "; one task is stacked by metainfluence.stack_tasks([task])" if axes == 2 else ""
            raise ValueError(f"{leaf_name(name, path)}: expected at least {axes} leading axes, got shape {shape}{hint}")
        if lead is not None and shape[:axes] != lead:
            raise ValueError(
                f"{leaf_name(name, path)}: expected the leading axes {lead} of the other leaves, got shape {shape}"
            )
        lead = shape[:axes]
    if mask is not None:
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(f"{name}_mask: expected booleans, got {jnp.result_type(mask)}")
        if lead is not None and jnp.shape(mask) != lead:
            raise ValueError(f"{name}_mask: expected shape {lead}, got {jnp.shape(mask)}")
        lead = jnp.shape(mask)
    return lead if lead is not None else ()


def sizes(tasks: Task, *, stacked: bool = True, name: str = "tasks") -> Sizes:
    """Reads and checks the sizes of stacked tasks, or of one task.

    Raises:
      TypeError: `tasks` is not a `Task`, or a mask does not hold booleans.
      ValueError: leaves disagree in their leading axes, or a side is empty.
    """
    if not isinstance(tasks, Task):
        several = isinstance(tasks, Sequence) and any(isinstance(task, Task) for task in tasks)
        hint = "stack them with metainfluence.stack_tasks" if several else "meta_params come first, then the tasks"
        if isinstance(tasks, Iterator):
            hint = f"{PIECE}, and stack it with metainfluence.stack_tasks"
        elif not stacked:
            hint = "make it one: metainfluence.Task(support, query)"
        raise TypeError(f"{name}: expected a metainfluence.Task, got {type(tasks).__name__}; {hint}")
    axes = 2 if stacked else 1
    support = _lead(f"{name}.support", tasks.support, tasks.support_mask, axes)
    query = _lead(f"{name}.query", tasks.query, tasks.query_mask, axes)
    if not query:
        held = "nothing but PerTask" if jax.tree.leaves(tasks.query) else "a pytree without leaves"
        raise ValueError(f"{name}.query: expected at least one array, got {held}")
    if support and stacked and support[0] != query[0]:
        raise ValueError(
            f"{name}.support: expected the {query[0]} tasks of {name}.query on the leading axis, got {support[0]}"
        )
    for side, lead, mask in (("support", support, tasks.support_mask), ("query", query, tasks.query_mask)):
        if stacked:
            _check_per_task(f"{name}.{side}", getattr(tasks, side), query[0])
        if 0 in lead:
            raise ValueError(f"{name}.{side}: expected at least one task and one example, got leading axes {lead}")
        if mask is not None and concrete(mask) and not np.all(np.any(np.asarray(mask), axis=-1)):
            where = np.flatnonzero(~np.any(np.atleast_2d(np.asarray(mask)), axis=-1))
            raise ValueError(f"{name}.{side}_mask: expected a real example in every task, got none in tasks {where}")
    # A support pytree without leaves means that the inner level reads no data.
    return Sizes(query[:-1], support[-1] if support else 0, query[-1])


def _check_per_task(name: str, side: PyTree, count: int) -> None:
    for path, leaf, of_examples in leaves_by_kind(side):
        if not of_examples and jnp.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"{leaf_name(name, path)}: expected one for each of the {count} tasks on the leading axis, got shape "
                f"{jnp.shape(leaf)}"
            )


def not_finite(tasks: Task, name: str = "tasks") -> str | None:
    """Names the first leaf of stacked tasks with NaN or infinity outside the padding, and the tasks; None if finite."""
    for side in ("support", "query"):
        mask = getattr(tasks, f"{side}_mask")
        for path, leaf, of_examples in leaves_by_kind(getattr(tasks, side)):
            # Arrays that lie partly on other hosts cannot be seen in full from this one.
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or not getattr(
                leaf, "is_fully_addressable", True
            ):
                continue
            bad = ~np.isfinite(np.asarray(leaf))
            bad = bad.reshape(*bad.shape[: 2 if of_examples else 1], -1).any(axis=-1)
            if of_examples:
                bad = np.any(bad if mask is None else bad & np.asarray(mask), axis=-1)
            where = np.flatnonzero(bad)
            if where.size:
                return (
                    f"{leaf_name(f'{name}.{side}', path)}: expected finite numbers, got NaN or infinity in "
                    f"{'task' if where.size == 1 else 'tasks'} {', '.join(map(str, where[:8]))}"
                    f"{' …' if where.size > 8 else ''}"
                )
    return None


def name_not_finite(derivative: PyTree, data: PyTree, name: str) -> None:
    """Raises, naming task and leaf, where the tasks' data explain why a derivative is NaN or infinite."""
    if not isinstance(data, Task) or not concrete(derivative, data):
        return
    finite = all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(derivative))
    found = None if finite else not_finite(data, name)
    if found is not None:
        raise ValueError(found)


def stack_tasks(tasks: Sequence[Task]) -> Task:
    """Stacks single tasks on a new leading axis, padding ragged ones.

    Padding repeats a task's last example, so that it is valid input for any loss; the masks mark it. Masks stay None on
    a side where all tasks have the same number of examples and none has a mask.

    Args:
      tasks: single tasks with equal pytree structures, trailing shapes and dtypes. Their leaves are arrays of JAX or
        NumPy, or whatever NumPy converts to one, such as PyTorch's tensors.

    Returns:
      Task with leaves `[T, n_max, ...]`.

    Raises:
      TypeError: an iterator, which may never end; an element that is not a `Task`.
      ValueError: no tasks, or tasks that differ in structure, trailing shapes or dtypes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> short = mi.Task(support=jnp.asarray([1.0]), query=jnp.asarray([2.0]))
      >>> long = mi.Task(support=jnp.asarray([3.0, 4.0]), query=jnp.asarray([5.0]))
      >>> tasks = mi.stack_tasks([short, long])
      >>> tasks.support.tolist(), tasks.support_mask.tolist()
      ([[1.0, 1.0], [3.0, 4.0]], [[True, False], [True, True]])
    """
    if isinstance(tasks, Iterator):
        raise TypeError(
            f"tasks: expected a sequence of tasks, got {type(tasks).__name__}, which may never end; {PIECE}"
        )
    tasks = [jax.tree.map(_array, task) if isinstance(task, Task) else task for task in tasks]
    if not tasks:
        raise ValueError("tasks: expected at least one task, got an empty sequence")
    counts = [sizes(task, stacked=False, name=f"tasks[{k}]") for k, task in enumerate(tasks)]

    def side(name: str) -> tuple[PyTree, Any]:
        lengths = [getattr(count, name) for count in counts]
        masks = [getattr(task, f"{name}_mask") for task in tasks]
        longest = max(lengths)

        def stack(path: Any, *leaves: Any) -> Array:
            of_examples = path in paths
            for k, leaf in enumerate(leaves):
                expected, got = (
                    (jnp.shape(each)[int(of_examples) :], jnp.result_type(each)) for each in (leaves[0], leaf)
                )
                if got != expected:
                    raise ValueError(
                        f"{leaf_name(f'tasks[{k}].{name}', path)}: expected {'trailing ' if of_examples else ''}shape "
                        f"and dtype {expected} as in tasks[0], got {got}"
                    )
            if not of_examples:
                return jnp.stack(leaves)
            rows = [np.minimum(np.arange(longest), length - 1) for length in lengths]
            return jnp.stack([jnp.asarray(leaf)[row] for leaf, row in zip(leaves, rows, strict=True)])

        batches = [getattr(task, name) for task in tasks]
        for k, batch in enumerate(batches):
            structure: Any = jax.tree.structure(batch)
            if structure != jax.tree.structure(batches[0]):
                raise ValueError(
                    f"tasks[{k}].{name}: expected the structure {jax.tree.structure(batches[0])} of tasks[0], "
                    f"got {structure}"
                )
        paths = {path for path, _, of_examples in leaves_by_kind(batches[0]) if of_examples}
        stacked = jax.tree_util.tree_map_with_path(stack, *batches)
        if all(mask is None for mask in masks) and len(set(lengths)) == 1:
            return stacked, None
        filled = [
            jnp.pad(jnp.ones(length, bool) if mask is None else jnp.asarray(mask), (0, longest - length))
            for mask, length in zip(masks, lengths, strict=True)
        ]
        return stacked, jnp.stack(filled)

    (support, support_mask), (query, query_mask) = side("support"), side("query")
    return Task(support, query, support_mask, query_mask)


def _array(leaf: Any) -> Any:
    """Converts another library's array, such as PyTorch's, to NumPy's; returns anything else as it is."""
    foreign = hasattr(leaf, "__array__") and not isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    return np.asarray(leaf) if foreign else leaf


def unit_weights(tasks: Task) -> Weights:
    """Weights of 1 for stacked tasks: `[T]`, `[T, n_support]`, `[T, n_query]`, in JAX's default float dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> weights = mi.unit_weights(mi.Task(support=jnp.zeros((2, 3)), query=jnp.zeros((2, 1))))
      >>> weights.task.tolist(), weights.support.shape, weights.query.shape
      ([1.0, 1.0], (2, 3), (2, 1))
    """
    return _ones(sizes(tasks))


def _ones(size: Sizes) -> Weights:
    return Weights(**{field: jnp.ones(shape) for field, shape in size.shapes().items()})


def resolve_weights(weights: Weights | None, tasks: Task, *, stacked: bool = True, name: str = "weights") -> Weights:
    """Checks `weights` against `tasks`; None means 1 for every datum.

    Raises:
      TypeError: `weights` is not a `Weights`, or does not hold floating-point numbers.
      ValueError: a wrong shape, or a value that is not finite.
    """
    size = sizes(tasks, stacked=stacked)
    if weights is None:
        return _ones(size)
    if not isinstance(weights, Weights):
        raise TypeError(f"{name}: expected metainfluence.Weights, got {type(weights).__name__}")
    for field, shape in size.shapes().items():
        value = getattr(weights, field)
        if jnp.shape(value) != shape:
            raise ValueError(f"{name}.{field}: expected shape {shape}, got {jnp.shape(value)}")
        check_finite_floats(f"{name}.{field}", value)
    return Weights(*map(jnp.asarray, weights))


def drop(weights: Weights, tasks: Any = (), support: Any = (), query: Any = ()) -> Weights:
    """Sets the weights of removed data to 0.

    Args:
      weights: weights of stacked tasks.
      tasks: indices of whole tasks, `[m]`.
      support: pairs (task, example) of support examples, `[m, 2]`.
      query: pairs (task, example) of query examples, `[m, 2]`.

    Returns:
      New weights; the ones given are unchanged.

    Raises:
      TypeError: indices that are not integers.
      ValueError: pairs of another shape, or an index out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> weights = mi.unit_weights(mi.Task(support=jnp.zeros((2, 3)), query=jnp.zeros((2, 1))))
      >>> without = mi.drop(weights, tasks=[1], support=[(0, 2)])
      >>> without.task.tolist(), without.support.tolist()
      ([1.0, 0.0], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights: expected metainfluence.Weights, got {type(weights).__name__}")

    def clear(field: str, index: Any, argument: str) -> Array:
        values = jnp.asarray(getattr(weights, field))
        width = values.ndim
        # In NumPy, since under jit JAX would make it a tracer, whose range cannot be checked.
        index = index if isinstance(index, Array) else np.asarray(index)
        if index.size == 0:
            return values
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(f"{argument}: expected integer indices, got {index.dtype}")
        index = index.reshape(-1, 1) if width == 1 and index.ndim <= 1 else index
        if index.ndim != 2 or index.shape[1] != width:
            kind = "indices [m]" if width == 1 else "pairs (task, example) [m, 2]"
            raise ValueError(f"{argument}: expected {kind}, got shape {index.shape}")
        if concrete(index):
            for bound, column in zip(values.shape, np.asarray(index).T, strict=True):
                if column.min() < 0 or column.max() >= bound:
                    raise ValueError(f"{argument}: expected indices from 0 to {bound - 1}, got {column.tolist()}")
        return values.at[tuple(index.T)].set(0.0)

    return Weights(clear("task", tasks, "tasks"), clear("support", support, "support"), clear("query", query, "query"))


def coefficients(weights: Array, mask: Array | None) -> Array:
    """Weights of one task's examples times its normaliser: 1/(number of real examples), 0 on padding."""
    if mask is None:
        return weights / max(weights.shape[0], 1)
    return jnp.where(mask, weights, 0.0) / jnp.sum(mask, dtype=weights.dtype)


def fill_padding(batch: PyTree, mask: Array | None) -> PyTree:
    """Replaces padded rows by the first real one, so that whatever is in the padding cannot reach a result."""
    if mask is None:
        return batch
    rows = jnp.where(mask, jnp.arange(mask.shape[0]), jnp.argmax(mask))
    return map_examples(lambda leaf: leaf[rows], batch)


def weighted_sum(losses: Array, coefficients: Array) -> Array:
    """Σ_j c_j ℓ_j in the dtype of the losses."""
    return jnp.sum(losses * coefficients.astype(losses.dtype))
