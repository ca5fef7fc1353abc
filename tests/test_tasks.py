"""Tasks, weights and removal as plain pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
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
