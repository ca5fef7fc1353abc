import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from metainfluence.lab.bench import _convolution as bench_convolution
from metainfluence.lab.learn.convolution import ShiftedConv, fastest, shifted_convolution, windowed_convolution
from metainfluence.lab.learn.models import MLP, Conv4, pooled
from oracles.reference import relative_error


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


@pytest.mark.parametrize(("height", "width", "stride"), [(5, 4, 1), (6, 7, 2), (1, 2, 1), (3, 1, 2)])
def test_it_is_the_convolution_of_flax(height, width, stride, rng):
    """With the same parameters under the same names; odd, even and tiny images."""
    inputs = normal(rng, 2, height, width, 3)
    shifted, flax = ShiftedConv(4, stride=stride, impl="shifted"), nn.Conv(4, (3, 3), strides=stride)
    params = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), shifted.init(jax.random.key(0), inputs))
    np.testing.assert_allclose(shifted.apply(params, inputs), flax.apply(params, inputs), rtol=1e-12, atol=1e-13)
    for impl in ("windows", "lax"):
        other = ShiftedConv(4, stride=stride, impl=impl).apply(params, inputs)
        np.testing.assert_allclose(shifted.apply(params, inputs), other, rtol=1e-12, atol=1e-13)


def test_a_kernel_per_task_under_vmap(rng):
    inputs, kernels = normal(rng, 3, 2, 4, 4, 2), normal(rng, 3, 3, 3, 2, 2)
    together, same = (jax.vmap(each)(inputs, kernels) for each in (shifted_convolution, windowed_convolution))
    np.testing.assert_allclose(same, together, rtol=1e-12, atol=1e-13)
    for one, x, kernel in zip(together, inputs, kernels, strict=True):
        expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        np.testing.assert_allclose(one, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("backend", "dtype", "precision", "expected"),
    [
        ("cpu", "float32", None, "windows"),
        ("gpu", "float32", "highest", "windows"),
        ("gpu", "float64", None, "windows"),
        ("gpu", "float32", None, "lax"),
        ("gpu", "float32", "tensorfloat32", "lax"),
        ("tpu", "float32", "highest", "lax"),
    ],
)
def test_what_auto_stands_for(backend, dtype, precision, expected):
    with jax.default_matmul_precision(precision):
        assert fastest(backend, np.dtype(dtype)) == expected


def test_auto_takes_matrix_products_on_cpus(rng):
    inputs = normal(rng, 1, 4, 4, 1)
    params = ShiftedConv(2).init(jax.random.key(0), inputs)
    programs = {impl: str(jax.make_jaxpr(ShiftedConv(2, impl=impl).apply)(params, inputs)) for impl in ("auto", "lax")}
    assert "conv_general_dilated" in programs["lax"]
    assert "conv_general_dilated" not in programs["auto"]


def test_ekfac_sees_it(rng):
    """It solves as with Flax's kind of convolution, and no parameter is left uncovered, which would raise."""
    images, rhs = normal(rng, 4, 4, 4), None
    solutions = []
    for impl in ("windows", "shifted", "lax"):
        model = Conv4(2, depth=1, impl=impl, activation=jnp.tanh)
        params = model.init(jax.random.key(0), images)

        def loss(head, meta_params, batch, model=model):
            return jnp.square(model.apply(meta_params, batch)).sum(axis=-1)

        problem = mi.bilevel(loss, mi.adaptation.closed_form(lambda meta_params, support, coefficients: ()))
        operator = mi.total_hessian(problem, damping=0.1)(params, mi.Task(images[None], images[None]))
        rhs = jax.tree.map(lambda leaf: normal(rng, *leaf.shape), params) if rhs is None else rhs
        solver = mi.solvers.ekfac()
        solutions.append(solver.solve(operator, solver.init(operator), rhs)[0])
    windows, shifted, flax, plain = (ravel_pytree(tree)[0] for tree in (*solutions, rhs))
    assert relative_error(shifted, flax) < 1e-10
    assert relative_error(windows, flax) < 1e-10
    assert relative_error(shifted, plain / 0.1) > 0.1


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_is_that_of_flax(kind, rng):
    inputs = normal(rng, 2, 5, 6, 3)
    pool = {"max": nn.max_pool, "average": nn.avg_pool}[kind]
    np.testing.assert_allclose(pooled(inputs, kind), pool(inputs, (2, 2), (2, 2)), rtol=1e-12)


@pytest.mark.parametrize("normalization", [None, "layer", "group", "instance"])
@pytest.mark.parametrize("pooling", ["max", "stride"])
def test_no_example_sees_another(normalization, pooling, rng):
    model = Conv4(8, depth=2, normalization=normalization, pooling=pooling)
    images = normal(rng, 3, 8, 8)
    params = model.init(jax.random.key(0), images)
    together = model.apply(params, images)
    assert together.shape == (3, 2 * 2 * 8)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {together.dtype} == {jnp.dtype("float64")}
    for k in range(3):
        np.testing.assert_allclose(together[k], model.apply(params, images[k : k + 1])[0], rtol=1e-10, atol=1e-12)
    assert ("GroupNorm_0" in params["params"]) == (normalization is not None)


def test_images_may_have_channels(rng):
    images = normal(rng, 2, 16, 16, 3)
    model = Conv4(4)
    params = model.init(jax.random.key(0), images)
    assert params["params"]["ShiftedConv_0"]["kernel"].shape == (3, 3, 3, 4)
    assert model.apply(params, images).shape == (2, 4)
    flat = MLP((5,), image_ndim=3)
    assert flat.apply(flat.init(jax.random.key(0), images), images).shape == (2, 5)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Conv4(2, pooling="sum"), (1, 16, 16), "pooling: expected one of max, average, stride, got 'sum'"),
        (Conv4(2, normalization="batch"), (1, 16, 16), "normalization: expected one of .*, got 'batch'"),
        (Conv4(2, impl="fast"), (1, 16, 16), "impl: expected one of windows, shifted, lax, auto, got 'fast'"),
        (Conv4(2), (1, 8, 8), r"images: expected at least 16 pixels each way, got \(1, 8, 8\)"),
        (Conv4(2), (8, 8), r"images: expected shape \[n, H, W\] or \[n, H, W, C\], got \(8, 8\)"),
        (Conv4(12, normalization="group"), (1, 16, 16), "width: expected a multiple of 8 .*, got 12"),
        (ShiftedConv(2), (4, 4, 1), r"inputs: expected images \[n, H, W, channels\], got shape \(4, 4, 1\)"),
    ],
)
def test_what_cannot_be_built(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.slow
def test_products_with_windows_are_eight_times_faster_on_cpus():
    if jax.default_backend() != "cpu":
        pytest.skip("says nothing of other backends")
    with jax.enable_x64(False):
        measured = bench_convolution.convolution_ratio()
    assert measured.ratio == measured.lax_seconds / measured.windows_seconds
    assert measured.ratio >= 8
