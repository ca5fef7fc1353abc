"""Sources that misbehave: unreadable tasks, content and length that change, ids, structures."""

import jax
import numpy as np
import pytest

import metainfluence as mi
from scoring import setting

TASKS = setting.tasks(9)


class Source(list):
    """A source with ids whose items may be broken from some read on."""

    def __init__(self, tasks, ids=None, broken=(), after=0):
        super().__init__(tasks)
        self.broken, self.after, self.reads = dict(broken), after, 0
        if ids is not None:
            self.ids = ids

    def __getitem__(self, index):
        self.reads += 1
        if index in self.broken and self.reads > self.after:
            value = self.broken[index]
            if isinstance(value, Exception):
                raise value
            return value
        return super().__getitem__(index)


NAMES = [f"task-{letter}" for letter in "abcdefghi"]


def score(source, tmp_path, **options):
    return setting.score(source, tmp_path / "scores.parquet", **{"memory": 1.0, **options})


def test_a_task_that_cannot_be_read_is_named(tmp_path):
    source = Source(TASKS, NAMES, {5: OSError("truncated file")})
    with pytest.raises(mi.scoring.SourceError, match=r"task 'task-f' \(item 5\) could not be read: OSError: truncated"):
        score(source, tmp_path)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tasks_that_cannot_be_read_are_skipped_where_that_is_asked_for(tmp_path, batch_size):
    source = Source(TASKS, NAMES, {0: OSError("truncated"), 5: ValueError("no image")})
    result = score(source, tmp_path, on_error="skip", batch_size=batch_size)
    rest = [task for k, task in enumerate(TASKS) if k not in (0, 5)]
    expected = setting.in_memory(rest)
    for name in mi.Weights._fields:
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=1e-10, atol=1e-15)
    assert result.ids.tolist() == [name for k, name in enumerate(NAMES) if k not in (0, 5)]
    assert list(result.skipped) == ["task-a", "task-f"]
    assert "OSError: truncated" in result.skipped["task-a"]
    table = mi.read_scores(tmp_path / "scores.parquet")
    assert [identity for identity, _ in table.metadata["skipped"]] == ["task-a", "task-f"]
    assert not set(table.task) & {"task-a", "task-f"}


def test_tasks_whose_gradient_is_nan_are_skipped_too(tmp_path):
    """The first one among them, which else fills up the last batch; and a run that is taken up again knows them."""
    spoilt = [jax.tree.map(lambda leaf: leaf * np.nan, task) if k in (0, 5) else task for k, task in enumerate(TASKS)]
    with pytest.raises(ValueError, match=r"NaN or infinity from tasks 0, 5: .*, as on_error=\"skip\" does"):
        score(spoilt, tmp_path)
    stopped = RuntimeError("stopped")

    def stop(progress):
        if progress.phase == "scores":
            raise stopped

    with pytest.raises(RuntimeError, match="stopped"):
        score(spoilt, tmp_path, on_error="skip", resume=False, progress=stop)
    result = score(spoilt, tmp_path, on_error="skip")
    expected = setting.in_memory([task for k, task in enumerate(TASKS) if k not in (0, 5)])
    for name in mi.Weights._fields:
        np.testing.assert_allclose(getattr(result, name), getattr(expected, name), rtol=1e-10, atol=1e-15)
    assert result.skipped == {k: f"task {k} has a gradient of NaN or infinity" for k in (0, 5)}


def test_a_task_that_can_no_longer_be_read_ends_the_run(tmp_path):
    source = Source(TASKS, None, {5: OSError("gone")}, after=30)
    with pytest.raises(mi.scoring.SourceError, match=r"task 5 \(item 5\) could not be read: .*; it could be before"):
        score(source, tmp_path, on_error="skip")


def test_nothing_to_read_is_an_error(tmp_path):
    source = Source(TASKS, None, dict.fromkeys(range(9), OSError("gone")))
    with pytest.raises(mi.scoring.SourceError, match="expected a task that can be read, got none in 9"):
        score(source, tmp_path, on_error="skip")


def test_content_that_changes_is_named(tmp_path):
    other = jax.tree.map(np.copy, TASKS[5])
    other.query["y"][2] += 1e-9
    source = Source(TASKS, NAMES, {5: other}, after=40)
    with pytest.raises(mi.scoring.SourceError, match=r"task 'task-f' \(item 5\): expected what was read before, got"):
        score(source, tmp_path)


def test_length_that_changes_is_told(tmp_path):
    class Shrinking(Source):
        def __len__(self):
            return 9 if self.reads < 30 else 8

    with pytest.raises(mi.scoring.SourceError, match="expected 9 tasks, as at first, got 8"):
        score(Shrinking(TASKS), tmp_path)


def replaced(**fields):
    return TASKS[5]._replace(**fields)


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (replaced(query={"x": TASKS[5].query["x"]}), "expected the structure"),
        (
            replaced(query={**TASKS[5].query, "x": np.zeros((5, 2))}),
            r"source\['task-f'\]\.query\['x'\]: expected trailing shape and dtype",
        ),
        (
            replaced(support=jax.tree.map(np.float32, TASKS[5].support)),
            r"source\['task-f'\]\.support\['x'\]: expected trailing shape and dtype",
        ),
        (replaced(query={**TASKS[5].query, "y": np.zeros(4)}), "expected the leading axes"),
        ((1, 2), "expected a metainfluence.Task"),
    ],
)
def test_a_task_unlike_the_others_is_named(task, match, tmp_path):
    with pytest.raises(mi.scoring.SourceError, match=match):
        score(Source(TASKS, NAMES, {5: task}), tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        (Source(TASKS, [*NAMES[:8], "task-c"]), ValueError, r"source\.ids: expected distinct ids, got \['task-c'\]"),
        (Source(TASKS, NAMES[:8]), ValueError, r"source\.ids: expected one id for each of 9 tasks"),
        (Source(TASKS, np.arange(9.0)), TypeError, r"source\.ids: expected all integers or all strings"),
        ([], ValueError, "source: expected at least one task"),
        (mi.stack_tasks(TASKS), TypeError, "source: expected a sequence of single tasks, got Task"),
        (iter(TASKS), TypeError, "source: expected a sequence of tasks with len"),
    ],
)
def test_sources_that_make_no_sense(source, error, match, tmp_path):
    with pytest.raises(error, match=match):
        score(source, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"solver": 3}, TypeError, "solver: expected one of"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"memory": -1}, ValueError, "memory"),
        ({"mesh": 4}, TypeError, "mesh: expected None or a jax.sharding.Mesh"),
        ({"on_error": "ignore"}, ValueError, "on_error: expected 'raise' or 'skip'"),
        ({"target": 1.0}, TypeError, "target"),
        ({"meta_params": {"scale": np.arange(3), "bias": 0.1}}, TypeError, "meta_params"),
        ({"solver": mi.solvers.cg(preconditioner=mi.solvers.ekfac())}, ValueError, "expected .*losses"),
    ],
)
def test_bad_options(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        score(TASKS, tmp_path, **options)


def test_prng_keys_and_masks_may_be_among_the_data(tmp_path):
    """A dropout key per task, and padding that the source has made itself."""

    def with_key(task, k):
        padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.full_like(leaf[:1], np.nan)]), task.query)
        mask = np.arange(6) < 5
        return mi.Task({**task.support, "key": jax.random.split(jax.random.key(k), 4)}, padded, None, mask)

    source = [with_key(task, k) for k, task in enumerate(TASKS)]
    result, expected = score(source, tmp_path), setting.in_memory(TASKS)
    np.testing.assert_allclose(result.task, expected.task, rtol=1e-10)
    np.testing.assert_allclose(result.query, expected.query, rtol=1e-10)
