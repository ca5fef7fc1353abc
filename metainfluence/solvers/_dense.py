"""Dense factorisations, for small operators and as the oracle of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence import _lapack
from metainfluence.operators import Operator
from metainfluence.solvers._base import Outcome, Solver, SolveStatus, direct
from metainfluence.subspace import Ritz, turned


class _Cholesky(NamedTuple):
    factor: Array
    positive: Array
    smallest_diagonal: Array


def _rounding(operator_size: int, dtype: Any) -> Any:
    return operator_size * jnp.finfo(dtype).eps


def _residual_tol(dtype: Any) -> Any:
    return jnp.finfo(dtype).eps ** 0.5


def dense(*, method: str = "eigh", absolute: bool = False) -> Solver:
    """Forms the matrix (`size` products) and factorises it once.

    `"eigh"` takes any symmetric operator; components along eigenvalues that are zero to working precision are left out
    (the pseudo-inverse), and where the right-hand side has such components the residual shows it and the status is
    INDEFINITE. `"cholesky"` is faster and needs a positive definite operator: where it is not one to working precision,
    the solution is NaN and the status INDEFINITE. The solve counts as converged at a relative residual of √eps.

    Args:
      method: "eigh" or "cholesky".
      absolute: solve with |H| + δI instead, see `lanczos`; "eigh" only.

    Raises:
      ValueError: another `method`, or "cholesky" with `absolute`.
    """
    if method == "eigh":
        return by_eigenvalues(lambda smallest: jnp.full_like(smallest, absolute, bool))
    if method != "cholesky":
        raise ValueError(f"method: expected 'eigh' or 'cholesky', got {method!r}")
    if absolute:
        raise ValueError("absolute: expected False with method 'cholesky', which knows no eigenvalues, got True")
    return direct(_cholesky_init, _cholesky_solve, _residual_tol, lambda state: len(state.factor))


def by_eigenvalues(turn: Callable[[Array], Array]) -> Solver:
    """A solver by all eigenvalues, with |H| in place of H where `turn(smallest eigenvalue)`, damping included."""

    def init(operator: Operator) -> Ritz:
        values, vectors = _lapack.eigh(operator.dense())
        unshifted = values - operator.shift
        return Ritz(unshifted, vectors.T, jnp.zeros_like(values), jnp.ones_like(values, bool))

    def solve(operator: Operator, state: Ritz, rhs: Array) -> Outcome:
        smallest = state.values[0] + operator.shift
        values = jnp.where(turn(smallest), jnp.abs(state.values), state.values) + operator.shift
        size = jnp.abs(values)
        zero = size <= _rounding(operator.size, rhs.dtype) * jnp.max(size)
        inverse = jnp.where(zero, 0, 1 / jnp.where(zero, 1, values))
        precision = jax.lax.Precision.HIGHEST
        components = jnp.matmul(state.vectors, rhs, precision=precision)
        solution = jnp.matmul(inverse * components, state.vectors, precision=precision)
        finite = jnp.all(jnp.isfinite(solution))
        failure = jnp.where(finite, jnp.int32(SolveStatus.INDEFINITE), jnp.int32(SolveStatus.NONFINITE))
        return Outcome(solution, operator.size, smallest, failure)

    def system(operator: Operator, state: Ritz) -> Operator:
        return turned(operator, state._replace(valid=state.valid & turn(state.values[0] + operator.shift)))

    return direct(init, solve, _residual_tol, lambda state: len(state.values), system)


def _cholesky_init(operator: Operator) -> _Cholesky:
    matrix = operator.dense()
    factor = _lapack.cholesky(matrix)
    pivots = jnp.diagonal(factor) ** 2
    # A pivot that rounding alone could have made positive would give finite nonsense.
    positive = jnp.min(pivots) > _rounding(operator.size, factor.dtype) * jnp.max(pivots)
    return _Cholesky(factor, positive, jnp.min(jnp.diagonal(matrix)))


def _cholesky_solve(operator: Operator, state: _Cholesky, rhs: Array) -> Outcome:
    solution = _lapack.cho_solve(state.factor, rhs)
    solution = jnp.where(state.positive, solution, jnp.nan)
    failure = jnp.where(
        state.positive | ~jnp.isfinite(state.smallest_diagonal),
        jnp.int32(SolveStatus.MAX_STEPS),
        jnp.int32(SolveStatus.INDEFINITE),
    )
    return Outcome(solution, operator.size, state.smallest_diagonal, failure)
