"""Small meta-learning problems, each as the user of the library writes it and once more as the mathematics does.

The library is handed `model`, `head` and `adapt`. The reference is handed `model`, `head` and either the inner
objective (`Inner`), which it minimises itself by dense Newton steps, or a hand-written `program` that unrolls the inner
loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from oracles.parts import (
    Inner,
    Spec,
    anchored,
    apply_net,
    classification_tasks,
    cross_entropy,
    dense_net,
    lenient,
    one_hot,
    regression_tasks,
    softplus_error,
    square_norm,
    squared_error,
)


def _logistic_head(classes: int, features: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def logits(params: Any, meta_params: Any, batch: Any) -> Any:
        return apply_net([*meta_params, params], batch["x"])

    def zeros(meta_params: Any, support: Any) -> Any:
        del meta_params, support
        return jnp.zeros((features + 1, classes))

    return logits, zeros


def implicit_head() -> Spec:
    """Logistic head on an MLP; ragged tasks and integer labels."""
    rng = np.random.default_rng(1)
    model, zeros = _logistic_head(classes=3, features=3)

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return cross_entropy(model(params, meta_params, batch), batch)

    def regularizer(params: Any, meta_params: Any) -> Any:
        del meta_params
        return 0.05 * square_norm(params)

    initial = dense_net(rng, 3, 4, 3)
    return Spec(
        "implicit_head",
        initial,
        classification_tasks(rng, [6, 8, 5, 7], [5, 4, 6, 6], classes=3, inputs=3),
        model,
        cross_entropy,
        anchored(0.02, initial),
        mi.adaptation.implicit(inner_loss, zeros, regularizer=regularizer),
        Inner(inner_loss, regularizer, zeros),
    )


def imaml() -> Spec:
    """Full copy of an MLP with a proximal term; the outer loss sees λ only through θ."""
    rng = np.random.default_rng(2)

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return apply_net(params, batch["x"])

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return squared_error(model(params, meta_params, batch), batch)

    def regularizer(params: Any, meta_params: Any) -> Any:
        return 1.0 * square_norm(jax.tree.map(jnp.subtract, params, meta_params))

    def start(meta_params: Any, support: Any) -> Any:
        del support
        return meta_params

    initial = dense_net(rng, 2, 3, 1)
    return Spec(
        "imaml",
        initial,
        regression_tasks(rng, [5, 6, 4, 6], [4, 5, 5, 3]),
        model,
        softplus_error,
        anchored(0.05, initial),
        mi.adaptation.implicit(inner_loss, start, regularizer=regularizer),
        Inner(inner_loss, regularizer, start),
    )


def given() -> Spec:
    """Implicit head whose parameters come from the user's own loop of gradient descent, which knows no data weights."""
    rng = np.random.default_rng(3)
    model, zeros = _logistic_head(classes=2, features=3)

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return cross_entropy(model(params, meta_params, batch), batch)

    def regularizer(params: Any, meta_params: Any) -> Any:
        return 0.1 * jnp.exp(meta_params[-1][-1, 0]) * square_norm(params)

    def user_loop(meta_params: Any, support: Any) -> Any:
        def objective(params: Any) -> Any:
            return jnp.mean(inner_loss(params, meta_params, support)) + regularizer(params, meta_params)

        def descend(_: Any, params: Any) -> Any:
            return jax.tree.map(lambda p, g: p - 0.6 * g, params, jax.grad(objective)(params))

        return jax.lax.fori_loop(0, 600, descend, zeros(meta_params, support))

    initial = dense_net(rng, 2, 4, 3)
    return Spec(
        "given",
        initial,
        classification_tasks(rng, [6, 6, 6], [4, 5, 4], classes=2, inputs=2),
        model,
        cross_entropy,
        anchored(0.05, initial),
        mi.adaptation.implicit(inner_loss, user_loop, minimizer=mi.adaptation.given(), regularizer=regularizer),
        Inner(inner_loss, regularizer, zeros),
        reweighs_support=False,
    )


def maml_sgd() -> Spec:
    """Three steps of gradient descent from the meta-parameters; ragged tasks."""
    rng = np.random.default_rng(4)

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return apply_net(params, batch["x"])

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return squared_error(model(params, meta_params, batch), batch)

    def program(meta_params: Any, support: Any, coefficients: Any) -> Any:
        def step(_: Any, params: Any) -> Any:
            gradient = jax.grad(lambda p: jnp.sum(coefficients * inner_loss(p, meta_params, support)))(params)
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)

        return jax.lax.fori_loop(0, 3, step, meta_params)

    initial = dense_net(rng, 2, 3, 1)
    return Spec(
        "maml_sgd",
        initial,
        regression_tasks(rng, [5, 4, 6, 6, 5], [4, 6, 5, 3, 4]),
        model,
        softplus_error,
        mi.l2(0.03),
        mi.adaptation.unrolled(inner_loss, lambda meta_params, support: meta_params, optax.sgd(0.3), 3),
        program=program,
    )


def maml_adam() -> Spec:
    """Four steps of Adam with an inner regulariser; eps_root keeps the square root smooth; integer labels."""
    rng = np.random.default_rng(5)
    rate, decay1, decay2, eps, eps_root = 0.1, 0.9, 0.99, 1e-3, 1e-3

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return apply_net(params, batch["x"], jax.nn.softplus)

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return cross_entropy(model(params, meta_params, batch), batch)

    def regularizer(params: Any, meta_params: Any) -> Any:
        return 0.05 * square_norm(jax.tree.map(lambda p, m: p - 0.5 * m, params, meta_params))

    def program(meta_params: Any, support: Any, coefficients: Any) -> Any:
        def objective(params: Any) -> Any:
            losses = inner_loss(params, meta_params, support)
            return jnp.sum(coefficients * losses) + regularizer(params, meta_params)

        def step(carry: Any, power: Any) -> Any:
            params, first, second = carry
            gradient = jax.grad(objective)(params)
            first = jax.tree.map(lambda m, g: decay1 * m + (1 - decay1) * g, first, gradient)
            second = jax.tree.map(lambda v, g: decay2 * v + (1 - decay2) * g**2, second, gradient)

            def move(p: Any, m: Any, v: Any) -> Any:
                scale = jnp.sqrt(v / (1 - decay2**power) + eps_root) + eps
                return p - rate * m / (1 - decay1**power) / scale

            return (jax.tree.map(move, params, first, second), first, second), None

        zeros = jax.tree.map(jnp.zeros_like, meta_params)
        return jax.lax.scan(step, (meta_params, zeros, zeros), jnp.arange(1.0, 5.0))[0][0]

    initial = dense_net(rng, 2, 3, 2)
    return Spec(
        "maml_adam",
        initial,
        classification_tasks(rng, [4, 6, 5], [5, 4, 4], classes=2, inputs=2),
        model,
        cross_entropy,
        anchored(0.05, initial),
        mi.adaptation.unrolled(
            inner_loss,
            lambda meta_params, support: meta_params,
            lenient(optax.adam(rate, b1=decay1, b2=decay2, eps=eps, eps_root=eps_root)),
            4,
            regularizer=regularizer,
        ),
        program=program,
    )


def meta_sgd() -> Spec:
    """Learned initialisation and one learned inner rate per parameter (Li et al., 2017)."""
    rng = np.random.default_rng(6)

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return apply_net(params, batch["x"])

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return softplus_error(model(params, meta_params, batch), batch)

    def optimizer(meta_params: Any) -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            del params
            return jax.tree.map(lambda g, rate: -jnp.exp(rate) * g, updates, meta_params["log_rate"]), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    def program(meta_params: Any, support: Any, coefficients: Any) -> Any:
        def step(_: Any, params: Any) -> Any:
            gradient = jax.grad(lambda p: jnp.sum(coefficients * inner_loss(p, meta_params, support)))(params)
            return jax.tree.map(lambda p, g, r: p - jnp.exp(r) * g, params, gradient, meta_params["log_rate"])

        return jax.lax.fori_loop(0, 2, step, meta_params["init"])

    net = dense_net(rng, 2, 3, 1)
    initial = {"init": net, "log_rate": jax.tree.map(lambda leaf: jnp.full(leaf.shape, -1.0), net)}
    return Spec(
        "meta_sgd",
        initial,
        regression_tasks(rng, [5, 5, 5, 5], [4, 4, 4, 4]),
        model,
        squared_error,
        anchored(0.05, initial),
        mi.adaptation.unrolled(inner_loss, lambda meta_params, support: meta_params["init"], optimizer, 2),
        program=program,
    )


def context_vector() -> Spec:
    """A context vector fed to a shared network, adapted from zero (CAVIA, Zintgraf et al., 2019)."""
    rng = np.random.default_rng(7)

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        x = batch["x"]
        context = jnp.broadcast_to(params[None], (x.shape[0], params.shape[0]))
        return apply_net(meta_params, jnp.concatenate([x, context], axis=1))

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return squared_error(model(params, meta_params, batch), batch)

    def program(meta_params: Any, support: Any, coefficients: Any) -> Any:
        def step(_: Any, params: Any) -> Any:
            return params - 0.4 * jax.grad(lambda p: jnp.sum(coefficients * inner_loss(p, meta_params, support)))(
                params
            )

        return jax.lax.fori_loop(0, 3, step, jnp.zeros(2))

    initial = dense_net(rng, 4, 3, 1)
    return Spec(
        "context_vector",
        initial,
        regression_tasks(rng, [5, 6, 4, 5], [4, 3, 5, 5]),
        model,
        squared_error,
        anchored(0.04, initial),
        mi.adaptation.unrolled(inner_loss, lambda meta_params, support: jnp.zeros(2), optax.sgd(0.4), 3, remat=True),
        program=program,
    )


def ridge_head() -> Spec:
    """Ridge regression on features in closed form (R2D2, Bertinetto et al., 2019), in the dual; a learned ridge."""
    rng = np.random.default_rng(8)

    def features(meta_params: Any, batch: Any) -> Any:
        return apply_net(meta_params["net"], batch["x"])

    def closed_form(meta_params: Any, support: Any, coefficients: Any) -> Any:
        # (ZᵀCZ + ρI)⁻¹ZᵀCY = Zᵀ(CZZᵀ + ρI)⁻¹CY: no square root of C, whose derivative is infinite on padding.
        z = features(meta_params, support)
        weighted = coefficients[:, None] * one_hot(support, jnp.zeros((1, 2)))
        ridge = jnp.exp(meta_params["log_ridge"]) * jnp.eye(z.shape[0])
        return z.T @ jnp.linalg.solve(coefficients[:, None] * (z @ z.T) + ridge, weighted)

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        return meta_params["scale"] * (features(meta_params, batch) @ params)

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        predicted = features(meta_params, batch) @ params
        return 0.5 * jnp.sum((predicted - one_hot(batch, predicted)) ** 2, axis=1)

    def regularizer(params: Any, meta_params: Any) -> Any:
        return 0.5 * jnp.exp(meta_params["log_ridge"]) * jnp.sum(params**2)

    def zeros(meta_params: Any, support: Any) -> Any:
        del meta_params, support
        return jnp.zeros((3, 2))

    initial = {"net": dense_net(rng, 2, 4, 3), "log_ridge": jnp.asarray(-1.5), "scale": jnp.asarray(2.0)}
    return Spec(
        "ridge_head",
        initial,
        classification_tasks(rng, [6, 4, 5, 6], [5, 5, 4, 6], classes=2, inputs=2),
        model,
        cross_entropy,
        anchored(0.04, initial),
        mi.adaptation.closed_form(closed_form),
        Inner(inner_loss, regularizer, zeros),
    )


def prototypes() -> Spec:
    """Class means of features in closed form (ProtoNet, Snell et al., 2017): the minimiser of weighted distances."""
    rng = np.random.default_rng(9)

    def features(meta_params: Any, batch: Any) -> Any:
        return apply_net(meta_params, batch["x"])

    def closed_form(meta_params: Any, support: Any, coefficients: Any) -> Any:
        z = features(meta_params, support)
        members = coefficients[:, None] * one_hot(support, jnp.zeros((1, 3)))
        return members.T @ z / jnp.sum(members, axis=0)[:, None]

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        difference = features(meta_params, batch)[:, None, :] - params[None, :, :]
        return -jnp.sum(difference**2, axis=2)

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return 0.5 * jnp.sum((features(meta_params, batch) - params[batch["y"]]) ** 2, axis=1)

    def regularizer(params: Any, meta_params: Any) -> Any:
        del meta_params
        return jnp.zeros((), params.dtype)

    def zeros(meta_params: Any, support: Any) -> Any:
        del meta_params, support
        return jnp.zeros((3, 2))

    initial = dense_net(rng, 2, 4, 2)
    return Spec(
        "prototypes",
        initial,
        classification_tasks(rng, [7, 9, 6, 8], [6, 6, 3, 4], classes=3, inputs=2),
        model,
        cross_entropy,
        anchored(0.05, initial),
        mi.adaptation.closed_form(closed_form),
        Inner(inner_loss, regularizer, zeros),
    )


def convex() -> Spec:
    """Twenty tasks; θ is affine in λ (ridge with a proximal term) and the outer loss convex: one task is 5 %."""
    rng = np.random.default_rng(10)

    def model(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return batch["x"] @ params

    def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return squared_error(model(params, meta_params, batch), batch)

    def regularizer(params: Any, meta_params: Any) -> Any:
        return 0.5 * jnp.sum((params - meta_params) ** 2)

    def start(meta_params: Any, support: Any) -> Any:
        del support
        return meta_params

    initial = jnp.asarray(rng.normal(size=(4, 1)))
    return Spec(
        "convex",
        initial,
        regression_tasks(rng, [5] * 20, [6] * 20, inputs=4),
        model,
        softplus_error,
        mi.l2(0.01),
        mi.adaptation.implicit(inner_loss, start, regularizer=regularizer),
        Inner(inner_loss, regularizer, start),
    )


_MAKERS = {
    maker.__name__: maker
    for maker in (
        implicit_head, imaml, given, maml_sgd, maml_adam, meta_sgd, context_vector, ridge_head, prototypes, convex
    )
}  # fmt: skip

# The kinds that every exactness test runs over; those beside differ from them in how λ enters the inner loop only.
KINDS = ("implicit_head", "imaml", "given", "maml_sgd", "maml_adam", "ridge_head", "prototypes")
NAMES = (*KINDS, "meta_sgd", "context_vector")
IMPLICIT = ("implicit_head", "imaml", "given", "ridge_head", "prototypes")


@functools.cache
def spec(name: str) -> Spec:
    """The problem of that name."""
    return _MAKERS[name]()
