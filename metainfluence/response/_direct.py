"""The part of a target's change that does not go through λ: ∂_wφ, and whether it was left out where it matters."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt32

from metainfluence._checks import concrete
from metainfluence.data import Task

# Pairs of examples that are compared one by one; where there are more, support sets are compared as wholes.
_MOST_PAIRS = 3e7


class DirectEffectWarning(UserWarning):
    """Scores of support examples that leave out what the examples do to the target's own adapted parameters."""


ADVICE = (
    "the target adapts to support data of training tasks, and scores of support examples hold only what goes through "
    "meta_params; pass total_effect=True if a removed example leaves the target's tasks too (scores of tasks and of "
    "query examples hold)"
)


def warn_of_direct_effect(result: Any, *, stacklevel: int = 2) -> None:
    """Warns where a target's tasks share support data with training, and adaptation reads the support weights."""
    shared = getattr(result.info, "support_shared", None)
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
    """Whether a task among the target's arguments has a training task's support set, a part of it, or it and more.

    Works under jit. None where no argument holds tasks of the same kind.
    """
    is_task = lambda node: isinstance(node, Task)  # noqa: E731
    others = [node for node in jax.tree.leaves(target_args, is_leaf=is_task) if is_task(node)]
    found = [_contained(tasks, other) for other in others if _alike(tasks.support, other.support)]
    return jnp.any(jnp.stack(found)) if found else None


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
    (ours, real), (theirs, really) = map(_support_hashes, (tasks, other))
    if math.prod(ours.shape) * math.prod(theirs.shape) > _MOST_PAIRS:
        ours, theirs = (jnp.sum(x, axis=1, keepdims=True, dtype=jnp.uint32) for x in (ours, theirs))
        real, really = (jnp.any(x, axis=1, keepdims=True) for x in (real, really))
    same = (ours[:, :, None, None] == theirs[None, None]) & real[:, :, None, None] & really[None, None]
    within = jnp.all(jnp.any(same, axis=3) | ~real[:, :, None], axis=1)
    around = jnp.all(jnp.any(same, axis=1) | ~really[None], axis=2)
    return jnp.any(within | around)


def _support_hashes(tasks: Task) -> tuple[UInt32[Array, "T n"], Bool[Array, "T n"]]:
    """A number for each support example, the same for the same data and 0 on padding; and which are real."""
    parts = [_mixed(_words(leaf), salt) for salt, leaf in enumerate(jax.tree.leaves(tasks.support))]
    # Mixed once more, so that sums over examples tell which parts belong together.
    hashes = _mixed(sum(parts[1:], parts[0])[:, :, None], 0)
    mask = tasks.support_mask
    real = jnp.ones(hashes.shape, bool) if mask is None else jnp.asarray(mask)
    return jnp.where(real, hashes, jnp.uint32(0)), real


def _words(leaf: Any) -> UInt32[Array, "T n size"]:
    """An array's examples as whole numbers that tell them apart."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        leaf = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return leaf.astype(jnp.uint32).reshape(*leaf.shape[:2], -1)


def _mixed(words: UInt32[Array, "T n size"], salt: int) -> UInt32[Array, "T n"]:
    """The words and their places in one number: the last steps of MurmurHash3, and a sum."""
    places = jnp.arange(words.shape[2], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(salt)
    mixed = words + places[None, None]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), axis=2, dtype=jnp.uint32)
