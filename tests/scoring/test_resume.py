"""Runs that end early, and what is left of them: kills, damage, full disks, other runs, two at once."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import metainfluence as mi
from metainfluence._disk import Store
from metainfluence.scoring import _engine
from scoring import runner, setting


def same(path, other):
    """Two score files with the same rows, and scores to 1e-12."""
    left, right = mi.read_scores(path), mi.read_scores(other)
    for name in ("task", "role"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    np.testing.assert_array_equal(left.example.filled(-1), right.example.filled(-1))
    np.testing.assert_allclose(left.score, right.score, rtol=1e-12, atol=1e-15)
    return left.metadata == right.metadata


def kinds(out):
    """What a run has left behind, as counts of files."""
    names = [path.name.partition("-")[0] for path in out.with_name(f"{out.name}.run").glob("*-*")]
    return {name: names.count(name) for name in sorted(set(names))}


def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def run(out, kill_at):
        command = [sys.executable, runner.__file__, str(out), str(kill_at), "0"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    finished = run(whole, 0)
    assert finished.returncode == 0, finished.stderr
    rng = np.random.default_rng(5)
    kills, left, phases = 0, [], set()
    while kills < 8 or left:
        ended = run(killed, int(rng.integers(1, 120)) if kills < 8 else 0)
        if ended.returncode == 0:
            assert same(whole, killed)
            assert not left or int(ended.stdout) < int(finished.stdout)
            assert sorted(path.name for path in tmp_path.glob("*.parquet*")) == ["killed.parquet", "whole.parquet"]
            killed.unlink()
            left = []
        else:
            assert ended.returncode == -signal.SIGKILL, ended.stderr
            kills += 1
            left.append(kinds(killed))
            phases.update(left[-1])
    # The moments lie in all phases.
    assert {"gradient", "solve", "solution", "shard"} <= phases


class Stopping(list):
    """A source that ends the run at one of its reads, and counts them."""

    def __init__(self, tasks, stop_at=None):
        super().__init__(tasks)
        self.stop_at, self.count, self.read = stop_at, 0, []

    def __getitem__(self, index):
        self.count += 1
        self.read.append(index)
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


TASKS = setting.tasks(9)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(_engine, "_ROWS_PER_SHARD", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "scores.parquet"
    setting.score(TASKS, out, batch_size=1, memory=1.0)
    return out


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A run that was stopped among the scores."""
    out = tmp_path_factory.mktemp("left") / "scores.parquet"
    source = Stopping(TASKS)
    setting.score(source, out, batch_size=1, memory=1.0, resume=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_engine, "_ROWS_PER_SHARD", 1)
        with pytest.raises(KeyboardInterrupt):
            setting.score(Stopping(TASKS, source.count - 1), out, batch_size=1, memory=1.0, resume=False)
    return out


@pytest.fixture
def stopped(left, tmp_path):
    """The same, to be changed."""
    out = tmp_path / "scores.parquet"
    shutil.copytree(left.with_name("scores.parquet.run"), tmp_path / "scores.parquet.run")
    return out


def shards(out):
    return sorted(out.with_name("scores.parquet.run").glob("shard-*"))


def test_only_what_is_missing_is_computed(stopped, whole):
    done = kinds(stopped)
    assert done["solution"] == 1
    assert 1 < done["shard"] < 9
    source = Stopping(TASKS)
    setting.score(source, stopped, batch_size=None, memory=1.0)
    assert same(stopped, whole)
    # All are looked at once, and then those of the missing shards.
    assert source.read[-(9 - done["shard"]) :] == list(range(done["shard"], 9))


def test_damaged_files_are_found_and_made_again(stopped, whole):
    first, second, *_ = shards(stopped)
    first.write_bytes(first.read_bytes()[:-7])
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    (solution,) = stopped.with_name("scores.parquet.run").glob("solution-*")
    solution.write_bytes(b"")
    setting.score(TASKS, stopped, batch_size=None, memory=1.0)
    assert same(stopped, whole)


def other_problem():
    return mi.bilevel(setting._loss, mi.adaptation.closed_form(setting._ridge), meta_regularizer=mi.l2(0.25))


def changed(index, value):
    tasks = list(TASKS)
    tasks[index] = value
    return tasks


class Named(list):
    ids = tuple("abcdefghi")


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (r"damping: this run has 0\.2, that one 1\.0", {"damping": 0.2}),
        (r"damping: this run has 'auto', that one 1\.0", {"damping": "auto"}),
        (r"solver: this run has 'cg\(\)', that one 'cg\(tol=1e-12\)'", {"solver": mi.solvers.cg()}),
        (r"solver: this run has 'minres\(\)'", {"solver": mi.solvers.minres()}),
        ("problem and curvature", {"curvature": mi.curvature.gamma()}),
        (r"batch_size: this run has 3, that one 1", {"batch_size": 3}),
        ("on_error: this run has 'skip', that one 'raise'", {"on_error": "skip"}),
        ("precision: this run has 'default', that one 'highest'", {"precision": "default"}),
        ("meta_params", {"meta_params": {**setting.LAMBDA, "bias": np.asarray(0.2)}}),
        ("target_args", {"target_args": (np.asarray([1.0, -0.5, 0.3]),)}),
        ("meta_regularizer", {"problem": other_problem()}),
        ("target: ", {"target": lambda meta_params, direction: 2.0 * setting.target(meta_params, direction)}),
        (r"source\.length: this run has 8, that one 9", {"source": TASKS[:8]}),
        (r"source\.content", {"source": changed(4, setting.tasks(1, seed=1)[0])}),
        (r"source\.ids", {"source": Named(TASKS)}),
    ],
)
def test_another_run_is_refused_with_the_difference_named(left, match, options):
    before = sorted(path.name for path in left.parent.rglob("*"))
    with pytest.raises(ValueError, match=rf"out: expected a new file or one of this run.*differs in {match}"):
        setting.score(**{"source": TASKS, "out": left, "memory": 1.0, "batch_size": None, **options})
    assert sorted(path.name for path in left.parent.rglob("*")) == before


def test_a_finished_file_is_read_or_refused_or_replaced(whole, tmp_path):
    out = shutil.copy(whole, tmp_path / "scores.parquet")
    source = Stopping(TASKS)
    again = setting.score(source, out, batch_size=None)
    first = mi.read_scores(whole)
    np.testing.assert_array_equal(again.task, first.score[first.role == "task"])
    assert again.info.num_matvecs == first.metadata["solve"]["num_matvecs"]
    with pytest.raises(ValueError, match="differs in damping"):
        setting.score(source, out, damping=0.2, batch_size=1)
    assert same(out, whole)
    setting.score(source, out, damping=0.2, batch_size=1, memory=1.0, resume=False)
    assert mi.read_scores(out).metadata["manifest"]["damping"] == 0.2


def test_a_full_disk_is_an_error_and_leaves_what_was_finished(tmp_path, whole, monkeypatch):
    out, write = tmp_path / "scores.parquet", Path.write_bytes

    def full(path, content):
        if path.name.startswith("shard-00000003"):
            write(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            setting.score(TASKS, out, batch_size=1, memory=1.0)
    assert kinds(out) == {"gradient": 1, "shard": 3, "solution": 1}
    assert not list(out.with_name("scores.parquet.run").glob("*.tmp"))
    setting.score(TASKS, out, batch_size=None, memory=1.0)
    assert same(out, whole)


def test_products_of_solvers_without_steps_are_kept(tmp_path):
    """Stopped in its solve, such a solver finds the products that it has made."""
    solver = mi.solvers.block_cg(tol=1e-12)
    out, source = tmp_path / "scores.parquet", Stopping(TASKS)
    expected = setting.score(source, tmp_path / "whole.parquet", solver=solver, memory=1.0)
    needed, each = source.count, len(TASKS)
    with pytest.raises(KeyboardInterrupt):
        # The scores are the last pass; this is within the one before, the last product.
        setting.score(Stopping(TASKS, needed - each - 2), out, solver=solver, memory=1.0)
    products = kinds(out)["product"]
    assert products == expected.info.num_matvecs - 1 > 1
    source = Stopping(TASKS)
    result = setting.score(source, out, solver=solver, memory=1.0)
    # A pass for the gradient and one for each product are not made again.
    assert source.count == needed - each * (products + 1)
    np.testing.assert_allclose(result.task, expected.task, rtol=1e-12)


def test_two_runs_on_one_file_exclude_each_other(tmp_path):
    source = Stopping(TASKS)
    with Store.opened(tmp_path / "scores.parquet.run"), pytest.raises(BlockingIOError, match="another process"):
        setting.score(source, tmp_path / "scores.parquet")
    assert not source.read


def test_a_run_that_has_kept_nothing_stands_in_no_ones_way(tmp_path):
    """Its data gave NaN, or it was killed in its first pass; the mended run is another one."""
    spoilt = [*TASKS]
    spoilt[1] = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), TASKS[1])
    out, folder = tmp_path / "scores.parquet", tmp_path / "scores.parquet.run"
    with pytest.raises(ValueError, match="NaN"):
        setting.score(spoilt, out)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    (folder / "manifest.json").write_text('{"damping": 7}')
    assert np.all(np.isfinite(setting.score(TASKS, out).task))


def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    source = Stopping(TASKS)
    with pytest.raises(OSError, match="file"):
        setting.score(source, tmp_path / "file" / "scores.parquet")
    with pytest.raises(IsADirectoryError, match="out: expected a file"):
        setting.score(source, tmp_path)
    assert not source.read


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "scores.parquet").write_text("my notes")
    with pytest.raises(ValueError, match="expected a score file of metainfluence"):
        setting.score(TASKS, tmp_path / "scores.parquet")
    assert (tmp_path / "scores.parquet").read_text() == "my notes"


def test_a_changed_library_is_another_run(stopped, monkeypatch):
    monkeypatch.setattr("metainfluence._disk.library", lambda: "0.0 other")
    with pytest.raises(ValueError, match=r"differs in library: this run has '0\.0 other'"):
        setting.score(TASKS, stopped)


def test_float32_is_another_run(stopped):
    with jax.enable_x64(False), pytest.raises(ValueError, match="differs in dtype: this run has 'float32'"):
        setting.score(TASKS, stopped)
