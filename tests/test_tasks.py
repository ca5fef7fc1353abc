"""Tasks, weights and removal as plain pytrees."""

import jax
import jax.numpy as jnp
import numpy as np

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
