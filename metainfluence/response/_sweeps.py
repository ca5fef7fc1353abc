"""The programs of a trajectory: forward through a run, and back through it with few of its states kept.

Steps come in segments of equal length, filled up with steps that do nothing; the state before each segment is kept, and
those within it are recomputed (Griewank and Walther, Evaluating Derivatives, 2008, ch. 12). Each program holds one copy
of the step, or of its transpose, per loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from metainfluence.data import Task, Weights
from metainfluence.response._choice import mapped, tree_bytes, vectors_at_once
from metainfluence.training import Floats, Run, floats_of, taken, with_floats


class Steps(NamedTuple):
    """Some steps of a run: their numbers `[m]`, and their tasks `[m, b]` or None for all."""

    number: Array
    row: Array | None


class Passed(NamedTuple):
    """What goes forward: a state, and the first step after which λ was not finite, −1 for none."""

    state: PyTree
    nonfinite: Array


class Returned(NamedTuple):
    """What comes back: the cotangent of a state, and dφ/dw so far."""

    cotangent: Floats
    scores: Weights


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """A run's programs, for segments of `length` steps.

    Attributes:
      run: the run.
      length: steps in a segment.
      keeps_all: whether every step's state and record is kept, so that nothing is recomputed; then there is one
        segment.
      mesh: devices for each step's tasks.
      many: whether cotangents, and what is computed from them, have a leading axis.
    """

    run: Run
    length: int
    keeps_all: bool = False
    mesh: Mesh | None = None
    many: bool = False

    @property
    def segments(self) -> int:
        """Number of segments."""
        return math.ceil(self.run.num_steps / self.length)

    def steps(self, table: Array | None) -> Steps:
        """All steps, `[segments, length]`; filler steps have numbers from N on."""
        number = jnp.arange(self.segments * self.length, dtype=jnp.int32)
        row = None
        if table is not None:
            row = table[jnp.minimum(number, self.run.num_steps - 1)]
        return jax.tree.map(lambda x: x.reshape(self.segments, self.length, *x.shape[1:]), Steps(number, row))

    def forward(self, passed: Passed, steps: Steps, tasks: Task, weights: Weights) -> tuple[Passed, PyTree]:
        """Goes through some steps; also gives each one's state and record."""

        def step(passed: Passed, each: Steps) -> tuple[Passed, PyTree]:
            def go(passed: Passed) -> tuple[Passed, PyTree]:
                chosen, own = taken(each.row, tasks, weights)
                state, record = self.run.step(passed.state, each.number, chosen, own, self.mesh)
                good = jnp.all(
                    jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(self.run.meta_params(state))])
                )
                nonfinite = jnp.where((passed.nonfinite < 0) & ~good, each.number, passed.nonfinite)
                return Passed(state, nonfinite), record

            after, record = self._unless_filled(each, go, passed)
            return after, (passed.state, record)

        return jax.lax.scan(step, passed, steps)

    def train(self, state: PyTree, steps: Steps, tasks: Task, weights: Weights) -> tuple[Passed, PyTree]:
        """Goes through all segments; also gives the state before each, or all states and records where all are kept."""
        passed = Passed(state, jnp.asarray(-1, jnp.int32))
        if self.keeps_all:
            return self.forward(passed, _first(steps), tasks, weights)

        def segment(passed: Passed, steps: Steps) -> tuple[Passed, PyTree]:
            return self.forward(passed, steps, tasks, weights)[0], passed.state

        return jax.lax.scan(segment, passed, steps)

    def back(
        self, returned: Returned, kept: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Returned, Array]:
        """Comes back through some steps whose states and records are all given.

        Also gives the norms of the cotangents, with the steps on the first axis.
        """

        def step(returned: Returned, each: tuple[Steps, tuple[PyTree, PyTree]]) -> tuple[Returned, Array]:
            steps, (state, record) = each

            def go(returned: Returned) -> tuple[Returned, Array]:
                chosen, own = taken(steps.row, tasks, weights)
                cotangent, part = self.pull_step(state, record, steps.number, chosen, own, returned.cotangent)
                scores = jax.tree.map(lambda total, new: self._added(total, steps.row, new), returned.scores, part)
                return Returned(cotangent, scores), self.norm(cotangent, state)

            return self._unless_filled(steps, go, returned)

        return jax.lax.scan(step, returned, (steps, kept), reverse=True)

    def back_again(
        self, returned: Returned, start: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Returned, Array]:
        """Comes back through a segment whose first state is given."""
        passed = Passed(start, jnp.asarray(-1, jnp.int32))
        _, kept = self.forward(passed, steps, tasks, weights)
        return self.back(returned, kept, steps, tasks, weights)

    def pull(
        self, returned: Returned, kept: PyTree, steps: Steps, tasks: Task, weights: Weights
    ) -> tuple[Weights, Array]:
        """dφ/dw of a cotangent of the last state, and the norms of the cotangents before each step, `[N]`."""
        if self.keeps_all:
            returned, norms = self.back(returned, kept, _first(steps), tasks, weights)
        else:

            def segment(returned: Returned, each: tuple[Steps, PyTree]) -> tuple[Returned, Array]:
                return self.back_again(returned, each[1], each[0], tasks, weights)

            returned, norms = jax.lax.scan(segment, returned, (steps, kept), reverse=True)
        # [N], or [N, m] by segments and steps.
        norms = norms.reshape(-1, *norms.shape[norms.ndim - self.many :])[: self.run.num_steps]
        return returned.scores, jnp.moveaxis(norms, 0, -1)

    def pull_step(
        self, state: PyTree, record: PyTree, number: Array, tasks: Task, weights: Weights, cotangent: Floats
    ) -> tuple[Floats, Weights]:
        """Comes back through one step with its own tasks.

        Many cotangents go through one linearisation, as many at once as stay in the cache. All of them together would
        take that many times the memory, and more time.
        """
        data = (state, record, number, tasks, weights)
        if not self.many:
            return self.run.pull(*data, cotangent, self.mesh)
        pullback = self.run.pullback(*data, self.mesh)
        return mapped(pullback, cotangent, vectors_at_once(tree_bytes(pullback), self.mesh))

    def norm(self, cotangent: Floats, state: PyTree) -> Array:
        """`relative_norm` of one cotangent or of each."""
        if not self.many:
            return relative_norm(cotangent, state)
        return jax.vmap(lambda each: relative_norm(each, state))(cotangent)

    def push(
        self, state: PyTree, steps: Steps, tasks: Task, weights: Weights, direction: Weights
    ) -> tuple[PyTree, Floats]:
        """The last state, and its derivative along a direction in the weights."""

        def step(carry: tuple[PyTree, Floats], each: Steps) -> tuple[tuple[PyTree, Floats], None]:
            chosen, own, along = taken(each.row, tasks, weights, direction)
            return self.run.push(carry[0], each.number, chosen, own, carry[1], along, self.mesh), None

        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: self.run.num_steps], steps)
        change = jax.tree.map(jnp.zeros_like, floats_of(state))
        return jax.lax.scan(step, (state, change), flat)[0]

    def _added(self, total: Array, row: Array | None, part: Array) -> Array:
        if row is None:
            return total + part
        return (total.at[:, row] if self.many else total.at[row]).add(part)

    def _unless_filled(self, each: Steps, go: Callable[[Any], tuple[Any, PyTree]], carry: Any) -> tuple[Any, PyTree]:
        """`go(carry)`, or, for a step that fills up, the carry as it is and zeros."""
        if self.segments * self.length == self.run.num_steps:
            return go(carry)
        _, like = jax.eval_shape(go, carry)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        return jax.lax.cond(each.number < self.run.num_steps, go, lambda carry: (carry, zeros), carry)


def relative_norm(cotangent: Floats, state: PyTree) -> Array:
    """‖c ⊙ s‖: what relative changes of a state do to φ, so that leaves of different units can be compared."""
    return optax.tree.norm(jax.tree.map(jnp.multiply, cotangent, floats_of(state)))


def cotangent_of(run: Run, state: PyTree, slope: PyTree) -> Floats:
    """The cotangent of a state whose λ has the cotangent `slope`."""
    return jax.vjp(lambda floats: run.meta_params(with_floats(state, floats)), floats_of(state))[1](slope)[0]


def change_of(run: Run, state: PyTree, change: Floats) -> PyTree:
    """The change of λ when a state changes."""
    return jax.jvp(lambda floats: run.meta_params(with_floats(state, floats)), (floats_of(state),), (change,))[1]


def _first(steps: Steps) -> Steps:
    return jax.tree.map(lambda x: x[0], steps)
