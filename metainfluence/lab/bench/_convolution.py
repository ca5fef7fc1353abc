"""How much faster the shifted convolution makes a MAML gradient than XLA's own convolution does."""

import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp

import metainfluence as mi
from metainfluence.lab.data.fewshot import Batch
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.models import Conv4
from metainfluence.lab.learn.timing import Compiled

SIZE = 28


class ConvolutionRatio(NamedTuple):
    """Median seconds of one gradient with each implementation, and lax over shifted."""

    shifted_seconds: float
    lax_seconds: float
    ratio: float


def convolution_ratio(
    *, width: int = 32, num_tasks: int = 8, ways: int = 5, queries: int = 5, repeats: int = 5
) -> ConvolutionRatio:
    """Times the gradient of one-step MAML on a `Conv4`, under `vmap` over tasks, on random 28 × 28 images.

    The two take turns, so that other load on the machine slows both. Only the convolution differs.

    Args:
      width: channels.
      num_tasks: tasks, each with kernels of its own.
      ways: classes, with one support example each.
      queries: query examples per class.
      repeats: timed runs of each.
    """
    keys = jax.random.split(jax.random.key(0), 2)

    def side(key: jax.Array, per_class: int) -> Batch:
        labels = jnp.tile(jnp.arange(ways), (num_tasks, per_class))
        return Batch(jax.random.uniform(key, (*labels.shape, SIZE, SIZE)), labels)

    tasks = mi.Task(side(keys[0], 1), side(keys[1], queries))
    programs = {}
    for impl in ("shifted", "lax"):
        learner = learners.maml(Conv4(width, impl=impl), ways)
        programs[impl] = Compiled(jax.grad(mi.total_objective(learner.problem)))
        meta_params = learner.init(jax.random.key(1), tasks.support.images[0])
        programs[impl](meta_params, tasks)
    seconds: dict[str, list[float]] = {impl: [] for impl in programs}
    for _ in range(repeats):
        for impl, program in programs.items():
            program(meta_params, tasks)
            seconds[impl].append(program.run_seconds)
    shifted, lax = (statistics.median(seconds[impl]) for impl in ("shifted", "lax"))
    return ConvolutionRatio(shifted, lax, lax / shifted)
