"""Meta-training: steps on the outer objective, of all tasks or of batches; data weights are an argument."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import metainfluence as mi
from metainfluence._disk import of_arrays
from metainfluence.lab.learn.checkpoints import Checkpoints
from metainfluence.lab.learn.timing import Compiled

Lookup = Callable[..., mi.Task]


class Training(NamedTuple):
    """What meta-training returns: the trained λ, F before each step [num_steps], and where the time went."""

    meta_params: Any
    losses: np.ndarray
    compile_seconds: float
    run_seconds: float


class TrainingError(RuntimeError):
    """Meta-training whose objective or meta-parameters are no longer finite.

    Args:
      message: names the step and the cause.
      grew: whether they were finite before, so that smaller steps may help.
    """

    def __init__(self, message: str, *, grew: bool):
        super().__init__(message)
        self.grew = grew

    def by(self, option: str, rate: float) -> "TrainingError":
        """The same error, naming the option that sets the learning rate if that may be the cause."""
        return TrainingError(f"{self}; lower {option} {rate:g}" if self.grew else str(self), grew=self.grew)


class Trained(NamedTuple):
    """Many models, as returned by `train_many`.

    Attributes:
      meta_params: every leaf with a leading axis [M].
      losses: F before each step, [M, num_steps].
      kept: λ after every `keep_every` steps, leading axes [M, num_steps / keep_every]; None if not requested.
    """

    meta_params: Any
    losses: jax.Array
    kept: Any = None


def batch_index(step: jax.Array, num_tasks: int, tasks_per_step: int, seed: int | jax.Array) -> jax.Array:
    """The tasks of one step, int [tasks_per_step]: every epoch reorders all tasks and cuts them into batches.

    JAX's own generator makes the order from (seed, epoch), so it is the same on every machine. Tasks left over at the
    end of an epoch are not used in it.
    """
    per_epoch = num_tasks // tasks_per_step
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), step // per_epoch), num_tasks)
    return jax.lax.dynamic_slice(order, ((step % per_epoch) * tasks_per_step,), (tasks_per_step,))


def training_steps(
    problem: mi.Bilevel,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    tasks_per_step: int | None = None,
    lookup: Lookup | None = None,
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Makes the pure function behind `meta_train`, which can be jitted, and vmapped over weights or starting points.

    Args:
      problem: its total objective is minimised.
      optimizer: any optax optimiser.
      num_steps: length of the scan.
      tasks_per_step: tasks in each step's batch, whose mean estimates that over all tasks; None for all tasks in each
        step.
      lookup: (tasks, *data) -> tasks that the problem takes, such as `fewshot.lookup`, for tasks that hold ids into
        arrays too large to stack; None for tasks that hold their data.

    Returns:
      (meta_params, optimizer_state, tasks, weights, first_step=0, seed=0, *data) -> the first two after `num_steps`
      steps, and F (of the batch) before each step. Steps are counted from `first_step`, so that training in pieces is
      the same as training at once; `first_step` and the batches' `seed` have no effect if all tasks are used.
    """
    objective = mi.total_objective(problem)

    def run(meta_params, optimizer_state, tasks, weights, first_step=0, seed=0, *data):
        num_tasks = weights.task.shape[0]
        if tasks_per_step is not None and not 1 <= tasks_per_step <= num_tasks:
            raise ValueError(f"tasks_per_step: expected a number from 1 to {num_tasks}, got {tasks_per_step}")

        def loss(meta_params, step):
            chosen, own = tasks, weights
            if tasks_per_step is not None:
                index = batch_index(step, num_tasks, tasks_per_step, seed)
                chosen, own = jax.tree.map(lambda leaf: leaf[index], (tasks, weights))
            return objective(meta_params, chosen if lookup is None else lookup(chosen, *data), own)

        def advance(carry, step):
            meta_params, optimizer_state = carry
            value, gradient = jax.value_and_grad(loss)(meta_params, step)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, meta_params)
            return (optax.apply_updates(meta_params, updates), optimizer_state), value

        steps = first_step + jnp.arange(num_steps)
        carry, losses = jax.lax.scan(advance, (meta_params, optimizer_state), steps)
        return *carry, losses

    return run


def train_many(
    problem: mi.Bilevel,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    tasks_per_step: int | None = None,
    lookup: Lookup | None = None,
    batch_size: int | None = None,
    keep_every: int | None = None,
    stacked_start: bool = False,
    seed: int = 0,
) -> Callable[..., Trained]:
    """Makes the pure function that trains M models, which differ in their data weights, in one program.

    Ground truth by retraining runs this function; jit it.

    Args:
      problem: its total objective is minimised.
      optimizer: any optax optimiser.
      num_steps: steps of every model.
      tasks_per_step: as in `training_steps`; all models see the same batches.
      lookup: as in `training_steps`.
      batch_size: models at a time, which bounds the memory; None for all M.
      keep_every: steps between two λ that are kept, the last one included, as TracIn needs; None for none.
      stacked_start: whether the models also have different starting points.
      seed: seed of the batches.

    Returns:
      (meta_params, tasks, weights, *data) -> Trained; every leaf of `weights` has a leading axis [M], and with
      `stacked_start` every leaf of `meta_params` too. A model does not depend on the other models, up to rounding.

    Raises:
      ValueError: `keep_every` does not divide `num_steps`.
    """
    if keep_every is not None and (keep_every < 1 or num_steps % keep_every):
        raise ValueError(f"keep_every: expected a divisor of num_steps {num_steps}, got {keep_every}")
    length = num_steps if keep_every is None else keep_every
    advance = training_steps(problem, optimizer, length, tasks_per_step=tasks_per_step, lookup=lookup)

    def run(meta_params: Any, tasks: mi.Task, weights: mi.Weights, *data: Any) -> Trained:
        def single(start: Any, own: mi.Weights) -> Trained:
            def piece(carry, first_step):
                *carry, losses = advance(*carry, tasks, own, first_step, seed, *data)
                return tuple(carry), (losses, carry[0] if keep_every is not None else None)

            carry = (start, optimizer.init(start))
            carry, (losses, kept) = jax.lax.scan(piece, carry, jnp.arange(0, num_steps, length))
            return Trained(carry[0], losses.reshape(num_steps), kept)

        if batch_size is None:
            return jax.vmap(single, in_axes=(0 if stacked_start else None, 0))(meta_params, weights)
        if stacked_start:
            return jax.lax.map(lambda pair: single(*pair), (meta_params, weights), batch_size=batch_size)
        return jax.lax.map(lambda own: single(meta_params, own), weights, batch_size=batch_size)

    return run


def meta_train(
    problem: mi.Bilevel,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    tasks_per_step: int | None = None,
    lookup: Lookup | None = None,
    seed: int = 0,
    block_size: int = 25,
    console: Console | None = None,
    checkpoints: Path | None = None,
    save_every: int | None = None,
    on_block: Callable[[int, tuple[Any, Any]], None] | None = None,
) -> Callable[..., Training]:
    """Makes a trainer, (meta_params, tasks, weights=None, *data) -> Training, compiled once for all its calls.

    Weights are data: a task of weight 0 is absent, while F stays a mean over all T tasks.

    Args:
      problem: its total objective is minimised.
      optimizer: any optax optimiser.
      num_steps: steps in total.
      tasks_per_step: as in `training_steps`.
      lookup: as in `training_steps`, which takes `data`.
      seed: seed of the batches.
      block_size: steps between two progress reports.
      console: where progress goes: a bar on a terminal, else plain lines; None is silent.
      checkpoints: folder of one run's checkpoints; an interrupted run continues from the last one, to the same result.
        None for none.
      save_every: steps between two checkpoints, a multiple of `block_size`; None for one at the end only.
      on_block: called after every block with the number of steps done and (λ, optimiser's state), before these are
        saved.

    Raises:
      ValueError: `save_every` is no multiple of `block_size`; when training, a folder with another run's checkpoints.
      TrainingError: when training, F or λ is no longer finite, with the step; no checkpoint of it is saved.
    """
    if save_every is not None and (save_every < 1 or save_every % block_size):
        raise ValueError(f"save_every: expected a multiple of block_size {block_size}, got {save_every}")
    sizes = [block_size] * (num_steps // block_size) + [num_steps % block_size] * (num_steps % block_size > 0)
    blocks = {
        size: Compiled(training_steps(problem, optimizer, size, tasks_per_step=tasks_per_step, lookup=lookup))
        for size in set(sizes)
    }

    def train(meta_params: Any, tasks: mi.Task, weights: mi.Weights | None = None, *data: Any) -> Training:
        weights = mi.unit_weights(tasks) if weights is None else weights
        compiled_before = sum(block.compile_seconds for block in blocks.values())
        losses, run_seconds, done = np.zeros(num_steps), 0.0, 0
        state = (meta_params, optimizer.init(meta_params))
        with contextlib.ExitStack() as stack:
            saved = None
            if checkpoints is not None:
                identity = of_arrays(meta_params, tasks, weights, data, (num_steps, tasks_per_step, seed, block_size))
                saved = stack.enter_context(Checkpoints(checkpoints, identity))
                done, state, losses = saved.restore(state, losses)
            advance = stack.enter_context(_progress(console, num_steps))
            while done < num_steps:
                size = sizes[done // block_size]
                first_step, key = jnp.asarray(done), jnp.asarray(seed)
                *state, of_block = blocks[size](*state, tasks, weights, first_step, key, *data)
                losses[done : done + size] = of_block
                _check_finite(losses[: done + size], done, state[0])
                run_seconds += blocks[size].run_seconds
                done += size
                if on_block is not None:
                    on_block(done, tuple(state))
                advance(done, float(of_block[-1]))
                if saved is not None and (done == num_steps or (save_every is not None and done % save_every == 0)):
                    saved.save(done, tuple(state), losses)
        compile_seconds = sum(block.compile_seconds for block in blocks.values()) - compiled_before
        return Training(state[0], losses, compile_seconds, run_seconds)

    return train


def _check_finite(losses: np.ndarray, since: int, meta_params: Any) -> None:
    """Raises TrainingError if F was not finite at a step from `since` on, or if λ is not finite after them."""
    lost = np.flatnonzero(~np.isfinite(losses[since:]))
    if len(lost):
        step = since + int(lost[0])
        what = f"F is {losses[step]} at step {step + 1}"
    elif not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(meta_params)):
        step = len(losses)
        what = f"the meta-parameters are not finite after step {step}"
    else:
        return
    if step == 0:
        raise TrainingError(
            f"training: {what}, where nothing has been trained yet: look for NaN or infinity in the tasks' data, the "
            "initial meta-parameters and the losses",
            grew=False,
        )
    raise TrainingError(
        f"training: {what}; it was {losses[0]:.3g} at the first step and {losses[step - 1]:.3g} at step {step}: where "
        "it grew, the learning rate is too large; else a loss has no finite gradient there",
        grew=True,
    )


@contextlib.contextmanager
def _progress(console: Console | None, num_steps: int) -> Iterator[Callable[[int, float], None]]:
    """Yields advance(done, loss), which shows the progress of training."""
    if console is None:
        yield lambda done, loss: None
    elif console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("F = {task.fields[loss]}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("meta-training", total=num_steps, loss="(compiling)")
            yield lambda done, loss: bar.update(task, completed=done, loss=f"{loss:.4f}")
    else:
        yield lambda done, loss: console.print(f"step {done}/{num_steps}  F = {loss:.4f}", highlight=False)
