"""A training run as a pure function of where it starts, the tasks and their data weights.

A run is what `mi.trajectory` differentiates: N steps state ← step(state, tasks of the step, their weights). It is made
from a problem and an optax optimiser (`training`), or from the user's own update (`training_loop`).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Int, PyTree

from metainfluence._checks import (
    calling,
    check_arrays,
    check_finite,
    check_floating,
    check_function,
    check_mesh,
    check_precision,
    concrete,
    leaf_name,
    refuse_half,
    traced_at,
)
from metainfluence._spoilt import Rest, without_spoilt
from metainfluence.data import Task, Weights, name_not_finite, resolve_weights, sizes
from metainfluence.differentiation import REVERSE
from metainfluence.problem import Bilevel, check_derivatives, total_objective, with_hvp

__all__ = ["Run", "training", "training_loop"]

Floats = list[Array]


def floats_of(state: PyTree) -> Floats:
    """The floating-point leaves of a state, those that have a derivative."""
    return [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]


def with_floats(state: PyTree, floats: Floats) -> PyTree:
    """The state with other floating-point leaves."""
    left = iter(floats)
    return jax.tree.map(lambda leaf: next(left) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf, state)


@dataclasses.dataclass(frozen=True)
class Run(abc.ABC):
    """A training run; callable as (start, tasks, weights=None) -> λ at its end, differentiable in start and weights.

    In the methods below, `tasks` and `weights` are those of the step's batch. A *record* is what `pull` needs from a
    step besides its state, so that it need not compute it again.

    Attributes:
      num_steps: N.
      seed: for the order of the tasks, or for the keys.
    """

    num_steps: int
    seed: int

    @property
    def problem(self) -> Bilevel | None:
        """The problem whose objective the run lowers, where it is known."""
        return None

    @abc.abstractmethod
    def begin(self, start: PyTree) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def meta_params(self, state: PyTree) -> PyTree:
        """λ of a state."""

    @abc.abstractmethod
    def batches(self, num_tasks: int) -> Int[Array, "N b"] | None:
        """The tasks of every step; None where each step takes all of them."""

    @abc.abstractmethod
    def step(
        self, state: PyTree, number: Array, tasks: Task, weights: Weights, mesh: Mesh | None = None
    ) -> tuple[PyTree, PyTree]:
        """(state after the step, record)."""

    @abc.abstractmethod
    def push(
        self,
        state: PyTree,
        number: Array,
        tasks: Task,
        weights: Weights,
        change: Floats,
        direction: Weights,
        mesh: Mesh | None = None,
    ) -> tuple[PyTree, Floats]:
        """(state after the step, its derivative) along a change of the state before it and of the weights."""

    @abc.abstractmethod
    def pull(
        self,
        state: PyTree,
        record: PyTree,
        number: Array,
        tasks: Task,
        weights: Weights,
        cotangent: Floats,
        mesh: Mesh | None = None,
    ) -> tuple[Floats, Weights]:
        """The transpose of `push`: from a cotangent of the state after the step to that before it, and dφ/dw."""

    @abc.abstractmethod
    def pullback(
        self, state: PyTree, record: PyTree, number: Array, tasks: Task, weights: Weights, mesh: Mesh | None = None
    ) -> Callable[[Floats], tuple[Floats, Weights]]:
        """`pull` as a map of cotangents, itself a pytree; what does not depend on them is computed once."""

    @abc.abstractmethod
    def check(self, state: PyTree, tasks: Task, weights: Weights) -> None:
        """Checks the run at a start with the first step's tasks, and raises what is wrong."""

    def __call__(
        self, start: PyTree, tasks: Task, weights: Weights | None = None, *, precision: str | None = "highest"
    ) -> PyTree:
        """Trains, with matrix products at `precision` (JAX's setting if None), and returns λ.

        Outside jit, a task whose program gives NaN at the start is treated as absent, see `rest`.
        """
        check_precision(precision)
        weights = resolve_weights(weights, tasks)
        with traced_at(precision):
            end = self._trained(start, tasks, weights)
            rest = self.rest(start, end, tasks, weights)
            return end if rest is None else self._trained(start, rest.tasks, rest.weights(weights))

    def rest(self, start: PyTree, end: PyTree, tasks: Task, weights: Weights) -> Rest | None:
        """The data without the tasks that made a run end in NaN; None where it did not, or these cannot be told.

        Warns:
          SpoiltTaskWarning: tasks with weights other than 0 are left out.

        Raises:
          ValueError: data that are not finite; the message names them.
        """
        if not concrete(start, end, tasks, weights):
            return None
        size = optax.tree.norm(end)
        if np.isfinite(np.asarray(size)):
            return None
        if self.problem is None:
            name_not_finite(size, tasks, "tasks")
            return None
        return without_spoilt(self.problem, size, self.meta_params(self.begin(start)), tasks, weights)

    def _trained(self, start: PyTree, tasks: Task, weights: Weights) -> PyTree:
        table = self.batches(sizes(tasks).lead[0])

        def step(state: PyTree, each: tuple[Array, Array | None]) -> tuple[PyTree, None]:
            number, row = each
            return self.step(state, number, *taken(row, tasks, weights))[0], None

        state = self.begin(start)
        return self.meta_params(jax.lax.scan(step, state, (jnp.arange(self.num_steps), table))[0])


def taken(row: Array | None, *stacked: Any) -> tuple[Any, ...]:
    """The tasks of one step, from pytrees with all tasks on their leading axes."""
    return stacked if row is None else tuple(jax.tree.map(lambda leaf: leaf[row], tree) for tree in stacked)


@dataclasses.dataclass(frozen=True)
class _Training(Run):
    objective_of: Bilevel
    optimizer: optax.GradientTransformation
    tasks_per_step: int | None

    @property
    def problem(self) -> Bilevel:
        return self.objective_of

    def begin(self, start: PyTree) -> PyTree:
        check_floating(start, "start")
        refuse_half(start, "start")
        check_finite("start", start)
        start = jax.tree.map(_strong, start)
        return start, jax.tree.map(_strong, self.optimizer.init(start))

    def meta_params(self, state: PyTree) -> PyTree:
        return state[0]

    def batches(self, num_tasks: int) -> Array | None:
        size = self.tasks_per_step
        if size is None:
            return None
        if size > num_tasks:
            raise ValueError(f"tasks_per_step: expected at most the {num_tasks} tasks, got {size}")
        per_epoch = num_tasks // size
        key = _key(self.seed)

        def epoch(number: Array) -> Array:
            order = jax.random.permutation(jax.random.fold_in(key, number), num_tasks)
            return order[: per_epoch * size].reshape(per_epoch, size)

        epochs = jnp.arange(-(-self.num_steps // per_epoch))
        return jax.vmap(epoch)(epochs).reshape(-1, size)[: self.num_steps]

    def check(self, state: PyTree, tasks: Task, weights: Weights) -> None:
        # A step back applies forward mode to the objective, see `pull`.
        check_derivatives(self.objective_of, state[0], tasks, weights, twice=False)
        after = jax.eval_shape(self._update, state[0], state)
        _check_alike(after, state, "optimizer")

    def step(
        self, state: PyTree, number: Array, tasks: Task, weights: Weights, mesh: Mesh | None = None
    ) -> tuple[PyTree, PyTree]:
        del number
        gradient = jax.grad(total_objective(self.objective_of, mesh=mesh, precision=None))(state[0], tasks, weights)
        return self._update(gradient, state), gradient

    def push(
        self,
        state: PyTree,
        number: Array,
        tasks: Task,
        weights: Weights,
        change: Floats,
        direction: Weights,
        mesh: Mesh | None = None,
    ) -> tuple[PyTree, Floats]:
        del number
        objective = total_objective(self.objective_of, mesh=mesh, precision=None)
        leaves, structure = jax.tree.flatten(state[0])
        moved = jax.tree.unflatten(structure, change[: len(leaves)])
        if self.objective_of.hvp == REVERSE:
            # Second derivatives are symmetric: one pullback of ∇_(λ,w)F along (change, direction), seen from λ.
            (gradient, _), pullback = jax.vjp(
                lambda m: jax.grad(objective, argnums=(0, 2))(m, tasks, weights), state[0]
            )
            rate = pullback((moved, direction))[0]
        else:
            gradient, rate = jax.jvp(
                lambda m, w: jax.grad(objective)(m, tasks, w), (state[0], weights), (moved, direction)
            )
        after = self._update(gradient, state)

        def update(gradient: PyTree, floats: Floats) -> Floats:
            return floats_of(self._update(gradient, with_floats(state, floats)))

        return after, jax.jvp(update, (gradient, floats_of(state)), (rate, change))[1]

    def pull(
        self,
        state: PyTree,
        record: PyTree,
        number: Array,
        tasks: Task,
        weights: Weights,
        cotangent: Floats,
        mesh: Mesh | None = None,
    ) -> tuple[Floats, Weights]:
        if self.objective_of.hvp == REVERSE:
            return self.pullback(state, record, number, tasks, weights, mesh)(cotangent)
        objective = total_objective(self.objective_of, mesh=mesh, precision=None)
        of_gradient, before = self._update_pullback(state, record)(cotangent)

        def slope(meta_params: PyTree, weights: Weights) -> Array:
            """⟨D_λF, v⟩: its gradient in λ is Hv, and its gradient in w the scores; one reverse pass gives both."""
            return jax.jvp(lambda m: objective(m, tasks, weights), (meta_params,), (of_gradient,))[1]

        product, scores = jax.grad(slope, argnums=(0, 1))(state[0], weights)
        return _with_product(before, product), scores

    def pullback(
        self, state: PyTree, record: PyTree, number: Array, tasks: Task, weights: Weights, mesh: Mesh | None = None
    ) -> Callable[[Floats], tuple[Floats, Weights]]:
        del number
        gradient = jax.grad(total_objective(self.objective_of, mesh=mesh, precision=None))
        of_gradient = jax.vjp(lambda m, w: gradient(m, tasks, w), state[0], weights)[1]
        return Partial(_pulled, self._update_pullback(state, record), of_gradient)

    def _update_pullback(self, state: PyTree, gradient: PyTree) -> Callable[[Floats], tuple[PyTree, Floats]]:
        """The optimiser's own vjp: a cotangent of the state after an update -> those of the gradient and the state."""

        def update(gradient: PyTree, floats: Floats) -> Floats:
            return floats_of(self._update(gradient, with_floats(state, floats)))

        return jax.vjp(update, gradient, floats_of(state))[1]

    def _update(self, gradient: PyTree, state: PyTree) -> PyTree:
        meta_params, inner = state
        try:
            updates, inner = self.optimizer.update(gradient, inner, meta_params)
        except TypeError as error:
            if "missing" not in str(error):
                raise
            raise TypeError(
                f"optimizer: expected one whose update takes (gradient, state, params) alone, got {error}; state the "
                "step yourself with metainfluence.training_loop"
            ) from error
        return optax.apply_updates(meta_params, updates), inner


@dataclasses.dataclass(frozen=True)
class _Loop(Run):
    advance: Callable[[PyTree, Task, Weights, Array], PyTree]
    read: Callable[[PyTree], PyTree]
    batch: Callable[[int], Any] | None

    def begin(self, start: PyTree) -> PyTree:
        check_arrays(start, "start")
        state = jax.tree.map(_strong, start)
        found = self.meta_params(state)
        check_finite("meta_params(start)", found)
        return state

    def meta_params(self, state: PyTree) -> PyTree:
        with calling("meta_params", "(state)"):
            found = self.read(state)
        check_floating(found, "meta_params(state)")
        refuse_half(found, "meta_params(state)")
        return found

    def batches(self, num_tasks: int) -> Array | None:
        if self.batch is None:
            return None
        # Under jit what the user's function computes would be traced, and could not be checked.
        with jax.ensure_compile_time_eval():
            rows, again = ([np.asarray(self.batch(k)) for k in range(self.num_steps)] for _ in range(2))
        for k, (row, other) in enumerate(zip(rows, again, strict=True)):
            if row.ndim != 1 or row.size == 0 or not np.issubdtype(row.dtype, np.integer):
                raise ValueError(
                    f"batch: expected indices of tasks, integers [b], got shape {row.shape} and dtype {row.dtype} at "
                    f"step {k}"
                )
            if row.shape != rows[0].shape:
                raise ValueError(
                    f"batch: expected as many tasks in every step, {rows[0].size} as in step 0, got {row.size} at step "
                    f"{k}; give what fills up weight 0"
                )
            if row.min() < 0 or row.max() >= num_tasks:
                raise ValueError(f"batch: expected indices from 0 to {num_tasks - 1}, got {row.tolist()} at step {k}")
            if not np.array_equal(row, other):
                raise ValueError(
                    f"batch: expected the same indices whenever it is asked, got {row.tolist()} and then "
                    f"{other.tolist()} at step {k}; make them from the step's number and a fixed seed"
                )
        return jnp.asarray(np.stack(rows), jnp.int32)

    def check(self, state: PyTree, tasks: Task, weights: Weights) -> None:
        def advance(state: PyTree, tasks: Task, weights: Weights) -> PyTree:
            return self.step(state, jnp.zeros((), jnp.int32), tasks, weights)[0]

        _check_alike(jax.eval_shape(advance, state, tasks, weights), state, "step")

    def step(
        self, state: PyTree, number: Array, tasks: Task, weights: Weights, mesh: Mesh | None = None
    ) -> tuple[PyTree, PyTree]:
        check_mesh(mesh)
        with calling("step", "(state, tasks, weights, key)"):
            return self.advance(state, tasks, weights, jax.random.fold_in(_key(self.seed), number)), ()

    def push(
        self,
        state: PyTree,
        number: Array,
        tasks: Task,
        weights: Weights,
        change: Floats,
        direction: Weights,
        mesh: Mesh | None = None,
    ) -> tuple[PyTree, Floats]:
        def step(floats: Floats, weights: Weights) -> tuple[Floats, PyTree]:
            after = self.step(with_floats(state, floats), number, tasks, weights, mesh)[0]
            return floats_of(after), after

        _, rate, after = jax.jvp(step, (floats_of(state), weights), (change, direction), has_aux=True)
        return after, rate

    def pull(
        self,
        state: PyTree,
        record: PyTree,
        number: Array,
        tasks: Task,
        weights: Weights,
        cotangent: Floats,
        mesh: Mesh | None = None,
    ) -> tuple[Floats, Weights]:
        return self.pullback(state, record, number, tasks, weights, mesh)(cotangent)

    def pullback(
        self, state: PyTree, record: PyTree, number: Array, tasks: Task, weights: Weights, mesh: Mesh | None = None
    ) -> Callable[[Floats], tuple[Floats, Weights]]:
        del record

        def step(floats: Floats, weights: Weights) -> Floats:
            return floats_of(self.step(with_floats(state, floats), number, tasks, weights, mesh)[0])

        return jax.vjp(step, floats_of(state), weights)[1]


def _pulled(of_update: Any, of_gradient: Any, cotangent: Floats) -> tuple[Floats, Weights]:
    slope, before = of_update(cotangent)
    product, scores = of_gradient(slope)
    return _with_product(before, product), scores


def _with_product(before: Floats, product: PyTree) -> Floats:
    """The cotangent of the state before a step: through the optimiser, and through the gradient at λ."""
    leaves = jax.tree.leaves(product)
    return [*map(jnp.add, before[: len(leaves)], leaves), *before[len(leaves) :]]


def training(
    problem: Bilevel,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    tasks_per_step: int | None = None,
    seed: int = 0,
) -> Run:
    """Meta-training by an optax optimiser on the outer objective, or on that of batches of tasks.

    A step's objective is (1/b) Σ_k w_k L_k + R over its b tasks. Every epoch cuts a new order of all tasks into
    batches; tasks left over at its end are not used in it. The order comes from JAX's threefry with (seed, epoch), so
    it is the same on every machine.

    Args:
      problem: the problem. One with `hvp="reverse_over_reverse"` is differentiated that way, at more cost.
      optimizer: any optax optimiser whose update takes (gradient, state, params): schedules, clipping and weight decay
        included. Adam divides by √(v + eps_root): give it eps_root > 0, or its derivative is infinite where a gradient
        is exactly 0.
      num_steps: N, at least 1.
      tasks_per_step: b; None for all tasks in every step.
      seed: for the order of the tasks.

    Raises:
      TypeError: not a problem, or not an optax optimiser.
      ValueError: `num_steps` or `tasks_per_step` is not a positive integer, or `seed` not an integer; at the call, more
        tasks per step than there are.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> import optax
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> run = mi.training(problem, optax.sgd(0.5), num_steps=2)
      >>> run(jnp.asarray(0.0), tasks).tolist()  # half of the way to the mean, 2, in each step
      1.5
      >>> without = mi.drop(mi.unit_weights(tasks), tasks=[2])
      >>> round(float(run(jnp.asarray(0.0), tasks, without)), 3)
      0.278
    """
    problem = with_hvp(problem, None)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer: expected one of optax, as optax.adam(1e-3, eps_root=1e-6), got {optimizer!r}")
    _check_count("num_steps", num_steps)
    if tasks_per_step is not None:
        _check_count("tasks_per_step", tasks_per_step)
    _check_seed(seed)
    return _Training(num_steps, seed, problem, optimizer, tasks_per_step)


def training_loop(
    step: Callable[[PyTree, Task, Weights, Array], PyTree],
    num_steps: int,
    *,
    meta_params: Callable[[PyTree], PyTree],
    batch: Callable[[int], Any] | None,
    seed: int = 0,
) -> Run:
    """Meta-training by the user's own update.

    Args:
      step: (state, tasks, weights, key) -> state, a pure function, for the tasks of one step and their `Weights`. The
        state is any pytree: λ, an optimiser's state, averages, running statistics. The step must keep its structure,
        shapes and dtypes. The key differs in every step; it is made from `seed` and the step's number.
      num_steps: N, at least 1.
      meta_params: (state) -> λ.
      batch: (step number) -> indices of that step's tasks, `[b]`, the same whenever and wherever it is called; None for
        all tasks in every step.
      seed: for the keys.

    Raises:
      TypeError: a function that does not take these arguments; at the call, a λ that does not hold floating-point
        numbers.
      ValueError: `num_steps` is not a positive integer, or `seed` not an integer; at the call, a step that changes the
        structure, a shape or a dtype of its state, or indices that are out of range, differ in number from those of
        step 0, or change when asked twice.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> def step(m, tasks, weights, key):
      ...     return m - 0.5 * jnp.mean(weights.task * (m - tasks.query[:, 0]))
      >>> run = mi.training_loop(step, 3, meta_params=lambda m: m, batch=lambda number: [number])
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> run(jnp.asarray(0.0), tasks).tolist()  # to 0, half of the way to 1, half of the way to 5
      2.75
    """
    check_function("step", step, "(state, tasks, weights, key) -> state", *"stwk")
    check_function("meta_params", meta_params, "(state) -> meta-parameters", "s")
    if batch is not None:
        check_function("batch", batch, "(step number) -> indices of that step's tasks", 0)
    _check_count("num_steps", num_steps)
    _check_seed(seed)
    return _Loop(num_steps, seed, step, meta_params, batch)


def _key(seed: int) -> Array:
    # Named, so that no setting of JAX's changes a run.
    return jax.random.key(seed, impl="threefry2x32")


def _strong(leaf: Any) -> Array:
    """The leaf as an array whose dtype a step cannot change by promotion."""
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf, leaf.dtype)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _check_seed(seed: Any) -> None:
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"seed: expected an integer, got {seed!r}")


def _check_alike(after: PyTree, before: PyTree, name: str) -> None:
    """Raises ValueError, naming the leaf, unless a step leaves its state's structure, shapes and dtypes as they are."""
    structure: Any = jax.tree.structure(after)
    if structure != jax.tree.structure(before):
        raise ValueError(
            f"{name}: expected a state of the structure {jax.tree.structure(before)} that it was given, got {structure}"
        )
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(before), strict=True):
        got, expected = (leaf.shape, str(leaf.dtype)), (like.shape, str(like.dtype))
        if got != expected:
            raise ValueError(
                f"{leaf_name(f'{name}: state', path)}: expected shape {expected[0]} and dtype {expected[1]} as before "
                f"the step, got {got[0]} and {got[1]}"
            )
