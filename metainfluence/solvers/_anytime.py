"""What a solver reaches after each of its steps, in one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Solver, norm


class Trace(NamedTuple):
    """A solve step by step.

    Attributes:
      num_matvecs: products used up to each step, `[J]`; those of the residuals recorded here are not counted.
      relative_residual: ‖b − Hx‖ / ‖b‖ of the iterate, recomputed, `[J]`.
      measured: what `measure` returned for the iterates, `[J, ...]`; None without it.
    """

    num_matvecs: Int[Array, " J"]
    relative_residual: Float[Array, " J"]
    measured: PyTree


def anytime(
    solver: Solver, num_steps: int, *, measure: Callable[[PyTree], PyTree] | None = None
) -> Callable[..., Trace]:
    """Makes (operator, rhs) -> Trace of an iterative solver's first `num_steps` steps: its error after each.

    Args:
      solver: one with an `iteration`: `cg`, `minres`, `neumann`.
      num_steps: J; a solver that ends earlier keeps its last iterate.
      measure: (solution) -> pytree, recorded at each step, such as scores or the distance to a known answer.

    Raises:
      ValueError: a solver without steps, or `num_steps` not a positive integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> trace = mi.solvers.anytime(mi.solvers.cg(), 3)(operator, jnp.ones(3))
      >>> trace.num_matvecs.tolist(), trace.relative_residual.round(3).tolist()
      ([1, 2, 3], [0.535, 0.185, 0.0])
    """
    check_positive("num_steps", num_steps, integer=True)
    if solver.iteration is None:
        raise ValueError("solver: expected an iterative one with an `iteration`, as cg(), got one without steps")
    iteration = solver.iteration

    def run(operator: Operator, rhs: PyTree) -> Trace:
        operator.domain.check("rhs", rhs)
        vector, state = operator.domain.ravel(rhs), solver.init(operator)
        scale = norm(vector)

        def step(carry: Any, _: None) -> tuple[Any, Trace]:
            carry = jax.lax.cond(
                iteration.running(carry), lambda: iteration.step(operator, state, carry), lambda: carry
            )
            outcome = iteration.finish(carry)
            residual = norm(vector - operator.flat_matvec(outcome.solution)) / jnp.where(scale > 0, scale, 1)
            measured = None if measure is None else measure(operator.domain.unravel(outcome.solution))
            return carry, Trace(jnp.asarray(outcome.num_matvecs, jnp.int32), residual, measured)

        return jax.lax.scan(step, iteration.start(operator, state, vector, None), length=num_steps)[1]

    return run
