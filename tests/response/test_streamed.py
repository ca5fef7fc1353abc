"""A run whose tasks are read from a source: the numbers of tasks in memory, with those of one step held."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
import tiny
from response.test_trajectory import ADAM, STEPS, directions, distance, loop, normal, stacked

RUN = mi.training(tiny.PROBLEM, ADAM, STEPS, tasks_per_step=2)
SLOPE = {"scale": jnp.asarray(2.0)}
MANY = {"scale": jnp.asarray([2.0, -1.0, 0.5])}


class Source:
    """Five tasks of unlike sizes, made when they are asked for; some may be other ones, or unreadable."""

    ids = tuple("abcde")

    def __init__(self, changed: int | None = None, reads: int | None = None, nan: int | None = None):
        self.changed, self.left, self.nan = changed, reads, nan

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int, /) -> mi.Task:
        if self.left == 0:
            raise OSError("no such file")
        self.left = None if self.left is None else self.left - 1
        rng = np.random.default_rng(index)
        support, query = ({"x": rng.normal(size=(n, 2)), "y": rng.normal(size=n)} for n in (3 + index % 2, 5))
        query["y"] *= 1.1 if index == self.changed else np.nan if index == self.nan else 1.0
        return mi.Task(support, query)


def in_memory() -> mi.Task:
    return mi.stack_tasks([jax.tree.map(jnp.asarray, Source()[k]) for k in range(5)])


def weights() -> mi.Weights:
    return jax.tree.map(lambda w: w + 0.1 * normal(w), mi.unit_weights(in_memory()))


@functools.cache
def reference() -> Any:
    return mi.trajectory(RUN)(tiny.LAMBDA, in_memory(), weights())


def test_answers_are_those_of_tasks_in_memory() -> None:
    at = mi.trajectory(RUN, progress=False)(tiny.LAMBDA, Source(), weights())
    assert at.ids.tolist() == list("abcde")
    assert distance(at.meta_params, reference().meta_params) < 1e-12
    for slope in (SLOPE, MANY):
        (scores, info), (expected, told) = at.vjp(slope), reference().vjp(slope)
        assert distance(scores, expected) < 1e-12
        for ours, theirs in zip(info, told, strict=True):
            np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), rtol=1e-11)
    ways = directions(weights())
    assert distance(at.jvp(ways[-1]).delta, reference().jvp(ways[-1]).delta) < 1e-12
    assert distance(at.jvp(stacked(ways)).delta, reference().jvp(stacked(ways)).delta) < 1e-12
    ours, theirs = (mi.scores(response, tiny.target)() for response in (at, reference()))
    np.testing.assert_allclose(ours.support, theirs.support, rtol=1e-11, atol=1e-16)
    mi.check(ours)


def test_every_step_may_take_all_tasks_and_a_loop_its_own() -> None:
    run = mi.training(tiny.PROBLEM, ADAM, 3)
    ours, theirs = (
        mi.trajectory(run, progress=False)(tiny.LAMBDA, tasks, weights()) for tasks in (Source(), in_memory())
    )
    assert distance(ours.meta_params, theirs.meta_params) < 1e-12
    np.testing.assert_allclose(ours.info.outer_gradient_norm, theirs.info.outer_gradient_norm, rtol=1e-12)
    run, start = loop(4)
    ours, theirs = (mi.trajectory(run, progress=False)(start, tasks) for tasks in (Source(), in_memory()))
    assert distance(ours.vjp(SLOPE)[0], theirs.vjp(SLOPE)[0]) < 1e-12
    assert ours.info.outer_gradient_norm is None


def test_tasks_of_one_step_are_in_memory() -> None:
    class Large:
        def __len__(self) -> int:
            return 60

        def __getitem__(self, index: int, /) -> mi.Task:
            return mi.Task((), np.full((1, 1 << 16), 1.0 + index))

    problem = mi.from_task_loss(lambda m, task, w: jnp.mean(w.query[:, None] * (m - task.query) ** 2))
    run = mi.training(problem, optax.sgd(0.01), 30, tasks_per_step=2)
    make = mi.trajectory(run, progress=False)
    tracemalloc.start()
    make(jnp.asarray(0.0), Large()).vjp(jnp.asarray(1.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Half a megabyte each: two in a step, and the steps that are read ahead. All would be 30 MB.
    assert peak < 12e6


SCRIPT = """
import os, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
import metainfluence as mi
from response import test_streamed as setting
import tiny

def killed(now):
    if now.phase == "sweep" and now.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

make = mi.trajectory(setting.RUN, store=Path(sys.argv[1]), keep=2, progress=killed)
make(tiny.LAMBDA, setting.Source(), setting.weights()).vjp(setting.MANY)
"""


def test_goes_on_after_a_kill_and_after_a_source_that_failed(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    make = mi.trajectory(
        RUN, store=tmp_path, keep=2, progress=lambda now: seen.append((now.phase, now.done, now.total))
    )
    # All tasks once, the first step's, and then six more: the source fails in the fourth step.
    with pytest.raises(mi.scoring.SourceError, match="could not be read: OSError: no such file"):
        make(tiny.LAMBDA, Source(reads=5 + 2 + 6), weights())
    assert seen == [("training", 1, 4)]
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    script = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ended = subprocess.run(script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    seen.clear()
    at = make(tiny.LAMBDA, Source(), weights())
    scores, info = at.vjp(MANY)
    assert seen == [("sweep", 1, 2), ("sweep", 2, 2)]
    expected, told = reference().vjp(MANY)
    assert distance(scores, expected) < 1e-12
    assert distance(info.cotangent_norms, told.cotangent_norms) < 1e-12
    with pytest.raises(ValueError, match=r"holds another run: tasks: this run has"):
        make(tiny.LAMBDA, Source(changed=4), weights())
    renamed = Source()
    renamed.ids = tuple("abcdf")
    with pytest.raises(ValueError, match=r"holds another run: ids of the tasks: this run has"):
        make(tiny.LAMBDA, renamed, weights())


def test_a_source_that_changes_between_two_questions_is_refused() -> None:
    source = Source()
    at = mi.trajectory(RUN, progress=False)(tiny.LAMBDA, source)
    source.changed = 3
    with pytest.raises(mi.scoring.SourceError, match=r"task 'd' \(item 3\): expected what was read before"):
        at.vjp(SLOPE)


def test_sources_that_cannot_be() -> None:
    make = mi.trajectory(RUN, progress=False)
    with pytest.raises(ValueError, match=r"source\['c'\].query\['y'\]: expected finite numbers, got NaN"):
        make(tiny.LAMBDA, Source(nan=2))
    with pytest.raises(
        ValueError, match=r'keep: expected "auto", "sqrt" or a positive integer with a source, got "all"'
    ):
        mi.trajectory(RUN, keep="all")(tiny.LAMBDA, Source())
    with pytest.raises(TypeError, match=r"tasks: expected stacked tasks within jit, vmap and grad, got a source"):
        jax.jit(lambda start: make(start, Source()).meta_params)(tiny.LAMBDA)
    with pytest.raises(mi.scoring.SourceError, match=r"source: task 0 \(item 0\) could not be read: TypeError"):
        make(tiny.LAMBDA, [1.0, 2.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"weights.support: expected shape \(5, 4\), got \(5, 3\)"):
        make(tiny.LAMBDA, Source(), weights()._replace(support=jnp.ones((5, 3))))
