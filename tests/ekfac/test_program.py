"""What EK-FAC must see of the losses' program, and how it says that it does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from ekfac import nets

NET = nets.build("mlp")
FIRST, SECOND = nets.FIRST, nets.SECOND


def hidden(params, batch):
    return jnp.tanh(FIRST(params, batch["x"]))


def loss(params, batch):
    return nets.cross_entropy(SECOND(params, hidden(params, batch)), batch["y"])


def estimate(function, params=None):
    """Raises while the program is traced: nothing is computed."""
    params = NET.params if params is None else params
    operator = nets.operator(function, params, NET.data, NET.coefficients)
    return jax.eval_shape(lambda: nets.estimate(operator))


def uncovered(params, batch):
    return nets.cross_entropy(hidden(params, batch) @ params["w2"][:, :3], batch["y"])


def wrong_name(params, batch):
    return nets.cross_entropy(mi.ekfac.Dense("w2", "b3")(params, hidden(params, batch)), batch["y"])


def used_elsewhere(params, batch):
    return loss(params, batch) + 0.1 * jnp.sum(params["w1"] ** 2)


def used_in_an_input(params, batch):
    inputs = hidden(params, batch) + jnp.mean(params["w1"])
    return nets.cross_entropy(SECOND(params, inputs), batch["y"])


def bypassed(params, batch):
    return jnp.sum(FIRST(params, batch["x"]) ** 2, axis=1) + loss(params, batch)


def computed_kernel(params, batch):
    return loss({**params, "w2": 2.0 * params["w2"]}, batch)


def other_bias(params, batch):
    without = mi.ekfac.Dense("w1")(params, batch["x"])
    return nets.cross_entropy(SECOND(params, hidden(params, batch) + without), batch["y"])


def in_a_loop(params, batch):
    def step(x, _):
        return jnp.tanh(FIRST(params, x)), None

    return nets.cross_entropy(SECOND(params, jax.lax.scan(step, batch["x"], length=2)[0]), batch["y"])


def merged_examples(params, batch):
    outputs = SECOND(params, hidden(params, {"x": batch["x"].reshape(2, 3, 3)}))
    return nets.cross_entropy(outputs.reshape(6, 3), batch["y"])


def marked_twice(params, batch):
    return nets.cross_entropy(mi.ekfac.outputs(mi.ekfac.outputs(nets.mlp(params, batch["x"]))), batch["y"])


def reduced(params, batch):
    return jnp.mean(loss(params, batch))


REFUSED = {
    "uncovered": (uncovered, r"'b2', 'w2': covered by no layer"),
    "wrong name": (wrong_name, r"Dense\(kernel='w2', bias='b3'\): expected a leaf 'b3' in its parameters"),
    "used elsewhere": (used_elsewhere, r"'w1': the losses depend on it other than through its layer"),
    "used in an input": (used_in_an_input, r"'w1': the losses depend on it other than through its layer"),
    "bypassed": (bypassed, r"Dense\(kernel='w1', bias='b1'\): the losses depend on its outputs other than"),
    "computed kernel": (computed_kernel, r"Dense\(kernel='w2', bias='b2'\): expected its kernel and bias to be leaves"),
    "another bias": (other_bias, r"'w1': expected it in one layer"),
    "in a loop": (in_a_loop, r"Dense\(kernel='w1', bias='b1'\): called inside scan"),
    "merged examples": (
        merged_examples,
        r"Dense\(kernel='w1', bias='b1'\): expected the 6 examples on the leading axis",
    ),
    "marked twice": (marked_twice, r"outputs: expected one mark on the model's outputs, got 2"),
    "reduced": (reduced, r"losses: expected one loss per example, shape \(6,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_treated_is_named(case):
    function, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        estimate(function, nets.build("shared").params if case == "in a loop" else NET.params)


def test_an_error_in_a_capture_leaves_nothing_behind():
    with pytest.raises(ValueError, match="covered by no layer"):
        estimate(uncovered)
    assert "ekfac_mark" not in str(jax.make_jaxpr(loss)(NET.params, NET.data))
    estimate(loss)
    assert "ekfac_mark" not in str(jax.make_jaxpr(jax.jit(loss))(NET.params, NET.data))


def test_layers_of_other_parameters_are_constants():
    """The operator acts on the second layer only; the first, whose parameters are closed over, may be in a loop."""
    rest = {name: NET.params[name] for name in ("w2", "b2")}

    def looped(params, batch):
        first = jax.lax.map(lambda x: FIRST(NET.params, x), batch["x"])
        return nets.cross_entropy(SECOND(params, jnp.tanh(first)), batch["y"])

    def values(function):
        operator = nets.operator(function, rest, NET.data, NET.coefficients)
        return [block.values for block in nets.estimate(operator).blocks]

    ways = (lambda params, batch: loss({**NET.params, **params}, batch), looped)
    (plain,), (same,) = jax.jit(lambda: tuple(map(values, ways)))()
    assert plain.shape == (5, 3)
    np.testing.assert_allclose(same, plain, rtol=1e-12, atol=1e-24)


def test_names_are_paths():
    layer = mi.ekfac.Dense("params/0/kernel", "params/0/bias")
    params = {"params": [{"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}]}
    np.testing.assert_array_equal(layer(params, jnp.ones((4, 3))), np.full((4, 2), 4.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mi.ekfac.Dense("w")({"w": jnp.ones((2, 2, 2))}, jnp.ones((1, 2))), r"expected a kernel of shape \[in"),
        (lambda: mi.ekfac.Conv("k")({"k": jnp.ones((2, 2))}, jnp.ones((1, 2))), r"expected inputs \[n, \*space, in\]"),
        (lambda: mi.ekfac.Conv("k", padding="CIRCULAR"), "padding: expected one of"),
    ],
)
def test_layers_check_their_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("options", [{}, {"strides": 2, "padding": "VALID"}, {"padding": 1, "kernel_dilation": 2}])
def test_a_convolution_is_the_product_of_its_patches_with_its_matrix(options):
    rng = np.random.default_rng(1)
    layer = mi.ekfac.Conv("k", **options)
    kernel, inputs = jnp.asarray(rng.normal(size=(3, 2, 2, 4))), jnp.asarray(rng.normal(size=(2, 6, 7, 2)))

    @functools.partial(jax.jit, static_argnums=0)
    def run(layer, kernel, inputs):
        product = layer.features(inputs, kernel.shape) @ layer.matrix(kernel)
        return layer({"k": kernel}, inputs), product, layer.from_matrix(layer.matrix(kernel), kernel.shape)

    outputs, product, same = run(layer, kernel, inputs)
    np.testing.assert_allclose(outputs.reshape(product.shape), product, atol=1e-13)
    np.testing.assert_array_equal(same, kernel)
