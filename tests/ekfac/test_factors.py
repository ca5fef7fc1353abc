"""The curvature that EK-FAC builds, against matrices built of dense Jacobians and of loops over positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from ekfac import nets
from oracles.reference import relative_error

NETS = ("mlp", "shared", "convolutional")
METRIC = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 0.7]])


def operator_of(net, function=None):
    function = nets.losses_of(net.model, net.head) if function is None else function
    return nets.operator(function, net.params, net.data, net.coefficients)


@functools.cache
def compared(name):
    """Gauss–Newton by Jacobians; EK-FAC and K-FAC; projectors on the basis vectors with their eigenvalues, by layer."""
    net = nets.build(name)

    def run(operator):
        factors, kfac = nets.estimate(operator), nets.estimate(operator, reestimate=False)

        def projectors(index):
            none = [jnp.zeros_like(block.values) for block in factors.blocks]

            def projector(one):
                return nets.matrix(operator, factors, [*none[:index], one, *none[index + 1 :]])

            return jax.vmap(projector)(jnp.eye(none[index].size).reshape(-1, *none[index].shape))

        pairs = [(projectors(index), block.values.reshape(-1)) for index, block in enumerate(factors.blocks)]
        return nets.matrix(operator, factors), nets.matrix(operator, kfac), pairs

    return nets.gauss_newton(net), *jax.jit(run)(operator_of(net))


@pytest.mark.parametrize("name", NETS)
def test_eigenvalues_are_the_best_in_their_basis(name):
    exact, _, _, pairs = compared(name)
    for projectors, values in pairs:
        assert relative_error(values, np.einsum("kab,ab->k", projectors, exact)) <= 1e-12


@pytest.mark.parametrize("name", NETS)
def test_ekfac_is_closer_to_gauss_newton_than_kfac(name):
    exact, ekfac, kfac, _ = compared(name)
    errors = [relative_error(found, exact) for found in (ekfac, kfac)]
    assert errors[0] < 0.99 * errors[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("regularizer", [None, nets.l2(0.3)])
def test_one_linear_layer_with_squared_loss_is_exact(bias, regularizer):
    net, rng = nets.build("mlp"), np.random.default_rng(8)
    layer = mi.ekfac.Dense("w1", "b1" if bias else None)
    params = {"w1": jnp.asarray(rng.normal(size=(3, 3)))} | ({"b1": jnp.asarray(rng.normal(size=3))} if bias else {})

    def function(params, batch):
        error = layer(params, batch["x"]) - batch["y"]
        return jnp.einsum("ni,ij,nj->n", error, METRIC, error)

    exact = nets.hessian(function, params, net.data, net.coefficients, regularizer)
    operator = nets.operator(function, params, net.data, net.coefficients, regularizer).damped(1e-3)
    rhs = jnp.asarray(rng.normal(size=operator.size))

    @jax.jit
    def run(operator):
        solver = mi.solvers.ekfac()
        solution, info = solver.solve(operator, solver.init(operator), operator.domain.unravel(rhs))
        return nets.matrix(operator, nets.estimate(operator)), ravel_pytree(solution)[0], info

    found, solution, info = run(operator)
    assert relative_error(found, exact) <= 1e-12
    assert relative_error(solution, np.linalg.solve(exact + 1e-3 * np.eye(len(exact)), rhs)) <= 1e-10
    assert info.status == mi.SolveStatus.CONVERGED


def test_the_convolution_factors_are_sums_over_positions():
    net = nets.build("convolutional")
    layer, weights = nets.CONV, np.asarray(net.coefficients)
    padded = np.pad(net.data["x"], ((0, 0), (1, 0), (0, 1), (0, 0)))
    places = [(row, column) for row in (0, 2) for column in range(4)]
    patches = np.stack([padded[:, i : i + 2, j : j + 3 : 2].reshape(6, -1) for i, j in places], axis=1)
    patches = np.concatenate([patches, np.ones((6, len(places), 1))], axis=2)

    def tail(hidden):
        return nets.SECOND(net.params, jnp.tanh(hidden).reshape(1, -1))[0]

    hidden = layer(net.params, net.data["x"])
    jacobian = jax.vmap(jax.jacrev(tail))(hidden[:, None]).reshape(6, 3, len(places), 2)
    curvature = jax.vmap(jax.hessian(net.head))(jax.vmap(tail)(hidden[:, None]), net.data["y"])
    first = np.einsum("n,npi,npj->ij", weights, patches, patches)
    second = np.einsum("n,nkpo,nkl,nlpq->oq", weights, jacobian, curvature, jacobian)

    index = ravel_pytree(net.params)[1](jnp.arange(ravel_pytree(net.params)[0].size, dtype=float))
    rows = np.concatenate([np.reshape(index["k"], (8, 2)), index["b1"][None]]).astype(int).reshape(-1)
    expected = np.kron(first, second) / (len(places) * weights.sum())
    assert relative_error(compared("convolutional")[2][np.ix_(rows, rows)], expected) <= 1e-12


def test_however_the_losses_are_run_the_factors_are_the_same():
    net = nets.build("mlp")
    plain = nets.losses_of(net.model, net.head)
    single = mi.per_example(lambda params, _, batch: plain(params, batch)[0])
    compiled = jax.jit(jax.checkpoint(plain))
    compiled(net.params, net.data)
    ways = {
        "per_example": lambda params, batch: single(params, None, batch),
        "mapped": lambda params, batch: jax.vmap(
            lambda x, y: net.head(nets.mlp(params, x[None])[0], y), in_axes=(1, 0)
        )(batch["x"].T, batch["y"]),
        "compiled before": compiled,
        "marked outputs": lambda params, batch: net.head(mi.ekfac.outputs(nets.mlp(params, batch["x"])), batch["y"]),
        "two heads": two_heads,
        "stopped": lambda params, batch: plain(params, batch) * jax.lax.stop_gradient(1 + 0 * jnp.sum(params["w1"])),
    }
    found = jax.jit(lambda: {k: nets.matrix(o := operator_of(net, f), nets.estimate(o)) for k, f in ways.items()})()
    for matrix in found.values():
        assert relative_error(matrix, compared("mlp")[1]) <= 1e-12


def two_heads(params, batch):
    """The same outputs, in parts."""
    logits = nets.mlp(params, batch["x"])
    first, rest = mi.ekfac.outputs((logits[:, 0], logits[:, 1:]))
    return nets.cross_entropy(jnp.concatenate([first[:, None], rest], axis=1), batch["y"])


def test_groups_are_added_up_whatever_the_chunks():
    net = nets.build("mlp")
    function = nets.losses_of(net.model, net.head)
    data, coefficients = jax.tree.map(lambda leaf: leaf.reshape(3, 2, *leaf.shape[1:]), (net.data, net.coefficients))
    groups = nets.operator(function, net.params, data, coefficients)
    for batch_size in (None, 2):
        found = jax.jit(lambda o, size=batch_size: nets.matrix(o, nets.estimate(o, batch_size=size)))(groups)
        assert relative_error(found, compared("mlp")[1]) <= 1e-12


def test_a_regularizer_of_uneven_weights_enters_by_its_diagonal_in_the_basis():
    net = nets.build("mlp")

    def kernels_only(params):
        return 0.7 * sum(jnp.sum(params[name] ** 2) for name in ("w1", "w2"))

    function = nets.losses_of(net.model, net.head)
    operator = nets.operator(function, net.params, net.data, net.coefficients, kernels_only)
    found = jax.jit(lambda operator: nets.matrix(operator, nets.estimate(operator)))(operator)
    diagonal = 1.4 * ravel_pytree(jax.tree.map(lambda leaf: jnp.full_like(leaf, leaf.ndim == 2), net.params))[0]
    for projectors, _ in compared("mlp")[3]:
        added = np.einsum("kab,ab->k", projectors, found - compared("mlp")[1])
        assert relative_error(added, np.einsum("kaa,a->k", projectors, diagonal)) <= 1e-12
