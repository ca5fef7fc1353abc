import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import metainfluence as mi
from metainfluence.lab.data import digits, fewshot
from metainfluence.lab.learn.models import MLP, logistic_head_problem
from metainfluence.lab.learn.train import batch_index, meta_train, train_many, training_steps

NUM_STEPS = 20
GOLDEN_BATCHES = [[5, 0, 3], [6, 1, 4]]


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


def weights_without(tasks, removed):
    """[M] weights, each without one task."""
    unit = mi.unit_weights(tasks)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[mi.drop(unit, tasks=[k]) for k in removed])


def test_every_epoch_takes_every_task_once():
    steps = [batch_index(jnp.asarray(step), 7, 3, 5).tolist() for step in range(4)]
    first, second = steps[0] + steps[1], steps[2] + steps[3]
    assert len(set(first)) == len(set(second)) == 6
    assert first != second
    assert steps[0] != batch_index(jnp.asarray(0), 7, 3, 6).tolist()
    # Golden: a change of these changes every minibatched run.
    assert steps[:2] == GOLDEN_BATCHES


@pytest.fixture(scope="module")
def in_batches(problem):
    return meta_train(problem, optax.adam(0.03), 10, tasks_per_step=2, seed=3, block_size=5)


def test_a_batch_stands_for_all_tasks(problem, in_batches, initial, tasks):
    """By hand, beyond the first block of steps: the batches' own objectives, the weights of their tasks included."""
    weights = mi.unit_weights(tasks)._replace(task=jnp.arange(6.0))
    trained = in_batches(initial, tasks, weights)
    optimizer, meta_params = optax.adam(0.03), initial
    state = optimizer.init(initial)
    step = jax.jit(jax.value_and_grad(mi.total_objective(problem)))
    for k in range(7):
        index = batch_index(jnp.asarray(k), 6, 2, 3)
        value, gradient = step(meta_params, *jax.tree.map(lambda leaf, index=index: leaf[index], (tasks, weights)))
        np.testing.assert_allclose(trained.losses[k], value, rtol=1e-9)
        updates, state = optimizer.update(gradient, state)
        meta_params = optax.apply_updates(meta_params, updates)


def test_looked_up_tasks_train_as_materialised_ones(problem, in_batches, initial, tasks):
    source = digits.load()
    listed = fewshot.sample_tasks(source.labels, num_tasks=6, ways=3, shots=2, queries=4, seed=0)
    train = meta_train(problem, optax.adam(0.03), 5, tasks_per_step=2, seed=3, block_size=5, lookup=fewshot.lookup)
    ids = fewshot.indexed(listed)
    got = train(initial, ids, mi.unit_weights(ids), jnp.asarray(source.images))
    np.testing.assert_allclose(got.losses, in_batches(initial, tasks).losses[:5], rtol=1e-10)


def test_many_models_are_each_their_own_training(problem, train, initial, tasks):
    """Against `meta_train`, one by one; in chunks that do not divide their number, with the λ on the way kept."""
    many = jax.jit(train_many(problem, optax.adam(0.03), NUM_STEPS, batch_size=2, keep_every=10))
    trained = many(initial, tasks, weights_without(tasks, [0, 2, 5]))
    assert trained.losses.shape == (3, NUM_STEPS)
    for row, removed in enumerate([0, 2, 5]):
        alone = train(initial, tasks, mi.drop(mi.unit_weights(tasks), tasks=[removed]))
        np.testing.assert_allclose(trained.losses[row], alone.losses, rtol=1e-8)
        for leaf, kept, one in zip(
            *map(jax.tree.leaves, (trained.meta_params, trained.kept, alone.meta_params)), strict=True
        ):
            assert kept.shape[:2] == (3, 2)
            np.testing.assert_array_equal(kept[row, -1], leaf[row])
            np.testing.assert_allclose(leaf[row], one, rtol=1e-5, atol=1e-8)
    half = jax.jit(training_steps(problem, optax.adam(0.03), 10))
    expected = half(initial, optax.adam(0.03).init(initial), tasks, mi.drop(mi.unit_weights(tasks), tasks=[0]))[0]
    for kept, leaf in zip(*map(jax.tree.leaves, (trained.kept, expected)), strict=True):
        np.testing.assert_allclose(kept[0, 0], leaf, rtol=1e-5, atol=1e-8)


def test_many_models_may_start_differently(problem, initial, tasks):
    """The same weights from two starts, in batches, one model at a time; each step's loss at the λ before it."""
    starts = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), initial)
    options = {"stacked_start": True, "tasks_per_step": 3, "batch_size": 1, "keep_every": 1}
    many = train_many(problem, optax.sgd(0.1), 2, **options)
    trained = jax.jit(many)(starts, tasks, weights_without(tasks, [1, 1]))
    objective = jax.jit(mi.total_objective(problem))
    weights = mi.drop(mi.unit_weights(tasks), tasks=[1])
    for row in range(2):
        kept = jax.tree.map(lambda leaf: leaf[:, 0], trained.kept)
        before = [jax.tree.map(lambda leaf, row=row: leaf[row], tree) for tree in (starts, kept)]
        for step, meta_params in enumerate(before):
            index = batch_index(jnp.asarray(step), 6, 3, 0)
            batch = jax.tree.map(lambda leaf, index=index: leaf[index], (tasks, weights))
            np.testing.assert_allclose(trained.losses[row, step], objective(meta_params, *batch), rtol=1e-10)


class CutShortError(Exception):
    pass


class Cutting(io.StringIO):
    """Output that ends a run at the third sign of life."""

    def write(self, text):
        if "15/20" in text:
            raise CutShortError
        return super().write(text)


def test_a_run_that_is_cut_short_goes_on_to_the_same_result(problem, initial, tasks, tmp_path):
    """Cut after step 15, of which the last checkpoint holds 10."""
    options = {"tasks_per_step": 2, "seed": 1, "block_size": 5, "save_every": 10}
    optimizer = optax.adam(0.03)
    whole = meta_train(problem, optimizer, 20, **options)(initial, tasks)
    folder = tmp_path / "run"
    console = Console(file=Cutting(), force_terminal=False)
    with pytest.raises(CutShortError):
        meta_train(problem, optimizer, 20, **options, checkpoints=folder, console=console)(initial, tasks)
    lines = io.StringIO()
    console = Console(file=lines, force_terminal=False, width=100)
    train = meta_train(problem, optimizer, 20, **options, checkpoints=folder, console=console)
    resumed = train(initial, tasks)
    assert [line.split()[1] for line in lines.getvalue().splitlines()] == ["15/20", "20/20"]
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-12)
    for one, other in zip(*map(jax.tree.leaves, (resumed.meta_params, whole.meta_params)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)

    finished = train(initial, tasks)
    assert len(lines.getvalue().splitlines()) == 2
    np.testing.assert_array_equal(finished.losses, resumed.losses)
    with pytest.raises(ValueError, match="checkpoints: expected a folder of this run"):
        train(initial, tasks, mi.drop(mi.unit_weights(tasks), tasks=[0]))


def test_bad_input(problem, initial, tasks):
    with pytest.raises(ValueError, match="tasks_per_step: expected a number from 1 to 6, got 7"):
        meta_train(problem, optax.sgd(0.1), 2, tasks_per_step=7)(initial, tasks)
    with pytest.raises(ValueError, match="keep_every: expected a divisor of num_steps 20, got 3"):
        train_many(problem, optax.sgd(0.1), 20, keep_every=3)
    with pytest.raises(ValueError, match="save_every: expected a multiple of block_size 25, got 30"):
        meta_train(problem, optax.sgd(0.1), 50, save_every=30)
