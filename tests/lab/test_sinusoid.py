import numpy as np
import pytest

from metainfluence.lab.data import sinusoid

GOLDEN_AMPLITUDES = [0.5196809190037595, 1.3409400814662968]
GOLDEN_SEEDS = [778955830, 3318433256]


@pytest.fixture(scope="module")
def tasks():
    return sinusoid.sample_tasks(num_tasks=200, seed=3)


def test_tasks_are_the_same_everywhere(tasks):
    """Golden values: a change of these changes every published task list."""
    np.testing.assert_allclose(tasks.amplitude[:2], GOLDEN_AMPLITUDES, rtol=1e-15)
    assert tasks.seed[:2].tolist() == GOLDEN_SEEDS
    for few, many in zip(sinusoid.sample_tasks(num_tasks=2, seed=3), tasks, strict=True):
        np.testing.assert_array_equal(few, many[:2])


def test_ranges_are_those_of_maml(tasks):
    arrays = sinusoid.materialize(tasks)
    for values, (low, high) in (
        (tasks.amplitude, (0.1, 5)),
        (tasks.phase, (0, np.pi)),
        (np.asarray(arrays.query.inputs), (-5, 5)),
    ):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high >= values.max() > high - 0.05 * (high - low)
    assert arrays.support.inputs.shape == (200, 5, 1)
    assert arrays.query.targets.shape == (200, 10)


def test_targets_are_on_the_curve_and_damage_is_where_it_is_recorded(tasks):
    damaged = sinusoid.add_noise(sinusoid.flip_sign(tasks, [1, 4]), [2, 4], scale=0.5)
    clean, arrays = sinusoid.materialize(tasks), sinusoid.materialize(damaged)
    for side in ("support", "query"):
        points = getattr(clean, side)
        curve = tasks.amplitude[:, None] * np.sin(np.asarray(points.inputs)[..., 0] - tasks.phase[:, None])
        np.testing.assert_allclose(points.targets, curve, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(points.inputs, getattr(arrays, side).inputs)
    np.testing.assert_array_equal(clean.support.targets, arrays.support.targets)
    before, after = (np.asarray(found.query.targets) for found in (clean, arrays))
    np.testing.assert_allclose(after[1], -before[1], rtol=1e-12)
    for k, expected in ((2, before[2]), (4, -before[4])):
        assert 0.1 < np.std(after[k] - expected) < 1.0
    rest = np.setdiff1d(np.arange(200), [1, 2, 4])
    np.testing.assert_array_equal(after[rest], before[rest])
    assert sinusoid.harm(damaged)[:5].tolist() == ["clean", "wrong sign", "noisy targets", "clean", "wrong sign"]
    assert not tasks.wrong_sign.any()


def test_bad_input(tasks):
    with pytest.raises(ValueError, match="num_tasks: expected a positive integer, got 0"):
        sinusoid.sample_tasks(num_tasks=0, seed=0)
    with pytest.raises(ValueError, match="scale: expected a positive number, got 0"):
        sinusoid.add_noise(tasks, [0], scale=0)
