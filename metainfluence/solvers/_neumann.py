"""Truncated Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Iteration, Outcome, Solver, SolveStatus, dot, norm
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_steps, preconditioner_of

_POWER_STEPS = 20


class _State(NamedTuple):
    scale: Array
    matvecs: Array
    preconditioner: Any


class _Carry(NamedTuple):
    solution: Array
    residual: Array
    term: Array
    scale: Array
    terms_left: Array
    matvecs: Array
    min_curvature: Array
    diverged: Array


def largest_eigenvalue(
    operator: Operator, num_steps: int = _POWER_STEPS, seed: int = 0, after: Callable[[Array], Array] = lambda x: x
) -> Array:
    """Estimate, from below, of the largest absolute eigenvalue of `after` ∘ operator; `num_steps` products."""
    vector = jax.random.normal(jax.random.key(seed), (operator.size,), operator.domain.dtype)

    def step(vector: Array, _: None) -> tuple[Array, Array]:
        size = norm(vector)
        product = after(operator.flat_matvec(vector / jnp.where(size > 0, size, 1)))
        return product, norm(product)

    return jax.lax.scan(step, vector, length=num_steps)[1][-1]


@called
def neumann(
    num_terms: int, *, scale: float | None = None, preconditioner: Solver | None = None, tol: Any = 1e-6
) -> Solver:
    """Truncated Neumann series H⁻¹b ≈ s Σ_{j<J} (I − sH)ʲ b, or, with a preconditioner P, s Σ_{j<J} (I − sPH)ʲ P b.

    It converges for eigenvalues of (P)H in (0, 2/s), at a rate set by the smallest one, with one product per term. The
    relative residual is the norm of the first term left out, (I − sHP)ᴶ b; the norm of the tail is at most that divided
    by the smallest eigenvalue. Growing terms prove that an eigenvalue lies outside the interval: the series then stops,
    with status DIVERGED.

    Args:
      num_terms: J, at least 1; J = 1 is s · b.
      scale: s; None for 1 over the largest absolute eigenvalue, from 20 power iterations in `init`.
      preconditioner: any solver whose `solve` is a fixed positive definite linear map, such as `ekfac` or `nystrom`.
      tol: relative residual ‖b − Hx‖/‖b‖ at which the truncated series counts as converged; values below 100 eps
        (1.2e-5 in float32) are out of reach because of rounding and are raised to that.

    Raises:
      ValueError: `num_terms` < 1, or `scale` or `tol` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.neumann(3, scale=0.25)
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> # 0.25 Σ_j (1 − 0.25 h)ʲ, and the residual that is left of it.
      >>> x.round(3).tolist(), mi.SolveStatus(int(info.status)).name, round(float(info.relative_residual), 3)
      ([0.578, 0.438, 0.25], 'MAX_STEPS', 0.254)
    """
    check_positive("num_terms", num_terms, integer=True)
    check_positive("tol", tol)
    if scale is not None:
        check_positive("scale", scale)

    def init(operator: Operator) -> _State:
        state = None if preconditioner is None else preconditioner.init(operator)
        linear = preconditioner_of(preconditioner, operator, state)
        if scale is not None:
            return _State(jnp.asarray(scale, operator.domain.dtype), jnp.int32(linear.init_matvecs), state)
        largest = largest_eigenvalue(operator, after=linear.apply)
        matvecs = linear.init_matvecs + _POWER_STEPS * (1 + linear.matvecs)
        return _State(1.0 / largest, jnp.asarray(matvecs, jnp.int32), state)

    def start(operator: Operator, state: _State, residual: Array, scale: Array | None) -> _Carry:
        del scale
        linear = preconditioner_of(preconditioner, operator, state.preconditioner)
        return _Carry(
            solution=jnp.zeros_like(residual),
            residual=residual,
            term=linear.apply(residual),
            scale=state.scale,
            terms_left=jnp.int32(num_terms),
            matvecs=state.matvecs + jnp.asarray(linear.matvecs, jnp.int32),
            min_curvature=jnp.full((), jnp.inf, residual.dtype),
            diverged=jnp.bool_(False),
        )

    def running(carry: _Carry) -> Array:
        return (carry.terms_left > 0) & ~carry.diverged & jnp.all(jnp.isfinite(carry.term))

    def aim(operator: Operator, state: _State, carry: _Carry) -> tuple[_Carry, Array]:
        del operator, state
        return carry, carry.term

    def take(operator: Operator, state: _State, carry: _Carry, product: Array) -> _Carry:
        linear = preconditioner_of(preconditioner, operator, state.preconditioner)
        residual = carry.residual - carry.scale * product
        term = linear.apply(residual)
        # In the preconditioner's inner product the iteration is symmetric, and no term may grow.
        before, after = dot(carry.residual, carry.term), dot(residual, term)
        rounding = 16 * jnp.finfo(term.dtype).eps
        square = dot(carry.term, carry.term)
        curvature = dot(carry.term, product) / jnp.where(square > 0, square, 1)
        return _Carry(
            solution=carry.solution + carry.scale * carry.term,
            residual=residual,
            term=term,
            scale=carry.scale,
            terms_left=carry.terms_left - 1,
            matvecs=carry.matvecs + 1 + linear.matvecs,
            min_curvature=jnp.minimum(carry.min_curvature, jnp.where(square > 0, curvature, jnp.inf)),
            diverged=after > before * (1 + rounding),
        )

    def finish(carry: _Carry) -> Outcome:
        failure = jnp.where(carry.diverged, jnp.int32(SolveStatus.DIVERGED), jnp.int32(SolveStatus.MAX_STEPS))
        return Outcome(carry.solution, carry.matvecs, carry.min_curvature, failure)

    def solve_matvecs(state: _State) -> Any:
        own = 0 if preconditioner is None else preconditioner.solve_matvecs(state.preconditioner)
        return own + num_terms * (1 + own)

    return from_steps(
        init,
        Iteration(start, aim, take, running, finish),
        tol=tol,
        init_matvecs=lambda state: state.matvecs,
        solve_matvecs=solve_matvecs,
    )
