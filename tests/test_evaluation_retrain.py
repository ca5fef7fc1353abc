"""Ground truth: interventions, retraining side by side, and its cache."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import convex
import metainfluence as mi
from metainfluence import evaluation
from metainfluence.evaluation import _cache

TASKS = convex.tasks()
WEIGHTS = mi.unit_weights(TASKS)
WEIGHTS = WEIGHTS._replace(query=WEIGHTS.query * 0.5)


def same(got, expected):
    for left, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_leave_one_out_clears_one_datum_at_a_time():
    left = evaluation.leave_one_out(WEIGHTS, tasks=[3, 0], support=[(1, 2)], query=[(2, 0), (0, 3)])
    expected = [{"tasks": [3]}, {"tasks": [0]}, {"support": [(1, 2)]}, {"query": [(2, 0)]}, {"query": [(0, 3)]}]
    assert left.task.shape == (5, 12)
    for row, removed in enumerate(expected):
        same(jax.tree.map(lambda leaf, row=row: leaf[row], left), mi.drop(WEIGHTS, **removed))


def test_leave_groups_out():
    groups = [[0, 5], {"tasks": [1], "query": [(2, 1), (2, 3)]}, [], {"support": np.array([[4, 0]])}]
    left = evaluation.leave_groups_out(WEIGHTS, groups)
    expected = [{"tasks": [0, 5]}, groups[1], {}, groups[3]]
    for row, removed in enumerate(expected):
        same(jax.tree.map(lambda leaf, row=row: leaf[row], left), mi.drop(WEIGHTS, **removed))


def test_random_subsets_keep_their_share_of_the_tasks():
    left, kept = evaluation.random_subsets(WEIGHTS, 200, 0.5, seed=3)
    assert kept.shape == (200, 12)
    assert kept.dtype == bool
    np.testing.assert_array_equal(kept.sum(axis=1), 6)
    np.testing.assert_array_equal(left.task, kept)
    np.testing.assert_array_equal(left.query, np.broadcast_to(WEIGHTS.query, left.query.shape))
    # Each task is kept in half of them: a binomial count, within four standard deviations.
    assert np.all(np.abs(kept.sum(axis=0) - 100) <= 4 * 50**0.5)
    np.testing.assert_array_equal(kept, evaluation.random_subsets(WEIGHTS, 200, 0.5, seed=3)[1])
    assert np.any(kept != evaluation.random_subsets(WEIGHTS, 200, 0.5, seed=4)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation.leave_one_out(WEIGHTS), r"expected at least one datum.*got none"),
        (lambda: evaluation.leave_one_out(WEIGHTS, tasks=[12]), r"^tasks: expected.*got \[12\]"),
        (lambda: evaluation.leave_one_out(WEIGHTS, query=[0, 1]), r"^query: expected pairs.*got"),
        (lambda: evaluation.leave_one_out(TASKS, tasks=[0]), r"^weights: expected.*got Task"),
        (lambda: evaluation.leave_groups_out(WEIGHTS, []), r"^groups: expected at least one.*got none"),
        (lambda: evaluation.leave_groups_out(WEIGHTS, [[0], [-1]]), r"^tasks: expected.*got.*-1"),
        (lambda: evaluation.leave_groups_out(WEIGHTS, [{"task": [0]}]), r"^groups\[0\]: expected the names.*'task'"),
        (lambda: evaluation.leave_groups_out(WEIGHTS, [[0], {"query": [1]}]), r"^groups\[1\]\.query: expected pairs"),
        (lambda: evaluation.leave_groups_out(WEIGHTS, [np.ones(12, bool)]), r"^groups\[0\]\.tasks: expected.*bool"),
        (lambda: evaluation.random_subsets(WEIGHTS, 0, 0.5, 0), r"^num_subsets: expected a positive.*got 0"),
        (lambda: evaluation.random_subsets(WEIGHTS, 3, 0.0, 0), r"^share: expected.*got 0.0"),
        (lambda: evaluation.random_subsets(WEIGHTS, 3, 1.0, 0), r"^share: expected.*got 1.0"),
        (lambda: evaluation.random_subsets(WEIGHTS, 3, 0.01, 0), r"^share: expected one that keeps.*got 0.01"),
        (lambda: evaluation.random_subsets(TASKS, 3, 0.5, 0), r"^weights: expected.*got Task"),
        (lambda: evaluation.retrain("train"), r"^train: expected a function.*got 'train'"),
        (lambda: evaluation.retrain(convex.train, batch_size=0), r"^batch_size: expected.*got 0"),
        (lambda: evaluation.retrain(convex.train)(TASKS, TASKS), r"^interventions: expected.*Weights.*got Task"),
        (
            lambda: evaluation.retrain(convex.train)(jax.tree.map(lambda x: x[None][:0], WEIGHTS), TASKS),
            r"^interventions: expected one leading axis that is not empty, got lengths \[0\]",
        ),
        (
            lambda: evaluation.retrain(convex.train)(WEIGHTS._replace(task=jnp.ones((2, 12))), TASKS),
            r"^interventions: expected one leading axis.*got lengths \[2, 12\]",
        ),
        (
            lambda: evaluation.retrain(convex.train)(LEFT, TASKS, keys=jnp.zeros((0, 3))),
            r"^keys: expected one leading axis.*got lengths \[0\]",
        ),
        (
            lambda: evaluation.retrain(convex.train)(LEFT, TASKS, keys=jnp.zeros(())),
            r"^keys: expected an array with a leading axis",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


LEFT = evaluation.leave_one_out(WEIGHTS, tasks=range(5), support=[(1, 2)], query=[(2, 0)])


@pytest.fixture(scope="module")
def singly():
    """Every intervention trained by itself."""
    train = jax.jit(convex.train)
    rows = [jax.tree.map(lambda leaf, k=k: leaf[k], LEFT) for k in range(7)]
    return jnp.stack([train(row, TASKS, convex.START) for row in rows])


@pytest.mark.parametrize("batch_size", [None, 3, 100])
def test_retraining_side_by_side_equals_a_loop_of_single_trainings(batch_size, singly):
    trained = evaluation.retrain(convex.train, batch_size=batch_size)(LEFT, TASKS, convex.START)
    assert trained.shape == (7, 3)
    np.testing.assert_allclose(trained, singly, rtol=1e-12, atol=1e-14)
    assert np.all(np.ptp(trained, axis=0) > 1e-3)


def noisy(weights, tasks, rate, *, key):
    """Gradient descent from a random start: a pytree of λ, and not yet the optimum."""
    objective = mi.total_objective(convex.PROBLEM)
    meta_params = jax.random.normal(key, (3,))
    for _ in range(2):
        updates = jax.grad(objective)(meta_params, tasks, weights)
        meta_params = optax.apply_updates(meta_params, -rate * updates)
    return {"lam": meta_params}


def test_keys_give_several_seeds(tmp_path):
    keys = jax.random.split(jax.random.key(0), 3)
    run = evaluation.retrain(noisy, batch_size=4, cache=tmp_path / "runs")
    trained = run(LEFT, TASKS, 0.3, keys=keys)["lam"]
    assert trained.shape == (3, 7, 3)
    single = jax.jit(noisy)
    for seed, row in ((0, 0), (1, 6), (2, 3)):
        weights = jax.tree.map(lambda leaf, row=row: leaf[row], LEFT)
        expected = single(weights, TASKS, 0.3, key=keys[seed])["lam"]
        np.testing.assert_allclose(trained[seed, row], expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"differ: keys;"):
        run(LEFT, TASKS, 0.3, keys=jax.random.split(jax.random.key(1), 3))


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
import numpy as np
import convex, metainfluence as mi
from metainfluence import evaluation

savez, done = np.savez, []
def dying(file, *arrays):
    if len(done) == 2:
        file.write(b"half a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(savez(file, *arrays))
np.savez = dying
weights = mi.unit_weights(convex.tasks())
weights = weights._replace(query=weights.query * 0.5)
left = evaluation.leave_one_out(weights, tasks=range(5), support=[(1, 2)], query=[(2, 0)])
evaluation.retrain(convex.train, batch_size=2, cache={cache!r})(left, convex.tasks(), convex.START)
"""


@pytest.fixture(scope="module")
def cached(tmp_path_factory, singly):
    """A run that was killed while it wrote its third chunk, and was then resumed here."""
    folder = tmp_path_factory.mktemp("cache") / "runs"
    script = SCRIPT.format(tests=str(Path(__file__).parent), cache=str(folder))
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("chunk-*.npz")}
    assert sorted(before) == ["chunk-00000.npz", "chunk-00001.npz"]
    run = evaluation.retrain(convex.train, batch_size=2, cache=folder)
    trained = run(LEFT, TASKS, convex.START)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("chunk-*.npz")}
    assert len(after) == 4
    assert before.items() <= after.items()
    return folder, run, trained


def test_a_run_that_was_killed_goes_on_where_it_was(cached, singly):
    _, _, trained = cached
    whole = evaluation.retrain(convex.train, batch_size=2)(LEFT, TASKS, convex.START)
    np.testing.assert_array_equal(trained, whole)
    np.testing.assert_allclose(trained, singly, rtol=1e-12, atol=1e-14)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit flipped": lambda path: path.write_bytes(path.read_bytes().replace(b"\x3f", b"\x3e")),
    "of another shape": lambda path: np.savez(path, np.zeros((2, 5))),
    "with fewer arrays": lambda path: np.savez(path),
    "pickled": lambda path: np.savez(path, np.array([[1, None], [2, 3]], object)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_computed_again(damage, cached):
    folder, run, trained = cached
    path = folder / "chunk-00001.npz"
    intact = path.read_bytes()
    DAMAGES[damage](path)
    assert path.read_bytes() != intact
    np.testing.assert_array_equal(run(LEFT, TASKS, convex.START), trained)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], trained[2:4])


def slower(weights, tasks, start):
    return convex.train(weights, tasks, start, num_steps=11)


OTHERS = {
    "interventions": lambda folder: (convex.train, 2, (jax.tree.map(lambda leaf: leaf[::-1], LEFT), TASKS)),
    r"args\[0\]": lambda folder: (convex.train, 2, (LEFT, convex.tasks(seed=1))),
    "program": lambda folder: (slower, 2, (LEFT, TASKS)),
    "program, batch_size": lambda folder: (convex.train, 3, (LEFT, TASKS)),
}


@pytest.mark.parametrize("part", OTHERS)
def test_a_cache_of_another_run_is_refused_and_left_alone(part, cached):
    folder, _, _ = cached
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    train, batch_size, data = OTHERS[part](folder)
    with pytest.raises(ValueError, match=rf"^cache: expected.*same computation.*differ: {part}; name another"):
        evaluation.retrain(train, batch_size=batch_size, cache=folder)(*data, convex.START)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_cache_without_a_manifest_is_refused(tmp_path):
    (tmp_path / "chunk-00000.npz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^cache: expected a folder with manifest.json, got .* without it"):
        _cache.Cache.open(tmp_path, {"args": "0"})
    (tmp_path / "manifest.json").write_text('{"args": ')
    with pytest.raises(ValueError, match=r"^cache: expected a manifest.*got a damaged file"):
        _cache.Cache.open(tmp_path, {"args": "0"})
    (tmp_path / "manifest.json").write_text(json.dumps({"args": "0"}))
    assert _cache.Cache.open(tmp_path, {"args": "0"}).read(0, [np.zeros(1)]) is None


def test_bfloat16_survives_the_cache(tmp_path):
    cache, array = _cache.Cache.open(tmp_path, {}), np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    cache.write(0, [array])
    (found,) = cache.read(0, [array])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, array)


def test_a_full_disk_is_an_error_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(file, *arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    cache = _cache.Cache.open(tmp_path, {})
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        cache.write(0, [np.zeros(3)])
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_cache_needs_values(tmp_path):
    run = evaluation.retrain(convex.train, cache=tmp_path / "runs")
    with pytest.raises(TypeError, match="interventions: expected values where a cache is named, got traced"):
        jax.jit(lambda left: run(left, TASKS, convex.START))(LEFT)
