"""What the derivative of a training run costs, compared with the training itself."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.bench import growth
from metainfluence.lab.bench._output import publish
from metainfluence.lab.experiments.ranges import Count, OutFolder

TRAINING, ALL_KEPT, ROOT_KEPT, TOGETHER = (
    "training",
    "one target, all states kept",
    "one target, √N states kept",
    "many targets, √N states kept, each",
)
# For one target, over one training; for many, each over a single one.
BARS = {ALL_KEPT: 3.0, ROOT_KEPT: 4.0, TOGETHER: 0.25}


@dataclasses.dataclass(frozen=True)
class RunsBenchConfig:
    """Backward sweeps through Adam on random tasks; heads on a tanh MLP's features, in float64."""

    num_tasks: Count = 32
    """Tasks, all of them in every step."""
    examples: Count = 35
    """Examples per task; two of seven are in the support set."""
    width: Count = 69
    """Hidden units, each with 145 meta-parameters."""
    inner_steps: Count = 5
    """Inner steps of the unrolled head; the other head is implicit."""
    num_steps: Count = 9
    """Training steps, N."""
    num_targets: Count = 64
    """Targets differentiated together."""
    repeats: Count = 2
    """Timed runs of each in turn; the shortest counts, in processor time, which other load does not add to."""
    out: OutFolder = Path("bench-output")
    """Folder for runs.md and runs.json."""


class Row(NamedTuple):
    """One part of one problem: seconds, and their ratio to training, or of many targets to one."""

    problem: str
    part: str
    seconds: float
    ratio: float


def run(config: RunsBenchConfig) -> None:
    """Measure, print, and write the table."""
    jax.config.update("jax_enable_x64", True)
    rows = measure(config)
    publish("runs", config, markdown(config, rows), rows=[row._asdict() for row in rows])


def measure(config: RunsBenchConfig) -> list[Row]:
    """Measures all rows."""
    sizes = growth.GrowthBenchConfig()
    layers = growth.make_layers(sizes, config.width)
    tasks = growth.make_tasks(sizes, config.num_tasks, config.examples)
    rng = np.random.default_rng(0)
    many = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(config.num_targets, *leaf.shape))), layers)
    one = jax.tree.map(lambda leaf: leaf[0], many)
    rows = []
    for name, steps in (("implicit head", None), (f"head of {config.inner_steps} unrolled steps", config.inner_steps)):
        trained = mi.training(growth.make_problem(sizes, steps), optax.adam(0.01, eps_root=1e-5), config.num_steps)
        every, root = (mi.trajectory(trained, keep=keep)(layers, tasks) for keep in ("all", "sqrt"))
        seconds = shortest(
            config.repeats,
            {
                TRAINING: (jax.jit(trained), layers, tasks),
                ALL_KEPT: (jax.jit(lambda at, slope: at.vjp(slope)), every, one),
                ROOT_KEPT: (jax.jit(lambda at, slope: at.vjp(slope)), root, one),
                TOGETHER: (jax.jit(lambda at, slope: at.vjp(slope)), root, many),
            },
        )
        seconds[TOGETHER] /= config.num_targets
        base = dict.fromkeys(seconds, seconds[TRAINING]) | {TOGETHER: seconds[ROOT_KEPT]}
        rows += [Row(name, part, value, value / base[part]) for part, value in seconds.items()]
    return rows


def shortest(repeats: int, calls: dict[str, tuple[Callable[..., Any], Any, Any]]) -> dict[str, float]:
    """Processor seconds of each call, without compiling; the calls take turns."""
    seconds = dict.fromkeys(calls, float("inf"))
    for count in range(repeats + 1):
        for name, (function, *args) in calls.items():
            start = time.process_time()
            jax.block_until_ready(function(*args))
            if count:
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def markdown(config: RunsBenchConfig, rows: list[Row]) -> str:
    """The table."""
    about = (
        f"N = {config.num_steps}, {config.num_tasks} tasks, {config.num_targets} targets together; "
        f"{jnp.result_type(float)}, {jax.devices()[0].platform}, jax {jax.__version__}. Ratios are to the training; "
        "of many targets, of each to one alone."
    )
    head = ["| problem | part | processor seconds | ratio | bar | met |", "|---|---|---:|---:|---:|---|"]
    return "\n".join([about, "", *head, *map(_line, rows), ""])


def _line(row: Row) -> str:
    bar = BARS.get(row.part)
    told = "" if bar is None else f"{bar:.2f} | {'yes' if row.ratio <= bar else 'NO'}"
    return f"| {row.problem} | {row.part} | {row.seconds:.4f} | {row.ratio:.2f} | {told or ' | '} |"
