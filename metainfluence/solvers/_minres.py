"""Minimum residuals."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Iteration, Outcome, Solver, default_max_steps, dot, norm
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_steps, reachable


class _Carry(NamedTuple):
    solution: Array
    vector: Array
    previous_vector: Array
    update: Array
    previous_update: Array
    beta: Array
    cosine: Array
    previous_cosine: Array
    sine: Array
    previous_sine: Array
    residual_norm: Array
    stop_norm: Array
    steps_left: Array
    matvecs: Array
    pivot: Array
    direction_square: Array
    min_curvature: Array


@called
def minres(*, tol: Any = 1e-6, max_steps: int | None = None) -> Solver:
    """MINRES for symmetric operators, indefinite ones included (Paige and Saunders, SIAM J. Numer. Anal. 12, 1975).

    One product per step: the Lanczos recurrence with Givens rotations. Among all iterates of the Krylov space it
    returns the one with the smallest residual. With negative curvature it still solves the linear system, but then for
    a saddle and not for a minimum: see `SolveInfo.min_curvature`.

    Args:
      tol: relative residual ‖b − Hx‖/‖b‖ at which the solve counts as converged; values below 100 eps (1.2e-5 in
        float32) are out of reach because of rounding and are raised to that.
      max_steps: steps allowed; None for min(2 · size + 10, 1000).

    Raises:
      ValueError: `tol` or `max_steps` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([-1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.minres()
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> x.round(3).tolist(), mi.SolveStatus(int(info.status)).name, int(info.num_matvecs)
      ([-1.0, 0.5, 0.25], 'CONVERGED', 4)
    """
    check_positive("tol", tol)
    if max_steps is not None:
        check_positive("max_steps", max_steps, integer=True)

    def start(operator: Operator, state: Any, residual: Array, scale: Array | None) -> _Carry:
        del state
        beta, zero = norm(residual), jnp.zeros_like(residual)
        one, nought = jnp.ones((), residual.dtype), jnp.zeros((), residual.dtype)
        return _Carry(
            solution=zero,
            vector=residual / jnp.where(beta > 0, beta, 1),
            previous_vector=zero,
            update=zero,
            previous_update=zero,
            beta=nought,
            cosine=one,
            previous_cosine=one,
            sine=nought,
            previous_sine=nought,
            residual_norm=beta,
            # The recursion's residual drifts from the true one, which decides on convergence at the end.
            stop_norm=0.9
            * reachable(tol, residual.dtype, operator.domain.coarsest)
            * (beta if scale is None else scale),
            steps_left=jnp.int32(default_max_steps(operator.size, max_steps)),
            matvecs=jnp.int32(0),
            pivot=one,
            direction_square=nought,
            min_curvature=jnp.full((), jnp.inf, residual.dtype),
        )

    def running(carry: _Carry) -> Array:
        size = jnp.abs(carry.residual_norm)
        return (size > carry.stop_norm) & jnp.isfinite(size) & (carry.steps_left > 0)

    def aim(operator: Operator, state: Any, carry: _Carry) -> tuple[_Carry, Array]:
        del operator, state
        return carry, carry.vector

    def take(operator: Operator, state: Any, carry: _Carry, product: Array) -> _Carry:
        del operator, state
        alpha = dot(carry.vector, product)
        remainder = product - alpha * carry.vector - carry.beta * carry.previous_vector
        beta = norm(remainder)
        # Column of the tridiagonal matrix under the two last rotations, then the new rotation that clears beta.
        diagonal = carry.cosine * alpha - carry.previous_cosine * carry.sine * carry.beta
        rho = jnp.sqrt(diagonal**2 + beta**2)
        above = carry.sine * alpha + carry.previous_cosine * carry.cosine * carry.beta
        above_twice = carry.previous_sine * carry.beta
        singular = ~(rho > 0)
        # The tridiagonal matrix's LDLᵀ gives the curvatures (the pivots) and lengths of the Krylov space's conjugate
        # directions without their vectors: a pivot is negative as soon as the space holds negative curvature.
        tiny = jnp.finfo(alpha.dtype).tiny ** 0.5
        ratio = carry.beta / jnp.where(jnp.abs(carry.pivot) > tiny, carry.pivot, tiny)
        pivot = alpha - carry.beta * ratio
        direction_square = 1 + ratio**2 * carry.direction_square
        rho = jnp.where(singular, 1, rho)
        cosine, sine = diagonal / rho, beta / rho
        update = (carry.vector - above_twice * carry.previous_update - above * carry.update) / rho
        return _Carry(
            solution=carry.solution + jnp.where(singular, 0, cosine * carry.residual_norm) * update,
            vector=remainder / jnp.where(beta > 0, beta, 1),
            previous_vector=carry.vector,
            update=update,
            previous_update=carry.update,
            beta=beta,
            cosine=cosine,
            previous_cosine=carry.cosine,
            sine=sine,
            previous_sine=carry.sine,
            residual_norm=jnp.where(singular, carry.residual_norm, -sine * carry.residual_norm),
            stop_norm=carry.stop_norm,
            # A Krylov space that closes on a singular operator holds no better iterate.
            steps_left=jnp.where(singular, 0, carry.steps_left - 1),
            matvecs=carry.matvecs + 1,
            pivot=pivot,
            direction_square=direction_square,
            min_curvature=jnp.minimum(carry.min_curvature, pivot / direction_square),
        )

    def finish(carry: _Carry) -> Outcome:
        return Outcome(carry.solution, carry.matvecs, carry.min_curvature)

    return from_steps(None, Iteration(start, aim, take, running, finish), tol=tol)
