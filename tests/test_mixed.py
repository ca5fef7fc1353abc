"""Half precision around a network: what is rounded, in derivatives too, and scores that do not bear it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi

HALF = [jnp.bfloat16, jnp.float16]
RNG = np.random.default_rng(0)
X, W, V = RNG.normal(size=(7, 5)), RNG.normal(size=(5, 3)), RNG.normal(size=(5, 3))


def near(values, dtype):
    return np.asarray(np.asarray(values).astype(dtype), float)


@pytest.mark.parametrize("dtype", HALF)
def test_operands_are_rounded_and_sums_are_not_in_a_hessian_product_too(dtype):
    """By hand: of |y|²/2, y = R(x) R(w), the gradient is R(x)ᵀ R(y), its derivative along v R(x)ᵀ R(R(x) R(v))."""
    network = mi.mixed.compute_in(dtype)(jnp.matmul)

    def gradient(w):
        return jax.grad(lambda w: jnp.sum(network(X, w) ** 2) / 2)(w)

    slope, product = jax.jit(lambda w, v: jax.jvp(gradient, (w,), (v,)))(W, V)
    x = near(X, dtype)
    np.testing.assert_allclose(slope, x.T @ near(x @ near(W, dtype), dtype), rtol=1e-12)
    np.testing.assert_allclose(product, x.T @ near(x @ near(V, dtype), dtype), rtol=1e-12)
    assert slope.dtype == product.dtype == W.dtype
    assert np.abs(slope - X.T @ (X @ W)).max() > 1e-4


def test_small_and_large_numbers_are_those_of_the_format():
    """Emulated on a CPU: float16's smallest numbers, and where it ends."""
    values = np.asarray([[1e-5], [1e-7], [1e-9], [7e4], [-3e-6], [0.0]])
    found = mi.mixed.compute_in(jnp.float16)(jnp.matmul)(values, np.ones((1, 1)))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, near(values, np.float16))


def test_every_kind_of_call_is_gone_into():
    images, kernel = RNG.normal(size=(2, 6, 6, 3)), RNG.normal(size=(3, 3, 3, 4))

    def network(kernel, images):
        numbers = ("NHWC", "HWIO", "NHWC")
        seen = jax.nn.relu(jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers))
        mix = jnp.eye(4) / 3 + 0.1
        seen, _ = jax.lax.scan(lambda h, _: (jax.checkpoint(lambda h: jnp.tanh(h @ mix))(h), None), seen, length=2)
        return seen

    def hessian_product(network):
        def gradient(kernel):
            # One kernel for each of two tasks, under vmap.
            both = jnp.stack([kernel, 2 * kernel])
            return jax.grad(lambda k: jnp.sum(jax.vmap(network, (0, None))(k, images) ** 2))(both)

        return jax.jit(lambda k: jax.jvp(gradient, (k,), (k,)))(kernel)

    half, full = hessian_product(mi.mixed.compute_in(jnp.bfloat16)(network)), hessian_product(network)
    for found, wanted in zip(half, full, strict=True):
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 1e-4 < error < 0.05


def test_a_product_that_cannot_be_reached_is_refused():
    def network(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w * 2)

    with pytest.raises(TypeError, match=r"expected products of matrices outside of .*, got one inside cond"):
        mi.mixed.compute_in(jnp.bfloat16)(network)(jnp.asarray(X), jnp.asarray(W))


def test_an_accelerator_gets_products_of_half_precision():
    network = mi.mixed.compute_in(jnp.bfloat16)(jnp.matmul)
    shapes = [jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in (X, W)]
    traced = jax.jit(network).trace(*shapes)
    assert (
        "(tensor<7x5xbf16>, tensor<5x3xbf16>) -> tensor<7x3xf32>"
        in traced.lower(lowering_platforms=("cuda",)).as_text()
    )
    assert "xbf16>" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def problem_of(network, finish):
    """Prototypes of a class each; λ is the network's matrix. `finish` makes the losses of features and prototypes."""

    def adapt(weights, support, coefficients):
        seen = network(weights, support)
        return jnp.stack([coefficients[:2] @ seen[:2], coefficients[2:] @ seen[2:]])

    def losses(prototypes, weights, query):
        seen = network(weights, query["x"])
        logits = -finish(seen, prototypes)
        return -jax.nn.log_softmax(logits, -1)[jnp.arange(len(logits)), query["y"]]

    return mi.bilevel(losses, mi.adaptation.closed_form(adapt), meta_regularizer=mi.l2(1.0))


def squares(seen, prototypes):
    return jnp.sum((seen[:, None] - prototypes[None]) ** 2, -1)


def tasks(count, seed):
    rng = np.random.default_rng(seed)
    support, query = rng.normal(size=(count, 4, 5)), rng.normal(size=(count, 6, 5))
    return mi.Task(jnp.asarray(support), {"x": jnp.asarray(query), "y": jnp.asarray(rng.integers(0, 2, (count, 6)))})


def linear(weights, x):
    return jnp.tanh(x @ weights)


def in_half(function, dtype):
    """The function with its arguments cast, as one writes it who casts a whole loss."""

    def run(*args):
        found = function(*(each.astype(dtype) for each in args))
        return found.astype(args[0].dtype)

    return run


def overflowing(seen, prototypes):
    """A loss on a scale of its own, which float16 does not have."""
    return squares(300 * seen, 300 * prototypes) / 300 / 300


def norms(seen, prototypes):
    """Of features that are small; float16 has no number below 6e-8 for their squares."""
    return 1e4 * jnp.linalg.norm(1e-4 * (seen[:, None] - prototypes[None]), axis=-1)


def expanded(seen, prototypes):
    """The distance by |a|² − 2ab + |p|², far from the origin."""
    seen, prototypes = seen + 10, prototypes + 10
    return jnp.sum(seen**2, -1)[:, None] - 2 * seen @ prototypes.T + jnp.sum(prototypes**2, -1)[None]


PLANTED = {
    "overflow": (overflowing, jnp.float16),
    "norm": (norms, jnp.float16),
    "distance": (expanded, jnp.bfloat16),
}


@pytest.mark.parametrize("name", PLANTED)
def test_scores_that_do_not_bear_it_are_refused_and_a_network_alone_passes(name):
    finish, dtype = PLANTED[name]
    full = problem_of(linear, finish)
    target, held_out, options = mi.query_loss(full), tasks(3, 1), {"damping": 1.0, "solver": mi.solvers.identity()}
    data = (jnp.asarray(W), tasks(12, 0), held_out)
    bad = problem_of(linear, in_half(finish, dtype))
    with pytest.raises(mi.mixed.PrecisionError, match=r"rank correlation .* at least 0\.999, got") as caught:
        mi.mixed.probe(bad, full, target, **options)(*data)
    number = str(caught.value).partition(", got ")[2]
    assert number.startswith("none") or float(number.split()[0]) < 0.999
    good = problem_of(mi.mixed.compute_in(dtype)(linear), finish)
    found = mi.mixed.probe(good, full, target, **options)(*data)
    assert found.rank_correlation >= 0.999
    assert 1e-5 < found.error < 0.05
    assert found.num_scores == 8 * (1 + 4 + 6)


def test_the_report_on_a_solve_knows_the_precision_inside():
    half = problem_of(mi.mixed.compute_in(jnp.bfloat16)(linear), squares)
    response = mi.task_if(half, damping=1.0, solver=mi.solvers.identity())
    info = jax.jit(response)(jnp.asarray(W), tasks(2, 0)).info
    np.testing.assert_array_equal(info.working_eps, 2.0**-7)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: mi.mixed.compute_in(jnp.float32), ValueError, r"dtype: expected jnp\.bfloat16 or jnp\.float16, got"),
        (lambda: mi.mixed.compute_in(None), ValueError, "dtype: expected"),
        (lambda: mi.mixed.compute_in(jnp.bfloat16)(3), TypeError, "apply: expected a function"),
        (lambda: probe(least=2.0), ValueError, "least: expected a number above 0"),
        (lambda: probe(num_tasks=0), ValueError, "num_tasks"),
        (lambda: probe()(jnp.asarray(W), 3), TypeError, "tasks: expected stacked tasks, or a source"),
        (lambda: jax.jit(probe())(W, tasks(2, 0), tasks(1, 1)), TypeError, "call the probe outside of jit"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()


def probe(**options):
    full = problem_of(linear, squares)
    return mi.mixed.probe(full, full, mi.query_loss(full), **options)
