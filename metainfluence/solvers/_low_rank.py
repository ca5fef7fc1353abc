"""Low-rank solves: a basis made once, which all right-hand sides share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence import krylov, subspace
from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Outcome, Solver
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_map


@called
def lanczos(rank: int, *, absolute: bool = False, seed: int = 0, tol: Any = 1e-6) -> Solver:
    """Solves in the Ritz space of `rank` Lanczos vectors; on its complement only the damping acts.

    H + δI ≈ Σ_i (θ_i + δ) y_i y_iᵀ + δ (I − Σ_i y_i y_iᵀ). The basis starts from a random vector, with full
    reorthogonalisation. A right-hand side costs only the product for its residual, which shows what the basis leaves
    out: the solve converges only if that is negligible. Without damping, the smallest |θ_i| takes its place.

    Args:
      rank: products of `init`, and size of the basis; at most the operator's size is used.
      absolute: solve with |H| + δI instead, as saddle-free Newton does (Dauphin et al., NeurIPS 2014): where λ is not
        quite a minimum, directions of negative curvature then count as positive and do not reverse the answer. The
        residual is that of H with the signs of the negative Ritz values flipped.
      seed: of the start vector.
      tol: relative residual at which the solve counts as converged; values below 100 eps are raised to that.

    Raises:
      ValueError: `rank` is no positive integer, or `tol` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.lanczos(3)
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> x.round(3).tolist(), mi.SolveStatus(int(info.status)).name, int(info.num_matvecs)
      ([1.0, 0.5, 0.25], 'CONVERGED', 4)
    """
    check_positive("rank", rank, integer=True)

    def init(operator: Operator) -> subspace.Ritz:
        first, _ = jax.random.split(jax.random.key(seed))
        start = jax.random.normal(first, (operator.size,), operator.domain.dtype)
        return subspace.ritz(krylov.lanczos(operator, min(rank, operator.size), start))

    return _low_rank(init, absolute, tol)


@called
def nystrom(rank: int, *, seed: int = 0, tol: Any = 1e-6) -> Solver:
    """Solves with a randomised Nyström approximation, (Â + δI)⁻¹, mostly to precondition `cg`.

    Â has rank `rank` and is positive semidefinite (Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023).
    Unlike `lanczos`, it multiplies all vectors of its basis in one batch. As a solver alone it is accurate only if the
    spectrum decays fast; the residual shows this.

    Args:
      rank: products of `init`, and size of the basis; at most the operator's size is used.
      seed: of the random basis.
      tol: relative residual at which the solve counts as converged; values below 100 eps are raised to that.

    Raises:
      ValueError: `rank` is no positive integer, or `tol` not positive.

    Examples:
      >>> import metainfluence as mi
      >>> mi.solvers.cg(preconditioner=mi.solvers.nystrom(50))
      cg(preconditioner=nystrom(50))
    """
    check_positive("rank", rank, integer=True)

    def init(operator: Operator) -> subspace.Ritz:
        return subspace.nystrom(operator, min(rank, operator.size), jax.random.key(seed))

    return _low_rank(init, False, tol)


def _low_rank(init: Any, absolute: bool, tol: Any) -> Solver:
    check_positive("tol", tol)

    def solve(operator: Operator, state: subspace.Ritz, rhs: Array) -> Outcome:
        solution = subspace.low_rank_inverse(state, rhs, operator.shift, absolute)
        smallest = jnp.min(jnp.where(state.valid, state.values, jnp.inf)) + operator.shift
        return Outcome(solution, len(state.values), smallest)

    def multiply(operator: Operator, state: subspace.Ritz, vector: Array) -> Array:
        return (subspace.turned(operator, state) if absolute else operator).flat_matvec(vector)

    return from_map(init, solve, tol=tol, init_matvecs=lambda state: len(state.values), multiply=multiply)
