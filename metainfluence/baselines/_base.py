"""What baselines share: the report of a method that solves nothing, and λ on a leading axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from metainfluence._checks import leaf_name
from metainfluence.operators import Operator
from metainfluence.problem import check_meta_params
from metainfluence.solvers import SolveInfo, Solver, SolveStatus


def unsolved(dtype: Any, shape: tuple[int, ...] = ()) -> SolveInfo:
    """The report of a method that solves nothing: not converged after 0 products, and NaN for what was not measured."""
    nothing = jnp.full(shape, jnp.nan, dtype)
    return SolveInfo(
        status=jnp.full(shape, SolveStatus.MAX_STEPS, jnp.int32),
        num_matvecs=jnp.zeros(shape, jnp.int32),
        relative_residual=nothing,
        min_curvature=nothing,
        outer_gradient_norm=nothing,
        inner_gradient_norm=nothing,
        effective_curvature=nothing,
        damping=nothing,
    )


def no_solve() -> Solver:
    """Replaces H by the identity, as `solvers.identity`, but takes no product for a report, which is empty."""

    def solve(operator: Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        del state, x0
        return rhs, unsolved(operator.domain.dtype)

    return Solver(lambda operator: None, solve)


def dtype_of(meta_params: PyTree) -> Any:
    """The dtype in which all leaves can be held."""
    return jnp.result_type(*jax.tree.leaves(meta_params))


def stacked_length(meta_params: PyTree, kind: str) -> int:
    """The leading axis of stacked meta-parameters; `kind` names its entries.

    Raises:
      ValueError: leaves without a common leading axis, or one that is empty; and as `check_meta_params`.
    """
    check_meta_params(meta_params)
    first: tuple[int, ...] | None = None
    for path, leaf in jax.tree_util.tree_leaves_with_path(meta_params):
        first = jnp.shape(leaf)[:1] if first is None else first
        if jnp.shape(leaf)[:1] != first or first in ((), (0,)):
            raise ValueError(
                f"{leaf_name('meta_params', path)}: expected a leading axis for the {kind} that all leaves share, got "
                f"shape {jnp.shape(leaf)}"
            )
    assert first is not None
    return first[0]


def weighted_total(weights: Array, stacked: Array) -> Array:
    """Σ_c weights_c · stacked_c."""
    return jnp.tensordot(weights.astype(stacked.dtype), stacked, 1, precision=jax.lax.Precision.HIGHEST)
