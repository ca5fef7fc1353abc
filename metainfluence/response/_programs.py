"""The compiled programs of a trajectory: made once for a run, used by all calls on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from metainfluence._checks import at_own_precision
from metainfluence.data import Task, Weights
from metainfluence.problem import total_objective
from metainfluence.response._sweeps import Passed, Returned, Steps, Sweeps, change_of, cotangent_of, relative_norm
from metainfluence.training import Floats, Run

KEEP_ALL_BYTES = 1 << 28
"""Up to so many bytes of states and gradients a run on the device keeps those of every step."""


class Programs:
    """A run's compiled programs.

    Args:
      run: the run.
      store: as in `trajectory`.
      keep: as in `trajectory`.
      mesh: as in `trajectory`.
      precision: as in `trajectory`.
    """

    def __init__(self, run: Run, store: str, keep: int | str, mesh: Mesh | None, precision: str | None):
        self.run, self.store, self.mesh, self.precision, self._keep = run, store, mesh, precision, keep
        self._train = jax.jit(self._trained, static_argnums=0)
        self._segment = jax.jit(self._forward, static_argnums=0)
        self._norm = jax.jit(self._gradient_norm)
        self._pull = jax.jit(self._pulled, static_argnums=0)
        self._back = jax.jit(self._segment_back, static_argnums=0)
        self._begin = jax.jit(self._begun, static_argnums=0)
        self._one = jax.jit(self._step, static_argnums=0)
        self._one_back = jax.jit(self._step_back, static_argnums=0)
        self._one_push = {many: jax.jit(self._pushes(many)) for many in (False, True)}
        self._change = {many: jax.jit(self._changes(many)) for many in (False, True)}
        self._slope = jax.jit(self._batch_slope)
        self._push = {many: jax.jit(_mapped(self._pushed, many), static_argnums=0) for many in (False, True)}

    @at_own_precision
    def sweeps(self, state: PyTree, many: bool = False) -> Sweeps:
        """The programs for a state of these shapes, and for one cotangent or many."""
        length = steps_per_segment(self._keep, self.store, self.run, state)
        return Sweeps(self.run, length, self.store == "device" and length == self.run.num_steps, self.mesh, many)

    def train(
        self, state: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[PyTree, PyTree, Array | None, Array]:
        """Goes through the run: (last state, what is kept, ‖D_λF‖, first step that is not finite)."""
        return self._train(self.sweeps(state), state, steps, tasks, weights)

    @at_own_precision
    def segment(self, passed: Passed, steps: Steps, tasks: Task, weights: Weights) -> Passed:
        """Goes through one segment."""
        return self._segment(self.sweeps(passed.state), passed, steps, tasks, weights)

    @at_own_precision
    def gradient_norm(self, state: PyTree, steps: Steps, tasks: Task, weights: Weights) -> Array | None:
        """‖D_λF‖ over all tasks, as many at a time as a step takes; None where F is not known."""
        return self._norm(state, steps, tasks, weights)

    @at_own_precision
    def pull(
        self, many: bool, slope: PyTree, state: PyTree, kept: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Weights, Array, Array]:
        """(dφ/dw, norms of the cotangents, their growth)."""
        return self._pull(self.sweeps(state, many), slope, state, kept, steps, tasks, weights)

    @at_own_precision
    def begin_back(self, many: bool, slope: PyTree, state: PyTree, weights: Weights) -> tuple[Returned, Array]:
        """What comes back before the last segment, and the norm of the cotangent there."""
        return self._begin(self.sweeps(state, many), slope, state, weights)

    @at_own_precision
    def segment_back(
        self, many: bool, returned: Returned, state: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Returned, Array]:
        """Comes back through one segment whose first state is given."""
        return self._back(self.sweeps(state, many), returned, state, steps, tasks, weights)

    @at_own_precision
    def push(
        self, many: bool, direction: Weights, start: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> PyTree:
        """The change of λ_N."""
        return self._push[many](self.sweeps(start), direction, start, steps, tasks, weights)

    @at_own_precision
    def step(self, passed: Passed, number: Array, tasks: Task, weights: Weights) -> tuple[Passed, PyTree]:
        """Goes through one step with its own tasks; also gives what `step_back` needs from it."""
        return self._one(self.sweeps(passed.state), passed, number, tasks, weights)

    @at_own_precision
    def step_back(
        self, many: bool, cotangent: Floats, kept: PyTree, number: Array, tasks: Task, weights: Weights
    ) -> tuple[Floats, Weights, Array]:
        """Comes back through one step: (cotangent, dφ/dw of the step's tasks, its norm)."""
        return self._one_back(self.sweeps(kept[0], many), cotangent, kept, number, tasks, weights)

    @at_own_precision
    def step_push(
        self, many: bool, change: Floats, along: Weights, state: PyTree, number: Array, tasks: Task, weights: Weights
    ) -> tuple[PyTree, Floats]:
        """(state after one step, its change)."""
        return self._one_push[many](change, along, state, number, tasks, weights)

    @at_own_precision
    def change(self, many: bool, change: Floats, state: PyTree) -> PyTree:
        """The change of λ."""
        return self._change[many](change, state)

    @at_own_precision
    def batch_slope(self, state: PyTree, tasks: Task, weights: Weights) -> PyTree:
        """Σ w_k D_λL_k over a batch."""
        return self._slope(state, tasks, weights)

    def _step(
        self, sweeps: Sweeps, passed: Passed, number: Array, tasks: Task, weights: Weights
    ) -> tuple[Passed, PyTree]:
        passed, kept = sweeps.forward(passed, Steps(number[None], None), tasks, weights)
        return passed, jax.tree.map(lambda leaf: leaf[0], kept)

    def _step_back(
        self, sweeps: Sweeps, cotangent: Floats, kept: PyTree, number: Array, tasks: Task, weights: Weights
    ) -> tuple[Floats, Weights, Array]:
        state, record = kept
        cotangent, scores = sweeps.pull_step(state, record, number, tasks, weights, cotangent)
        return cotangent, scores, sweeps.norm(cotangent, state)

    def _pushes(self, many: bool) -> Callable[..., tuple[PyTree, Floats]]:
        def push(
            change: Floats, along: Weights, state: PyTree, number: Array, tasks: Task, weights: Weights
        ) -> tuple[PyTree, Floats]:
            def one(change: Floats, along: Weights) -> tuple[PyTree, Floats]:
                return self.run.push(state, number, tasks, weights, change, along, self.mesh)

            return (jax.vmap(one, out_axes=(None, 0)) if many else one)(change, along)

        return push

    def _changes(self, many: bool) -> Callable[..., PyTree]:
        def change(change: Floats, state: PyTree) -> PyTree:
            def one(change: Floats) -> PyTree:
                return change_of(self.run, state, change)

            return (jax.vmap(one) if many else one)(change)

        return change

    def _batch_slope(self, state: PyTree, tasks: Task, weights: Weights) -> PyTree:
        assert self.run.problem is not None
        plain = self.run.problem._replace(meta_regularizer=None)
        objective = total_objective(plain, mesh=self.mesh, precision=None)
        slope = jax.grad(objective)(self.run.meta_params(state), tasks, weights)
        return optax.tree.scale(weights.task.shape[0], slope)

    def _trained(
        self, sweeps: Sweeps, state: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[PyTree, PyTree, Array | None, Array]:
        passed, kept = sweeps.train(state, steps, tasks, weights)
        return passed.state, kept, self._gradient_norm(passed.state, steps, tasks, weights), passed.nonfinite

    def _forward(self, sweeps: Sweeps, passed: Passed, steps: Steps, tasks: Task, weights: Weights) -> Passed:
        return sweeps.forward(passed, steps, tasks, weights)[0]

    def _gradient_norm(self, state: PyTree, steps: Steps, tasks: Task, weights: Weights) -> Array | None:
        if self.run.problem is None:
            return None
        size = None if steps.row is None else steps.row.shape[-1]
        objective = total_objective(self.run.problem, batch_size=size, mesh=self.mesh, precision=None)
        return optax.tree.norm(jax.grad(objective)(self.run.meta_params(state), tasks, weights))

    def _begun(self, sweeps: Sweeps, slope: PyTree, state: PyTree, weights: Weights) -> tuple[Returned, Array]:
        def begin(slope: PyTree) -> tuple[Returned, Array]:
            cotangent = cotangent_of(self.run, state, slope)
            return Returned(cotangent, jax.tree.map(jnp.zeros_like, weights)), relative_norm(cotangent, state)

        return (jax.vmap(begin) if sweeps.many else begin)(slope)

    def _pulled(
        self, sweeps: Sweeps, slope: PyTree, state: PyTree, kept: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Weights, Array, Array]:
        returned, last = self._begun(sweeps, slope, state, weights)
        scores, norms = sweeps.pull(returned, kept, steps, tasks, weights)
        return scores, norms, growth(norms, last)

    def _segment_back(
        self, sweeps: Sweeps, returned: Returned, state: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Returned, Array]:
        returned, norms = sweeps.back_again(returned, state, steps, tasks, weights)
        return returned, jnp.moveaxis(norms, 0, -1)

    def _pushed(
        self, sweeps: Sweeps, direction: Weights, start: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> PyTree:
        return change_of(self.run, *sweeps.push(start, steps, tasks, weights, direction))


def _mapped(fn: Callable[..., Any], many: bool) -> Callable[..., Any]:
    """The function, or its `vmap` over a leading axis of its first argument."""
    if not many:
        return fn

    def mapped(sweeps: Sweeps, first: PyTree, *rest: Any) -> Any:
        return jax.vmap(lambda one: fn(sweeps, one, *rest))(first)

    return mapped


def growth(norms: Array, last: Array) -> Array:
    """The largest norm on the last axis over the norm at the end; 1 where the latter is 0, as without a gradient."""
    largest = jnp.maximum(jnp.max(norms, axis=-1), last)
    return jnp.where(last == 0, jnp.ones_like(last), largest / jnp.where(last == 0, jnp.ones_like(last), last))


def steps_per_segment(keep: int | str, store: str, run: Run, state: PyTree) -> int:
    """Steps between two states that are kept, from shapes alone; all steps where every state is kept."""
    count = run.num_steps
    if isinstance(keep, int):
        return min(keep, count)
    size = sum(math.prod(jnp.shape(leaf)) * _itemsize(leaf) for leaf in jax.tree.leaves(state))
    gradient = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.meta_params(state)))
    fits = store == "device" and count * (size + gradient) <= KEEP_ALL_BYTES
    if keep == "all" or (keep == "auto" and fits):
        return count
    return math.ceil(count / math.ceil(math.sqrt(count)))


def _itemsize(leaf: Any) -> int:
    dtype = jnp.result_type(leaf)
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
