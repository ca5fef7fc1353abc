"""Meta-learners: each is a problem with a way to initialise its meta-parameters.

A task's support and query sets are pairs (inputs [n, ...], targets [n]), like `fewshot.Batch`. All problems have an
outer head, whose outputs are the logits on the query set, so every curvature is available.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.learn import models
from metainfluence.lab.learn.models import apply, check_penalty, cross_entropy, linear, zero_linear

# For the logarithm of the inverse temperature: its largest value, and the number of bisection steps.
_MOST_LOG, _HALVINGS = 8.0, 40

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Learner(NamedTuple):
    """A meta-learner.

    Attributes:
      problem: a problem with an outer head.
      init: (key, inputs [n, ...]) -> meta-parameters to start training from.
    """

    problem: mi.Bilevel
    init: Callable[[jax.Array, jax.Array], Any]


class WithHead(nn.Module):
    """A feature extractor and a linear layer on it.

    Attributes:
      features: a module from inputs to features.
      ways: outputs; 1 for regression.
    """

    features: nn.Module
    ways: int

    @property
    def compute_dtype(self) -> str | None:
        """The compute dtype of the features."""
        return getattr(self.features, "compute_dtype", None)

    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(self.ways, param_dtype=jnp.result_type(float))(self.features(inputs))


def _whole_network(
    features: nn.Module, ways: int, loss: Loss, meta_l2: float, network_of: Callable[[Any], Any], adaptation: Any
) -> tuple[mi.Bilevel, nn.Module]:
    """A problem whose task parameters copy the complete network; the outer loss depends on λ only through θ."""
    model = WithHead(features, ways)

    def outputs(params, meta_params, batch):
        del meta_params
        return apply(model, params, batch[0])

    def head(outputs, batch):
        return loss(outputs, batch[1])

    def inner_loss(params, meta_params, batch):
        return head(outputs(params, meta_params, batch), batch)

    adapt = adaptation(inner_loss, lambda meta_params, support: network_of(meta_params))
    return mi.bilevel(outputs, adapt, meta_regularizer=_l2(meta_l2), outer_head=head), model


def _l2(delta: float) -> Callable[[Any], jax.Array] | None:
    check_penalty("meta_l2", delta)
    return mi.l2(delta) if delta else None


def _frozen_gradients() -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.lax.stop_gradient(updates))


def maml(
    features: nn.Module,
    ways: int,
    *,
    steps: int = 1,
    lr: float = 0.1,
    order: int = 2,
    loss: Loss = cross_entropy,
    meta_l2: float = 0.0,
    remat: bool = False,
) -> Learner:
    """MAML (Finn et al., ICML 2017): λ is a network, θ the same network some gradient steps later.

    With `order` 1 the inner gradients are held fixed in differentiation (first-order MAML). The total gradient and the
    total Hessian are then those of another function, λ ↦ L(λ − constant), rather than derivatives of the computed loss.
    Influence from them predicts where first-order training would go, but has no exact oracle.

    Args:
      features: a module from inputs to features.
      ways: outputs of the head.
      steps: gradient steps.
      lr: length of the gradient steps.
      order: 2, or 1 for first-order MAML.
      loss: (outputs [n, ways], targets [n]) -> [n]; `models.squared_error` for regression.
      meta_l2: weight of ‖λ‖² / 2.
      remat: recompute the steps in reverse mode to save memory.

    Raises:
      ValueError: an order other than 1 or 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order: expected 1 or 2, got {order!r}")
    optimizer = optax.sgd(lr) if order == 2 else optax.chain(_frozen_gradients(), optax.sgd(lr))

    def adaptation(inner_loss, start):
        return mi.adaptation.unrolled(inner_loss, start, optimizer, steps, remat=remat)

    problem, model = _whole_network(features, ways, loss, meta_l2, lambda meta_params: meta_params, adaptation)
    return Learner(problem, model.init)


def meta_sgd(
    features: nn.Module,
    ways: int,
    *,
    steps: int = 1,
    lr: float = 0.1,
    loss: Loss = cross_entropy,
    meta_l2: float = 0.0,
) -> Learner:
    """Meta-SGD (Li et al., 2017): MAML with a learned rate for every parameter, λ = {"network", "rates"}.

    Args:
      features: a module from inputs to features.
      ways: outputs of the head.
      steps: gradient steps.
      lr: initial value of the rates.
      loss: (outputs [n, ways], targets [n]) -> [n].
      meta_l2: weight of ‖λ‖² / 2, including the rates.
    """

    def optimizer(meta_params):
        return optax.stateless(lambda updates, params: jax.tree.map(lambda r, g: -r * g, meta_params["rates"], updates))

    def adaptation(inner_loss, start):
        return mi.adaptation.unrolled(inner_loss, start, optimizer, steps)

    problem, model = _whole_network(
        features, ways, loss, meta_l2, lambda meta_params: meta_params["network"], adaptation
    )

    def init(key, inputs):
        network = model.init(key, inputs)
        return {"network": network, "rates": jax.tree.map(lambda leaf: jnp.full_like(leaf, lr), network)}

    return Learner(problem, init)


def imaml(
    features: nn.Module,
    ways: int,
    *,
    proximal: float = 1.0,
    loss: Loss = cross_entropy,
    meta_l2: float = 0.0,
    tol: float | None = None,
) -> Learner:
    """IMAML (Rajeswaran et al., NeurIPS 2019): θ minimises the support loss + proximal/2 · ‖θ − λ‖².

    Args:
      features: a module from inputs to features.
      ways: outputs of the head.
      proximal: weight of the proximal term. It must outweigh the loss's negative curvature, to make the inner Hessian
        positive definite.
      loss: (outputs [n, ways], targets [n]) -> [n].
      meta_l2: weight of ‖λ‖² / 2.
      tol: relative gradient norm of the minimum, and relative residual of its derivative; None for eps^(3/4).
    """
    check_penalty("proximal", proximal, above=True)

    def distance(params, meta_params):
        return 0.5 * proximal * optax.tree.norm(optax.tree.sub(params, meta_params), squared=True)

    def adaptation(inner_loss, start):
        return mi.adaptation.implicit(
            inner_loss,
            start,
            minimizer=mi.adaptation.newton_cg(tol=tol),
            linear_solver=None if tol is None else mi.solvers.cg(tol=tol),
            regularizer=distance,
        )

    problem, model = _whole_network(features, ways, loss, meta_l2, lambda meta_params: meta_params, adaptation)
    return Learner(problem, model.init)


def anil(
    features: nn.Module,
    ways: int,
    *,
    steps: int = 5,
    lr: float = 0.1,
    loss: Loss = cross_entropy,
    meta_l2: float = 0.0,
) -> Learner:
    """ANIL (Raghu et al., ICLR 2020): only a linear head takes gradient steps, λ = {"features", "head"}.

    Args:
      features: a module from inputs to features.
      ways: outputs of the head.
      steps: gradient steps.
      lr: length of the gradient steps.
      loss: (outputs [n, ways], targets [n]) -> [n].
      meta_l2: weight of ‖λ‖² / 2.
    """

    def inner_loss(head, start, support):
        del start
        return loss(linear(head, support[0]), support[1])

    fit = mi.adaptation.unrolled(inner_loss, lambda start, support: start, optax.sgd(lr), steps)

    # The features of the support set are the same in every step.
    def adapt(meta_params, support, coefficients):
        seen = apply(features, meta_params["features"], support[0])
        return fit(meta_params["head"], (seen, support[1]), coefficients)

    def outputs(head, meta_params, batch):
        return linear(head, apply(features, meta_params["features"], batch[0]))

    def init(key, inputs):
        seen, variables = features.init_with_output(key, inputs)
        return {"features": variables, "head": zero_linear(seen.shape[-1], ways, seen.dtype)}

    return Learner(_on_features(outputs, adapt, loss, meta_l2), init)


def implicit_head(
    features: nn.Module, ways: int, *, head_l2: float = 0.1, meta_l2: float = 1e-3, tol: float = 1e-9
) -> Learner:
    """A logistic-regression head, fitted per task to its minimum: `models.logistic_head_problem`."""
    problem = models.logistic_head_problem(features, ways, head_l2=head_l2, meta_l2=meta_l2, tol=tol)
    return Learner(problem, features.init)


def r2d2(
    features: nn.Module, ways: int, *, ridge: float = 0.1, meta_l2: float = 0.0, learned_head: bool = True
) -> Learner:
    """R2D2 (Bertinetto et al., ICLR 2019): a ridge-regression head in closed form, W = (XᵀCX + βI)⁻¹ XᵀCY.

    C holds the support examples' coefficients, Y their one-hot targets. The logits are scale · φ(x) W + bias. λ is
    {"features", "log_ridge", "scale", "bias"}, or only the features if the other three keep their initial values.

    Args:
      features: a module from inputs to features.
      ways: classes.
      ridge: initial β.
      meta_l2: weight of ‖λ‖² / 2, of all its parts.
      learned_head: whether λ holds β, scale and bias. EK-FAC supports only layers, so it needs False.
    """
    check_penalty("ridge", ridge, above=True)
    start = {"log_ridge": float(np.log(ridge)), "scale": 10.0, "bias": 0.0}

    def parts(meta_params):
        return meta_params if learned_head else {"features": meta_params, **start}

    def adapt(meta_params, support, coefficients):
        meta_params = parts(meta_params)
        seen = apply(features, meta_params["features"], support[0])
        weights = coefficients.astype(seen.dtype)[:, None]
        targets = weights * jax.nn.one_hot(support[1], ways, dtype=seen.dtype)
        beta = jnp.exp(meta_params["log_ridge"])
        count, width = seen.shape
        if width <= count:
            return mi.adaptation.linear_solve(
                seen.T @ (weights * seen) + beta * jnp.eye(width, dtype=seen.dtype), seen.T @ targets
            )
        # The push-through identity gives the same in the number of examples. A root of C is avoided, since its
        # derivative is infinite at weight 0.
        return seen.T @ mi.adaptation.linear_solve(
            weights * (seen @ seen.T) + beta * jnp.eye(count, dtype=seen.dtype), targets
        )

    def outputs(kernel, meta_params, batch):
        meta_params = parts(meta_params)
        seen = apply(features, meta_params["features"], batch[0])
        return meta_params["scale"] * (seen @ kernel) + meta_params["bias"]

    def init(key, inputs):
        seen, variables = features.init_with_output(key, inputs)
        if not learned_head:
            return variables
        return {"features": variables} | {name: jnp.asarray(value, seen.dtype) for name, value in start.items()}

    return Learner(_on_features(outputs, adapt, cross_entropy, meta_l2), init)


def protonet(features: nn.Module, ways: int, *, meta_l2: float = 0.0) -> Learner:
    """Prototypical networks (Snell et al., NeurIPS 2017): logits − ‖φ(x) − p_k‖², p_k the mean of its class's features.

    The mean is weighted, so a class's only support example has no influence through its weight until that weight is 0.
    If all weights of a class are 0, its prototype is the origin.

    Args:
      features: a module from inputs to features.
      ways: classes.
      meta_l2: weight of ‖λ‖² / 2.
    """

    def adapt(meta_params, support, coefficients):
        seen = apply(features, meta_params, support[0])
        shares = coefficients.astype(seen.dtype)[:, None] * jax.nn.one_hot(support[1], ways, dtype=seen.dtype)
        total = shares.sum(0)[:, None]
        return (shares.T @ seen) / jnp.where(total == 0, 1, total)

    def outputs(prototypes, meta_params, batch):
        seen = apply(features, meta_params, batch[0])
        return -jnp.square(seen[:, None] - prototypes[None]).sum(-1)

    return Learner(_on_features(outputs, adapt, cross_entropy, meta_l2), features.init)


def _on_features(outputs: Any, adapt: Any, loss: Loss, meta_l2: float) -> mi.Bilevel:
    adaptation = mi.adaptation.closed_form(adapt)
    return mi.bilevel(
        outputs, adaptation, meta_regularizer=_l2(meta_l2), outer_head=lambda outputs, batch: loss(outputs, batch[1])
    )


def accuracy(problem: mi.Bilevel, *, batch_size: int | None = None) -> Callable[[Any, mi.Task], jax.Array]:
    """Makes (meta_params, tasks) -> each task's share of correctly classified query examples, [T].

    A task with a NaN output has accuracy NaN; argmax would return the first class.

    Args:
      problem: with an outer head whose outputs are logits.
      batch_size: tasks at a time, which bounds the memory; None for all.

    Raises:
      ValueError: a problem without an outer head.
    """
    logits_of = _logits(problem)

    def run(meta_params: Any, tasks: mi.Task) -> jax.Array:
        def single(data: tuple[mi.Task, mi.Weights]) -> jax.Array:
            task, weights = data
            logits = logits_of(meta_params, task, weights)
            right = jnp.argmax(logits, -1) == task.query[1]
            unknown = jnp.any(jnp.isnan(logits), axis=-1) & (True if task.query_mask is None else task.query_mask)
            return jnp.where(jnp.any(unknown), jnp.nan, jnp.mean(right, where=task.query_mask))

        data = (tasks, mi.unit_weights(tasks))
        return jax.vmap(single)(data) if batch_size is None else jax.lax.map(single, data, batch_size=batch_size)

    return run


def calibrated_loss(problem: mi.Bilevel) -> Callable[[Any, mi.Task], jax.Array]:
    """Makes (meta_params, tasks) -> mean cross-entropy of the query examples at the temperature that fits them best.

    One temperature for all tasks (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017). As a target it
    ignores how sure the outputs are, on which accuracy does not depend. For an overconfident learner, the plain loss
    calls helpful whatever makes its outputs smaller, including tasks with wrong labels.

    The temperature minimises the loss, so the gradient does not need the temperature's derivative; second derivatives
    would.

    Args:
      problem: with an outer head whose outputs are the logits of a cross-entropy.

    Raises:
      ValueError: a problem without an outer head.
    """
    logits_of = _logits(problem)

    def run(meta_params: Any, tasks: mi.Task) -> jax.Array:
        logits = jax.vmap(lambda task, weights: logits_of(meta_params, task, weights))(tasks, mi.unit_weights(tasks))
        labels = tasks.query[1]

        def loss(inverse: jax.Array, logits: jax.Array) -> jax.Array:
            each = optax.losses.softmax_cross_entropy_with_integer_labels(inverse * logits, labels)
            return jnp.mean(jnp.mean(each, axis=-1, where=tasks.query_mask))

        fixed = jax.lax.stop_gradient(logits)
        slope = jax.grad(lambda log: loss(jnp.exp(log), fixed))

        # The loss is convex in the inverse temperature, so its slope changes sign once.
        def halved(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low + high) / 2
            rises = slope(middle) > 0
            return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

        ends = (jnp.asarray(-_MOST_LOG, logits.dtype), jnp.asarray(_MOST_LOG, logits.dtype))
        low, high = jax.lax.fori_loop(0, _HALVINGS, halved, ends)
        return loss(jnp.exp((low + high) / 2), logits)

    return run


def _logits(problem: mi.Bilevel) -> Callable[[Any, mi.Task, mi.Weights], jax.Array]:
    if problem.adapt is None or problem.outputs is None:
        raise ValueError("problem: expected one made by bilevel(model, adapt, outer_head=head), got one without a head")
    adapt, outputs = problem.adapt, problem.outputs
    return lambda meta_params, task, weights: outputs(adapt(meta_params, task, weights), meta_params, task)


class Interval(NamedTuple):
    """A mean and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float


def mean_interval(accuracies: Any) -> Interval:
    """The mean over tasks and its 95 % interval, 1.96 standard errors each way."""
    values = np.asarray(accuracies, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"accuracies: expected at least two numbers [T], got shape {values.shape}")
    return Interval(float(values.mean()), float(1.96 * values.std(ddof=1) / len(values) ** 0.5))
