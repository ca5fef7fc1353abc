"""Tasks, weights and removal as plain pytrees."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi


def task(n_support, n_query, offset=0):
    """A task with floats, integers, booleans and a nested leaf, all distinct."""
    return mi.Task(
        {
            "x": offset + jnp.arange(2.0 * n_support).reshape(n_support, 2),
            "y": (jnp.arange(n_support, dtype=jnp.int32),),
        },
        [offset + jnp.arange(float(n_query)), jnp.arange(n_query) % 2 == 0],
    )


def test_tasks_of_one_size_are_stacked_without_masks():
    stacked = mi.stack_tasks([task(3, 2), task(3, 2, 10)])
    assert stacked.support_mask is None
    assert stacked.query_mask is None
    np.testing.assert_array_equal(stacked.support["x"][1], task(3, 2, 10).support["x"])
    assert stacked.support["y"][0].dtype == jnp.int32
    assert stacked.query[1].dtype == jnp.bool_


def test_ragged_tasks_are_padded_and_masked():
    single = [task(3, 4), task(5, 1, 10), task(1, 4, 20)]
    stacked = mi.stack_tasks(single)
    np.testing.assert_array_equal(stacked.support_mask, np.arange(5)[None] < np.array([[3], [5], [1]]))
    np.testing.assert_array_equal(stacked.query_mask, np.arange(4)[None] < np.array([[4], [1], [4]]))
    for k, original in enumerate(single):
        for side, mask in (("support", stacked.support_mask), ("query", stacked.query_mask)):
            for got, wanted in zip(
                jax.tree.leaves(getattr(stacked, side)), jax.tree.leaves(getattr(original, side)), strict=True
            ):
                np.testing.assert_array_equal(got[k][mask[k]], wanted)
                assert got.dtype == wanted.dtype


def test_masks_that_tasks_bring_along_are_kept():
    first = task(3, 2)._replace(support_mask=jnp.asarray([True, False, True]))
    stacked = mi.stack_tasks([first, task(4, 2)])
    np.testing.assert_array_equal(stacked.support_mask, [[True, False, True, False], [True] * 4])


def test_unit_weights_have_the_shapes_of_the_tasks():
    weights = mi.unit_weights(mi.stack_tasks([task(3, 4), task(5, 1)]))
    assert [leaf.shape for leaf in weights] == [(2,), (2, 5), (2, 4)]
    assert all(np.all(leaf == 1) for leaf in weights)


def test_drop_sets_weights_to_zero_and_leaves_the_rest():
    weights = jax.tree.map(lambda leaf: 2.0 * leaf, mi.unit_weights(mi.stack_tasks([task(3, 4), task(5, 1)])))
    dropped = mi.drop(weights, tasks=[1], support=[(0, 2), (1, 4)], query=np.array([[0, 0]]))
    np.testing.assert_array_equal(dropped.task, [2, 0])
    expected = np.full((2, 5), 2.0)
    expected[0, 2] = expected[1, 4] = 0
    np.testing.assert_array_equal(dropped.support, expected)
    np.testing.assert_array_equal(dropped.query, [[0, 2, 2, 2], [2, 2, 2, 2]])
    assert np.all(weights.task == 2)


def test_drop_of_nothing_is_the_same():
    weights = mi.unit_weights(mi.stack_tasks([task(3, 4), task(5, 1)]))
    jax.tree.map(np.testing.assert_array_equal, mi.drop(weights), weights)


def test_drop_works_under_jit():
    weights = mi.unit_weights(mi.stack_tasks([task(3, 4), task(5, 1)]))
    pairs = jnp.asarray([[1, 1]], jnp.int32)
    got = jax.jit(lambda weights, pairs: mi.drop(weights, support=pairs))(weights, pairs)
    assert got.support[1, 1] == 0
    assert got.support.sum() == 9


class Foreign:
    """An array of another library, whose dtype NumPy does not know; PyTorch's are such."""

    dtype = "theirs.float64"

    def __init__(self, values):
        self.values = values
        self.shape, self.ndim = values.shape, values.ndim

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_arrays_of_other_libraries_are_stacked():
    single = [mi.Task({"x": Foreign(np.full((2, 3), float(k)))}, Foreign(np.ones(n))) for k, n in ((0, 2), (1, 3))]
    stacked = mi.stack_tasks(single)
    np.testing.assert_array_equal(stacked.support["x"][1], np.ones((2, 3)))
    np.testing.assert_array_equal(stacked.query_mask, [[True, True, False], [True] * 3])
    assert isinstance(stacked.query, jax.Array)


def test_scores_are_summed_by_datum_over_both_sides_without_padding():
    single = [task(3, 2), task(2, 3, 10)]
    ids = [([5, 3, 5], [3, 9]), ([9, 7], [5, 5, 3])]
    single = [
        mi.Task(t.support | {"id": np.asarray(s)}, {"v": t.query[0], "id": np.asarray(q)})
        for t, (s, q) in zip(single, ids, strict=True)
    ]
    tasks = mi.stack_tasks(single)
    support, query = 1.0 * np.arange(6).reshape(2, 3), 10.0 * np.arange(6).reshape(2, 3)
    scores = mi.Scores(np.zeros(2), support, query, None)
    found = mi.by_datum(scores, tasks)
    assert found.ids.tolist() == [3, 5, 7, 9]
    assert found.score.tolist() == [1 + 0 + 50, 0 + 2 + 30 + 40, 4, 10 + 3]
    assert found.places.tolist() == [3, 4, 1, 2]
    names = mi.by_datum(scores, tasks, lambda side: np.char.mod("p%d", np.asarray(side["id"])))
    assert names.ids.tolist() == ["p3", "p5", "p7", "p9"]
    alone = mi.by_datum(scores, tasks, lambda side: side["id"] if "v" in side else None)
    assert alone.score.tolist() == [50, 70, 10]
    with pytest.raises(TypeError, match=r"ids: expected tasks\.support to hold a leaf 'name', got dict"):
        mi.by_datum(scores, tasks, "name")
    with pytest.raises(ValueError, match=r"ids: expected those of tasks\.support in the shape \(2, 3\)"):
        mi.by_datum(scores, tasks, lambda side: np.arange(2))
    with pytest.raises(TypeError, match="got traced arrays"):
        jax.jit(lambda s: mi.by_datum(s, tasks).score)(mi.Scores(*scores[:3], jnp.zeros(())))


def per_task_case():
    """Coordinates and a key that belong to a task, once; and the same repeated in every example."""

    def made(once):
        def seen(batch):
            where, key = (batch[name].value if once else batch[name][0] for name in ("where", "key"))
            noise = jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), (2,))
            return batch["x"] + 0.1 * noise[None], batch["y"] - where @ where

        def ridge(meta_params, support, coefficients):
            x, y = seen(support)
            return meta_params + x.T @ (coefficients * (y - x @ meta_params))

        def loss(params, meta_params, query):
            x, y = seen(query)
            return (x @ params - y) ** 2

        rng = np.random.default_rng(0)

        def task(k):
            shared = {"where": rng.normal(size=2), "key": np.asarray([k, 7], np.uint32)}

            def side(n):
                held = {
                    name: mi.PerTask(leaf) if once else np.broadcast_to(leaf, (n, 2)) for name, leaf in shared.items()
                }
                return {"x": rng.normal(size=(n, 2)), "y": rng.normal(size=n)} | held

            return mi.Task(side(3 + k % 2), side(4))

        problem = mi.bilevel(loss, mi.adaptation.closed_form(ridge), meta_regularizer=mi.l2(0.5))
        return problem, [task(k) for k in range(5)]

    return made(True), made(False)


def test_what_is_per_task_stands_once_and_counts_as_if_every_example_carried_it(tmp_path):
    """In chunks, streamed, by a run, by a plain loss, and by examples alone."""
    (problem, tasks), (other, repeated) = per_task_case()
    target = lambda m: jnp.sum(m**3)  # noqa: E731
    meta_params, cg = jnp.asarray([0.3, -0.6]), mi.solvers.cg(tol=1e-10)
    stacked = mi.stack_tasks(tasks)
    assert stacked.support["where"].value.shape == (5, 2)
    assert stacked.support_mask.shape == (5, 4)
    expected = jax.jit(mi.influence_scores(other, target, solver=cg))(meta_params, mi.stack_tasks(repeated))
    found = [jax.jit(mi.influence_scores(problem, target, solver=cg, batch_size=2))(meta_params, stacked)]
    run = {"out": tmp_path / "scores.parquet", "progress": False, "batch_size": 2, "solver": cg}
    found.append(mi.scoring.score(problem, target, meta_params, tasks, **run))
    for each in found:
        np.testing.assert_allclose(each.task, expected.task, rtol=1e-8)
        np.testing.assert_allclose(each.support, expected.support, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(each.query, expected.query, rtol=1e-7, atol=1e-12)
    ends = []
    for each, source in ((other, repeated), (problem, tasks)):
        training = mi.training(each, optax.sgd(0.1), num_steps=2, tasks_per_step=2)
        ends.append(mi.scores(mi.trajectory(training)(meta_params, source), target)())
    np.testing.assert_allclose(ends[1].task, ends[0].task, rtol=1e-8)
    plain = [
        mi.baselines.plain_loss(each)(meta_params, mi.stack_tasks(source))
        for each, source in ((other, repeated), (problem, tasks))
    ]
    np.testing.assert_allclose(plain[1].support, plain[0].support, rtol=1e-12)
    by_example = mi.per_example(lambda params, m, batch: jnp.mean((batch["x"] @ params - batch["where"].value[0]) ** 2))
    np.testing.assert_allclose(
        by_example(meta_params, None, tasks[0].support),
        (tasks[0].support["x"] @ meta_params - tasks[0].support["where"].value[0]) ** 2,
        rtol=1e-12,
    )


def test_sides_that_differ_in_what_is_per_task_are_no_shared_support():
    (problem, tasks), _ = per_task_case()
    stacked = mi.stack_tasks(tasks)
    target = mi.query_loss(problem)
    moved = stacked.support["where"].value + 1.0
    elsewhere = stacked._replace(support=stacked.support | {"where": mi.PerTask(moved)})
    asked = mi.influence_scores(problem, target, solver=mi.solvers.cg())
    for held_out, shared in ((stacked, True), (elsewhere, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            asked(jnp.asarray([0.3, -0.6]), stacked, held_out)
        assert any(each.category is mi.DirectEffectWarning for each in caught) == shared


def test_a_spoilt_example_is_left_out_without_what_is_per_task():
    def loss(params, meta_params, query):
        del params
        return jnp.sqrt(jnp.sum((query["x"] - (query["where"].value * meta_params)[None]) ** 2, axis=1))

    problem = mi.bilevel(loss, mi.adaptation.closed_form(lambda m, s, c: m), meta_regularizer=mi.l2(1.0))
    points = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2)))
    where = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2)))
    meta_params = jnp.asarray([0.5, -0.5])
    spoilt = points.at[1, 2].set(where[1] * meta_params)
    asked = mi.influence_scores(problem, jnp.sum, damping=0.1)
    tasks = mi.Task((), {"x": spoilt, "where": mi.PerTask(where)})
    with pytest.warns(mi.SpoiltTaskWarning, match="goes with query example 2"):
        asked(meta_params, tasks)
    without = mi.drop(mi.unit_weights(tasks), query=[(1, 2)])
    found = asked(meta_params, tasks, weights=without)
    expected = asked(meta_params, tasks._replace(query=tasks.query | {"x": points}), weights=without)
    np.testing.assert_allclose(found.task, expected.task, rtol=1e-9)


def test_what_is_per_task_and_does_not_fit_is_named(tmp_path):
    (problem, tasks), _ = per_task_case()
    stacked = mi.stack_tasks(tasks)
    wide = tasks[2]._replace(query=tasks[2].query | {"where": mi.PerTask(np.zeros(3))})
    with pytest.raises(ValueError, match=r"tasks\[2\].query\['where'\].value: expected shape and dtype \(\(2,\)"):
        mi.stack_tasks([*tasks[:2], wide])
    lacking = stacked._replace(support=stacked.support | {"where": mi.PerTask(jnp.zeros(2))})
    with pytest.raises(ValueError, match=r"tasks.support\['where'\].value: expected one for each of the 5 tasks"):
        mi.unit_weights(lacking)
    with pytest.raises(ValueError, match=r"tasks.query: expected at least one array, got nothing but PerTask"):
        mi.unit_weights(mi.Task((), mi.PerTask(jnp.zeros((5, 2)))))
    with pytest.raises(mi.scoring.SourceError, match=r"source\[2\].*where.*expected shape and dtype \(\(2,\)"):
        mi.scoring.score(
            problem, jnp.sum, jnp.zeros(2), [*tasks[:2], wide], out=tmp_path / "s", progress=False, batch_size=1
        )
    where = mi.PerTask(stacked.query["where"].value.at[3].set(jnp.nan))
    spoilt = stacked._replace(query=stacked.query | {"where": where})
    with pytest.raises(ValueError, match=r"tasks.query\['where'\].value: expected finite numbers, .* in task 3"):
        mi.influence_scores(problem, jnp.sum)(jnp.zeros(2), spoilt)


def test_tasks_that_see_each_other_are_refused_with_the_reason():
    def loss(meta_params, task, weights):
        pool = jax.lax.pmean(jnp.mean(task.query), "tasks")
        return jnp.sum(weights.query * (task.query - pool - meta_params) ** 2)

    tasks = mi.Task((), jnp.ones((3, 2)))
    with pytest.raises(NameError, match="unbound axis name") as error:
        mi.influence_scores(mi.from_task_loss(loss), lambda m: m)(jnp.asarray(0.0), tasks)
    assert "task_loss is a function of one task alone: tasks that see each other" in error.value.__notes__[0]
