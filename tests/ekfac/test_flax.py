"""Flax models, unchanged, against the same models with declared layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import metainfluence as mi
from ekfac import nets
from oracles.reference import relative_error

NET = nets.build("convolutional")
OPTIONS = {"strides": (2, 1), "padding": ((1, 0), (0, 1)), "kernel_dilation": (1, 2), "param_dtype": jnp.float64}


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = jnp.tanh(nn.Conv(2, (2, 2), **OPTIONS)(x))
        return nn.Dense(3, param_dtype=jnp.float64)(hidden.reshape(x.shape[0], -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 2, (2, 2), **OPTIONS, rngs=rngs)
        self.dense = nnx.Linear(16, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x):
        return self.dense(jnp.tanh(self.conv(x)).reshape(x.shape[0], -1))


def linen_params():
    p = NET.params
    return {"Conv_0": {"kernel": p["k"], "bias": p["b1"]}, "Dense_0": {"kernel": p["w2"], "bias": p["b2"]}}


def nnx_params():
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    p = NET.params
    nnx.replace_by_pure_dict(
        state, {"conv": {"kernel": p["k"], "bias": p["b1"]}, "dense": {"kernel": p["w2"], "bias": p["b2"]}}
    )
    return graph, state


def models():
    graph, state = nnx_params()
    inner = linen_params()
    return {
        "declared": (nets.convolutional, NET.params),
        "linen": (Linen().apply, {"params": inner}),
        "linen, bare": (lambda params, x: Linen().apply({"params": params}, x), inner),
        "nnx": (lambda state, x: nnx.merge(graph, state)(x), state),
        "nnx, compiled": (jax.jit(lambda state, x: nnx.merge(graph, state)(x)), state),
    }


def test_models_of_flax_have_the_factors_of_declared_layers():
    originals = nnx.Linear.__call__, nnx.Conv.__call__

    def run(name):
        model, params = models()[name]
        model(params, NET.data["x"][:1])
        function = nets.losses_of(model, NET.head)
        operator = nets.operator(function, params, NET.data, NET.coefficients)
        rhs = jax.tree.map(lambda leaf: leaf + 1.0, params)
        solver = mi.solvers.ekfac()
        return solver.solve(operator.damped(0.1), solver.init(operator.damped(0.1)), rhs)[0]

    found = jax.jit(lambda: {name: run(name) for name in models()})()
    declared = found["declared"]
    for name, solution in found.items():
        if name == "declared":
            continue
        leaves = {
            jax.tree_util.keystr(path).lower(): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(solution)
        }
        for old, layer, kind in (("k", "conv", "kernel"), ("b1", "conv", "bias"), ("w2", "dense", "kernel")):
            (leaf,) = [leaf for key, leaf in leaves.items() if layer in key and kind in key]
            assert relative_error(leaf, declared[old]) <= 1e-10
    assert (nnx.Linear.__call__, nnx.Conv.__call__) == originals


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (1, 3), jnp.float64)
        return scale * nn.Dense(3, param_dtype=jnp.float64)(x)


class Circular(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.Conv(1, (2,), padding="CIRCULAR", param_dtype=jnp.float64)(x[..., None])
        return nn.Dense(3, param_dtype=jnp.float64)(hidden[..., 0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scaled(), r"'params/scale': covered by no layer.*the layers seen are \[\"Dense\(kernel='Dense_0/kernel'"),
        (Circular(), r"Conv\(kernel='Conv_0/kernel'.*: EK-FAC does not support padding 'CIRCULAR'"),
    ],
)
def test_layers_that_are_not_supported_are_named(model, message):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    params = model.init(jax.random.key(0), x)
    function = nets.losses_of(model.apply, nets.cross_entropy)
    operator = nets.operator(function, params, {"x": x, "y": NET.data["y"]}, NET.coefficients)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: nets.estimate(operator))


def test_a_capture_that_fails_restores_the_methods():
    originals = nnx.Linear.__call__, nnx.Conv.__call__
    operator = nets.operator(lambda params, batch: 1 / 0, NET.params, NET.data, NET.coefficients)
    with pytest.raises(ZeroDivisionError):
        nets.estimate(operator)
    assert (nnx.Linear.__call__, nnx.Conv.__call__) == originals
