"""A trajectory whose states are in host memory or on disk: its segments in a Python loop, resumed where it ended.

On disk, each state is a file that is either complete or absent, and the cotangent and scores of a reverse sweep are
kept likewise. A run killed at any moment goes on where it was, and reaches the same numbers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from metainfluence import _disk
from metainfluence._disk import Store
from metainfluence._progress import Reporter
from metainfluence.data import Task, Weights
from metainfluence.response._programs import Programs, growth
from metainfluence.response._sweeps import Passed, Returned, Steps

_STATE, _SWEEP = "state", "sweep"


class Kept(Protocol):
    """The states before each segment, and the last one."""

    def keep(self, number: int, passed: Passed) -> None:
        """Keeps the state before a segment."""

    def state(self, number: int, like: Passed) -> Passed:
        """The state before a segment."""

    def last(self) -> int | None:
        """The number of the last state kept, with none missing before it."""


class Memory:
    """States in host memory, stacked at the end so that they are arrays like others."""

    def __init__(self) -> None:
        self._states: list[Passed] = []

    def keep(self, number: int, passed: Passed) -> None:
        """Keeps the state before a segment."""
        del number
        self._states.append(jax.tree.map(_on_host, passed))

    def state(self, number: int, like: Passed) -> Passed:
        """The state before a segment."""
        del like
        return self._states[number]

    def last(self) -> int | None:
        """The number of the last state kept."""
        return len(self._states) - 1 if self._states else None

    def stacked(self) -> PyTree:
        """The states before each segment on a leading axis."""
        return jax.tree.map(lambda *leaves: (jnp if _is_key(leaves[0]) else np).stack(leaves), *self.each())

    def each(self) -> list[PyTree]:
        """The states before each segment."""
        return [passed.state for passed in self._states[:-1]]


class Folder:
    """States on disk, and those of a sweep."""

    def __init__(self, store: Store):
        self._store = store

    def keep(self, number: int, passed: Passed) -> None:
        """Writes the state before a segment."""
        self._store.write(_STATE, number, _packed(passed))

    def state(self, number: int, like: Passed) -> Passed:
        """Reads the state before a segment.

        Raises:
          OSError: it is missing or damaged.
        """
        found = self._store.arrays(_STATE, number)
        if found is None:
            raise OSError(
                f"store: state {number} is missing or damaged; the same call of trajectory(run)(start, tasks) computes "
                "it again, and those after it"
            )
        return _unpacked(found, like)

    def last(self) -> int | None:
        """The number of the last state kept, with none missing before it."""
        whole = [number for place, number in enumerate(self._store.numbers(_STATE)) if place == number]
        while whole and self._store.read(_STATE, whole[-1]) is None:
            whole.pop()
        return whole[-1] if whole else None

    def save(self, done: int, sweep: PyTree) -> None:
        """Writes a sweep's progress, in place of the earlier one."""
        self._store.replace(_SWEEP, done, _packed(sweep))

    def saved(self, slope: str, like: PyTree) -> tuple[int, PyTree] | None:
        """How many segments the sweep for a slope has done, and its progress; that of another slope is removed."""
        found = self._store.latest(_SWEEP)
        if found is None:
            return None
        arrays = found[1]
        if len(arrays) == len(jax.tree.leaves(like)):
            sweep = _unpacked(arrays, like)
            if _text(sweep[0]) == slope:
                return found[0], sweep
        self._store.forget(_SWEEP)
        return None


class Place(NamedTuple):
    """A folder and, as JSON, the manifest of the run whose states are in it."""

    folder: Path
    manifest: str

    @contextlib.contextmanager
    def opened(self, resume: bool = True, *, new: bool = False) -> Iterator[Folder]:
        """The folder's files, once checked to be this run's.

        Args:
          resume: False removes what is there.
          new: whether the folder may still be empty.

        Raises:
          ValueError: they are another run's, with the difference named; or there are none although there should be.
        """
        with Store.opened(self.folder) as store:
            if not resume:
                store.clear()
            ours, theirs = json.loads(self.manifest), store.manifest
            if theirs is None:
                if not new:
                    raise ValueError(f"store: expected the states of this run in {self.folder}, got none")
                store.clear()
                store.manifest = ours
            elif (told := _disk.difference(ours, theirs)) is not None:
                raise ValueError(
                    f"store: {self.folder} holds another run: {told}; give another folder, or resume=False replaces it"
                )
            yield Folder(store)


class Sweep(NamedTuple):
    """A sweep's progress: the digest of its slope, what comes back, and the norms of the cotangents so far."""

    slope: Any
    returned: Returned
    norms: Any


def begun(state: PyTree, kept: Kept) -> tuple[int, Passed]:
    """How many segments are done, and the state after the last; if none, the start, which is then kept."""
    passed, done = Passed(state, jnp.asarray(-1, jnp.int32)), kept.last()
    if done is not None:
        return done, kept.state(done, passed)
    kept.keep(0, passed)
    return 0, passed


def train(
    programs: Programs, state: PyTree, steps: Steps, tasks: Task, weights: Weights, kept: Kept, report: Reporter
) -> Passed:
    """Goes through the run from the last state kept, and returns the final one."""
    done, passed = begun(state, kept)
    total = steps.number.shape[0]
    report.phase("training")
    for segment in range(done, total):
        passed = programs.segment(passed, _at(steps, segment), tasks, weights)
        kept.keep(segment + 1, passed)
        report.batch(segment + 1 - done, total - done)
    return passed


def pull(
    programs: Programs,
    many: bool,
    slope: PyTree,
    end: PyTree,
    steps: Steps,
    tasks: Task,
    weights: Weights,
    states: PyTree,
    folder: Folder | None,
    report: Reporter,
) -> tuple[Weights, Array, Array]:
    """Comes back through the run, as `Programs.pull`, with the states stacked in host memory or in a folder."""
    returned, last = programs.begin_back(many, slope, end, weights)
    total, length = steps.number.shape
    norms: Any = np.zeros((*last.shape, total * length), last.dtype)
    digest = _disk.of_arrays(slope)
    done = 0
    if folder is not None:
        found = folder.saved(digest, Sweep(np.zeros(8, np.uint8), returned, norms))
        if found is not None:
            done, (_, returned, norms) = found
    report.phase("sweep")
    like = Passed(end, jnp.asarray(-1, jnp.int32))
    for count, segment in enumerate(reversed(range(total - done)), 1):
        if folder is not None:
            state = folder.state(segment, like).state
        else:
            state = jax.tree.map(lambda leaf, k=segment: leaf[k], states)
        returned, part = programs.segment_back(many, returned, state, _at(steps, segment), tasks, weights)
        norms[..., segment * length : (segment + 1) * length] = np.asarray(part)
        if folder is not None:
            folder.save(total - segment, Sweep(np.frombuffer(bytes.fromhex(digest), np.uint8), returned, norms))
        report.batch(count, total - done)
    kept = jnp.asarray(norms[..., : programs.run.num_steps])
    return jax.tree.map(jnp.asarray, returned.scores), kept, growth(kept, last)


def manifest_of(programs: Programs, state: PyTree, length: int, first: tuple[Task, Weights], data: Any) -> str:
    """What a trajectory's numbers depend on, as JSON; `data` says it for the tasks, `first` are those of one step."""
    run = programs.run

    def step(state: PyTree, number: Array, tasks: Task, weights: Weights) -> PyTree:
        return run.step(state, number, tasks, weights)[0]

    return json.dumps(
        {
            "library": _disk.library(),
            "jax": jax.__version__,
            "default dtype": str(jnp.result_type(float)),
            "precision": programs.precision,
            "num_steps": run.num_steps,
            "steps between states": length,
            "step": _disk.of_function(step, state, jnp.zeros((), jnp.int32), *first),
            "start": _disk.of_arrays(state),
            **data,
        }
    )


def about(steps: Steps, tasks: Task, weights: Weights) -> dict[str, Any]:
    """What the manifest says about tasks in memory."""
    return {
        "tasks": _disk.of_arrays(tasks),
        "weights": _disk.of_arrays(weights),
        "order of the tasks": None if steps.row is None else _disk.of_arrays(steps.row),
    }


def _at(steps: Steps, segment: int) -> Steps:
    return jax.tree.map(lambda leaf: leaf[segment], steps)


def _text(digest: Any) -> str:
    return bytes(np.asarray(digest)).hex()


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _on_host(leaf: Any) -> Any:
    # Typed PRNG keys have no NumPy form.
    return leaf if _is_key(leaf) else np.asarray(leaf)


def _packed(tree: PyTree) -> dict[str, np.ndarray]:
    leaves = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]
    return {str(k): np.asarray(leaf) for k, leaf in enumerate(leaves)}


def _unpacked(arrays: dict[str, np.ndarray], like: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [_restored(arrays[str(k)], leaf) for k, leaf in enumerate(leaves)])


def _restored(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
    # NumPy's files store bfloat16 and similar dtypes as bare bytes.
    return array.view(like.dtype) if array.dtype.kind == "V" else array
