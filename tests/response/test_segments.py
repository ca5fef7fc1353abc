"""Segments against the dense formula, against the two limits that they have, and in what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.stats
from jax.flatten_util import ravel_pytree

import convex
import metainfluence as mi
from oracles.parts import apply_net, dense_net, lenient, regression_tasks, squared_error
from oracles.reference import difference, offsets, ravel, relative_error, row, rows

NUM_STEPS, RATE = 40, 0.02


def model(params, meta_params, batch):
    del meta_params
    return apply_net(params, batch["x"])


def inner_loss(params, meta_params, batch):
    return squared_error(model(params, meta_params, batch), batch)


PROBLEM = mi.bilevel(
    inner_loss,
    mi.adaptation.unrolled(inner_loss, lambda meta_params, support: meta_params, optax.sgd(0.1), num_steps=1),
    meta_regularizer=mi.l2(1e-3),
)


TASKS = regression_tasks(np.random.default_rng(3), [4] * 8 + [3] * 8, [5] * 16, inputs=3)
WEIGHTS = jax.tree.map(
    lambda leaf: leaf + 0.3 * np.sin(7.0 * np.arange(leaf.size)).reshape(leaf.shape), mi.unit_weights(TASKS)
)
START = dense_net(np.random.default_rng(5), 3, 8, 1)


@functools.cache
def trained(name, num_steps=NUM_STEPS):
    """(λ, optimiser state) after every step of a run, stacked."""
    optimizer = {"sgd": optax.sgd(RATE * 10), "adam": lenient(optax.adamw(RATE, eps_root=1e-5, weight_decay=0.1))}[name]
    gradient = jax.grad(mi.total_objective(PROBLEM))

    def step(carry, _):
        meta_params, state = carry
        updates, state = optimizer.update(gradient(meta_params, TASKS, WEIGHTS), state, meta_params)
        carry = (optax.apply_updates(meta_params, updates), state)
        return carry, carry

    run = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=num_steps)[1])
    return run(START)


def known(name, count=5):
    kept = [row(trained(name), NUM_STEPS // count * (k + 1) - 1) for k in range(count)]
    if name == "sgd":
        return mi.checkpoints(kept, num_steps=NUM_STEPS, learning_rate=RATE * 10)
    return mi.checkpoints(kept, learning_rate=RATE, second_moments=True, eps_root=1e-5, weight_decay=0.1)


@functools.cache
def jets(name, count=5):
    """The dense Hessian and ∂_w D_λF `[p, all weights]` at every checkpoint, by other derivatives than the library's."""
    unravel = ravel_pytree(START)[1]
    flat_weights, unravel_weights = ravel_pytree(WEIGHTS)

    def objective(lam, flat):
        return mi.total_objective(PROBLEM)(unravel(lam), TASKS, unravel_weights(flat))

    @jax.jit
    def jet(lam):
        hessian = jax.hessian(objective)(lam, flat_weights)
        return hessian, jax.jacfwd(jax.grad(objective), argnums=1)(lam, flat_weights)

    return [jax.tree.map(np.asarray, jet(ravel(each.meta_params))) for each in known(name, count)]


def dense_response(name, count=5):
    """dλ/dw `[p, all weights]` by the formula, with full eigendecompositions."""
    change = 0.0
    for each, (hessian, mixed) in zip(known(name, count), jets(name, count), strict=True):
        root = np.sqrt(ravel(each.preconditioner)) if each.preconditioner is not None else np.ones(len(hessian))
        scaled = hessian / root[:, None] / root[None] + each.weight_decay * np.eye(len(hessian))
        values, vectors = np.linalg.eigh(scaled)
        values = np.maximum(values, 0)
        decayed = np.exp(-each.time * values)
        integrated = np.where(values > 0, (1 - decayed) / np.where(values > 0, values, 1), each.time)
        inside = vectors.T @ (root[:, None] * change) if np.ndim(change) else 0.0
        inside = np.reshape(decayed, (-1, 1)) * inside - integrated[:, None] * (vectors.T @ (mixed / root[:, None]))
        change = (vectors @ inside) / root[:, None]
    return change


@functools.cache
def answered(name, **options):
    """A response at full rank, and what it says along a few slopes and directions; made and asked in two programs."""
    rank = options.get("rank", 1000)
    make = mi.segments(PROBLEM, rank=rank, tol=options.get("tol", 0.0), batch_size=options.get("batch_size"))
    at = jax.jit(make)(known(name), TASKS, WEIGHTS)
    return at, jax.jit(lambda at, slopes: at.vjp(slopes)), jax.jit(lambda at, directions: at.jvp(directions))


def random_like(tree, seed, count=None):
    rng = np.random.default_rng(seed)
    shape = () if count is None else (count,)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=shape + np.shape(leaf))), tree)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_scores_of_several_targets_against_the_dense_formula(name):
    at, vjp, _ = answered(name)
    slopes = random_like(START, 1, 3)
    found, info = vjp(at, slopes)
    assert relative_error(rows(found), rows(slopes) @ dense_response(name)) <= 1e-9
    assert info.status.tolist() == [mi.SolveStatus.CONVERGED] * 3


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_changes_along_several_directions_against_the_dense_formula(name):
    at, _, jvp = answered(name)
    directions = random_like(WEIGHTS, 2, 3)
    found = jvp(at, directions)
    assert relative_error(rows(found.delta), rows(directions) @ dense_response(name).T) <= 1e-9


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_one_question_is_one_row_of_many_and_forward_is_reverse_transposed(name):
    at, vjp, jvp = answered(name)
    slopes, directions = random_like(START, 1, 3), random_like(WEIGHTS, 2, 3)
    backward, forward = vjp(at, row(slopes, 1))[0], jvp(at, row(directions, 2)).delta
    assert relative_error(ravel(backward), rows(vjp(at, slopes)[0])[1]) <= 1e-12
    assert relative_error(ravel(forward), rows(jvp(at, directions).delta)[2]) <= 1e-12
    left, right = ravel(backward) @ ravel(row(directions, 2)), ravel(forward) @ ravel(row(slopes, 1))
    assert abs(left - right) <= 1e-10 * abs(left)
