"""Reading, transfer and compute overlap, batches fill what there is, and lean linearisations leave room for more."""

import threading

import jax
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.scoring import _batch_size as batches
from metainfluence.scoring import _engine
from scoring import setting
from scoring.test_engine import largest_error

SECONDS = 20


class Watched(list):
    """A source that tells which of its items have been asked for, and holds one back."""

    def __init__(self, tasks):
        super().__init__(tasks)
        self.read = [threading.Event() for _ in tasks]
        self.before = {}

    def __getitem__(self, index):
        self.read[index].set()
        if index in self.before:
            assert self.before[index].wait(SECONDS), f"item {index} was read before anything was computed"
        return super().__getitem__(index)


def test_batches_are_read_and_moved_while_others_are_computed(monkeypatch):
    """Each waits for the other, so that neither can come first as a whole: batch 0 is computed while 2 is read."""
    source, computing, moved = Watched(setting.tasks(5)), threading.Event(), [threading.Event() for _ in range(5)]
    programs = setting.programs()
    prepare, put, reader = programs.gradient.prepare, programs.put, setting.reader(source, 1)
    reader.template()
    # Held back until a batch is in computation.
    source.before = {2: computing}
    numbers = iter(range(5))

    def moving(batch):
        found = put(batch)
        moved[next(numbers)].set()
        return found

    calls = iter(range(5))

    def slow(*args):
        call, number = prepare(*args), next(calls)

        def run():
            if number == 0:
                computing.set()
                assert source.read[3].wait(SECONDS), "no batch was read while batch 0 was computed"
                assert moved[1].wait(SECONDS), "no batch was moved while batch 0 was computed"
            return call()

        return run

    monkeypatch.setattr(programs.gradient, "prepare", slow)
    monkeypatch.setattr(programs, "put", moving)
    setting.passes(programs, reader, 0.0).slope()
    assert computing.is_set()
    assert all(event.is_set() for event in moved)


ROOM = batches.Room(whole=1e9, lean=1e8, data=1e7, vectors=1e6)


@pytest.mark.parametrize(("backend", "size"), [("gpu", 17), ("cpu", 15)])
def test_a_batch_fills_an_accelerator_and_a_cache(backend, size, monkeypatch):
    """Of 100 tasks 19 fit an accelerator at once, and a CPU is given at least 16: 6 batches or 7, of equal size."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert batches.batch_size_for(ROOM, 100, 80e9, setting.LAMBDA, None) == size


def test_small_tasks_fill_an_accelerator_up_to_where_more_bring_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    small = batches.Room(whole=1e4, lean=1e4, data=1e3, vectors=0.0)
    assert batches.batch_size_for(small, 10**5, 80e9, setting.LAMBDA, None) == 4000
    assert batches.batch_size_for(small, 300, 80e9, setting.LAMBDA, None) == 300


def test_a_device_without_room_for_one_task_says_what_is_missing_and_what_takes_half(tmp_path):
    expected = r"memory: expected at least .* got 1 kB: .* are missing; float32 in place of float64 takes half"
    with pytest.raises(MemoryError, match=expected):
        setting.score(setting.tasks(5), tmp_path / "scores.parquet", batch_size=None, memory=1e3)


def test_lean_linearisations_leave_room_for_more_and_change_nothing(tmp_path, monkeypatch):
    tasks = setting.tasks(11)
    room = batches.room_of(setting.PROBLEM, setting.EXACT, setting.LAMBDA, tasks[0])
    assert room.data == sum(leaf.nbytes for leaf in jax.tree.leaves(tasks[0]))
    assert not batches.keeps_lean(room, 11, 11 * room.whole)
    assert batches.keeps_lean(ROOM, 11, 1e10)
    lean = setting.programs_of(setting.PROBLEM, setting.EXACT, None, True)
    sizes_of = [setting.passes(each, setting.reader(tasks, 4), 1e9).linear_bytes for each in (lean, setting.programs())]
    assert sizes_of[0] < sizes_of[1]
    # Three of the small ones, beside the share that is for data.
    kept = [setting.passes(each, setting.reader(tasks, 4), 4.01 * sizes_of[0]) for each in (lean, setting.programs())]
    found, wanted = (each.operator(each.slope()).matvec(jax.tree.map(np.asarray, setting.LAMBDA)) for each in kept)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, wanted)
    assert len(kept[0]._linear) > len(kept[1]._linear)
    monkeypatch.setattr(_engine, "keeps_lean", lambda *args: True)
    result = setting.score(tasks, tmp_path / "scores.parquet", memory=3e4)
    assert largest_error(result, setting.in_memory(tasks)) <= 1e-12


def test_the_default_batch_needs_no_compiling(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("compiled to choose a batch")

    monkeypatch.setattr(mi.trust._preflight, "_measure", refused)
    result = setting.score(setting.tasks(3), tmp_path / "scores.parquet", batch_size=None)
    assert len(result.task) == 3


def test_a_device_that_is_lost_in_the_midst_of_a_run_keeps_what_is_done(tmp_path, monkeypatch):
    """The seventh of eleven batches of scores fails; the call that goes on solves nothing and makes the rest."""
    tasks, out, options = setting.tasks(11), tmp_path / "scores.parquet", {"memory": 1.0, "batch_size": 1}
    wanted = setting.score(tasks, tmp_path / "whole.parquet", **options)
    monkeypatch.setattr(_engine, "_ROWS_PER_SHARD", 1)
    programs, calls, told = setting.programs(), iter(range(11)), []
    prepare = programs.scores.prepare

    def failing(*args):
        if next(calls) < 6:
            return prepare(*args)
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(_engine, "programs_of", lambda *args: programs)
        patch.setattr(programs.scores, "prepare", failing)
        with pytest.raises(jax.errors.JaxRuntimeError, match="the device is gone; what was finished is kept"):
            setting.score(tasks, out, **options)
    found = setting.score(tasks, out, progress=told.append, **options)
    assert {now.phase for now in told} == {"scores"}
    assert max(now.total for now in told) <= 11 - 3
    np.testing.assert_array_equal(found.task, wanted.task)
