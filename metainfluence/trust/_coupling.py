"""Whether the examples of a task see each other, so that a weight of 0 does not remove one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import concrete
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.problem import Bilevel, check_meta_params, task_loss


class CouplingWarning(UserWarning):
    """Examples that affect a task's loss in other ways than through their weighted losses."""


class Coupling(NamedTuple):
    """How far an example of weight 0 still moves its task's loss, relative to the loss; 0 where it does not.

    Attributes:
      support: `[n_support]`.
      query: `[n_query]`.
      nonlinear: how far the task's loss is from linear in the query weights, relative to the loss, measured at twice
        the weights and at the mean of two sets of them.
    """

    support: Float[Array, " n_support"]
    query: Float[Array, " n_query"]
    nonlinear: Float[Array, ""]


def coupling(problem: Bilevel) -> Callable[..., Coupling]:
    """Makes (meta_params, task, weights=None) -> Coupling, a probe of one task.

    An example's weight is set to 0 and the next real example is put in its place. A loss that is a weighted sum over
    examples, in both levels, does not change by a single bit. A loss that changes uses statistics over the batch (batch
    normalisation, contrastive losses), or does not multiply the example's loss by its weight. Instance influence then
    answers what happens if the example's own term does not count, not what happens without the example; the influence
    of whole tasks is not affected. Runs two adaptations per example, and no derivative.

    A loss that divides by the sum of its weights is not such a sum either: the scores of its query examples add up to
    0, and not to the task's. Four sets of query weights show this.

    Returns:
      Function that warns (`CouplingWarning`) where examples are coupled, or the loss is not linear in the query
      weights; under jit it only returns the numbers. An example shows nothing if the next one is a copy of it, or if it
      is the only one on its side.

    Raises:
      ValueError: a loss that is not finite, and as `total_gradient`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(
      ...     lambda m, task, w: jnp.sum(w.query * (m - (task.query - jnp.mean(task.query))) ** 2)
      ... )
      >>> task = mi.Task(support=jnp.zeros(1), query=jnp.asarray([1.0, 3.0]))
      >>> jax.jit(mi.coupling(problem))(jnp.asarray(3.0), task).query.tolist()  # 4 becomes 9, and 16 too
      [1.25, 0.4375]
    """
    loss = task_loss(problem)

    def run(meta_params: PyTree, task: Task, weights: Weights | None = None) -> Coupling:
        check_meta_params(meta_params)
        weights = resolve_weights(weights, task, stacked=False)

        def side(name: str) -> Array:
            batch, own = jax.tree.map(jnp.asarray, getattr(task, name)), getattr(weights, name)
            mask = getattr(task, f"{name}_mask")
            real = jnp.ones(own.shape, bool) if mask is None else jnp.asarray(mask)

            def single(example: Array) -> Array:
                without = weights._replace(**{name: own.at[example].set(0)})
                # The next real example, wrapping around the end of the batch.
                order = (jnp.arange(own.shape[0]) - example - 1) % own.shape[0]
                other = jnp.argmin(jnp.where(real, order, own.shape[0]))
                replaced = jax.tree.map(lambda leaf: leaf.at[example].set(leaf[other]), batch)
                before = loss(meta_params, task, without)
                after = loss(meta_params, task._replace(**{name: replaced}), without)
                size = jnp.maximum(jnp.abs(before), jnp.finfo(before.dtype).tiny)
                return jnp.where(real[example], jnp.abs(after - before) / size, 0)

            if not own.size:
                return jnp.zeros_like(own)
            return jax.lax.map(single, jnp.arange(own.shape[0]))

        def nonlinear() -> Array:
            own = weights.query
            # Fixed weights, all different, so that nothing cancels.
            other = own * (1 + jnp.linspace(0.1, 0.9, own.shape[0], dtype=own.dtype))
            many = jnp.stack([own, 2 * own, other, (own + other) / 2])
            plain, twice, bent, between = jax.lax.map(
                lambda v: loss(meta_params, task, weights._replace(query=v)), many
            )
            off = jnp.maximum(jnp.abs(twice - 2 * plain), jnp.abs(plain + bent - 2 * between))
            return off / jnp.maximum(jnp.abs(plain), jnp.finfo(plain.dtype).tiny)

        found = Coupling(side("support"), side("query"), nonlinear())
        if concrete(found):
            _warn(found)
        return found

    return run


def _warn(found: Coupling) -> None:
    sides = {"support": found.support, "query": found.query}
    peaks = {name: float(np.max(values, initial=0.0)) for name, values in sides.items()}
    if not all(map(np.isfinite, peaks.values())):
        raise ValueError("task: expected a finite loss without any one example, got NaN or infinity")
    # Without coupling the two losses are the same sum, to the last bit; the margin is for kernels that are not
    # deterministic.
    eps = max(float(np.finfo(np.asarray(values).dtype).eps) for values in sides.values())
    if float(found.nonlinear) > max(1e-3, eps**0.5):
        warnings.warn(
            f"the task's loss is not linear in the query weights (off by {float(found.nonlinear):.1e}, relative): it "
            "divides by their sum, or has a part that they do not weigh. Scores of its query examples do not add up to "
            "the task's, and are not those of leaving an example out of a mean of fixed size; scores of tasks hold. "
            "Divide by the number of examples, as in jnp.sum(w.query * losses) / len(losses)",
            CouplingWarning,
            stacklevel=3,
        )
    coupled = [f"{name} set by {peak:.1e}" for name, peak in peaks.items() if peak > 100 * eps]
    if coupled:
        warnings.warn(
            f"examples of weight 0 still move the task's loss ({', '.join(coupled)}, relative): either they enter "
            "statistics over the batch, as in batch normalisation, or the loss does not weigh them. Scores of single "
            "examples on that side are those of removing an example's own term from the loss, and not its effect on "
            "the others (or they are 0, where it is not weighed); scores of tasks hold. Hold running statistics fixed, "
            "normalise each example by itself (layer norm), or weigh by coefficients where the code takes a mean.",
            CouplingWarning,
            stacklevel=3,
        )
