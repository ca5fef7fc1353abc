"""Dense factorisations, for small operators and as a reference for the other solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence import _lapack, krylov
from metainfluence.operators import Operator, from_matvec
from metainfluence.solvers._base import Outcome, Solver, SolveStatus, norm
from metainfluence.solvers._block_cg import in_turn
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_map
from metainfluence.subspace import RitzValues, flat, rounding, unshifted


class _Eigen(NamedTuple):
    """Eigenpairs as in `subspace.Ritz`, and the products they were computed from, both without the shift."""

    values: Array
    vectors: Array
    residuals: Array
    valid: Array
    rows: Array


class _Cholesky(NamedTuple):
    rows: Array
    factor: Array
    positive: Array
    smallest_diagonal: Array


def _residual_tol(dtype: Any) -> Any:
    return jnp.finfo(dtype).eps ** 0.5


@called
def dense(*, method: str = "eigh", absolute: bool = False) -> Solver:
    """Forms the matrix (`size` products) and factorises it once.

    `"eigh"` works for any symmetric operator. Components along eigenvalues that are zero to working precision are left
    out (the pseudo-inverse); if the right-hand side has such components, the residual shows it and the status is
    INDEFINITE. `"cholesky"` is faster but needs a positive definite operator: if it is not positive definite to working
    precision, the solution is NaN and the status INDEFINITE. The solve counts as converged at a relative residual of
    √eps.

    Args:
      method: "eigh" or "cholesky".
      absolute: solve with |H| + δI instead, see `lanczos`; "eigh" only.

    Raises:
      ValueError: another `method`, or "cholesky" with `absolute`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.dense()
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> x.round(3).tolist(), mi.SolveStatus(int(info.status)).name, int(info.num_matvecs)
      ([1.0, 0.5, 0.25], 'CONVERGED', 4)
    """
    if method == "eigh":
        return by_eigenvalues(lambda smallest: jnp.full_like(smallest, absolute, bool))
    if method != "cholesky":
        raise ValueError(f"method: expected 'eigh' or 'cholesky', got {method!r}")
    if absolute:
        raise ValueError("absolute: expected False with method 'cholesky', which knows no eigenvalues, got True")
    return from_map(
        _cholesky_init,
        _cholesky_solve,
        tol=_residual_tol,
        init_matvecs=lambda state: len(state.factor),
        multiply=_by_rows,
    )


def by_eigenvalues(turn: Callable[[Array], Array]) -> Solver:
    """A solver from all eigenvalues, with |H| in place of H if `turn(smallest damped eigenvalue)` is true."""

    def init(operator: Operator) -> _Eigen:
        rows = unshifted(operator).rows()
        values, vectors = _lapack.eigh(0.5 * (rows + rows.T))
        return _Eigen(values, vectors.T, jnp.zeros_like(values), jnp.ones_like(values, bool), rows)

    def smallest_of(operator: Operator, state: _Eigen) -> Array:
        """The smallest eigenvalue that is not zero; 0 where all are."""
        values = state.values + operator.shift
        least = jnp.min(jnp.where(flat(values, dtype=operator.domain.coarsest), jnp.inf, values))
        return jnp.where(jnp.isfinite(least), least, values[0])

    def solve(operator: Operator, state: _Eigen, rhs: Array) -> Outcome:
        smallest = smallest_of(operator, state)
        values = jnp.where(turn(smallest), jnp.abs(state.values), state.values) + operator.shift
        zero = flat(values, dtype=operator.domain.coarsest)
        inverse = jnp.where(zero, 0, 1 / jnp.where(zero, 1, values))
        solution = _matmul(inverse * _matmul(state.vectors, rhs), state.vectors)
        finite = jnp.all(jnp.isfinite(solution))
        failure = jnp.where(finite, jnp.int32(SolveStatus.INDEFINITE), jnp.int32(SolveStatus.NONFINITE))
        count = jnp.sum(zero, dtype=jnp.int32)
        return Outcome(solution, operator.size, smallest, failure, count, _asymmetry(operator, state.rows, solution))

    def multiply(operator: Operator, state: _Eigen, vector: Array) -> Array:
        extra = jnp.where(turn(smallest_of(operator, state)), jnp.maximum(-2 * state.values, 0), 0)
        return _by_rows(operator, state, vector) + _matmul(extra * _matmul(state.vectors, vector), state.vectors)

    def explore(operator: Operator, rank: int) -> tuple[_Eigen, RitzValues]:
        state = init(operator)
        rows = from_matvec(jax.tree_util.Partial(_matmul, state.rows), jnp.zeros(operator.size, state.rows.dtype))
        return state, krylov.explore(rows.damped(operator.shift), rank)[1]

    found = from_map(
        init, solve, tol=_residual_tol, init_matvecs=lambda state: len(state.values), multiply=multiply
    )._replace(explore=explore)
    return found._replace(explore_and_solve=in_turn(found))


def _by_rows(operator: Operator, state: Any, vector: Array) -> Array:
    """The operator's product, combined from the products that form its matrix."""
    return _matmul(vector, state.rows) + operator.shift.astype(vector.dtype) * vector


def _asymmetry(operator: Operator, rows: Array, vector: Array) -> Array:
    """‖Hx − Hᵀx‖ / ‖Hx‖ for the matrix Hᵀ without its shift."""
    product = _matmul(vector, rows)
    size = norm(product + operator.shift.astype(vector.dtype) * vector)
    return norm(product - _matmul(rows, vector)) / jnp.where(size > 0, size, 1)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _cholesky_init(operator: Operator) -> _Cholesky:
    rows = unshifted(operator).rows()
    matrix = 0.5 * (rows + rows.T) + operator.shift * jnp.eye(operator.size, dtype=rows.dtype)
    factor = _lapack.cholesky(matrix)
    pivots = jnp.diagonal(factor) ** 2
    # A pivot that rounding alone could have made positive would give finite nonsense.
    positive = jnp.min(pivots) > rounding(operator.size, factor.dtype) * jnp.max(pivots)
    return _Cholesky(rows, factor, positive, jnp.min(jnp.diagonal(matrix)))


def _cholesky_solve(operator: Operator, state: _Cholesky, rhs: Array) -> Outcome:
    solution = _lapack.cho_solve(state.factor, rhs)
    solution = jnp.where(state.positive, solution, jnp.nan)
    failure = jnp.where(
        state.positive | ~jnp.isfinite(state.smallest_diagonal),
        jnp.int32(SolveStatus.MAX_STEPS),
        jnp.int32(SolveStatus.INDEFINITE),
    )
    return Outcome(
        solution,
        operator.size,
        state.smallest_diagonal,
        failure,
        asymmetry=_asymmetry(operator, state.rows, solution),
    )
