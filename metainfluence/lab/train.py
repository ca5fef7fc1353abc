"""Meta-training: full-batch steps on the outer objective, with the data weights as an argument."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import metainfluence as mi
from metainfluence.lab.timing import Compiled


class Training(NamedTuple):
    """What meta-training returns: the trained λ, F before each step [num_steps], and where the time went."""

    meta_params: Any
    losses: np.ndarray
    compile_seconds: float
    run_seconds: float


def training_steps(
    problem: mi.Bilevel, optimizer: optax.GradientTransformation, num_steps: int
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """Makes the pure function behind `meta_train`, which can be jitted, and vmapped over weights or starting points.

    Args:
      problem: whose total objective is minimised.
      optimizer: any optax optimiser.
      num_steps: length of the scan.

    Returns:
      (meta_params, optimizer_state, tasks, weights) -> the first two after `num_steps` steps, and F before each step.
    """
    objective = mi.total_objective(problem)

    def run(meta_params, optimizer_state, tasks, weights):
        def step(carry, _):
            meta_params, optimizer_state = carry
            loss, gradient = jax.value_and_grad(objective)(meta_params, tasks, weights)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state, meta_params)
            return (optax.apply_updates(meta_params, updates), optimizer_state), loss

        carry, losses = jax.lax.scan(step, (meta_params, optimizer_state), length=num_steps)
        return *carry, losses

    return run


def meta_train(
    problem: mi.Bilevel,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    block_size: int = 25,
    console: Console | None = None,
) -> Callable[..., Training]:
    """Makes a trainer, (meta_params, tasks, weights=None) -> Training, that compiles once for all its calls.

    Weights are data: a task of weight 0 is absent, while F stays a mean over all T tasks.

    Args:
      problem: whose total objective is minimised.
      optimizer: any optax optimiser.
      num_steps: in total.
      block_size: steps between two signs of life.
      console: where progress goes: a bar on a terminal, else plain lines; None is silent.
    """
    sizes = [block_size] * (num_steps // block_size) + [num_steps % block_size] * (num_steps % block_size > 0)
    blocks = {size: Compiled(training_steps(problem, optimizer, size)) for size in set(sizes)}

    def train(meta_params: Any, tasks: mi.Task, weights: mi.Weights | None = None) -> Training:
        weights = mi.unit_weights(tasks) if weights is None else weights
        optimizer_state = optimizer.init(meta_params)
        compiled_before = sum(block.compile_seconds for block in blocks.values())
        losses, run_seconds = [jnp.zeros(0)], 0.0
        with _progress(console, num_steps) as advance:
            for done, size in zip(itertools.accumulate(sizes), sizes, strict=True):
                block = blocks[size]
                meta_params, optimizer_state, of_block = block(meta_params, optimizer_state, tasks, weights)
                losses.append(of_block)
                run_seconds += block.run_seconds
                advance(done, float(of_block[-1]))
        compile_seconds = sum(block.compile_seconds for block in blocks.values()) - compiled_before
        return Training(meta_params, np.concatenate(losses), compile_seconds, run_seconds)

    return train


@contextlib.contextmanager
def _progress(console: Console | None, num_steps: int) -> Iterator[Callable[[int, float], None]]:
    """Gives advance(done, loss), which shows how far training is."""
    if console is None:
        yield lambda done, loss: None
    elif console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("F = {task.fields[loss]}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("meta-training", total=num_steps, loss="(compiling)")
            yield lambda done, loss: bar.update(task, completed=done, loss=f"{loss:.4f}")
    else:
        yield lambda done, loss: console.print(f"step {done}/{num_steps}  F = {loss:.4f}", highlight=False)
