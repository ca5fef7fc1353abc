"""The response of a training run whose tasks are read from a source, one step's at a time.

The steps forward and back are the same as in memory, in a Python loop. Within a segment the states are recomputed from
the one that is kept, and each step's tasks are read again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from metainfluence import _disk
from metainfluence._checks import concrete
from metainfluence._progress import Progress, Reporter, reporter
from metainfluence._source import Batch, Reader, Source, Widths, stack
from metainfluence._spoilt import finite_gradients, told_of_source
from metainfluence.data import Task, Weights, leaves_by_kind, name_not_finite, resolve_weights, sizes
from metainfluence.response import _stored
from metainfluence.response._programs import Programs, growth
from metainfluence.response._questions import direction_of, slope_of
from metainfluence.response._response import Influence
from metainfluence.response._run_info import RunInfo
from metainfluence.response._sums import mean, regularizer_gradient
from metainfluence.response._sweeps import Passed, Returned, Steps
from metainfluence.training import Run, floats_of

__all__ = ["Streamed"]


class Stream:
    """The tasks of a source, by steps.

    Args:
      source: the tasks.
      rows: which of them each step takes, `[N, b]`; None for all of them.
      num_steps: N.

    Attributes:
      reader: reads them, and notices whether they change.
      rows: `[N, b]`.
      shapes: of all tasks, stacked; no values.
    """

    def __init__(self, source: Source, rows: Any, num_steps: int):
        self.reader = Reader(source, 1, "raise")
        count = len(self.reader.ids)
        every = np.broadcast_to(np.arange(count), (num_steps, count))
        self.rows: Any = every if rows is None else np.asarray(rows)
        # All are read once first: to pad every step's tasks equally, and to notice later whether they have changed.
        template = self.reader.template()
        own, longest, masked = sizes(template, stacked=False), {"support": 0, "query": 0}, set()
        for index in range(count):
            task = cast(Task, self.reader.task(index))
            size = sizes(task, stacked=False)
            for side, known in longest.items():
                number = getattr(size, side)
                longest[side] = max(known, number)
                if number != getattr(own, side) or getattr(task, f"{side}_mask") is not None:
                    masked.add(side)
        self._widths = Widths(*(longest[side] if side in masked else None for side in ("support", "query")))

        def shaped(side: str) -> PyTree:
            kinds = leaves_by_kind(getattr(template, side))
            shapes = [(longest[side], *leaf.shape[1:]) if of_examples else leaf.shape for _, leaf, of_examples in kinds]
            stacked = [
                jax.ShapeDtypeStruct((count, *shape), leaf.dtype)
                for (_, leaf, _), shape in zip(kinds, shapes, strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(getattr(template, side)), stacked)

        self.shapes = Task(shaped("support"), shaped("query"))

    def steps(self, numbers: Sequence[int]) -> Generator[tuple[int, Batch]]:
        """The tasks of these steps, read ahead by one thread."""
        return self.reader.ahead(lambda number: self._stacked(self.rows[number]), numbers)

    def all(self) -> Generator[tuple[int, Batch]]:
        """All tasks, as many at a time as a step takes; the last batch is filled up with weight 0."""
        size, count = self.rows.shape[1], len(self.reader.ids)

        def read(number: int) -> Batch:
            row = np.arange(number * size, (number + 1) * size)
            batch = self._stacked(np.minimum(row, count - 1))
            return batch._replace(weights=batch.weights._replace(task=batch.weights.task * (row < count)))

        return self.reader.ahead(read, range(-(-count // size)))

    def first(self) -> Batch:
        """The first step's tasks."""
        return self._stacked(self.rows[0])

    def ids(self) -> np.ndarray:
        """The ids of all tasks."""
        return np.asarray(self.reader.ids)

    def name_not_finite(self, run: Run, start: PyTree, end: PyTree) -> None:
        """Raises, naming the tasks, where λ at the end is not finite because of their data, or of their program."""
        if all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(end)):
            return
        problem, spoilt = run.problem, []
        finite = None if problem is None else jax.jit(functools.partial(finite_gradients, problem))
        for index, name in enumerate(self.reader.ids):
            alone = stack([self.reader.task(index)], self.reader.template(), self._widths)
            name_not_finite(end, alone.tasks, f"source[{name!r}]")
            if finite is not None and not np.all(np.asarray(finite(start, *alone))):
                spoilt.append(index)
        if problem is not None and spoilt:
            ids, first = [self.reader.ids[index] for index in spoilt], cast(Task, self.reader.task(spoilt[0]))
            told = told_of_source(problem, start, ids, first)
            raise ValueError(f"source: {told}; mend it there, or leave these tasks out of the source")

    def _stacked(self, row: Any) -> Batch:
        return stack([self.reader.task(int(index)) for index in row], self.reader.template(), self._widths)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """How the end of a training run responds to the data weights of tasks in a source; for use outside jit.

    Attributes:
      meta_params: λ_N, where the run ends.
      info: what was seen during the run.
      ids: the tasks' ids, in the order of the scores and weights, `[T]`.
      weights: the tasks' weights.
    """

    meta_params: PyTree
    info: RunInfo
    ids: np.ndarray
    weights: Weights
    start: PyTree
    end: PyTree
    stream: Stream
    steps: Steps
    states: PyTree
    programs: Programs
    place: _stored.Place | None
    progress: bool | Callable[[Progress], None]

    def jvp(self, direction: Weights) -> Influence:
        """As `Trajectory.jvp`."""
        many, direction = direction_of(direction, self.stream.shapes, self.weights)
        change = [jnp.zeros_like(leaf) for leaf in floats_of(self.start)]
        if many:
            change = [jnp.zeros((len(direction.task), *leaf.shape), leaf.dtype) for leaf in change]
        along, state, total = jax.tree.map(np.asarray, direction), self.start, self.programs.run.num_steps
        with reporter(self.progress) as report:
            report.phase("sweep")
            for number, batch in self.stream.steps(range(total)):
                row = self.stream.rows[number]
                chosen = jax.tree.map(lambda leaf, row=row: leaf[:, row] if many else leaf[row], along)
                data = (jnp.asarray(number, jnp.int32), batch.tasks, _rows(self.weights, row))
                state, change = self.programs.step_push(many, change, chosen, state, *data)
                report.batch(number + 1, total)
        return Influence(self.programs.change(many, change, state), cast(Any, self.info))

    def vjp(self, slope: PyTree) -> tuple[Weights, RunInfo]:
        """As `Trajectory.vjp`; an interrupted sweep is resumed where the states are on disk."""
        many, slope = slope_of(slope, self.meta_params, self.info)
        with reporter(self.progress) as report, contextlib.ExitStack() as stack:
            folder = None if self.place is None else stack.enter_context(self.place.opened())
            scores, norms, grown = self._pulled(many, slope, folder, report)
        return scores, self.info._replace(cotangent_norms=norms, growth=grown)

    def _pulled(
        self, many: bool, slope: PyTree, folder: _stored.Folder | None, report: Reporter
    ) -> tuple[Weights, Array, Array]:
        programs, last_step = self.programs, self.programs.run.num_steps
        begun, last = programs.begin_back(many, slope, self.end, self.weights)
        returned: Any = begun._replace(scores=jax.tree.map(np.array, begun.scores))
        norms: Any = np.zeros((*last.shape, last_step), last.dtype)
        total, length = self.steps.number.shape
        digest, done = _disk.of_arrays(slope), 0
        if folder is not None:
            found = folder.saved(digest, _stored.Sweep(np.zeros(8, np.uint8), returned, norms))
            if found is not None:
                done, (_, returned, norms) = found
                # Arrays read from a file cannot be written to.
                returned, norms = returned._replace(scores=jax.tree.map(np.array, returned.scores)), np.array(norms)
        report.phase("sweep")
        like = Passed(self.end, jnp.asarray(-1, jnp.int32))
        cotangent = jax.tree.map(jnp.asarray, returned.cotangent)
        for count, segment in enumerate(reversed(range(total - done)), 1):
            state = self.states[segment] if folder is None else folder.state(segment, like).state
            numbers = range(segment * length, min((segment + 1) * length, last_step))
            passed, kept = Passed(state, like.nonfinite), []
            for number, batch in self.stream.steps(numbers):
                passed, each = programs.step(passed, *self._data(number, batch))
                kept.append(each)
            for number, batch in self.stream.steps(numbers[::-1]):
                data = self._data(number, batch)
                cotangent, part, norm = programs.step_back(many, cotangent, kept.pop(), *data)
                norms[..., number] = np.asarray(norm)
                _add(many, returned.scores, self.stream.rows[number], part)
            if folder is not None:
                at = Returned(cotangent, returned.scores)
                folder.save(total - segment, _stored.Sweep(np.frombuffer(bytes.fromhex(digest), np.uint8), at, norms))
            report.batch(count, total - done)
        return jax.tree.map(jnp.asarray, returned.scores), jnp.asarray(norms), growth(jnp.asarray(norms), last)

    def _data(self, number: int, batch: Batch) -> tuple[Array, Task, Weights]:
        return jnp.asarray(number, jnp.int32), batch.tasks, _rows(self.weights, self.stream.rows[number])


def streamed(
    programs: Programs,
    start: PyTree,
    source: Source,
    weights: Weights | None,
    folder: Path | None,
    resume: bool,
    progress: bool | Callable[[Progress], None],
) -> Streamed:
    """Goes through a run whose tasks are read from a source."""
    if not concrete(start, weights):
        raise TypeError("tasks: expected stacked tasks within jit, vmap and grad, got a source, which is read outside")
    run = programs.run
    state = run.begin(start)
    stream = Stream(source, run.batches(len(source)), run.num_steps)
    weights = jax.tree.map(np.asarray, resolve_weights(weights, stream.shapes))
    first = stream.first().tasks, _rows(weights, stream.rows[0])
    run.check(state, *first)
    steps = programs.sweeps(state).steps(None)
    place, states = None, cast(Any, _stored.Memory())
    with reporter(progress) as report, contextlib.ExitStack() as stack:
        if folder is not None:
            about = _stored.manifest_of(programs, state, steps.number.shape[1], first, _about(stream, weights))
            place = _stored.Place(folder, about)
            states = stack.enter_context(place.opened(resume, new=True))
        passed = _trained(programs, state, steps, stream, weights, states, report)
        last, nonfinite = jax.tree.map(jnp.asarray, passed.state), jnp.asarray(passed.nonfinite)
        stream.name_not_finite(run, run.meta_params(state), run.meta_params(last))
        norm = _gradient_norm(programs, last, stream, weights)
    kept = None if folder is not None else states.each()
    info = RunInfo(run.num_steps, norm, None, nonfinite)
    reached = run.meta_params(last)
    return Streamed(reached, info, stream.ids(), weights, state, last, stream, steps, kept, programs, place, progress)


def _trained(
    programs: Programs, state: PyTree, steps: Steps, stream: Stream, weights: Weights, kept: Any, report: Reporter
) -> Passed:
    """Goes through the run from the last state kept, and returns the final one."""
    done, passed = _stored.begun(state, kept)
    total, length = steps.number.shape
    last_step = programs.run.num_steps
    report.phase("training")
    for number, batch in stream.steps(range(min(done * length, last_step), last_step)):
        data = (jnp.asarray(number, jnp.int32), batch.tasks, _rows(weights, stream.rows[number]))
        passed, _ = programs.step(passed, *data)
        if (number + 1) % length == 0 or number + 1 == last_step:
            segment = number // length
            kept.keep(segment + 1, passed)
            report.batch(segment + 1 - done, total - done)
    return passed


def _gradient_norm(programs: Programs, state: PyTree, stream: Stream, weights: Weights) -> Array | None:
    """‖D_λF‖ over all tasks; None where F is not known."""
    problem, total, count = programs.run.problem, None, len(weights.task)
    if problem is None:
        return None
    for number, batch in stream.all():
        size = len(batch.weights.task)
        own = _rows(weights, np.minimum(np.arange(number * size, (number + 1) * size), count - 1))
        own = own._replace(task=own.task * batch.weights.task)
        part = programs.batch_slope(state, batch.tasks, own)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return optax.tree.norm(mean(total, count, regularizer_gradient(problem, programs.run.meta_params(state))))


def _about(stream: Stream, weights: Weights) -> dict[str, Any]:
    return {
        "tasks": _disk.of_arrays(stream.reader.checksums),
        "ids of the tasks": _disk.of_texts(map(str, stream.ids().tolist())),
        "weights": _disk.of_arrays(weights),
        "order of the tasks": _disk.of_arrays(stream.rows),
    }


def _rows(weights: Weights, row: Any) -> Weights:
    return jax.tree.map(lambda leaf: leaf[row], weights)


def _add(many: bool, totals: Weights, row: Any, parts: Weights) -> None:
    """Adds a step's part in place; a task may occur twice in a step."""
    for total, part in zip(totals, parts, strict=True):
        np.add.at(total, (slice(None), row) if many else row, np.asarray(part))
