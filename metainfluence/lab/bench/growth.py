"""How the library's times grow with each size of a problem."""

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.curvature import exact
from metainfluence.lab.bench._output import publish
from metainfluence.lab.bench.peers.problem import features, losses
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFolder, Positive, Ways
from metainfluence.lab.learn.timing import Compiled
from metainfluence.response import expand

TASKS, CHUNKED, EXAMPLES, META_PARAMS = "tasks", "tasks in chunks", "examples per task", "meta-parameters"
STEPS, STEPS_REMAT = "inner steps", "inner steps, remat"
FORWARD, GRADIENT, PRODUCT, SCORES = "forward", "total gradients", "Hessian product from λ", "all scores"

_FEATURES = 16
_HEAD_L2 = 0.1
_STEP_SIZE = 0.5


@dataclasses.dataclass(frozen=True)
class GrowthBenchConfig:
    """Exponents of time against sizes: heads on the features of a tanh MLP, random tasks, in float64.

    Heads are implicit, except where inner steps grow. One size grows at a time; the others are held at their own
    options.
    """

    pixels: Count = 128
    """Numbers per image."""
    ways: Ways = 5
    """Classes per task."""
    tasks: tuple[Count, ...] = (64, 128, 256, 512)
    """Numbers of tasks to time."""
    chunk: Count = 32
    """Tasks at a time when they are processed in chunks, so that the working set stays in the cache."""
    examples: tuple[Count, ...] = (40, 80, 160, 320)
    """Numbers of examples per task to time; two of seven are in the support set."""
    widths: tuple[Count, ...] = (7, 69, 690, 6900)
    """Hidden units to time; at 128 pixels each has 145 meta-parameters, so the default goes from 10³ to 10⁶ of them."""
    steps: tuple[Count, ...] = (4, 8, 16, 32)
    """Numbers of inner steps to time."""
    some_tasks: Count = 32
    """Tasks while something else grows."""
    some_examples: Count = 35
    """Examples per task while something else grows."""
    some_width: Count = 69
    """Hidden units while something else grows."""
    repeats: Count = 7
    """Timed runs of each; the shortest is taken, since other load only ever adds time."""
    most_exponent: Positive = 1.05
    """Target: highest exponent of time in the number of tasks."""
    most_excess: NotNegative = 0.05
    """Target: highest exponent of scores over forward in the number of examples."""
    out: OutFolder = Path("bench-output")
    """Folder for growth.md and growth.json."""


class Cell(NamedTuple):
    """Shortest seconds of a quantity at one size."""

    axis: str
    size: int
    quantity: str
    seconds: float


class Fit(NamedTuple):
    """log seconds = exponent · log size + constant, by least squares; the standard error of two points is NaN."""

    axis: str
    quantity: str
    exponent: float
    standard_error: float


def run(config: GrowthBenchConfig) -> None:
    """Measure, print, and write the tables.

    Raises:
        ValueError: fewer than two sizes of something.
    """
    for name in ("tasks", "examples", "widths", "steps"):
        if len(set(getattr(config, name))) < 2:
            raise ValueError(f"{name}: expected at least two sizes, got {getattr(config, name)}")
    jax.config.update("jax_enable_x64", True)
    cells = measure(config)
    publish(
        "growth",
        config,
        markdown(config, cells),
        cells=[cell._asdict() for cell in cells],
        exponents=[fit._asdict() for fit in fits(cells)],
        targets=targets(config, cells),
    )


def make_tasks(config: GrowthBenchConfig, count: int, examples: int) -> mi.Task:
    """Random images; what is measured depends on their sizes only."""
    rng = np.random.default_rng(0)
    num_support = max(1, 2 * examples // 7)

    def side(number: int) -> tuple[jax.Array, jax.Array]:
        images = rng.normal(size=(count, number, config.pixels))
        return jnp.asarray(images), jnp.asarray(np.tile(np.arange(number) % config.ways, (count, 1)))

    return mi.Task(side(num_support), side(examples - num_support))


def make_layers(config: GrowthBenchConfig, width: int) -> Any:
    """A random λ."""
    rng = np.random.default_rng(1)
    sizes = (config.pixels, width, _FEATURES)
    return tuple(
        (jnp.asarray(rng.normal(size=pair) / pair[0] ** 0.5), jnp.zeros(pair[1])) for pair in itertools.pairwise(sizes)
    )


def make_problem(config: GrowthBenchConfig, num_steps: int | None = None, *, remat: bool = False) -> mi.Bilevel:
    """Heads on features: implicit, or fitted by some steps of gradient descent."""
    parts: dict[str, Any] = {
        "inner_loss": losses,
        "init": lambda features, labels: jnp.zeros((_FEATURES + 1, config.ways)),
        "regularizer": lambda head, features: 0.5 * _HEAD_L2 * jnp.sum(jnp.square(head)),
    }
    if num_steps is None:
        fit = mi.adaptation.implicit(**parts)
    else:
        fit = mi.adaptation.unrolled(**parts, optimizer=optax.sgd(_STEP_SIZE), num_steps=num_steps, remat=remat)

    def adapt(layers: Any, support: Any, coefficients: jax.Array) -> Any:
        return fit(features(layers, support[0]), support[1], coefficients)

    def outer(head: jax.Array, layers: Any, query: Any) -> jax.Array:
        return losses(head, features(layers, query[0]), query[1])

    return mi.bilevel(outer, mi.adaptation.closed_form(adapt))


def programs(problem: mi.Bilevel, batch_size: int | None = None) -> dict[str, Callable[..., Any]]:
    """What is timed, as functions of (layers, tasks)."""

    def scores(layers: Any, tasks: mi.Task) -> Any:
        return expand(problem, exact(), batch_size)(layers, tasks, mi.unit_weights(tasks)).mixed_transposed(layers)

    return {
        FORWARD: jax.vmap(mi.task_loss(problem), in_axes=(None, 0)),
        GRADIENT: jax.vmap(mi.total_gradient(problem), in_axes=(None, 0)),
        PRODUCT: lambda layers, tasks: mi.total_hessian(problem, batch_size=batch_size)(layers, tasks).matvec(layers),
        SCORES: scores,
    }


def measure(config: GrowthBenchConfig) -> list[Cell]:
    """Times all cells; the sizes of one axis take turns."""
    implicit = programs(make_problem(config))
    some_tasks = make_tasks(config, config.some_tasks, config.some_examples)
    some_layers = make_layers(config, config.some_width)
    points: dict[str, dict[int, tuple[Any, mi.Task, dict[str, Callable[..., Any]]]]] = {
        TASKS: {n: (some_layers, make_tasks(config, n, config.some_examples), implicit) for n in config.tasks},
        EXAMPLES: {n: (some_layers, make_tasks(config, config.some_tasks, n), implicit) for n in config.examples},
        META_PARAMS: {},
    }
    for width in config.widths:
        layers = make_layers(config, width)
        points[META_PARAMS][sum(leaf.size for leaf in jax.tree.leaves(layers))] = (layers, some_tasks, implicit)
    chunked = programs(make_problem(config), config.chunk)
    points[CHUNKED] = {
        n: (layers, tasks, {name: chunked[name] for name in (PRODUCT, SCORES)})
        for n, (layers, tasks, _) in points[TASKS].items()
    }
    for axis in (STEPS, STEPS_REMAT):
        of_steps = {n: programs(make_problem(config, n, remat=axis == STEPS_REMAT)) for n in config.steps}
        points[axis] = {
            n: (some_layers, some_tasks, {name: made[name] for name in (GRADIENT, PRODUCT)})
            for n, made in of_steps.items()
        }
    return [cell for axis, sizes in points.items() for cell in _axis(config, axis, sizes)]


def _axis(config: GrowthBenchConfig, axis: str, sizes: dict[int, tuple[Any, mi.Task, Any]]) -> list[Cell]:
    compiled = {}
    for size, (layers, tasks, functions) in sizes.items():
        for name, function in functions.items():
            compiled[size, name] = (Compiled(function), layers, tasks)
            compiled[size, name][0](layers, tasks)
    seconds = dict.fromkeys(compiled, float("inf"))
    for _ in range(config.repeats):
        for key, (program, layers, tasks) in compiled.items():
            program(layers, tasks)
            seconds[key] = min(seconds[key], program.run_seconds)
    return [Cell(axis, size, name, value) for (size, name), value in seconds.items()]


def fits(cells: list[Cell]) -> list[Fit]:
    """An exponent for each quantity on each axis, and one for scores over forward in the examples."""
    series: dict[tuple[str, str], dict[int, float]] = {}
    for cell in cells:
        series.setdefault((cell.axis, cell.quantity), {})[cell.size] = cell.seconds
    series[EXAMPLES, f"{SCORES} over {FORWARD}"] = {
        size: value / series[EXAMPLES, FORWARD][size] for size, value in series[EXAMPLES, SCORES].items()
    }
    return [Fit(axis, quantity, *exponent(values)) for (axis, quantity), values in series.items()]


def exponent(values: dict[int, float]) -> tuple[float, float]:
    """The slope of log value against log size, and its standard error."""
    x, y = np.log(list(values)), np.log(list(values.values()))
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    rest = y - slope * x
    with np.errstate(invalid="ignore"):
        variance = np.divide(rest @ rest, len(x) - 2) / (x @ x) if len(x) > 2 else np.nan
    return float(slope), float(np.sqrt(variance))


def targets(config: GrowthBenchConfig, cells: list[Cell]) -> list[dict[str, Any]]:
    """The targets and what was measured."""
    bars = {(TASKS, name): config.most_exponent for name in (GRADIENT, PRODUCT, SCORES)}
    bars |= {(CHUNKED, name): config.most_exponent for name in (PRODUCT, SCORES)}
    bars[EXAMPLES, f"{SCORES} over {FORWARD}"] = config.most_excess
    return [
        {
            "target": f"{fit.quantity} in {fit.axis}",
            "exponent": fit.exponent,
            "standard_error": fit.standard_error,
            "bar": bars[fit.axis, fit.quantity],
            "met": fit.exponent <= bars[fit.axis, fit.quantity],
        }
        for fit in fits(cells)
        if (fit.axis, fit.quantity) in bars
    ]


def markdown(config: GrowthBenchConfig, cells: list[Cell]) -> str:
    """The times, the exponents and the targets."""
    device = jax.devices()[0]
    lines = [
        (
            f"Heads on {_FEATURES} features of a tanh MLP on {config.pixels} numbers; {config.some_tasks} tasks, "
            f"{config.some_examples} examples each, {config.some_width} hidden units but where they grow; "
            f"{jnp.result_type(float)}; {device.platform} ({device.device_kind}, {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f} at the end), jax {jax.__version__}. The shortest of {config.repeats} runs in "
            "turn; exponents by least squares of log time on log size, ± one standard error."
        ),
        "",
        "| what grows | time of | seconds at each size | exponent |",
        "|---|---|---|---:|",
    ]
    for fit in fits(cells):
        found = {c.size: c.seconds for c in cells if (c.axis, c.quantity) == (fit.axis, fit.quantity)}
        times = ", ".join(f"{size}: {seconds:.4f}" for size, seconds in found.items())
        lines.append(f"| {fit.axis} | {fit.quantity} | {times} | {fit.exponent:.2f} ± {fit.standard_error:.2f} |")
    lines += ["", "Scores over forward by examples per task: "]
    by = {(c.size, c.quantity): c.seconds for c in cells if c.axis == EXAMPLES}
    lines[-1] += ", ".join(f"{n}: {by[n, SCORES] / by[n, FORWARD]:.1f} ×" for n in sorted(set(config.examples)))
    lines += ["", "| target | exponent | bar | met |", "|---|---:|---:|---|"]
    lines += [
        f"| {row['target']} | {row['exponent']:.2f} ± {row['standard_error']:.2f} | {row['bar']:g} | "
        f"{'yes' if row['met'] else 'NO'} |"
        for row in targets(config, cells)
    ]
    return "\n".join([*lines, ""])
