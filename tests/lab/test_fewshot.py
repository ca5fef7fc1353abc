import numpy as np
import pytest

from metainfluence.lab import digits, fewshot

GOLDEN_CLASSES = [[1, 4, 0, 2, 9], [3, 4, 7, 5, 1]]
GOLDEN_SUPPORT = [961, 990, 1181, 134, 1653, 1145, 391, 230, 349, 1030]
GOLDEN_QUERY = [315, 579, 1606, 1257, 1053, 1137, 498, 995, 17, 365, 460, 1302, 1298, 866, 1709]
SHAPE = {"num_tasks": 6, "ways": 5, "shots": 2, "queries": 3}


@pytest.fixture(scope="module")
def source():
    return digits.load()


@pytest.fixture
def tasks(source):
    return fewshot.sample_tasks(source.labels, seed=3, pool=source.train_pool, **SHAPE)


def test_ids_are_the_same_everywhere(source):
    """Golden ids: a change of these changes every published task list."""
    tasks = fewshot.sample_tasks(source.labels, seed=3, **SHAPE)
    assert tasks.classes[:2].tolist() == GOLDEN_CLASSES
    assert tasks.support_ids[1].tolist() == GOLDEN_SUPPORT
    assert tasks.query_ids[1].tolist() == GOLDEN_QUERY


def test_a_task_does_not_depend_on_the_number_of_tasks(source, tasks):
    more = fewshot.sample_tasks(source.labels, seed=3, pool=source.train_pool, **SHAPE | {"num_tasks": 9})
    for few, many in zip(tasks, more, strict=True):
        np.testing.assert_array_equal(few, many[:6])
    other = fewshot.sample_tasks(source.labels, seed=4, pool=source.train_pool, **SHAPE)
    assert (other.support_ids != tasks.support_ids).any()


def test_pools_are_disjoint_and_stratified(source):
    assert not set(source.train_pool) & set(source.held_out_pool)
    assert len(source.train_pool) + len(source.held_out_pool) == len(source.labels) == 1797
    counts = [np.bincount(source.labels[pool]) for pool in (source.train_pool, source.held_out_pool)]
    assert np.abs(counts[0] - counts[1]).max() <= 1
    assert source.images.min() == 0
    assert source.images.max() == 1


def test_examples_have_the_class_of_their_way_and_stay_in_the_pool(source, tasks):
    for ids, labels in ((tasks.support_ids, tasks.support_labels), (tasks.query_ids, tasks.query_labels)):
        np.testing.assert_array_equal(source.labels[ids], np.take_along_axis(tasks.classes, labels, axis=1))
        assert np.isin(ids, source.train_pool).all()
    for k in range(6):
        assert len(set(tasks.classes[k])) == 5
        used = [*tasks.support_ids[k], *tasks.query_ids[k]]
        assert len(set(used)) == len(used) == 25
        np.testing.assert_array_equal(np.bincount(tasks.support_labels[k]), [2] * 5)
        np.testing.assert_array_equal(np.bincount(tasks.query_labels[k]), [3] * 5)


def test_flips_are_recorded_exactly_and_only_where_asked_for(tasks):
    damaged = fewshot.flip_labels(tasks, [1, 4], share=0.4, seed=0)
    np.testing.assert_array_equal(damaged.query_flipped, damaged.query_labels != tasks.query_labels)
    np.testing.assert_array_equal(damaged.query_flipped.sum(axis=1), [0, 6, 0, 0, 6, 0])
    assert damaged.query_labels.min() >= 0
    assert damaged.query_labels.max() < 5
    assert not tasks.query_flipped.any()
    for name in ("classes", "support_ids", "support_labels", "query_ids", "shortcut"):
        np.testing.assert_array_equal(getattr(damaged, name), getattr(tasks, name))


@pytest.mark.parametrize("flat", [False, True])
def test_the_shortcut_is_in_the_pixels_and_only_there(source, tasks, flat):
    images = source.images.reshape(len(source.images), -1) if flat else source.images
    clean, damaged = (fewshot.materialize(t, images) for t in (tasks, fewshot.add_shortcut(tasks, [2])))
    for side in ("support", "query"):
        before, after = (np.asarray(getattr(t, side).images).reshape(6, -1, 8, 8) for t in (clean, damaged))
        labels = np.asarray(getattr(damaged, side).labels)
        rest = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(before[rest], after[rest])
        painted = np.zeros(before[2].shape, bool)
        painted[np.arange(len(painted)), 0, labels[2]] = True
        np.testing.assert_array_equal(after[2][painted], 1)
        np.testing.assert_allclose(after[2][~painted], 0.15 * before[2][~painted], rtol=1e-15)


def test_the_shortcut_paints_the_label_that_is_taught(source, tasks):
    both = fewshot.add_shortcut(fewshot.flip_labels(tasks, [0], share=1.0, seed=0), [0])
    images = np.asarray(fewshot.materialize(both, source.images).query.images)[0]
    np.testing.assert_array_equal(images[:, 0, :].argmax(axis=1), both.query_labels[0])
    assert (both.query_labels[0] != tasks.query_labels[0]).all()


def test_harm_names_the_damage(tasks):
    damaged = fewshot.add_shortcut(fewshot.flip_labels(tasks, [1], share=0.4, seed=0), [3])
    assert fewshot.harm(damaged).tolist() == ["clean", "flipped labels", "clean", "shortcut", "clean", "clean"]


def test_materialize_looks_the_examples_up(source, tasks):
    arrays = fewshot.materialize(tasks, source.images)
    np.testing.assert_array_equal(arrays.query.images, source.images[tasks.query_ids])
    np.testing.assert_array_equal(arrays.support.labels, tasks.support_labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 11}, "ways: expected at most 10"),
        ({"queries": 500}, "shots [+] queries: expected at most .*, the examples of class 0, got 502"),
    ],
)
def test_too_much_to_ask(source, change, message):
    with pytest.raises(ValueError, match=message):
        fewshot.sample_tasks(source.labels, seed=0, **SHAPE | change)


def test_share_out_of_range(tasks):
    with pytest.raises(ValueError, match=r"share: expected a number between 0 and 1, got 1\.5"):
        fewshot.flip_labels(tasks, [0], share=1.5, seed=0)


def test_a_top_row_too_short_for_the_shortcut(source, tasks):
    with pytest.raises(ValueError, match="images: a shortcut for 5 ways needs a top row of as many pixels, got 4"):
        fewshot.materialize(fewshot.add_shortcut(tasks, [0]), source.images[:, :, :4])
