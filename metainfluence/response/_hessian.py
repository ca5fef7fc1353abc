"""The total Hessian as an operator."""

from __future__ import annotations

from typing import Any, Protocol

from jax.sharding import Mesh
from jaxtyping import PyTree

from metainfluence._checks import check_damping, maker
from metainfluence.curvature import Curvature
from metainfluence.data import Task, Weights
from metainfluence.operators import Operator
from metainfluence.problem import Bilevel
from metainfluence.response._optimum import checked
from metainfluence.response._options import Options


class HessianAt(Protocol):
    """What `total_hessian` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Operator:
        """The operator at λ."""


@maker
def total_hessian(
    problem: Bilevel,
    curvature: Curvature | None = None,
    *,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> HessianAt:
    """Makes (meta_params, tasks, weights=None) -> Operator, the total Hessian H = D_λ D_λ F plus damping · I.

    The operator is a pytree that can pass through jit; `operator.matvec(v)` takes and returns pytrees like meta_params,
    and can be vmapped over v.

    Args:
      problem: the problem.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      damping: non-negative number added to every eigenvalue. F is a mean over tasks, so damping does not depend on T.
      batch_size: tasks per chunk, which bounds the memory; None for a choice by shapes alone. What the products need
        from all chunks is kept where it fits, see `metainfluence.response`, and otherwise recomputed in every product.
      mesh: devices over which tasks are sharded, along all axes of the mesh; None leaves tasks where they are.
      hvp: "forward_over_reverse" or "reverse_over_reverse", see `bilevel`; None for the problem's own, which by default
        is the first.
      precision: of matrix products, also the problem's, see `jax.default_matmul_precision`; None for JAX's setting.

    Raises:
      ValueError: a curvature that needs what the problem lacks, a negative damping, or an unknown `hvp`.
      TypeError: at trace time, forward mode through a `custom_vjp`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> operator = mi.total_hessian(problem, damping=0.5)(jnp.asarray(2.0), tasks)
      >>> float(operator.matvec(jnp.asarray(2.0)))  # (1 + 0.5) · 2
      3.0
    """
    check_damping(damping)
    options = Options.of(**locals())

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Operator:
        with options.traced():
            point = checked(meta_params, tasks, weights)
            return options.expanded(*point, options.chunks(*point[:2])).operator.damped(damping)

    return run
