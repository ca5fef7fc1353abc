"""A low-rank preconditioner from the curvature of fewer tasks."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence import krylov, subspace
from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Outcome, Solver
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_map

# Eigenvalues that the basis leaves out are larger than the damping alone; the factor is measured, not derived.
_COMPLEMENT = 3.0


class _State(NamedTuple):
    ritz: subspace.Ritz
    matvecs: Array


@called
def sampled(number: int | None = None, *, rank: int = 100, seed: int = 0, tol: Any = 1e-6) -> Solver:
    """Preconditions with the total Hessian of a few randomly chosen tasks instead of all of them.

    Curvature is a mean over tasks, and the mean over a sample resembles it (Byrd et al., SIAM J. Optim. 21, 2011;
    Erdogdu and Montanari, NeurIPS 2015). `rank` Lanczos vectors of the sample's Hessian are computed once; a product
    with that Hessian costs the sample's share of a full product, and is counted as such. Negative curvature is flipped,
    so that the map is positive definite.

    Args:
      number: tasks in the sample; None for a sixteenth of all, at least 4. All tasks if there are no more.
      rank: products with the sample's Hessian, and size of the basis; at most the operator's size.
      seed: of the start vector; the choice of tasks is fixed.
      tol: relative residual at which it counts as converged when used as a solver alone.

    Raises:
      ValueError: `number` or `rank` is not a positive integer; at `init`, an operator that is not a mean over tasks.

    Examples:
      >>> import metainfluence as mi
      >>> mi.solvers.cg(preconditioner=mi.solvers.sampled(64, rank=50))
      cg(preconditioner=sampled(64, rank=50))
    """
    if number is not None:
        check_positive("number", number, integer=True)
    check_positive("rank", rank, integer=True)
    check_positive("tol", tol)

    def init(operator: Operator) -> _State:
        if operator.sample is None:
            raise ValueError(
                "operator: sampled expected a mean over tasks, as total_hessian makes, got one that has no tasks"
            )
        wanted = max(4, operator.num_groups // 16) if number is None else number
        count, size = min(wanted, operator.num_groups), min(rank, operator.size)
        part = dataclasses.replace(operator.sample(count), shift=jnp.zeros_like(operator.shift))
        first, _ = jax.random.split(jax.random.key(seed))
        start = jax.random.normal(first, (operator.size,), operator.domain.dtype)
        # What the curvature adds to the diagonal is in the full operator's shift, and must not count twice.
        ritz = subspace.ritz(krylov.lanczos(part, size, start))
        return _State(ritz, jnp.int32(-(-size * count // operator.num_groups)))

    def solve(operator: Operator, state: _State, rhs: Array) -> Outcome:
        solution = subspace.low_rank_inverse(state.ritz, rhs, operator.shift, True, _COMPLEMENT)
        return Outcome(solution, state.matvecs, jnp.inf)

    return from_map(init, solve, tol=tol, init_matvecs=lambda state: state.matvecs)
