"""Small networks with declared layers, their operators, and their curvature computed without any layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import metainfluence as mi

FIRST = mi.ekfac.Dense("w1", "b1")
SECOND = mi.ekfac.Dense("w2", "b2")
CONV = mi.ekfac.Conv("k", "b1", strides=(2, 1), padding=((1, 0), (0, 1)), kernel_dilation=(1, 2))


def mlp(params: Any, x: Any) -> Any:
    return SECOND(params, jnp.tanh(FIRST(params, x)))


def shared(params: Any, x: Any) -> Any:
    """Weights that are used along a sequence, and twice."""
    hidden = jnp.tanh(FIRST(params, jnp.tanh(FIRST(params, x))))
    return SECOND(params, jnp.mean(hidden, axis=1))


def convolutional(params: Any, x: Any) -> Any:
    return SECOND(params, jnp.tanh(CONV(params, x)).reshape(x.shape[0], -1))


def cross_entropy(outputs: Any, labels: Any) -> Any:
    return -jnp.sum(labels * jax.nn.log_softmax(outputs), axis=-1)


def square(outputs: Any, targets: Any) -> Any:
    return jnp.sum((outputs - targets) ** 2, axis=-1)


def losses_of(model: Callable[..., Any], head: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, batch: head(model(params, batch["x"]), batch["y"])


class Net(NamedTuple):
    """A model (params, x) -> outputs under a head (outputs, y) -> losses, at a point, with data and coefficients."""

    model: Callable[..., Any]
    head: Callable[..., Any]
    params: Any
    data: Any
    coefficients: Any


def _shapes(name: str) -> tuple[Any, dict[str, tuple[int, ...]], tuple[int, ...]]:
    match name:
        case "mlp":
            return mlp, {"w1": (3, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}, (3,)
        case "shared":
            return shared, {"w1": (3, 3), "b1": (3,), "w2": (3, 3), "b2": (3,)}, (2, 3)
        case "convolutional":
            return convolutional, {"k": (2, 2, 2, 2), "b1": (2,), "w2": (16, 3), "b2": (3,)}, (4, 5, 2)
    raise ValueError(name)


def build(name: str, examples: int = 6) -> Net:
    """A network with random parameters and inputs of uneven scale, three classes and uneven weights."""
    rng = np.random.default_rng(5)
    model, shapes, features = _shapes(name)
    params = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
    x = rng.normal(size=(examples, *features)) * np.geomspace(0.5, 2.0, features[-1])
    data = {"x": jnp.asarray(x), "y": jnp.eye(3)[rng.integers(3, size=examples)]}
    return Net(model, cross_entropy, params, data, jnp.asarray(rng.uniform(0.5, 1.5, size=examples) / examples))


def objective(function: Any, regularizer: Any, params: Any, data: Any, coefficients: Any) -> Any:
    """Σ_g Σ_j c_gj ℓ_gj + r; data and coefficients with the groups on the leading axis."""
    losses = jax.vmap(function, in_axes=(None, 0))(params, data)
    return jnp.sum(coefficients * losses) + (0.0 if regularizer is None else regularizer(params))


def operator(function: Any, params: Any, data: Any, coefficients: Any, regularizer: Any = None) -> mi.Operator:
    """The Hessian of the objective, showing its losses; one group, unless coefficients are `[G, n]`."""
    if coefficients.ndim == 1:
        data, coefficients = jax.tree.map(lambda leaf: leaf[None], (data, coefficients))

    def product(params: Any, data: Any, coefficients: Any, vector: Any) -> Any:
        slope = jax.grad(lambda params: objective(function, regularizer, params, data, coefficients))
        return jax.jvp(slope, (params,), (vector,))[1]

    def losses(params: Any, data: Any, coefficients: Any) -> mi.operators.Losses:
        return mi.operators.Losses(function, params, data, coefficients, regularizer)

    arguments = (params, data, coefficients)
    plain = mi.operators.from_matvec(jax.tree_util.Partial(product, *arguments), params)
    return dataclasses.replace(plain, losses=jax.tree_util.Partial(losses, *arguments))


def estimate(operator: mi.Operator, **options: Any) -> mi.ekfac.Factors:
    return mi.ekfac.estimate(operator.losses(), operator.domain, **options)


def matrix(operator: mi.Operator, factors: mi.ekfac.Factors, scales: Any = None) -> Any:
    """Q diag(scales) Qᵀ in flat coordinates; scales None for the eigenvalues."""
    scales = [block.values for block in factors.blocks] if scales is None else scales
    domain = operator.domain
    return jax.vmap(lambda v: domain.ravel(factors.scale(domain.unravel(v), scales)))(jnp.eye(operator.size))


def gauss_newton(net: Net) -> np.ndarray:
    """Σ_j c_j J_jᵀ ∂²ℓ_j J_j by dense Jacobians, with the blocks between layers."""
    flat, unravel = ravel_pytree(net.params)
    jacobian = jax.jacfwd(lambda flat: net.model(unravel(flat), net.data["x"]))(flat)
    outputs = net.model(net.params, net.data["x"])
    hessian = jax.vmap(jax.hessian(net.head))(outputs, net.data["y"])
    return np.einsum("n,nka,nkl,nlb->ab", net.coefficients, jacobian, hessian, jacobian)


def hessian(function: Any, params: Any, data: Any, coefficients: Any, regularizer: Any = None) -> np.ndarray:
    """The objective's Hessian in flat coordinates."""
    flat, unravel = ravel_pytree(params)
    data, coefficients = jax.tree.map(lambda leaf: leaf[None], (data, coefficients))
    total = jax.hessian(lambda flat: objective(function, regularizer, unravel(flat), data, coefficients))
    return np.asarray(jax.jit(total)(flat))


def l2(strength: float) -> Callable[[Any], Any]:
    return lambda params: 0.5 * strength * optax.tree.norm(params, squared=True)
