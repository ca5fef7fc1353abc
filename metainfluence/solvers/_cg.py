"""Conjugate gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import (
    Iteration,
    Outcome,
    Solver,
    SolveStatus,
    default_max_steps,
    dot,
    norm,
)
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_steps, preconditioner_of, reachable
from metainfluence.subspace import select


class _Carry(NamedTuple):
    solution: Array
    residual: Array
    direction: Array
    inner: Array
    residual_norm: Array
    stop_norm: Array
    steps_left: Array
    matvecs: Array
    min_curvature: Array
    max_curvature: Array
    flat: Array
    indefinite: Array


@called
def cg(*, tol: Any = 1e-6, max_steps: int | None = None, preconditioner: Solver | None = None) -> Solver:
    """Preconditioned conjugate gradients for positive definite operators (Hestenes and Stiefel, 1952).

    One product per step. It stops at the first direction whose curvature is not positive, or cannot be told from zero
    because of rounding, and keeps the iterate reached before it, with status INDEFINITE.

    Args:
      tol: relative residual ‖b − Hx‖/‖b‖ at which the solve counts as converged; values below 100 eps (1.2e-5 in
        float32) are out of reach because of rounding and are raised to that.
      max_steps: steps allowed; None for min(2 · size + 10, 1000).
      preconditioner: any solver whose `solve` is a fixed positive definite linear map close to H⁻¹, such as `nystrom`,
        `sampled` or `ekfac`.

    Raises:
      ValueError: `tol` or `max_steps` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.cg()
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> x.round(3).tolist(), mi.SolveStatus(int(info.status)).name, int(info.num_matvecs)
      ([1.0, 0.5, 0.25], 'CONVERGED', 4)
    """
    check_positive("tol", tol)
    if max_steps is not None:
        check_positive("max_steps", max_steps, integer=True)

    def init(operator: Operator) -> Any:
        return None if preconditioner is None else preconditioner.init(operator)

    def start(operator: Operator, state: Any, residual: Array, scale: Array | None) -> _Carry:
        linear = preconditioner_of(preconditioner, operator, state)
        zero, length = jnp.zeros_like(residual), norm(residual)
        return _Carry(
            solution=zero,
            residual=residual,
            direction=zero,
            inner=jnp.ones((), residual.dtype),
            residual_norm=length,
            # The recursion's residual drifts from the true one, which decides on convergence at the end.
            stop_norm=0.9
            * reachable(tol, residual.dtype, operator.domain.coarsest)
            * (length if scale is None else scale),
            steps_left=jnp.int32(default_max_steps(operator.size, max_steps)),
            matvecs=jnp.asarray(linear.init_matvecs, jnp.int32),
            min_curvature=jnp.full((), jnp.inf, residual.dtype),
            max_curvature=jnp.zeros((), residual.dtype),
            flat=jnp.bool_(False),
            indefinite=jnp.bool_(False),
        )

    def running(carry: _Carry) -> Array:
        active = (carry.residual_norm > carry.stop_norm) & jnp.isfinite(carry.residual_norm)
        return active & (carry.steps_left > 0) & ~carry.indefinite

    def aim(operator: Operator, state: Any, carry: _Carry) -> tuple[_Carry, Array]:
        preconditioned = preconditioner_of(preconditioner, operator, state).apply(carry.residual)
        inner = dot(carry.residual, preconditioned)
        direction = preconditioned + inner / carry.inner * carry.direction
        return carry._replace(direction=direction, inner=inner), direction

    def take(operator: Operator, state: Any, carry: _Carry, product: Array) -> _Carry:
        curvature = dot(carry.direction, product)
        quotient = curvature / dot(carry.direction, carry.direction)
        # Along a direction without curvature, rounding alone decides the length of a step.
        flat = jnp.abs(quotient) <= 10 * float(jnp.finfo(product.dtype).eps) * carry.max_curvature
        indefinite = flat | (curvature <= 0)
        length = select(indefinite, 0, carry.inner / select(indefinite, 1, curvature))
        residual = carry.residual - length * product
        return carry._replace(
            solution=carry.solution + length * carry.direction,
            residual=residual,
            residual_norm=norm(residual),
            steps_left=carry.steps_left - 1,
            matvecs=carry.matvecs + (1 + preconditioner_of(preconditioner, operator, state).matvecs),
            min_curvature=jnp.minimum(carry.min_curvature, select(flat, jnp.inf, quotient)),
            max_curvature=jnp.maximum(carry.max_curvature, quotient),
            flat=flat,
            indefinite=indefinite,
        )

    def finish(carry: _Carry) -> Outcome:
        failure = select(carry.indefinite, jnp.int32(SolveStatus.INDEFINITE), jnp.int32(SolveStatus.MAX_STEPS))
        flat = carry.flat.astype(jnp.int32)
        return Outcome(carry.solution, carry.matvecs, carry.min_curvature, failure, flat)

    def init_matvecs(state: Any) -> Any:
        return 0 if preconditioner is None else preconditioner.init_matvecs(state)

    return from_steps(init, Iteration(start, aim, take, running, finish), tol=tol, init_matvecs=init_matvecs)
