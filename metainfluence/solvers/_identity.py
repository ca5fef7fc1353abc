"""No solve at all."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from metainfluence.operators import Operator
from metainfluence.solvers._base import Outcome, Solver
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import from_map


@called
def identity() -> Solver:
    """Replaces H by the identity: x = b, the zeroth term of the Neumann series.

    Influence becomes an inner product of gradients, as in TracIn (Pruthi et al., NeurIPS 2020) at one checkpoint. It is
    a baseline: its residual is reported like any other solver's, so `check` rejects it unless H is the identity.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.identity()
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> x.round(3).tolist(), mi.SolveStatus(int(info.status)).name, int(info.num_matvecs)
      ([1.0, 1.0, 1.0], 'MAX_STEPS', 1)
    """

    def apply(operator: Operator, state: Any, rhs: Array) -> Outcome:
        del operator, state
        return Outcome(rhs, 0, jnp.inf)

    return from_map(None, apply, tol=lambda dtype: jnp.finfo(dtype).eps ** 0.5)
