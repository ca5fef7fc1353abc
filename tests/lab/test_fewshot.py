import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metainfluence.lab.data import datasets, digits, fewshot

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
        ({"ways": 0}, "ways: expected a positive integer, got 0"),
        ({"num_tasks": 2.0}, "num_tasks: expected a positive integer, got 2.0"),
        ({"shots": True}, "shots: expected a positive integer, got True"),
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


@pytest.mark.parametrize(("side", "flipped_sides"), [("support", ["support"]), ("both", ["support", "query"])])
def test_either_side_can_be_flipped(tasks, side, flipped_sides):
    damaged = fewshot.flip_labels(tasks, [1, 4], share=0.2, seed=0, side=side)
    for name, count in (("support", 2), ("query", 3)):
        labels, before = getattr(damaged, f"{name}_labels"), getattr(tasks, f"{name}_labels")
        flipped = getattr(damaged, f"{name}_flipped")
        np.testing.assert_array_equal(flipped, labels != before)
        expected = count if name in flipped_sides else 0
        np.testing.assert_array_equal(flipped.sum(axis=1), [0, expected, 0, 0, expected, 0])
    assert fewshot.harm(damaged).tolist() == ["clean", "flipped labels", "clean", "clean", "flipped labels", "clean"]
    if side == "both":
        np.testing.assert_array_equal(
            damaged.query_labels, fewshot.flip_labels(tasks, [1, 4], share=0.2, seed=0).query_labels
        )


def test_a_label_is_not_flipped_twice(tasks):
    """Twice flipped it might be right again, and be recorded as wrong."""
    damaged = tasks
    for seed in range(2):
        damaged = fewshot.flip_labels(damaged, [0], share=0.4, seed=seed)
    np.testing.assert_array_equal(damaged.query_flipped[0], damaged.query_labels[0] != tasks.query_labels[0])
    assert damaged.query_flipped[0].sum() == 12
    with pytest.raises(ValueError, match=r"share: expected at most 3 labels to flip in task 0, .*, got 6"):
        fewshot.flip_labels(damaged, [0], share=0.4, seed=3)
    with pytest.raises(ValueError, match="share: expected at most 78 labels that are not flipped yet, got 90"):
        fewshot.flip_examples(damaged, share=1.0, seed=0)


def test_a_share_of_all_labels_is_flipped(tasks):
    damaged = fewshot.flip_examples(tasks, share=0.1, seed=0, side="both")
    np.testing.assert_array_equal(damaged.query_flipped, damaged.query_labels != tasks.query_labels)
    np.testing.assert_array_equal(damaged.support_flipped, damaged.support_labels != tasks.support_labels)
    assert (damaged.query_flipped.sum(), damaged.support_flipped.sum()) == (9, 6)
    assert len(set(damaged.query_flipped.sum(axis=1))) > 1
    assert damaged.query_labels.max() < 5


def test_noise_is_the_tasks_own_wherever_it_stands(source, tasks):
    damaged = fewshot.add_noise(tasks, [1, 3], seed=0)
    clean, noisy = (fewshot.materialize(t, source.images) for t in (tasks, damaged))
    for side in ("support", "query"):
        before, after = (np.asarray(getattr(t, side).images) for t in (clean, noisy))
        np.testing.assert_array_equal(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
        for k in (1, 3):
            assert 0 <= after[k].min() < 0.02 < 0.98 < after[k].max() <= 1
            assert abs(after[k].mean() - 0.5) < 0.05
        assert not np.array_equal(after[1], after[3])
    moved = fewshot.materialize(fewshot.take(damaged, [3, 0]), source.images)
    np.testing.assert_array_equal(moved.query.images[0], noisy.query.images[3])
    assert not np.array_equal(noisy.support.images[1], noisy.query.images[1][:10])


def test_foreign_tasks_take_the_place_of_others():
    both = datasets.add_foreign(datasets.load("digits"), datasets.load("digits", size=4)._replace(name="other"))
    shape = {"ways": 3, "shots": 1, "queries": 2}
    tasks = fewshot.sample(both, "train", num_tasks=4, seed=0, **shape)
    foreign = fewshot.sample(both, "other/train", num_tasks=2, seed=0, **shape)
    damaged = fewshot.replace_by_foreign(tasks, [3, 1], foreign)
    assert fewshot.harm(damaged).tolist() == ["clean", "wrong domain", "clean", "wrong domain"]
    np.testing.assert_array_equal(damaged.query_ids[[3, 1]], foreign.query_ids)
    np.testing.assert_array_equal(damaged.query_ids[[0, 2]], tasks.query_ids[[0, 2]])
    assert damaged.classes[3].min() >= 10 > damaged.classes[0].max()
    assert fewshot.materialize(damaged, both.images).query.images.shape == (4, 6, 8, 8)
    with pytest.raises(ValueError, match="foreign: expected 1 tasks, one for each in index, got 2"):
        fewshot.replace_by_foreign(tasks, [0], foreign)


def test_every_kind_of_harm_has_its_name(tasks):
    damaged = fewshot.flip_labels(tasks, [0], share=0.2, seed=0, side="support")
    damaged = fewshot.add_noise(fewshot.add_shortcut(damaged, [0, 1]), [1, 2], seed=0)
    damaged = fewshot.replace_by_foreign(damaged, [3], fewshot.take(damaged, [5]))
    assert fewshot.harm(damaged).tolist() == [*fewshot.KINDS[1:3], *fewshot.KINDS[3:], "clean", "clean"]


def test_lists_are_cut_and_joined(tasks):
    parts = fewshot.take(tasks, slice(0, 2)), fewshot.take(tasks, np.arange(6) >= 2)
    for joined, whole in zip(fewshot.join(*parts), tasks, strict=True):
        np.testing.assert_array_equal(joined, whole)
    assert fewshot.take(tasks, 4).classes.shape == (1, 5)
    np.testing.assert_array_equal(fewshot.take(tasks, [4, 1]).query_ids, tasks.query_ids[[4, 1]])
    other = fewshot.sample_tasks(digits.load().labels, seed=0, **SHAPE | {"shots": 1})
    with pytest.raises(ValueError, match=r"lists\[1\]: expected .* of lists\[0\], .*, got .*"):
        fewshot.join(tasks, other)


def test_samples_of_a_split_stay_in_it():
    read = datasets.load("digits")
    tasks = fewshot.sample(read, "test", num_tasks=2, ways=3, shots=1, queries=2, seed=0)
    assert np.isin(tasks.query_ids, read.pools["test"]).all()
    with pytest.raises(ValueError, match="split: expected one of train, test of digits, got 'val'"):
        fewshot.sample(read, "val", num_tasks=2, ways=3, shots=1, queries=2, seed=0)


def test_colour_images_are_dimmed_and_painted_white(tasks):
    images = np.full((1797, 8, 8, 3), 0.5, np.float32)
    got = np.asarray(fewshot.materialize(fewshot.add_shortcut(tasks, [0]), images).query.images)[0]
    assert got.shape == (15, 8, 8, 3)
    np.testing.assert_array_equal(got[np.arange(15), 0, tasks.query_labels[0]], 1)
    np.testing.assert_allclose(got[:, 1:], 0.15 * 0.5, rtol=1e-6)


def test_indexed_tasks_look_up_to_materialised_ones(source, tasks):
    looked_up = fewshot.lookup(fewshot.indexed(tasks), jnp.asarray(source.images))
    materialised = fewshot.materialize(tasks, source.images)
    for one, other in zip(jax.tree.leaves(looked_up), jax.tree.leaves(materialised), strict=True):
        np.testing.assert_array_equal(one, other)
    for damaged in (fewshot.add_shortcut(tasks, [0]), fewshot.add_noise(tasks, [0], seed=0)):
        with pytest.raises(ValueError, match="tasks: expected none with a shortcut or noise images"):
            fewshot.indexed(damaged)


def test_an_unknown_side(tasks):
    with pytest.raises(ValueError, match="side: expected 'query', 'support' or 'both', got 'left'"):
        fewshot.flip_labels(tasks, [0], share=0.5, seed=0, side="left")
