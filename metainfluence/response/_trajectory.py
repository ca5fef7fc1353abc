"""The response of a training run: the derivative of its end λ_N(w) with respect to the data weights.

A run is stepped through once, with its states kept at some steps. Forward mode carries a change of the state along the
same steps; reverse mode carries a cotangent back through them,

    c_k = (∂s_{k+1}/∂s_k)ᵀ c_{k+1},    dφ/dw += (∂s_{k+1}/∂w)ᵀ c_{k+1}

and gives the scores of all tasks and examples at once. Both are exact: nothing is assumed of where the run ends.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from metainfluence._calls import maker
from metainfluence.bilevel import total_objective
from metainfluence.influence import Influence
from metainfluence.operators import Domain
from metainfluence.response._sweeps import Steps, Sweeps, change_of, cotangent_of, relative_norm
from metainfluence.tasks import (
    Task,
    Weights,
    check_mesh,
    concrete,
    name_not_finite,
    resolve_weights,
    sizes,
)
from metainfluence.training import Run, floats_of, taken

KEEP_ALL_BYTES = 1 << 28
"""Up to so many bytes of states and gradients a run keeps those of every step."""

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
      state: the state after the last.
      kept: states before each segment, or all of them and their gradients.
      steps: the steps' numbers and tasks, by segment.
      tasks: the tasks.
      weights: their weights.
      programs: what computes the rest.
    """

    meta_params: PyTree
    info: RunInfo
    start: PyTree
    state: PyTree
    kept: PyTree
    steps: Steps
    tasks: Task
    weights: Weights
    programs: Programs = dataclasses.field(metadata={"static": True})

    def jvp(self, direction: Weights) -> Influence:
        """(dλ_N/dw) · direction, by one forward sweep.

        Args:
          direction: `Weights` of the tasks' shapes, or with one more leading axis for many, which are stepped together.

        Returns:
          Influence; λ_N + delta predicts the end at the weights w + direction.

        Raises:
          TypeError: no `Weights` of floating-point numbers.
          ValueError: a wrong shape, or values that are not finite.
        """
        many = isinstance(direction, Weights) and jnp.ndim(direction.task) == 2
        first = jax.tree.map(lambda leaf: leaf[0], direction) if many else direction
        resolve_weights(first, self.tasks, name="direction")
        direction = jax.tree.map(lambda d, w: jnp.asarray(d, w.dtype), direction, self.weights)
        delta = self.programs.push(many, self, direction)
        return Influence(delta, self.info)

    def vjp(self, slope: PyTree) -> tuple[Weights, RunInfo]:
        """dφ/dw of every task, support example and query example, by one reverse sweep.

        Args:
          slope: ∇φ at `meta_params`, a pytree like it; or with one more leading axis for many targets, which are
            stepped together.

        Returns:
          (dφ/dw, info with the cotangent's norms and growth); a score is − w · dφ/dw.

        Raises:
          ValueError: another structure or shape.
        """
        domain = Domain.of(self.meta_params)
        lead = [jnp.ndim(leaf) - len(like.shape) for leaf, like in zip(jax.tree.leaves(slope), domain.leaves)]
        many = bool(lead) and all(extra == 1 for extra in lead)
        domain.check("slope", jax.tree.map(lambda leaf: leaf[0], slope) if many else slope)
        slope = jax.tree.map(lambda s, like: jnp.asarray(s, like.dtype), slope, self.meta_params)
        scores, norms, growth = self.programs.pull(many, self, slope)
        return scores, self.info._replace(cotangent_norms=norms, growth=growth)


class Programs:
    """What computes a trajectory of one run; compiled once for all that is asked of it.

    Args:
      run: the run.
      keep: as in `trajectory`, like the others.
    """

    def __init__(self, run: Run, keep: int | str, mesh: Mesh | None, precision: str | None):
        self.run, self.mesh, self._keep, self._precision = run, mesh, keep, precision
        self._train = jax.jit(self._trained, static_argnums=0)
        self._pull = {many: jax.jit(_mapped(self._pulled, many), static_argnums=0) for many in (False, True)}
        self._push = {many: jax.jit(_mapped(self._pushed, many), static_argnums=0) for many in (False, True)}

    def train(self, start: PyTree, tasks: Task, weights: Weights) -> Trajectory:
        """Goes through the run."""
        with jax.default_matmul_precision(self._precision):
            state = self.run.begin(start)
            table = self.run.batches(sizes(tasks).lead[0])
            self.run.check(state, *taken(None if table is None else table[0], tasks, weights))
            sweeps = self.sweeps(state)
            steps = sweeps.steps(table)
            end, kept, norm, nonfinite = self._train(sweeps, state, steps, tasks, weights)
        info = RunInfo(self.run.num_steps, norm, None, nonfinite)
        return Trajectory(self.run.meta_params(end), info, state, end, kept, steps, tasks, weights, self)

    def pull(self, many: bool, at: Trajectory, slope: PyTree) -> tuple[Weights, Array, Array]:
        """dφ/dw, cotangents' norms and growth."""
        with jax.default_matmul_precision(self._precision):
            return self._pull[many](self.sweeps(at.start), slope, at.state, at.kept, at.steps, at.tasks, at.weights)

    def push(self, many: bool, at: Trajectory, direction: Weights) -> PyTree:
        """The change of λ_N."""
        with jax.default_matmul_precision(self._precision):
            return self._push[many](self.sweeps(at.start), direction, at.start, at.steps, at.tasks, at.weights)

    def sweeps(self, state: PyTree) -> Sweeps:
        """The programs for a state of these shapes."""
        return Sweeps(self.run, steps_per_segment(self._keep, self.run, state), self.mesh)

    def _trained(
        self, sweeps: Sweeps, state: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[PyTree, PyTree, Array | None, Array]:
        passed, kept = sweeps.train(state, steps, tasks, weights)
        return passed.state, kept, self.gradient_norm(passed.state, steps, tasks, weights), passed.nonfinite

    def gradient_norm(self, state: PyTree, steps: Steps, tasks: Task, weights: Weights) -> Array | None:
        """‖D_λF‖ over all tasks, as many at a time as a step takes."""
        if self.run.problem is None:
            return None
        size = None if steps.row is None else steps.row.shape[-1]
        objective = total_objective(self.run.problem, batch_size=size, mesh=self.mesh)
        return optax.tree.norm(jax.grad(objective)(self.run.meta_params(state), tasks, weights))

    def _pulled(
        self, sweeps: Sweeps, slope: PyTree, state: PyTree, kept: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Weights, Array, Array]:
        cotangent = cotangent_of(self.run, state, slope)
        scores, norms = sweeps.pull(cotangent, kept, steps, tasks, weights)
        return scores, norms, growth(norms, relative_norm(cotangent, state))

    def _pushed(
        self, sweeps: Sweeps, direction: Weights, start: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> PyTree:
        return change_of(self.run, *sweeps.push(start, steps, tasks, weights, direction))


def _mapped(fn: Callable[..., Any], many: bool) -> Callable[..., Any]:
    """The function, or for many of its first arguments on a leading axis."""
    if not many:
        return fn

    def mapped(sweeps: Sweeps, first: PyTree, *rest: Any) -> Any:
        return jax.vmap(lambda one: fn(sweeps, one, *rest))(first)

    return mapped


def growth(norms: Array, last: Array) -> Array:
    """The largest norm over the last; 1 where that is 0, as for a target without a gradient."""
    largest = jnp.maximum(jnp.max(norms), last)
    return jnp.where(last == 0, 1.0, largest / jnp.where(last == 0, 1.0, last)).astype(norms.dtype)


def steps_per_segment(keep: int | str, run: Run, state: PyTree) -> int:
    """Steps between two states that are kept, from shapes alone; all of them where every state is."""
    count = run.num_steps
    if isinstance(keep, int):
        return min(keep, count)
    size = sum(math.prod(jnp.shape(leaf)) * _itemsize(leaf) for leaf in jax.tree.leaves(state))
    gradient = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.meta_params(state)))
    if keep == "all" or (keep == "auto" and count * (size + gradient) <= KEEP_ALL_BYTES):
        return count
    return math.ceil(count / math.ceil(math.sqrt(count)))


def _itemsize(leaf: Any) -> int:
    dtype = jnp.result_type(leaf)
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


@maker("(start, tasks)")
def trajectory(
    run: Run,
    *,
    store: str | os.PathLike[str] = "device",
    keep: int | str = "auto",
    precision: str | None = "highest",
    mesh: Mesh | None = None,
) -> Callable[..., Trajectory]:
    """Makes (start, tasks, weights=None, end=None) -> Trajectory, the response of a training run.

    It runs the training: `at.meta_params` is its end λ_N, and `at.jvp`, `at.vjp` are the exact derivative of λ_N(w).

    Args:
      run: made by `metainfluence.training` or `training_loop`.
      store: where states are kept: "device".
      keep: "all" keeps every step's state and gradient, and computes nothing again; "sqrt" keeps every √N-th state; a
        number keeps one in so many steps; "auto" is "all" up to `KEEP_ALL_BYTES`, else "sqrt".
      precision: of matrix products, see `jax.default_matmul_precision`; None for JAX's setting.
      mesh: devices over which each step's tasks are sharded, over all axes of the mesh.

    Returns:
      Function of where the run starts, λ for `training` and the state for `training_loop`, of stacked tasks and their
      `Weights`; `end` is the λ that was recorded when the run was made, to which `info.replay_difference` is measured.

    Raises:
      TypeError: no run, or a λ without floating-point numbers.
      ValueError: an unknown `store` or `keep`; a start that is not finite; and as the run's maker says.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run: expected one made by metainfluence.training or training_loop, got {type(run).__name__}")
    _check_store(store)
    _check_keep(keep)
    check_mesh(mesh)
    programs = Programs(run, keep, mesh, precision)

    def make(start: PyTree, tasks: Task, weights: Weights | None = None, *, end: PyTree = None) -> Trajectory:
        weights = resolve_weights(weights, tasks)
        at = programs.train(start, tasks, weights)
        name_not_finite(at.meta_params, tasks, "tasks")
        if end is None:
            return at
        Domain.of(at.meta_params).check("end", end)
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, at.meta_params, end)) / optax.tree.norm(end)
        return dataclasses.replace(at, info=at.info._replace(replay_difference=difference))

    return make


def _check_store(store: Any) -> None:
    if store not in ("device",):
        raise ValueError(f'store: expected "device", got {store!r}')


def _check_keep(keep: Any) -> None:
    number = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not number and keep not in ("auto", "all", "sqrt"):
        raise ValueError(f'keep: expected "auto", "all", "sqrt" or a positive integer, got {keep!r}')


def problems_of(info: RunInfo) -> list[str]:
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
