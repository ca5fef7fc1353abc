"""The parts of the accelerator benchmark, each run as a process: python -m … PART CONFIG FILE."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BORN = time.monotonic()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402

import metainfluence as mi  # noqa: E402
from metainfluence.lab.bench._counting import count  # noqa: E402
from metainfluence.lab.bench.accelerator import PEAKS, AcceleratorBenchConfig  # noqa: E402
from metainfluence.lab.data.fewshot import Batch  # noqa: E402
from metainfluence.lab.learn import learners  # noqa: E402
from metainfluence.lab.learn.convolution import IMPLEMENTATIONS  # noqa: E402
from metainfluence.lab.learn.models import Conv4  # noqa: E402

Row = dict[str, Any]

_SHOTS = {"maml": 1, "head": 5}
_DAMPING = 1.0

# Mixed precision, by `metainfluence.mixed`.
HALF = ("bfloat16", "float16")


class Case(NamedTuple):
    """A problem and its λ."""

    problem: mi.Bilevel
    meta_params: Any
    shots: int


def main(part: str, values: str, file: str) -> None:
    """Runs a part and writes its rows as lines of JSON."""
    given: Any = {name: tuple(each) if isinstance(each, list) else each for name, each in json.loads(values).items()}
    config = AcceleratorBenchConfig(**given | {"out": Path()})
    device = jax.devices()[0]
    with Path(file).open("a", encoding="utf-8") as lines:

        def write(row: Row) -> None:
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        write({"device": {"platform": device.platform, "kind": device.device_kind, "jax": jax.__version__}})
        for row in parts()[part](config):
            write({"part": part} | row)


def parts() -> dict[str, Callable[[AcceleratorBenchConfig], Iterator[Row]]]:
    """Part name -> its rows."""
    return {
        "precision": precision,
        "convolution": convolution,
        "maml": lambda config: unit_costs(config, "maml"),
        "head": lambda config: unit_costs(config, "head"),
        "cold 64": lambda config: cold(config, config.cold[0]),
        "cold 512": lambda config: cold(config, config.cold[1]),
        "trajectory": trajectory,
    }


def case(config: AcceleratorBenchConfig, kind: str, impl: str = "auto", dtype: str | None = None) -> Case:
    """A learner on the configuration's network."""
    # Smooth, so that derivatives of all orders exist and can be compared across precisions.
    kind_of: dict[str, Any] = {"normalization": "layer", "activation": jnp.tanh, "impl": impl, "compute_dtype": dtype}
    network = Conv4(config.width, config.depth, **kind_of)
    if kind == "maml":
        learner = learners.maml(network, config.ways, steps=config.inner_steps, lr=0.01)
    else:
        learner = learners.implicit_head(network, config.ways, tol=1e-5)
    inputs = jnp.zeros((config.ways, config.size, config.size, 3))
    return Case(learner.problem, learner.init(jax.random.key(0), inputs), _SHOTS[kind])


def tasks(config: AcceleratorBenchConfig, shots: int, number: int, seed: int = 1) -> mi.Task:
    """Random images."""

    def side(key: jax.Array, per_class: int) -> Batch:
        labels = jnp.tile(jnp.arange(config.ways), (number, per_class))
        return Batch(jax.random.uniform(key, (*labels.shape, config.size, config.size, 3)), labels)

    keys = jax.random.split(jax.random.key(seed), 2)
    return mi.Task(side(keys[0], shots), side(keys[1], config.queries))


def timed(config: AcceleratorBenchConfig, what: str, number: int, function: Any, *args: Any) -> tuple[Row, Any]:
    """Times a compiled function; returns its row and its result."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    result, best = jax.block_until_ready(compiled(*args)), float("inf")
    for _ in range(config.repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*args))
        best = min(best, time.perf_counter() - start)
    row: Row = {"what": what, "tasks": number, "compile_seconds": compile_seconds, "seconds": best}
    return row | {"per_second": number / best} | rates(compiled, count(function, *args).flops, best), result


def rates(compiled: Any, flops: float, seconds: float) -> Row:
    """Operations per second, and the shares of the device's peaks if these are known."""
    kind = jax.devices()[0].device_kind
    peak, bandwidth = next((peaks for name, peaks in PEAKS.items() if name in kind), (None, None))
    moved: Any = compiled.cost_analysis() or {}
    rate, bytes_rate = flops / seconds, moved.get("bytes accessed", 0.0) / seconds
    return {
        "tflops": rate / 1e12,
        "share": None if peak is None else rate / peak,
        "bandwidth": None if bandwidth is None else bytes_rate / bandwidth,
    }


def meta_gradient(problem: mi.Bilevel, precision: str | None = "highest") -> Callable[..., Any]:
    """∇F."""
    return jax.grad(mi.total_objective(problem, precision=precision))


def precision(config: AcceleratorBenchConfig) -> Iterator[Row]:
    """The meta-gradient at several precisions, its distance from the float64 one, and the probe of scores."""
    with jax.enable_x64(True):
        made = case(config, "maml")
        data = jax.tree.map(_double, (made.meta_params, tasks(config, made.shots, config.at_once)))
        row, exact = timed(config, "float64", config.at_once, meta_gradient(made.problem), *data)
    yield row | {"error": 0.0}
    made = case(config, "maml")
    # Moved to the host first: JAX then takes the numbers at its own width again.
    data = jax.tree.map(jnp.asarray, jax.device_get(data))
    for name in ("highest", "tensorfloat32", *HALF):
        learner, at = (case(config, "maml", dtype=name), "highest") if name in HALF else (made, name)
        row, found = timed(config, name, config.at_once, meta_gradient(learner.problem, at), *data)
        distance = optax.tree.norm(jax.tree.map(lambda a, b: a - b.astype(a.dtype), found, exact))
        yield row | {"error": float(distance / optax.tree.norm(found))}
    few = tasks(config, made.shots, 4, seed=2)
    for name in HALF:
        half = case(config, "maml", dtype=name).problem
        probe = mi.mixed.probe(half, made.problem, mi.query_loss(made.problem), damping=_DAMPING)
        try:
            found = probe(*data, few)
            yield {"what": f"scores in {name}: rank correlation {found.rank_correlation:.5f}", "error": found.error}
        except mi.mixed.PrecisionError as error:
            yield {"what": f"scores in {name}: refused: {str(error).partition(': keep')[0]}"}


def _double(leaf: Any) -> Any:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def convolution(config: AcceleratorBenchConfig) -> Iterator[Row]:
    """The meta-gradient with each implementation of the convolution, at full precision."""
    for impl in IMPLEMENTATIONS[:-1]:
        made = case(config, "maml", impl)
        data = (made.meta_params, tasks(config, made.shots, config.at_once))
        yield timed(config, impl, config.at_once, meta_gradient(made.problem), *data)[0]


def unit_costs(config: AcceleratorBenchConfig, kind: str) -> Iterator[Row]:
    """Times the meta-gradient, the Hessian product, and the scores of several numbers of tasks."""
    made = case(config, kind)
    data = (made.meta_params, tasks(config, made.shots, config.at_once))
    yield timed(config, "meta-gradient", config.at_once, meta_gradient(made.problem), *data)[0]

    def product(meta_params: Any, tasks: mi.Task) -> Any:
        gradient = meta_gradient(made.problem)
        return jax.jvp(lambda m: gradient(m, tasks), (meta_params,), (meta_params,))[1]

    yield timed(config, "product", config.at_once, product, *data)[0]
    for number in config.num_tasks:
        yield timed(config, "scores", number, *_scores(config, made, number))[0]


def _scores(config: AcceleratorBenchConfig, made: Case, number: int) -> tuple[Any, ...]:
    target = mi.query_loss(made.problem)
    scores = mi.influence_scores(made.problem, target, damping=_DAMPING)
    return scores, made.meta_params, tasks(config, made.shots, number), tasks(config, made.shots, 4, seed=2)


def cold(config: AcceleratorBenchConfig, number: int) -> Iterator[Row]:
    """All scores with an implicit head, timed from the start of the process, and then once more."""
    scores, *args = _scores(config, case(config, "head"), number)
    compiled = jax.jit(scores)
    jax.block_until_ready(compiled(*args))
    yield {"what": "first scores, from the start of the process", "tasks": number, "seconds": time.monotonic() - _BORN}
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    seconds = time.perf_counter() - start
    yield {"what": "second scores", "tasks": number, "seconds": seconds, "per_second": number / seconds}


def trajectory(config: AcceleratorBenchConfig) -> Iterator[Row]:
    """Training, and scores through it."""
    made = case(config, "maml")
    data = (made.meta_params, tasks(config, made.shots, config.at_once))
    run = mi.training(made.problem, optax.adam(1e-3, eps_root=1e-8), config.train_steps, tasks_per_step=1)
    yield timed(config, f"{config.train_steps} steps of training", config.train_steps, run, *data)[0]
    held_out, target = tasks(config, made.shots, 1, seed=2), mi.query_loss(made.problem)

    def scores(meta_params: Any, tasks: mi.Task) -> Any:
        at: Any = mi.trajectory(run)(meta_params, tasks)
        return mi.scores(at, target)(held_out)

    yield timed(config, "scores through it, training included", config.train_steps, scores, *data)[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
