"""How trained meta-parameters respond to the data weights: two linear maps, however they are computed."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import check_precision, maker, traced_at
from metainfluence._spoilt import Spoilt, weighed
from metainfluence.data import Weights
from metainfluence.response._direct import check_total_effect, shares_support, warn_of_direct_effect
from metainfluence.response._target import slopes_of
from metainfluence.solvers import SolveInfo


class Influence(NamedTuple):
    """Derivatives of λ(w).

    Attributes:
      delta: pytree like meta_params; with a leading axis where there are several directions.
      info: report on how they were found, one entry per direction.
    """

    delta: PyTree
    info: SolveInfo


class Scores(NamedTuple):
    """Predicted change of the target when a datum is removed; positive helps, negative harms, padding has 0.

    Attributes:
      task: `[T]`.
      support: `[T, n_support]`.
      query: `[T, n_query]`.
      info: report on the solves.
    """

    task: Float[Array, " T"]
    support: Float[Array, "T n_support"]
    query: Float[Array, "T n_query"]
    info: SolveInfo


@runtime_checkable
class Response(Protocol):
    """λ(w) to first order in the data weights: made once, called as often as needed."""

    @property
    def meta_params(self) -> PyTree:
        """λ at the weights."""

    @property
    def weights(self) -> Weights:
        """The data weights w."""

    @property
    def info(self) -> Any:
        """What was found when it was made."""

    def jvp(self, direction: Weights) -> Influence:
        """The change of λ along a direction in w, or along several on a leading axis."""

    def vjp(self, slope: PyTree) -> tuple[Weights, Any]:
        """dφ/dw of a target with the slope ∇φ, or of several on a leading axis; and a report."""


class ScoresOfTarget(Protocol):
    """What `scores` makes."""

    def __call__(self, *target_args: Any) -> Scores:
        """Scores for the target at these arguments."""


@maker
def scores(
    at: Response, target: Callable[..., Array], *, precision: str | None = "highest", total_effect: bool = False
) -> ScoresOfTarget:
    """Makes (*target_args) -> Scores of all tasks and all examples, by one `vjp` of a response.

    A score is − w · dφ/dw at the response's weights.

    Args:
      at: a response, as made by `optimum`.
      target: φ: (meta_params, *target_args) -> scalar, as made by `query_loss`.
      precision: of the target's matrix products, see `jax.default_matmul_precision`; None for JAX's.
      total_effect: as in `influence_scores`; the weights are those of the response.

    Warns:
      DirectEffectWarning: as `influence_scores`.

    Raises:
      TypeError: `at` is not a response, or `target` does not take these arguments.
      ValueError: a target that is not a scalar.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> at = jax.jit(mi.optimum(problem))(meta_params, tasks)
      >>> test_tasks = mi.Task(support=(), query=jnp.asarray([[3.0]]))
      >>> found = jax.jit(mi.scores(at, mi.query_loss(problem)))(test_tasks)
      >>> found.task.round(3).tolist()  # (query − 2) / 3 · (3 − 2): the last task helps
      [-0.667, -0.333, 1.0]
    """
    if not isinstance(at, Response):
        raise TypeError(f"at: expected a response, as made by metainfluence.optimum, got {type(at).__name__}")
    check_target(target)
    check_precision(precision)
    check_total_effect(total_effect)

    def run(*target_args: Any) -> Scores:
        with traced_at(precision):
            slope, direct = slopes_of(target, at.meta_params, target_args, at.weights, total_effect)
        sensitivity, info = at.vjp(slope)
        spoilt = getattr(at, "spoilt", None)
        if direct is not None:
            return removal_scores(at.weights, jax.tree.map(jnp.add, sensitivity, direct), info, spoilt)
        tasks: Any = getattr(at, "tasks", None)
        if isinstance(info, SolveInfo) and tasks is not None:
            info = info._replace(support_shared=shares_support(tasks, target_args))
        found = removal_scores(at.weights, sensitivity, info, spoilt)
        warn_of_direct_effect(found)
        return found

    return run


def check_target(target: Any) -> None:
    """Raises TypeError unless the target can be called."""
    if not callable(target):
        expected = "a function (meta_params, *target_args) -> scalar"
        raise TypeError(f"target: expected {expected}, got {reprlib.repr(target)}")


def removal_scores(weights: Weights, sensitivity: Weights, info: Any, spoilt: Spoilt | None = None) -> Scores:
    """− w · dφ/dw."""
    task, support, query = jax.tree.map(jnp.negative, weighed(weights, sensitivity, spoilt))
    return Scores(task, support, query, info)


def leading_axis(tree: PyTree, single: PyTree) -> int | None:
    """The length of the axis that `tree` has before those of `single`; None without one."""
    first, like = jax.tree.leaves(tree)[0], jax.tree.leaves(single)[0]
    return None if jnp.ndim(first) == jnp.ndim(like) else jnp.shape(first)[0]
