"""What goes wrong around a long run: memory that ends, clocks that jump, files that vanish, parts that are large.

Kills, full disks, damaged shards, two writers and edited settings are in tests/scoring/test_resume.py, lost processes
in tests/scoring/test_devices.py.
"""

import os
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

import metainfluence as mi
from metainfluence.scoring import _engine, _table
from scoring import setting

TASKS = setting.tasks(9)
MOST = 1 << 30


class Watched(list):
    """A source that does something at one of its reads, and counts them."""

    def __init__(self, at=0, act=None):
        super().__init__(TASKS)
        self.at, self.act, self.count = at, act, 0

    def __getitem__(self, index):
        self.count += 1
        if self.count == self.at:
            self.act()
        return super().__getitem__(index)


def score(source, out, **options):
    return setting.score(source, out, **{"batch_size": 1, "memory": 1.0, **options})


def left(out):
    """Files that a run which ended early has left behind, but for its lock and what it is about."""
    return sorted(path.name.partition("-")[0] for path in out.with_name(f"{out.name}.run").glob("*-*"))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(_engine, "_ROWS_PER_SHARD", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed: its scores, and how often it read."""
    out, source = tmp_path_factory.mktemp("whole") / "scores.parquet", Watched()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "_ROWS_PER_SHARD", 1)
        score(source, out)
    return mi.read_scores(out).score, source.count


@pytest.fixture
def bounded():
    """Lets this process have 1 GiB more than it has at rest; the bound is taken back afterwards.

    Tasks are read ahead while the ones before are computed with, and what those take goes away again: so the least of
    many looks counts.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)

    def pages():
        time.sleep(0.02)
        return int(Path("/proc/self/statm").read_text().split()[0])

    def bound():
        least = min(pages() for _ in range(100))
        resource.setrlimit(resource.RLIMIT_AS, (least * resource.getpagesize() + MOST, before[1]))

    yield bound
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_memory_that_ends_is_an_error_and_loses_nothing(on_error, bounded, whole, tmp_path):
    """A task too large for the machine is no task that cannot be read, which `skip` would leave out."""
    out, (expected, reads) = tmp_path / "scores.parquet", whole
    before = resource.getrlimit(resource.RLIMIT_AS)

    def decode():
        bounded()
        np.empty(8 * MOST, np.uint8)

    with pytest.raises(MemoryError, match=r"Unable to allocate 8\.00 GiB"):
        score(Watched(reads - 3, decode), out, on_error=on_error)
    resource.setrlimit(resource.RLIMIT_AS, before)
    kept = left(out)
    assert kept.count("solution") == 1
    assert 1 < kept.count("shard") < 9
    source = Watched()
    result = score(source, out, on_error=on_error)
    np.testing.assert_array_equal(mi.read_scores(out).score, expected)
    assert not result.skipped
    # All are looked at once, and the missing ones read.
    assert source.count <= 2 * 9 + 1 < reads


def _loss_that_takes_more(params, meta_params, batch):
    """The problem's, and 2 GiB that a branch which is never taken would need, and which are allocated with the rest."""

    def needed():
        return jnp.dot(jnp.sin(jnp.arange(1.0 * MOST / 4)).reshape(1 << 14, -1), jnp.ones(1 << 14)).sum()

    bias = jax.lax.stop_gradient(meta_params["bias"])
    return setting._loss(params, meta_params, batch) * jax.lax.cond(bias > 1e30, needed, lambda: 1.0)


def test_memory_that_ends_on_the_device_is_an_error_and_loses_nothing(bounded, whole, tmp_path):
    out, (expected, reads) = tmp_path / "scores.parquet", whole
    adapt = mi.adaptation.closed_form(setting._ridge)
    problem = mi.bilevel(_loss_that_takes_more, adapt, meta_regularizer=mi.l2(0.5))
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(MemoryError, match=r"RESOURCE_EXHAUSTED.*allocating 2.*what was finished is kept"):
        score(Watched(reads - 3, bounded), out, problem=problem)
    resource.setrlimit(resource.RLIMIT_AS, before)
    kept = left(out)
    assert kept.count("solution") == 1
    source = Watched()
    score(source, out, problem=problem)
    np.testing.assert_allclose(mi.read_scores(out).score, expected, rtol=1e-10)
    assert source.count <= 2 * 9 + 1 < reads


def test_a_clock_that_jumps_changes_nothing(whole, tmp_path, monkeypatch):
    """Neither the wall clock nor the files' times decide what is done again."""
    out, (expected, reads) = tmp_path / "scores.parquet", whole
    jumps = iter(range(10**9))

    def jumping():
        return 1.7e9 + (-1) ** (number := next(jumps)) * 1e8 * number

    def interrupt():
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(time, "time", jumping)
    with pytest.raises(KeyboardInterrupt):
        score(Watched(reads - 3, interrupt), out, progress=seen.append)
    assert all(now.seconds_left is None or 0 <= now.seconds_left < 1e4 for now in seen)
    for number, path in enumerate(sorted(out.with_name(f"{out.name}.run").iterdir())):
        os.utime(path, (0, 0) if number % 2 else (4e9, 4e9))
    source = Watched()
    score(source, out)
    np.testing.assert_array_equal(mi.read_scores(out).score, expected)
    assert source.count <= 2 * 9 + 1 < reads


class Folder:
    """Tasks in files."""

    def __init__(self, folder, delete_at=0):
        self.folder, self.delete_at, self.count = folder, delete_at, 0
        self.ids = [f"task-{number}" for number in range(9)]

    def path(self, index):
        return self.folder / f"{self.ids[index]}.npz"

    def __len__(self):
        return 9

    def __getitem__(self, index):
        self.count += 1
        if self.count == self.delete_at:
            self.path(7).rename(self.path(7).with_suffix(".gone"))
        with np.load(self.path(index)) as kept:
            return mi.Task(*({name: kept[f"{side}_{name}"] for name in "xy"} for side in ("support", "query")))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_source_file_deleted_midway_is_named_and_the_run_goes_on_once_it_is_back(on_error, whole, tmp_path):
    """Left out only now, the task would be in the gradient and not in the scores."""
    for number, task in enumerate(TASKS):
        arrays = {f"{side}_{name}": getattr(task, side)[name] for side in ("support", "query") for name in "xy"}
        np.savez(tmp_path / f"task-{number}.npz", **arrays)
    out, (expected, reads) = tmp_path / "scores.parquet", whole
    with pytest.raises(mi.scoring.SourceError, match=r"'task-7' \(item 7\).*FileNotFoundError.*it could be before"):
        score(Folder(tmp_path, reads - 5), out, on_error=on_error)
    assert left(out).count("solution") == 1
    (tmp_path / "task-7.gone").rename(tmp_path / "task-7.npz")
    result = score(Folder(tmp_path), out, on_error=on_error)
    np.testing.assert_array_equal(mi.read_scores(out).score, expected)
    assert not result.skipped


def test_a_part_of_more_rows_than_arrows_own_limit_keeps_its_tasks_whole(tmp_path):
    rows, each = 1_100_000, 11
    task, place = np.divmod(np.arange(rows), each)
    table = pa.table(
        {
            "task": task,
            "role": pa.DictionaryArray.from_arrays(np.where(place == 0, 0, 1).astype(np.int8), ["task", "query"]),
            "score": np.arange(rows, dtype=float),
        }
    )
    _table.write_tables(tmp_path / "scores.parquet", lambda: [table], {})
    found = _table.read_dense(tmp_path / "scores.parquet")
    assert found.query.shape == (rows // each, each - 1)
    np.testing.assert_array_equal(np.column_stack([found.task, found.query]).ravel(), np.arange(rows))
