"""How an experiment trains: by Adam, on all tasks or on batches of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, NotNegative, Positive, Size
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import TrainingError


@dataclasses.dataclass(frozen=True)
class StepsConfig:
    """Meta-training by Adam, with a learning rate that falls to 0 along a cosine."""

    learning_rate: Positive = 0.05
    """Peak learning rate; without a warm-up, that of the first step."""
    warmup: Size = 0
    """Warm-up steps to the peak: with them the run responds to the data more smoothly."""
    eps_root: NotNegative = 0.0
    """Added under Adam's root, where optax has 0 by default; 1e-6 and more make the run smoother."""
    num_steps: Count = 200
    """Training steps."""
    tasks_per_step: Count | None = None
    """Tasks in each step's batch; by default all."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig(StepsConfig):
    """Meta-training that keeps its states along the way."""

    num_checkpoints: Count = 5
    """Evenly spaced checkpoints, for TracIn and segments; must divide num_steps."""


class Run(NamedTuple):
    """Training of one model.

    Attributes:
      meta_params: λ at the end.
      states: (λ, the optimiser's state) along the way, the last one at the end; every leaf [C, ...].
      seconds: run time, without compiling.
    """

    meta_params: Any
    states: Any
    seconds: float

    @property
    def checkpoints(self) -> Any:
        """λ along the way, every leaf [C, ...]."""
        return self.states[0]


def schedule_of(steps: StepsConfig) -> optax.Schedule:
    """The learning rate of each step."""
    if steps.warmup:
        return optax.warmup_cosine_decay_schedule(
            steps.learning_rate / steps.warmup, steps.learning_rate, steps.warmup, steps.num_steps
        )
    return optax.cosine_decay_schedule(steps.learning_rate, steps.num_steps)


def optimizer_of(steps: StepsConfig) -> optax.GradientTransformation:
    """The optimiser of the training.

    Raises:
      ConfigError: a warm-up that takes all steps.
    """
    if steps.warmup >= steps.num_steps:
        raise ConfigError(
            f"--training.warmup: expected fewer than --training.num-steps {steps.num_steps}, got {steps.warmup}"
        )
    return optax.adam(schedule_of(steps), eps_root=steps.eps_root)


def run_of(steps: StepsConfig, problem: mi.Bilevel, seed: int) -> Any:
    """The training in the form that `metainfluence.trajectory` differentiates; the seed is that of the task order."""
    return mi.training(problem, optimizer_of(steps), steps.num_steps, tasks_per_step=steps.tasks_per_step, seed=seed)


def states_of(run: Any, count: int) -> Callable[..., Any]:
    """Makes (start, tasks, weights=None) -> λ and the optimiser's state after each of `count` equal parts of the run.

    Raises:
      ValueError: a number of parts that does not divide the number of steps.
    """
    if run.num_steps % count:
        raise ValueError(f"num_checkpoints: expected a divisor of num_steps {run.num_steps}, got {count}")

    def states(start: Any, tasks: mi.Task, weights: mi.Weights | None = None) -> Any:
        weights = mi.unit_weights(tasks) if weights is None else weights
        table = run.batches(len(weights.task))

        def step(state: Any, each: Any) -> tuple[Any, None]:
            number, row = each
            own = (tasks, weights) if row is None else jax.tree.map(lambda leaf: leaf[row], (tasks, weights))
            return run.step(state, number, *own)[0], None

        def part(state: Any, each: Any) -> tuple[Any, Any]:
            state, _ = jax.lax.scan(step, state, each)
            return state, state

        each = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), (jnp.arange(run.num_steps), table))
        with jax.default_matmul_precision("highest"):
            return jax.lax.scan(part, run.begin(start), each)[1]

    return states


def fitting(config: TrainingConfig, problem: mi.Bilevel, seed: int) -> Callable[[mi.Weights, Any, mi.Task], Any]:
    """Makes the pure function (weights, start, tasks) -> states of one model, as in `Run`.

    Raises:
      ValueError: a number of checkpoints that does not divide the number of steps.
    """
    states = states_of(run_of(config, problem, seed), config.num_checkpoints)
    return lambda weights, start, tasks: states(start, tasks, weights)


def end_of(states: Any) -> Any:
    """λ at the end of a run, from its states."""
    return jax.tree.map(lambda leaf: leaf[-1], states[0])


def check_end(end: Any, run: Any, start: Any, tasks: mi.Task) -> None:
    """Raises TrainingError, naming the step, if λ at the end of a run, or F of a task there, is not finite."""
    objective, first = mi.total_objective(run.problem), jax.tree.map(lambda leaf: leaf[:1], tasks)

    @jax.jit
    def finite(meta_params: Any) -> jax.Array:
        values = [*jax.tree.leaves(meta_params), objective(meta_params, first)]
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in values]))

    if bool(finite(end)):
        return
    # For long runs, not every state would fit in memory.
    count = next(each for each in range(min(run.num_steps, 200), 0, -1) if run.num_steps % each == 0)
    states = jax.jit(states_of(run, count))(start, tasks)
    lost = np.flatnonzero(~np.asarray(jax.lax.map(finite, states[0])))
    step = run.num_steps if not len(lost) else run.num_steps // count * (int(lost[0]) + 1)
    raise TrainingError(
        f"training: the meta-parameters, or F there, are not finite after step {step} of {run.num_steps}: the "
        "learning rate is too large, or a loss has no finite value or gradient there",
        grew=True,
    )


def timed(fit: Callable[[mi.Weights, Any, mi.Task], Any], tasks: mi.Task) -> Callable[..., Run]:
    """Makes (weights, start) -> Run of one model, compiled once."""
    program = Compiled(fit)

    def run(weights: mi.Weights, start: Any) -> Run:
        states = program(weights, start, tasks)
        return Run(end_of(states), states, program.run_seconds)

    return run


def checkpoint_rates(config: TrainingConfig) -> jax.Array:
    """For TracIn: the learning rates summed over the steps that each checkpoint represents, [C]."""
    schedule = schedule_of(config)
    rates = jnp.stack([jnp.asarray(schedule(step)) for step in range(config.num_steps)])
    return jnp.sum(rates.reshape(config.num_checkpoints, -1), axis=1)


def checkpoints_of(config: TrainingConfig, states: Any) -> tuple[mi.Checkpoint, ...]:
    """The states of a run in the form that `metainfluence.segments` takes."""
    kept = [jax.tree.map(lambda leaf, k=k: leaf[k], states) for k in range(config.num_checkpoints)]
    found = mi.checkpoints(
        kept,
        num_steps=config.num_steps,
        learning_rate=schedule_of(config),
        second_moments=True,
        eps_root=config.eps_root,
    )
    # Step numbers would be traced, and nothing needs them.
    return tuple(each._replace(step=None) for each in found)
