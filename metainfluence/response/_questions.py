"""What a run is asked: one direction or slope, or many on a leading axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from metainfluence._checks import check_finite, concrete
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.operators import Domain
from metainfluence.response._run_info import RunInfo, problems_of_run


def direction_of(direction: Weights, tasks: Task, weights: Weights) -> tuple[bool, Weights]:
    """Whether there are many directions in the weights of `tasks`, and the checked directions."""
    many = isinstance(direction, Weights) and jnp.ndim(direction.task) == 2
    if many:
        _check_lead("direction", direction)
    resolve_weights(_first(direction) if many else direction, tasks, name="direction")
    check_finite("direction", direction)
    return many, jax.tree.map(lambda d, w: jnp.asarray(d, w.dtype), direction, weights)


def slope_of(slope: PyTree, meta_params: PyTree, info: RunInfo) -> tuple[bool, PyTree]:
    """Whether there are many slopes at the end λ of a run, and the checked slopes."""
    domain = Domain.of(meta_params)
    leaves = jax.tree.leaves(slope)
    ranks = [len(like.shape) for like in domain.leaves]
    many = len(leaves) == len(ranks) and all(jnp.ndim(x) == n + 1 for x, n in zip(leaves, ranks, strict=True))
    if many:
        _check_lead("slope", slope)
    domain.check("slope", _first(slope) if many else slope)
    try:
        check_finite("slope", slope)
    except ValueError as error:
        # A target at a λ that is NaN has no slope, which is not the target's fault.
        known = problems_of_run(info._replace(replay_difference=None)) if concrete(info) else []
        raise ValueError(f"{error}{f': {known[0]}' if known else ''}") from error
    return many, jax.tree.map(lambda s, like: jnp.asarray(s, like.dtype), slope, meta_params)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _check_lead(name: str, tree: PyTree) -> None:
    """Raises ValueError unless all leaves have the same, positive number on their leading axis."""
    counts = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"{name}: expected one number on the leading axis of all leaves, got {sorted(counts)}")
