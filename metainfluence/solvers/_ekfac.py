"""EK-FAC as a solver and as a preconditioner."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from metainfluence import ekfac as factors
from metainfluence._checks import check_batch_size, check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Outcome, Solver, SolveStatus
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_map


class _State(NamedTuple):
    factors: factors.Factors
    inverses: tuple[Array, ...]
    positive: Array


@called
def ekfac(*, reestimate: bool = True, tol: Any = 1e-6, batch_size: int | None = None) -> Solver:
    """Solves with the Kronecker-factored Gauss–Newton matrix in place of the operator (arXiv 2501.15963, section 5).

    It works for operators that expose their losses: the Hessian of the inner objective, as in
    `adaptation.implicit(linear_solver=...)` and preconditioners there, and the total Hessian, for which the adapted
    parameters are held fixed. The layers that hold the parameters must be `metainfluence.ekfac.Dense` and `Conv`, or
    Flax's linen `Dense` and `Conv` and nnx `Linear` and `Conv`; see `metainfluence.ekfac.estimate` for the formulas.
    The operator's damping is added to every eigenvalue.

    Used alone it is an approximation: the residual is that of the operator itself, and the status is MAX_STEPS unless
    the residual is below `tol`. Eigenvalues that are zero to working precision are replaced by the largest one, so that
    the map stays positive definite and is as small along these directions as anywhere. The status is INDEFINITE where
    that leaves a residual, and where an eigenvalue is negative, which negative data weights can cause.

    Args:
      reestimate: whether the eigenvalues are re-estimated in the Kronecker basis (EK-FAC); False for K-FAC.
      tol: relative residual ‖b − Hx‖/‖b‖ at which a solve counts as converged.
      batch_size: groups (tasks) per chunk, which bounds the memory at the cost of a second pass; None takes all at
        once.

    Raises:
      ValueError: `tol` or `batch_size` not positive; at trace time, an operator without losses, a parameter that no
        layer covers, or anything else that EK-FAC cannot treat.

    Examples:
      >>> import metainfluence as mi
      >>> mi.solvers.cg(preconditioner=mi.solvers.ekfac(reestimate=False))
      cg(preconditioner=ekfac(reestimate=False))
    """
    check_positive("tol", tol)
    check_batch_size(batch_size)

    def init(operator: Operator) -> _State:
        if operator.losses is None:
            raise ValueError(
                "operator: ekfac expected one that shows its losses, that of an inner objective in adaptation.implicit "
                "or the total Hessian of a problem made by bilevel(outer_loss, adapt), got one of products only"
            )
        found = factors.estimate(operator.losses(), operator.domain, reestimate=reestimate, batch_size=batch_size)
        values = [block.values + operator.shift.astype(block.values.dtype) for block in found.blocks]
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(value)) for value in values]))
        # Sums of squares are accurate to a few eps, products of the factors' eigenvalues only to eps times the factors'
        # size.
        sides = 1 if reestimate else max(max(block.values.shape) for block in found.blocks)
        rounding = sides * jnp.finfo(largest.dtype).eps * largest
        zero = [jnp.abs(value) <= rounding for value in values]
        instead = jnp.where(largest == 0, 1, largest)
        inverses = tuple(1 / jnp.where(flat, instead, value) for flat, value in zip(zero, values, strict=True))
        smallest = jnp.min(jnp.stack([jnp.min(value) for value in values]))
        return _State(found, inverses, smallest > rounding)

    def apply(operator: Operator, state: _State, rhs: Array) -> Outcome:
        solution = operator.domain.ravel(state.factors.scale(operator.domain.unravel(rhs), state.inverses))
        finite = jnp.all(jnp.isfinite(solution))
        failure = jnp.where(state.positive, jnp.int32(SolveStatus.MAX_STEPS), jnp.int32(SolveStatus.INDEFINITE))
        failure = jnp.where(finite, failure, jnp.int32(SolveStatus.NONFINITE))
        # Eigenvalues of the approximation are not curvatures of the operator: `report` takes the one along the
        # solution.
        return Outcome(solution, 0, jnp.inf, failure)

    return from_map(init, apply, tol=tol)
