"""Dense factorisations, for small operators and as the oracle of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence.operators import Operator
from metainfluence.solvers._base import Outcome, Solver, SolveStatus, direct


class _Eigen(NamedTuple):
    values: Array
    vectors: Array


class _Cholesky(NamedTuple):
    factor: Array
    positive: Array
    smallest_diagonal: Array


# Under vmap one call at a time: XLA's batched calls of LAPACK on CPU (jaxlib 0.10.2, 64 matrices, 2 cores) were seen to
# wait for each other for ever.
_one_by_one: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.custom_batching.sequential_vmap
_eigh = _one_by_one(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
_cholesky = _one_by_one(jnp.linalg.cholesky)
_cho_solve = _one_by_one(lambda factor, rhs: jax.scipy.linalg.cho_solve((factor, True), rhs))


def _rounding(operator_size: int, dtype: Any) -> Any:
    return operator_size * jnp.finfo(dtype).eps


def _residual_tol(dtype: Any) -> Any:
    return jnp.finfo(dtype).eps ** 0.5


def dense(*, method: str = "eigh") -> Solver:
    """Forms the matrix (`size` products) and factorises it once.

    `"eigh"` takes any symmetric operator; components along eigenvalues that are zero to working precision are left out
    (the pseudo-inverse), and where the right-hand side has such components the residual shows it and the status is
    INDEFINITE. `"cholesky"` is faster and needs a positive definite operator: where it is not one to working precision,
    the solution is NaN and the status INDEFINITE. The solve counts as converged at a relative residual of √eps.

    Raises:
      ValueError: another `method`.
    """
    if method == "eigh":
        return direct(_eigh_init, _eigh_solve, _residual_tol)
    if method == "cholesky":
        return direct(_cholesky_init, _cholesky_solve, _residual_tol)
    raise ValueError(f"method: expected 'eigh' or 'cholesky', got {method!r}")


def _eigh_init(operator: Operator) -> _Eigen:
    return _Eigen(*_eigh(operator.dense()))


def _eigh_solve(operator: Operator, state: _Eigen, rhs: Array) -> Outcome:
    size = jnp.abs(state.values)
    zero = size <= _rounding(operator.size, rhs.dtype) * jnp.max(size)
    inverse = jnp.where(zero, 0, 1 / jnp.where(zero, 1, state.values))
    precision = jax.lax.Precision.HIGHEST
    components = jnp.matmul(state.vectors.T, rhs, precision=precision)
    solution = jnp.matmul(state.vectors, inverse * components, precision=precision)
    failure = jnp.where(
        jnp.all(jnp.isfinite(solution)), jnp.int32(SolveStatus.INDEFINITE), jnp.int32(SolveStatus.NONFINITE)
    )
    return Outcome(solution, operator.size, state.values[0], failure)


def _cholesky_init(operator: Operator) -> _Cholesky:
    matrix = operator.dense()
    factor = _cholesky(matrix)
    pivots = jnp.diagonal(factor) ** 2
    # A pivot that rounding alone could have made positive would give finite nonsense.
    positive = jnp.min(pivots) > _rounding(operator.size, factor.dtype) * jnp.max(pivots)
    return _Cholesky(factor, positive, jnp.min(jnp.diagonal(matrix)))


def _cholesky_solve(operator: Operator, state: _Cholesky, rhs: Array) -> Outcome:
    solution = _cho_solve(state.factor, rhs)
    solution = jnp.where(state.positive, solution, jnp.nan)
    failure = jnp.where(
        state.positive | ~jnp.isfinite(state.smallest_diagonal),
        jnp.int32(SolveStatus.MAX_STEPS),
        jnp.int32(SolveStatus.INDEFINITE),
    )
    return Outcome(solution, operator.size, state.smallest_diagonal, failure)
