"""Truncated Neumann series."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence.operators import Operator
from metainfluence.solvers._base import (
    Iteration,
    Outcome,
    Solver,
    SolveStatus,
    check_positive,
    dot,
    iterative,
    norm,
)

_POWER_STEPS = 20


class _State(NamedTuple):
    scale: Array
    matvecs: Array


class _Carry(NamedTuple):
    solution: Array
    term: Array
    scale: Array
    terms_left: Array
    matvecs: Array
    min_curvature: Array
    diverged: Array


def largest_eigenvalue(operator: Operator, num_steps: int = _POWER_STEPS, seed: int = 0) -> Array:
    """Estimate, from below, of the largest absolute eigenvalue by power iteration; `num_steps` products."""
    vector = jax.random.normal(jax.random.key(seed), (operator.size,), operator.domain.dtype)

    def step(vector: Array, _: None) -> tuple[Array, Array]:
        size = norm(vector)
        product = operator.flat_matvec(vector / jnp.where(size > 0, size, 1))
        return product, norm(product)

    return jax.lax.scan(step, vector, length=num_steps)[1][-1]


def neumann(num_terms: int, *, scale: float | None = None, tol: Any = 1e-6) -> Solver:
    """Truncated Neumann series H⁻¹b ≈ s Σ_{j<J} (I − sH)ʲ b.

    It converges for eigenvalues in (0, 2/s), at the rate of the smallest one, by one product per term. Terms that grow
    prove that an eigenvalue lies outside: the series stops there, with status DIVERGED.

    Args:
      num_terms: J, at least 1; J = 1 is s · b.
      scale: s; None for 1 over the largest absolute eigenvalue, from 20 power iterations in `init`.
      tol: relative residual ‖b − Hx‖/‖b‖ at which the truncated series counts as converged; less than 100 eps (1.2e-5
        in float32) is out of rounding's reach and taken for that.

    Raises:
      ValueError: `num_terms` < 1, or `scale` or `tol` not positive.
    """
    check_positive("num_terms", num_terms, integer=True)
    check_positive("tol", tol)
    if scale is not None:
        check_positive("scale", scale)

    def init(operator: Operator) -> _State:
        if scale is not None:
            return _State(jnp.asarray(scale, operator.domain.dtype), jnp.int32(0))
        return _State(1.0 / largest_eigenvalue(operator), jnp.int32(_POWER_STEPS))

    def start(operator: Operator, state: _State, rhs: Array, x0: Array | None) -> _Carry:
        first_guess = x0 is not None
        return _Carry(
            solution=x0 if x0 is not None else jnp.zeros_like(rhs),
            term=rhs if x0 is None else rhs - operator.flat_matvec(x0),
            scale=state.scale,
            terms_left=jnp.int32(num_terms),
            matvecs=state.matvecs + jnp.int32(first_guess),
            min_curvature=jnp.full((), jnp.inf, rhs.dtype),
            diverged=jnp.bool_(False),
        )

    def running(carry: _Carry) -> Array:
        return (carry.terms_left > 0) & ~carry.diverged & jnp.all(jnp.isfinite(carry.term))

    def step(operator: Operator, state: _State, carry: _Carry) -> _Carry:
        del state
        product = operator.flat_matvec(carry.term)
        term = carry.term - carry.scale * product
        before, after = norm(carry.term), norm(term)
        rounding = 8 * jnp.finfo(term.dtype).eps
        curvature = dot(carry.term, product) / jnp.where(before > 0, before**2, 1)
        return _Carry(
            solution=carry.solution + carry.scale * carry.term,
            term=term,
            scale=carry.scale,
            terms_left=carry.terms_left - 1,
            matvecs=carry.matvecs + 1,
            min_curvature=jnp.minimum(carry.min_curvature, jnp.where(before > 0, curvature, jnp.inf)),
            diverged=after > before * (1 + rounding),
        )

    def finish(carry: _Carry) -> Outcome:
        failure = jnp.where(carry.diverged, jnp.int32(SolveStatus.DIVERGED), jnp.int32(SolveStatus.MAX_STEPS))
        return Outcome(carry.solution, carry.matvecs, carry.min_curvature, failure)

    return iterative(init, Iteration(start, step, running, finish), tol)
