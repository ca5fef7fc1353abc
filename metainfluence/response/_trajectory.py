"""The response of a training run: the derivative of its end λ_N(w) with respect to the data weights.

A run is stepped through once, with its states kept at some steps. Forward mode carries a change of the state along the
same steps; reverse mode carries a cotangent back through them,

    c_k = (∂s_{k+1}/∂s_k)ᵀ c_{k+1},    dφ/dw += (∂s_{k+1}/∂w)ᵀ c_{k+1}

and gives the scores of all tasks and examples at once. Both are exact: nothing is assumed about where the run ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast, overload

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from metainfluence._checks import check_mesh, check_precision, concrete, maker
from metainfluence._progress import Progress, reporter
from metainfluence._source import Source, is_source
from metainfluence._spoilt import Spoilt, change_along, sensitivity_of
from metainfluence.data import Task, Weights, resolve_weights, sizes
from metainfluence.operators import Domain
from metainfluence.response import _stored
from metainfluence.response._programs import Programs
from metainfluence.response._questions import direction_of, slope_of
from metainfluence.response._response import Influence
from metainfluence.response._run_info import RunInfo
from metainfluence.response._streamed import Streamed, streamed
from metainfluence.response._sweeps import Steps
from metainfluence.training import Run, taken

__all__ = ["Streamed", "Trajectory", "trajectory"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How the end of a training run responds to the data weights; a registered pytree, which can pass through jit.

    Attributes:
      meta_params: λ_N, where the run ends.
      info: what was seen during the run.
      start: the state before the first step.
      end: the state after the last.
      kept: the states before each segment, or all of them and their gradients; None where they are on disk.
      steps: the steps' numbers and tasks, by segment.
      tasks: the tasks, with others in place of those that are left out.
      used_weights: the weights that the run had.
      spoilt: what has no derivative; None if nothing.
      programs: the compiled programs for the rest.
      place: the folder of the states; None where they are in memory.
      progress: as in `trajectory`.
    """

    meta_params: PyTree
    info: RunInfo
    start: PyTree
    end: PyTree
    kept: PyTree
    steps: Steps
    tasks: Task
    used_weights: Weights
    spoilt: Spoilt | None
    programs: Programs = dataclasses.field(metadata={"static": True})
    place: _stored.Place | None = dataclasses.field(default=None, metadata={"static": True})
    progress: bool | Callable[[Progress], None] = dataclasses.field(default=False, metadata={"static": True})

    @property
    def weights(self) -> Weights:
        """The data weights w, as they were given."""
        return self.used_weights if self.spoilt is None else self.spoilt.weights

    def jvp(self, direction: Weights) -> Influence:
        """(dλ_N/dw) · direction, by one forward sweep, which needs no kept states.

        Args:
          direction: `Weights` of the tasks' shapes, or with one more leading axis for many, which are stepped together.

        Returns:
          Influence; λ_N + delta predicts the end at the weights w + direction.

        Raises:
          TypeError: not a `Weights` of floating-point numbers.
          ValueError: a wrong shape, or values that are not finite.
        """
        many, direction = direction_of(direction, self.tasks, self.weights)
        delta = self.programs.push(many, direction, self.start, self.steps, self.tasks, self.used_weights)
        return Influence(change_along(self.spoilt, direction, delta, many), cast(Any, self.info))

    def vjp(self, slope: PyTree) -> tuple[Weights, RunInfo]:
        """dφ/dw of every task, support example and query example, by one reverse sweep.

        Args:
          slope: ∇φ at `meta_params`, a pytree like it; or with one more leading axis for many targets, which are
            stepped together.

        Returns:
          (dφ/dw, info with the cotangents' norms and growth); a score is − w · dφ/dw.

        Raises:
          ValueError: another structure or shape, or values that are not finite.
          TypeError: a traced call, with states on disk.
        """
        many, slope = slope_of(slope, self.meta_params, self.info)
        scores, norms, growth = self._pulled(many, slope)
        return sensitivity_of(self.spoilt, scores, many), self.info._replace(cotangent_norms=norms, growth=growth)

    def _pulled(self, many: bool, slope: PyTree) -> tuple[Weights, Array, Array]:
        rest = (self.end, self.kept, self.steps, self.tasks, self.used_weights)
        untraced = concrete(slope, self.end, self.tasks, self.used_weights)
        if self.programs.store == "device" or (self.place is None and not untraced):
            return self.programs.pull(many, slope, *rest)
        if not untraced:
            raise TypeError("store: a run whose states are on disk is gone back through outside jit, vmap and grad")
        with reporter(self.progress) as report, contextlib.ExitStack() as stack:
            folder = None if self.place is None else stack.enter_context(self.place.opened())
            data = (self.end, self.steps, self.tasks, self.used_weights)
            return _stored.pull(self.programs, many, slope, *data, self.kept, folder, report)


class TrajectoryOf(Protocol):
    """What `trajectory` makes."""

    @overload
    def __call__(
        self, start: PyTree, tasks: Task, weights: Weights | None = None, *, end: PyTree = None
    ) -> Trajectory: ...

    @overload
    def __call__(
        self, start: PyTree, tasks: Source, weights: Weights | None = None, *, end: PyTree = None
    ) -> Streamed: ...

    def __call__(
        self, start: PyTree, tasks: Task | Source, weights: Weights | None = None, *, end: PyTree = None
    ) -> Trajectory | Streamed:
        """The response of the run from `start`."""


@maker
def trajectory(
    run: Run,
    *,
    store: str | os.PathLike[str] = "device",
    keep: int | str = "auto",
    precision: str | None = "highest",
    mesh: Mesh | None = None,
    resume: bool = True,
    progress: bool | Callable[[Progress], None] = True,
) -> TrajectoryOf:
    """Makes (start, tasks, weights=None, end=None) -> Trajectory, the response of a training run.

    Calling it runs the training: `at.meta_params` is the end λ_N, and `at.jvp`, `at.vjp` are the exact derivative of
    λ_N(w). Where every state is kept, a target costs at most about three times the training, otherwise four times. Many
    targets share the work that does not depend on them.

    Tasks that do not fit in memory are passed as a source, see `scoring.Source`. Each step reads its own tasks, one
    thread ahead, and no others are held. All tasks are read once before, to learn their sizes and to notice later
    changes, and once after, for the gradient at the end. The result is then a `Streamed`, whose scores are in the order
    of its `ids`.

    Args:
      run: made by `metainfluence.training` or `training_loop`.
      store: where states are kept: "device", within one compiled program; "host", in the host's memory; or a folder, as
        a `pathlib.Path`. With a folder, a run or a sweep that was cut short, for whatever reason, goes on when it is
        called again. With a source, "device" means "host".
      keep: "all" keeps every step's state and gradient, on the device only, and recomputes nothing; "sqrt" keeps every
        √N-th state; a number keeps one state in so many steps; "auto" is "all" on the device where they take up to
        `KEEP_ALL_BYTES`, 256 MiB, by their shapes, else "sqrt".
      precision: of matrix products, see `jax.default_matmul_precision`; None for JAX's setting.
      mesh: devices over which each step's tasks are sharded, over all axes of the mesh; for `training`.
      resume: False starts anew, and removes what is in the folder.
      progress: True shows a bar where states are on the host or on disk; or a function of `scoring.Progress`.

    Returns:
      Function of where the run starts (λ for `training`, the state for `training_loop`), of stacked tasks or a source
      of single ones, and of their `Weights`. `end` is the λ recorded in the original run, from which
      `info.replay_difference` is measured.

    Warns:
      SpoiltTaskWarning: at the call, outside jit, a run that ends in NaN because of tasks whose gradients at its start
        are NaN, although their data are not. The run is repeated without them, and their scores are NaN.

    Raises:
      TypeError: not a run; a λ without floating-point numbers; a mesh for a `training_loop`; at the call, traced values
        with a store other than the device.
      ValueError: an unknown `store`, `keep` or `precision`; at the call, a start that is not finite, a folder that
        holds another run, with the difference named, or keep="all" with a source; and as the run's maker.
      SourceError: a task that cannot be read, or a source that has changed.
      BlockingIOError: another process is writing to the folder.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> import optax
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> run = mi.training(problem, optax.sgd(0.5), num_steps=2)
      >>> at = mi.trajectory(run)(jnp.asarray(0.0), tasks)
      >>> at.meta_params.tolist(), [round(x, 3) for x in mi.scores(at, lambda m: m)().task.tolist()]
      (1.5, [0.167, -0.083, -1.083])
    """
    if not isinstance(run, Run):
        raise TypeError(f"run: expected one made by metainfluence.training or training_loop, got {type(run).__name__}")
    folder = _folder_of(store)
    where = str(store) if folder is None else "disk"
    _check_keep(keep, where)
    check_mesh(mesh)
    check_precision(precision)
    if mesh is not None and run.problem is None:
        raise TypeError("mesh: expected None for a training_loop, whose own step says where its tasks lie")
    programs = Programs(run, where, keep, mesh, precision)
    in_parts = programs if where != "device" else Programs(run, "host", keep, mesh, precision)

    def make(start: PyTree, tasks: Any, weights: Weights | None = None, *, end: PyTree = None) -> Trajectory | Streamed:
        if is_source(tasks):
            if keep == "all":
                raise ValueError('keep: expected "auto", "sqrt" or a positive integer with a source, got "all"')
            read = streamed(in_parts, start, tasks, weights, folder, resume, progress)
            return read if end is None else dataclasses.replace(read, info=_compared(read, end))
        weights = resolve_weights(weights, tasks)
        state = run.begin(start)
        table = run.batches(sizes(tasks).lead[0])
        run.check(state, *taken(None if table is None else table[0], tasks, weights))
        steps = programs.sweeps(state).steps(table)
        at = _through(programs, state, steps, tasks, weights, folder, resume, progress)
        rest = run.rest(start, at.meta_params, tasks, weights)
        if rest is not None:
            apart = None if folder is None else folder / "rest"
            at = _through(programs, state, steps, rest.tasks, rest.weights(weights), apart, resume, progress)
            at = dataclasses.replace(at, spoilt=rest.left_out(weights))
        return at if end is None else dataclasses.replace(at, info=_compared(at, end))

    return cast(TrajectoryOf, make)


def _compared(at: Trajectory | Streamed, end: PyTree) -> RunInfo:
    """The run's info, with the distance from the end that was recorded."""
    Domain.of(at.meta_params).check("end", end)
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, at.meta_params, end)) / optax.tree.norm(end)
    return at.info._replace(replay_difference=difference)


def _through(
    programs: Programs,
    state: PyTree,
    steps: Steps,
    tasks: Task,
    weights: Weights,
    folder: Path | None,
    resume: bool,
    progress: Any,
) -> Trajectory:
    """Goes through a run."""
    run, place = programs.run, None
    if programs.store == "device":
        last, kept, norm, nonfinite = programs.train(state, steps, tasks, weights)
    else:
        if not concrete(state, tasks, weights):
            raise TypeError(f'store: {programs.store!r} works outside jit, vmap and grad; use "device" within')
        with reporter(progress) as report, contextlib.ExitStack() as stack:
            states: Any = _stored.Memory()
            if folder is not None:
                first = cast(Any, taken(None if steps.row is None else steps.row[0, 0], tasks, weights))
                data = _stored.about(steps, tasks, weights)
                place = _stored.Place(folder, _stored.manifest_of(programs, state, steps.number.shape[1], first, data))
                states = stack.enter_context(place.opened(resume, new=True))
            last, nonfinite = _stored.train(programs, state, steps, tasks, weights, states, report)
            kept = states.stacked() if folder is None else None
        last = jax.tree.map(jnp.asarray, last)
        norm = programs.gradient_norm(last, steps, tasks, weights)
    info = RunInfo(run.num_steps, norm, None, jnp.asarray(nonfinite))
    reached = run.meta_params(last)
    return Trajectory(reached, info, state, last, kept, steps, tasks, weights, None, programs, place, progress)


def _folder_of(store: Any) -> Path | None:
    """The folder; None for the device and the host."""
    if isinstance(store, str) and store in ("device", "host"):
        return None
    if isinstance(store, os.PathLike) or (isinstance(store, str) and os.sep in store):
        return Path(store)
    raise ValueError(f'store: expected "device", "host" or a folder as a pathlib.Path, got {store!r}')


def _check_keep(keep: Any, store: str) -> None:
    number = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not number and not (isinstance(keep, str) and keep in ("auto", "all", "sqrt")):
        raise ValueError(f'keep: expected "auto", "all", "sqrt" or a positive integer, got {keep!r}')
    if keep == "all" and store != "device":
        raise ValueError('keep: expected "auto", "sqrt" or a positive integer, since "all" is for store="device"')
