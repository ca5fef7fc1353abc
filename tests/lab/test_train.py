import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import metainfluence as mi
from metainfluence.lab import digits, fewshot
from metainfluence.lab.models import MLP, logistic_head_problem
from metainfluence.lab.train import meta_train, training_steps

NUM_STEPS = 20


@pytest.fixture(scope="module")
def problem():
    return logistic_head_problem(MLP((8, 4)), 3, head_l2=0.1)


@pytest.fixture(scope="module")
def tasks():
    source = digits.load()
    listed = fewshot.sample_tasks(source.labels, num_tasks=6, ways=3, shots=2, queries=4, seed=0)
    return fewshot.materialize(listed, source.images)


@pytest.fixture(scope="module")
def initial(tasks):
    return MLP((8, 4)).init(jax.random.key(0), tasks.support.images[0])


@pytest.fixture(scope="module")
def train(problem):
    return meta_train(problem, optax.adam(0.03), NUM_STEPS, block_size=8)


@pytest.fixture(scope="module")
def trained(train, initial, tasks):
    return train(initial, tasks)


def test_parameters_and_features_are_float64(initial, tasks):
    features = MLP((8, 4)).apply(initial, tasks.support.images)
    assert features.shape == (6, 6, 4)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {features.dtype} == {jnp.dtype("float64")}


def test_the_head_is_fitted_to_the_support_set(problem, initial, tasks):
    weights = mi.unit_weights(tasks)
    task, own = jax.tree.map(lambda leaf: leaf[0], (tasks, weights))
    head = problem.adapt(initial, task, own)
    assert 0 < problem.inner_gradient_norm(head, initial, task, own) < 1e-8
    assert problem.inner_gradient_norm(jax.tree.map(jnp.zeros_like, head), initial, task, own) > 1e-2


def test_training_lowers_the_objective(problem, trained, initial, tasks):
    objective = mi.total_objective(problem)
    assert trained.losses.shape == (NUM_STEPS,)
    np.testing.assert_allclose(trained.losses[0], objective(initial, tasks), rtol=1e-10)
    assert objective(trained.meta_params, tasks) < trained.losses[-1] < 0.8 * trained.losses[0]


def test_blocks_are_one_run(problem, trained, initial, tasks):
    """20 steps in blocks of 8, 8 and 4 are 20 steps, so the optimiser's state is carried over."""
    optimizer = optax.adam(0.03)
    steps = jax.jit(training_steps(problem, optimizer, NUM_STEPS))
    meta_params, _, losses = steps(initial, optimizer.init(initial), tasks, mi.unit_weights(tasks))
    np.testing.assert_allclose(trained.losses, losses, rtol=1e-10)
    for one, other in zip(jax.tree.leaves(trained.meta_params), jax.tree.leaves(meta_params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


def test_a_task_of_weight_zero_is_absent(problem, train, initial, tasks):
    """F stays a mean over all T tasks: five of six tasks weigh 5/6 of the same five alone."""
    without = train(initial, tasks, mi.drop(mi.unit_weights(tasks), tasks=[2]))
    kept = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 3, 4, 5])], tasks)
    weights = mi.unit_weights(kept)
    weights = weights._replace(task=weights.task * (5 / 6))
    alone = meta_train(problem, optax.adam(0.03), NUM_STEPS, block_size=NUM_STEPS)(initial, kept, weights)
    np.testing.assert_allclose(without.losses, alone.losses, rtol=1e-8)


def test_weights_change_the_result_without_compiling_again(train, trained, initial, tasks):
    without = train(initial, tasks, mi.drop(mi.unit_weights(tasks), tasks=[2]))
    assert without.compile_seconds == 0
    assert trained.compile_seconds > 0
    assert not np.allclose(without.losses, trained.losses, rtol=1e-3)


def test_progress_is_plain_lines_where_there_is_no_terminal(problem, initial, tasks):
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    trained = meta_train(problem, optax.adam(0.03), 3, block_size=2, console=console)(initial, tasks)
    assert out.getvalue() == f"step 2/3  F = {trained.losses[1]:.4f}\nstep 3/3  F = {trained.losses[2]:.4f}\n"


def test_progress_is_a_bar_on_a_terminal(train, problem, initial, tasks):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    trained = meta_train(problem, optax.adam(0.03), 2, block_size=2, console=console)(initial, tasks)
    assert "2/2" in out.getvalue()
    assert f"F = {trained.losses[1]:.4f}" in out.getvalue()
