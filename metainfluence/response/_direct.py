"""The part of a target's change that does not go through λ: ∂_wφ, and whether it was left out where it matters."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt32

from metainfluence._checks import concrete
from metainfluence.data import Task, repeated

# At most this many pairs of examples are compared; where there are more, those of the target's first tasks.
_MOST_PAIRS = 30_000_000

_MOST_WORDS = 512


class DirectEffectWarning(UserWarning):
    """Scores of support examples leave out the examples' effect on the target's own adapted parameters."""


ADVICE = (
    "the target adapts to support data of training tasks, and scores of support examples hold only what goes through "
    "meta_params; pass total_effect=True if a removed example leaves the target's tasks too (scores of tasks and of "
    "query examples hold)"
)


def warn_of_direct_effect(result: Any, *, stacklevel: int = 2) -> None:
    """Warns where a target's tasks share support data with training, and adaptation reads the support weights."""
    shared = getattr(getattr(result, "info", None), "support_shared", None)
    if shared is None or not concrete(shared, result) or not np.any(np.asarray(shared)):
        return
    unread = np.any(np.asarray(result.task)) and not np.any(np.asarray(result.support))
    if not unread:
        warnings.warn(ADVICE, DirectEffectWarning, stacklevel=stacklevel + 1)


def check_total_effect(total_effect: Any) -> None:
    """Raises TypeError unless `total_effect` is True or False."""
    if not isinstance(total_effect, bool):
        raise TypeError(f"total_effect: expected True or False, got {total_effect!r}")


def shares_support(tasks: Task, target_args: tuple[Any, ...]) -> Bool[Array, ""] | None:
    """Whether a task among the target's arguments adapts to all support examples of a training task.

    Works under jit, in few operations, since every program with a target holds them. None where no argument holds tasks
    of the same kind.
    """
    is_task = lambda node: isinstance(node, Task)  # noqa: E731
    others = [node for node in jax.tree.leaves(target_args, is_leaf=is_task) if is_task(node)]
    sides = [each._replace(support=repeated(each.support)) for each in (tasks, *others)]
    found = [_contained(sides[0], other) for other in sides[1:] if _alike(sides[0].support, other.support)]
    return functools.reduce(jnp.logical_or, found) if found else None


def _alike(ours: PyTree, theirs: PyTree) -> bool:
    """Whether two sides hold examples of the same structure, shapes and dtypes, on two leading axes."""
    structure: Any = jax.tree.structure(ours)
    if not jax.tree.leaves(ours) or structure != jax.tree.structure(theirs):
        return False
    return all(
        min(jnp.ndim(a), jnp.ndim(b)) >= 2
        and (jnp.shape(a)[2:], jnp.result_type(a)) == (jnp.shape(b)[2:], jnp.result_type(b))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def _contained(tasks: Task, other: Task) -> Bool[Array, ""]:
    count, size = jnp.shape(jax.tree.leaves(tasks.support)[0])[:2]
    others, length = jnp.shape(jax.tree.leaves(other.support)[0])[:2]
    others = min(others, max(_MOST_PAIRS // (count * size * length), 1))
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf)[:others], (other.support, other.support_mask))
    numbers = _numbers(tasks.support, first[0])
    ours = numbers[: count * size].reshape(count, size, 1, 1)
    theirs = numbers[count * size :].reshape(1, 1, others, length)
    same = jax.lax.eq(*jnp.broadcast_arrays(ours, theirs))
    if first[1] is not None:
        same &= first[1][None, None]
    found = jax.lax.reduce_or(same, (3,))
    if tasks.support_mask is not None:
        found |= ~jnp.asarray(tasks.support_mask)[:, :, None]
    return jax.lax.reduce_or(jax.lax.reduce_and(found, (1,)), (0, 1))


def _numbers(*sides: PyTree) -> UInt32[Array, " examples"]:
    """A number for each example of the sides, equal for equal data: NH of UMAC (Black et al., CRYPTO 1999)."""
    leaves = zip(*map(jax.tree.leaves, sides), strict=True)
    words = jnp.concatenate([jnp.concatenate(list(map(_words, each))) for each in leaves], axis=1)
    keys = np.random.default_rng(0).integers(1 << 32, size=(1, words.shape[1]), dtype=np.uint32)
    return jax.lax.reduce_sum((words + keys) * ((words >> 16) + keys), (1,))


def _words(leaf: Any) -> UInt32[Array, "examples size"]:
    """An array's examples as integers that tell them apart; for large examples only a part, evenly spread."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    rows = leaf.reshape(leaf.shape[0] * leaf.shape[1], -1)
    rows = rows[:, :: rows.shape[1] // _MOST_WORDS + 1]
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        rows = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    return rows.astype(jnp.uint32).reshape(rows.shape[0], -1)
