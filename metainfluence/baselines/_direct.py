"""Influence that treats the adapted parameters as independent of λ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from metainfluence.data import Task, Weights
from metainfluence.influence import Scores, influence_scores
from metainfluence.problem import Bilevel
from metainfluence.solvers import Solver, ekfac


def direct_if(
    problem: Bilevel,
    target: Callable[..., Array],
    *,
    solver: Solver | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores that ignore dθ/dλ, in gradient and Hessian.

    Equation 2 of arXiv 2501.15963: influence as if the adapted parameters did not depend on λ. The target's gradient is
    used as it is. Where the outer loss sees λ only through θ, as in iMAML, all scores are exactly 0.

    Args:
      problem: the problem, made by `bilevel`.
      target: as in `influence_scores`, like the other arguments.
      solver: as in `influence_scores`.
      damping: as in `influence_scores`.
      batch_size: as in `influence_scores`.

    Raises:
      ValueError: a problem made by `from_task_loss`, and as `influence_scores`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.bilevel(
      ...     lambda params, m, query: 0.5 * (params + m - query) ** 2,
      ...     mi.adaptation.closed_form(lambda m, support, coefficients: m),
      ... )
      >>> tasks = mi.Task(jnp.zeros((3, 1)), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> score = jax.jit(mi.baselines.direct_if(problem, lambda m: m))
      >>> scores = score(jnp.asarray(1.0), tasks)  # (2 - query) / 3: twice the influence, since dθ/dλ = 1 is ignored
      >>> [round(x, 3) for x in scores.task.tolist()]
      [0.667, 0.333, -1.0]
    """
    if problem.adapt is None:
        raise ValueError(
            "problem: direct_if expected one made by bilevel(outer_loss, adapt), got one of from_task_loss"
        )
    adapt = problem.adapt

    def constant(meta_params: PyTree, task: Task, weights: Weights) -> PyTree:
        return adapt(jax.lax.stop_gradient(meta_params), task, weights)

    return influence_scores(
        problem._replace(adapt=constant), target, solver=solver, damping=damping, batch_size=batch_size
    )


def ekfac_if(
    problem: Bilevel,
    target: Callable[..., Array],
    *,
    reestimate: bool = True,
    damping: Any = 0.0,
    batch_size: int | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores: `direct_if`, solved by `solvers.ekfac`.

    Influence as computed for large networks (Grosse et al., arXiv 2308.03296), as if the adapted parameters did not
    depend on λ. The outer loss must call the layers that hold the meta-parameters, either declared ones or Flax's.

    Args:
      problem: the problem, made by `bilevel`.
      target: as in `influence_scores`.
      reestimate: as in `solvers.ekfac`; False for K-FAC.
      damping: as in `influence_scores`.
      batch_size: as in `influence_scores`, and for the factors.

    Raises:
      ValueError: as `direct_if` and `solvers.ekfac`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> layer = mi.ekfac.Dense(kernel="w")
      >>> problem = mi.bilevel(
      ...     lambda params, m, query: 0.5 * (layer(m, query["x"]) - query["y"])[:, 0] ** 2,
      ...     mi.adaptation.closed_form(lambda m, support, coefficients: ()),
      ... )
      >>> query = {"x": jnp.ones((3, 1, 1)), "y": jnp.asarray([[[0.0]], [[1.0]], [[5.0]]])}
      >>> score = jax.jit(mi.baselines.ekfac_if(problem, lambda m: m["w"][0, 0]))
      >>> scores = score({"w": jnp.asarray([[2.0]])}, mi.Task(jnp.zeros((3, 1)), query))
      >>> [round(x, 3) for x in scores.task.tolist()]  # (2 - y) / 3
      [0.667, 0.333, -1.0]
    """
    solver = ekfac(reestimate=reestimate, batch_size=batch_size)
    return direct_if(problem, target, solver=solver, damping=damping, batch_size=batch_size)
