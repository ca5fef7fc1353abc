"""The response of a training run: the derivative of its end λ_N(w) with respect to the data weights.

A run is stepped through once, with its states kept at some steps. Forward mode carries a change of the state along the
same steps; reverse mode carries a cotangent back through them,

    c_k = (∂s_{k+1}/∂s_k)ᵀ c_{k+1},    dφ/dw += (∂s_{k+1}/∂w)ᵀ c_{k+1}

and gives the scores of all tasks and examples at once. Both are exact: nothing is assumed of where the run ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from metainfluence._checks import check_finite, check_mesh, check_precision, concrete, maker
from metainfluence._progress import Progress, reporter
from metainfluence.data import Task, Weights, name_not_finite, resolve_weights, sizes
from metainfluence.operators import Domain
from metainfluence.response import _stored
from metainfluence.response._programs import Programs
from metainfluence.response._response import Influence
from metainfluence.response._sweeps import Steps
from metainfluence.training import Run, taken

__all__ = ["RunInfo", "Trajectory", "trajectory"]

_NO_DIGITS = 1e-3


class RunInfo(NamedTuple):
    """What a run's derivative rests on.

    Attributes:
      num_steps: N.
      outer_gradient_norm: ‖D_λF‖ at the end, over all tasks; None where the objective is not known, as of a
        `training_loop`.
      replay_difference: ‖λ_N − end‖ / ‖end‖, from the λ that was recorded; None where none was given.
      first_nonfinite_step: number of the first step after which λ is not finite; −1 for none.
      cotangent_norms: before each step `[N]`, ‖c ⊙ s‖ with the state s: the change of φ by relative changes of the
        state, in which leaves of different units compare; None but from `vjp`.
      growth: the largest of these over that at the end; None but from `vjp`. Rounding grows as much.
      smoothness: as measured by `mi.smoothness`; None where it was not.
    """

    num_steps: int | Int[Array, ""]
    outer_gradient_norm: Float[Array, ""] | None
    replay_difference: Float[Array, ""] | None
    first_nonfinite_step: Int[Array, ""]
    cotangent_norms: Float[Array, "*m N"] | None = None
    growth: Float[Array, "*m"] | None = None
    smoothness: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How the end of a training run answers the data weights; a registered pytree, which may cross jit.

    Attributes:
      meta_params: λ_N, where the run ends.
      info: what was seen on the way.
      start: the state before the first step.
      end: the state after the last.
      kept: the states before each segment, or all of them and their gradients; None where they are on disk.
      steps: the steps' numbers and tasks, by segment.
      tasks: the tasks.
      weights: their weights.
      programs: what computes the rest.
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
    weights: Weights
    programs: Programs = dataclasses.field(metadata={"static": True})
    place: _stored.Place | None = dataclasses.field(default=None, metadata={"static": True})
    progress: bool | Callable[[Progress], None] = dataclasses.field(default=False, metadata={"static": True})

    def jvp(self, direction: Weights) -> Influence:
        """(dλ_N/dw) · direction, by one forward sweep, which needs no kept states.

        Args:
          direction: `Weights` of the tasks' shapes, or with one more leading axis for many, which are stepped together.

        Returns:
          Influence; λ_N + delta predicts the end at the weights w + direction.

        Raises:
          TypeError: no `Weights` of floating-point numbers.
          ValueError: a wrong shape, or values that are not finite.
        """
        many = isinstance(direction, Weights) and jnp.ndim(direction.task) == 2
        if many:
            _check_lead("direction", direction)
        resolve_weights(_first(direction) if many else direction, self.tasks, name="direction")
        check_finite("direction", direction)
        direction = jax.tree.map(lambda d, w: jnp.asarray(d, w.dtype), direction, self.weights)
        delta = self.programs.push(many, direction, self.start, self.steps, self.tasks, self.weights)
        return Influence(delta, cast(Any, self.info))

    def vjp(self, slope: PyTree) -> tuple[Weights, RunInfo]:
        """dφ/dw of every task, support example and query example, by one reverse sweep.

        Args:
          slope: ∇φ at `meta_params`, a pytree like it; or with one more leading axis for many targets, which are
            stepped together.

        Returns:
          (dφ/dw, info with the cotangents' norms and growth); a score is − w · dφ/dw.

        Raises:
          ValueError: another structure or shape, or values that are not finite.
          TypeError: states on disk, and a call that is traced.
        """
        domain = Domain.of(self.meta_params)
        leaves = jax.tree.leaves(slope)
        ranks = [len(like.shape) for like in domain.leaves]
        many = len(leaves) == len(ranks) and all(jnp.ndim(x) == n + 1 for x, n in zip(leaves, ranks, strict=True))
        if many:
            _check_lead("slope", slope)
        domain.check("slope", _first(slope) if many else slope)
        check_finite("slope", slope)
        slope = jax.tree.map(lambda s, like: jnp.asarray(s, like.dtype), slope, self.meta_params)
        scores, norms, growth = self._pulled(many, slope)
        return scores, self.info._replace(cotangent_norms=norms, growth=growth)

    def _pulled(self, many: bool, slope: PyTree) -> tuple[Weights, Array, Array]:
        rest = (self.end, self.kept, self.steps, self.tasks, self.weights)
        untraced = concrete(slope, self.end, self.tasks, self.weights)
        if self.programs.store == "device" or (self.place is None and not untraced):
            return self.programs.pull(many, slope, *rest)
        if not untraced:
            raise TypeError("store: a run whose states are on disk is gone back through outside jit, vmap and grad")
        with reporter(self.progress) as report, contextlib.ExitStack() as stack:
            folder = None if self.place is None else stack.enter_context(self.place.opened())
            data = (self.end, self.steps, self.tasks, self.weights)
            return _stored.pull(self.programs, many, slope, *data, self.kept, folder, report)


class TrajectoryOf(Protocol):
    """What `trajectory` makes."""

    def __call__(self, start: PyTree, tasks: Task, weights: Weights | None = None, *, end: PyTree = None) -> Trajectory:
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

    It runs the training: `at.meta_params` is its end λ_N, and `at.jvp`, `at.vjp` are the exact derivative of λ_N(w).
    Where every state is kept, a target costs at most about three times the training, else four times.

    Args:
      run: made by `metainfluence.training` or `training_loop`.
      store: where states are kept: "device", within one compiled program; "host", memory of the host; or a folder, as a
        `pathlib.Path`, where a run or a sweep that was cut short, for whatever reason, goes on when it is called again.
      keep: "all" keeps every step's state and gradient, on the device only, and computes nothing again; "sqrt" keeps
        every √N-th state; a number keeps one in so many steps; "auto" is "all" on the device where they take up to
        `KEEP_ALL_BYTES`, 256 MiB, by their shapes, else "sqrt".
      precision: of matrix products, see `jax.default_matmul_precision`; None for JAX's setting.
      mesh: devices over which each step's tasks are sharded, over all axes of the mesh; for `training`.
      resume: False starts anew, and removes what is in the folder.
      progress: True shows a bar where states are on the host or on disk; or a function of `scoring.Progress`.

    Returns:
      Function of where the run starts, λ for `training` and the state for `training_loop`, of stacked tasks and their
      `Weights`; `end` is the λ that was recorded when the run was made, to which `info.replay_difference` is measured.

    Raises:
      TypeError: no run; a λ without floating-point numbers; a mesh for a `training_loop`; at the call, a store other
        than the device and values that are traced.
      ValueError: an unknown `store`, `keep` or `precision`; at the call, a start that is not finite, a folder that
        holds another run, with the difference named; and as the run's maker says.
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

    def make(start: PyTree, tasks: Task, weights: Weights | None = None, *, end: PyTree = None) -> Trajectory:
        weights = resolve_weights(weights, tasks)
        state = run.begin(start)
        table = run.batches(sizes(tasks).lead[0])
        run.check(state, *taken(None if table is None else table[0], tasks, weights))
        steps = programs.sweeps(state).steps(table)
        at = _through(programs, state, steps, tasks, weights, folder, resume, progress)
        name_not_finite(at.meta_params, tasks, "tasks")
        if end is None:
            return at
        Domain.of(at.meta_params).check("end", end)
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, at.meta_params, end)) / optax.tree.norm(end)
        return dataclasses.replace(at, info=at.info._replace(replay_difference=difference))

    return make


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
                about = _stored.manifest_of(run, state, steps, tasks, weights, programs.precision)
                place = _stored.Place(folder, about)
                states = stack.enter_context(place.opened(resume, new=True))
            last, nonfinite = _stored.train(programs, state, steps, tasks, weights, states, report)
            kept = states.stacked() if folder is None else None
        last = jax.tree.map(jnp.asarray, last)
        norm = programs.gradient_norm(last, steps, tasks, weights)
    info = RunInfo(run.num_steps, norm, None, jnp.asarray(nonfinite))
    reached = run.meta_params(last)
    return Trajectory(reached, info, state, last, kept, steps, tasks, weights, programs, place, progress)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _check_lead(name: str, tree: PyTree) -> None:
    """Raises ValueError unless all leaves have the same, positive number on their leading axis."""
    counts = {jnp.shape(leaf)[0] for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"{name}: expected one number on the leading axis of all leaves, got {sorted(counts)}")


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


def problems_of_run(info: RunInfo) -> list[str]:
    """What is wrong with a run's derivative, in words; empty where nothing is. For use outside jit."""
    found = []
    first = int(info.first_nonfinite_step)
    if first >= 0:
        found.append(
            f"λ is not finite after step {first} of {int(info.num_steps)}: lower the learning rate, clip the gradient, "
            "or give Adam an eps_root > 0"
        )
    eps = float(np.finfo(np.asarray(info.growth).dtype).eps) if info.growth is not None else 0.0
    if info.cotangent_norms is not None and first < 0:
        norms = np.asarray(info.cotangent_norms)
        norms = norms.reshape(-1, norms.shape[-1])
        bad = np.flatnonzero(~np.all(np.isfinite(norms), axis=0))
        largest = float(np.max(np.asarray(info.growth)))
        if bad.size:
            found.append(
                f"the derivative is not finite at step {int(bad[-1])} of {int(info.num_steps)}, seen from the end: a "
                "square root or a norm at 0, as in Adam without eps_root, or a derivative that overflows"
            )
        elif not largest * eps <= _NO_DIGITS:
            where = int(np.unravel_index(np.argmax(norms), norms.shape)[1])
            found.append(
                f"cotangents grow by {largest:.1e} on the way back, the most at step {where} of "
                f"{int(info.num_steps)}, and rounding with them: no digit of the derivative holds; the run is chaotic: "
                "train with a lower learning rate, warm-up or a larger eps_root, or ask metainfluence.optimum"
            )
    if info.replay_difference is not None:
        difference = float(info.replay_difference)
        dtype = np.asarray(info.replay_difference).dtype
        if not difference <= math.sqrt(float(np.finfo(dtype).eps)):
            found.append(
                f"the run does not end at the λ that was recorded, but {difference:.1e} ‖λ‖ from it: another start, "
                "order of tasks, number of steps, optimiser or precision than in training"
            )
    return found
