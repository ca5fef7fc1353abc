"""What a 3 × 3 convolution costs with each implementation, alone and in a MAML gradient."""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import metainfluence as mi
from metainfluence.lab.data.fewshot import Batch
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.convolution import IMPLEMENTATIONS, ShiftedConv
from metainfluence.lab.learn.models import Conv4
from metainfluence.lab.learn.timing import Compiled

SIZE = 28


class ConvolutionRatio(NamedTuple):
    """Median seconds of one gradient with each implementation, and the ratio of lax to windows."""

    windows_seconds: float
    shifted_seconds: float
    lax_seconds: float
    ratio: float


class LayerCost(NamedTuple):
    """The gradient of one layer with respect to image and kernel, with a separate kernel for each task.

    Attributes:
      impl: as in `ShiftedConv`.
      flops: as counted by XLA.
      bytes_accessed: as counted by XLA.
      compile_seconds: compile time.
      seconds: shortest run.
    """

    impl: str
    flops: float
    bytes_accessed: float
    compile_seconds: float
    seconds: float


def convolution_ratio(
    *, width: int = 32, num_tasks: int = 8, ways: int = 5, queries: int = 5, repeats: int = 5
) -> ConvolutionRatio:
    """Times the gradient of one-step MAML on a `Conv4`, under `vmap` over tasks, on random 28 × 28 images.

    Only the convolution differs. The implementations take turns, so that other load on the machine slows them all.

    Args:
      width: channels.
      num_tasks: tasks, each with its own kernels.
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
    for impl in ("windows", "shifted", "lax"):
        learner = learners.maml(Conv4(width, impl=impl), ways)
        programs[impl] = Compiled(jax.grad(mi.total_objective(learner.problem)))
        meta_params = learner.init(jax.random.key(1), tasks.support.images[0])
        programs[impl](meta_params, tasks)
    seconds: dict[str, list[float]] = {impl: [] for impl in programs}
    for _ in range(repeats):
        for impl, program in programs.items():
            program(meta_params, tasks)
            seconds[impl].append(program.run_seconds)
    windows, shifted, lax = (statistics.median(seconds[impl]) for impl in ("windows", "shifted", "lax"))
    return ConvolutionRatio(windows, shifted, lax, lax / windows)


def layer_costs(
    *, width: int = 32, size: int = SIZE, num_tasks: int = 4, images: int = 10, repeats: int = 5
) -> list[LayerCost]:
    """Costs of one layer's gradient with each implementation; the implementations take turns.

    Args:
      width: channels, in and out.
      size: height and width of the images.
      num_tasks: tasks, each with its own kernel.
      images: images per task.
      repeats: timed runs of each.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = jax.random.normal(keys[0], (num_tasks, images, size, size, width))
    programs: dict[str, tuple[Any, Any, float]] = {}
    for impl in IMPLEMENTATIONS[:-1]:
        layer = ShiftedConv(width, impl=impl)
        params = jax.vmap(layer.init, in_axes=(0, 0))(jax.random.split(keys[1], num_tasks), inputs)

        def loss(params: Any, inputs: jax.Array, layer: ShiftedConv = layer) -> jax.Array:
            outputs: Any = jax.vmap(layer.apply)(params, inputs)
            return jnp.sum(jnp.tanh(outputs))

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, inputs)
        start = time.perf_counter()
        compiled = lowered.compile()
        programs[impl] = compiled, params, time.perf_counter() - start
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(repeats):
        for impl, (compiled, params, _) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(params, inputs))
            best[impl] = min(best[impl], time.perf_counter() - start)
    rows = []
    for impl, (compiled, _, seconds) in programs.items():
        found: Any = compiled.cost_analysis()
        rows.append(LayerCost(impl, found["flops"], found["bytes accessed"], seconds, best[impl]))
    return rows


def markdown(rows: list[LayerCost]) -> str:
    """The table."""
    head = [
        "| convolution | GFLOP | GB read and written | compile seconds | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    body = [
        f"| {row.impl} | {row.flops / 1e9:.2f} | {row.bytes_accessed / 1e9:.2f} | {row.compile_seconds:.1f} | "
        f"{row.seconds:.3f} |"
        for row in rows
    ]
    return "\n".join([*head, *body, ""])
