"""Scoring more tasks than fit in memory: peak memory, and speed compared with scoring in memory."""

import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import metainfluence as mi
from metainfluence.lab.bench._output import publish
from metainfluence.lab.data import digits, fewshot
from metainfluence.lab.data.sources import FewShotSource
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFolder, Positive, Ways
from metainfluence.lab.learn.models import MLP, logistic_head_problem
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import meta_train

_COMPILING = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class ScoringBenchConfig:
    """Digits tasks streamed through metainfluence.scoring, and fewer of them scored in memory, in float64."""

    num_tasks: Count = 10_000
    """Tasks that are streamed; the targets are meant for 100000."""
    num_in_memory: Count = 1_000
    """Tasks scored in memory, all at once, with their linearisation."""
    num_held_out: Count = 100
    """Held-out tasks of the target."""
    ways: Ways = 5
    """Classes per task."""
    shots: Count = 5
    """Support examples per class."""
    queries: Count = 10
    """Query examples per class."""
    widths: tuple[Count, ...] = (32, 16)
    """Layers of the feature extractor."""
    head_l2: Positive = 0.1
    """Penalty of the head that each task fits."""
    num_trained: Count = 200
    """Tasks that λ is trained on."""
    num_steps: Count = 150
    """Training steps, by Adam."""
    damping: NotNegative = 0.03
    """Damping of the solves."""
    memory: Positive = 1.2e9
    """Bytes that the engine may use."""
    most_gigabytes: Positive = 3.0
    """Target: the process's peak memory."""
    least_ratio: NotNegative = 0.6
    """Target: tasks per second, as a share of those in memory."""
    out: OutFolder = Path("bench-output")
    """Folder for scoring.md, scoring.json and, while the benchmark runs, the score file."""


def run(config: ScoringBenchConfig) -> dict[str, Any]:
    """Measure, print, and write the table; the streamed run comes first, since a memory peak never goes down again."""
    jax.config.update("jax_enable_x64", True)
    data = digits.load()
    shape: dict[str, Any] = {"ways": config.ways, "shots": config.shots, "queries": config.queries}

    def sample(count: int, seed: int, pool: Any) -> fewshot.FewShotTasks:
        return fewshot.sample_tasks(data.labels, num_tasks=count, seed=seed, pool=pool, **shape)

    listed = sample(config.num_tasks, 0, data.train_pool)
    held_out = fewshot.materialize(sample(config.num_held_out, 1, data.held_out_pool), data.images)
    problem = logistic_head_problem(MLP(config.widths), config.ways, head_l2=config.head_l2)
    initial = MLP(config.widths).init(jax.random.key(0), held_out.query.images[0])
    few = fewshot.materialize(fewshot.take(listed, slice(config.num_trained)), data.images)
    train = meta_train(problem, optax.adam(optax.cosine_decay_schedule(0.05, config.num_steps)), config.num_steps)
    meta_params = train(initial, few).meta_params
    source = FewShotSource(listed, data.images)

    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        streamed = _streamed(config, problem, meta_params, source, held_out, Path(folder) / "scores.parquet")
    tasks = fewshot.materialize(fewshot.take(listed, slice(config.num_in_memory)), data.images)
    rows = [streamed] + [
        _in_memory(config, problem, meta_params, tasks, held_out, batch_size) for batch_size in (None, 256)
    ]
    targets = {
        "peak gigabytes": (
            streamed["gigabytes"],
            config.most_gigabytes,
            streamed["gigabytes"] <= config.most_gigabytes,
        ),
        "tasks/s over those in memory": (
            ratio := streamed["rate"] / rows[1]["rate"],
            config.least_ratio,
            ratio >= config.least_ratio,
        ),
    }
    return publish("scoring", config, markdown(config, rows, targets), runs=rows, targets=targets)


def _solver() -> mi.Solver:
    """The solver that the engine uses for many tasks."""
    return mi.solvers.cg(preconditioner=mi.solvers.sampled(64, rank=50))


def _streamed(
    config: ScoringBenchConfig,
    problem: mi.Bilevel,
    meta_params: Any,
    source: FewShotSource,
    held_out: mi.Task,
    out: Path,
) -> dict[str, Any]:
    compiling = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILING:
            compiling[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    result = mi.scoring.score(
        problem,
        mi.query_loss(problem),
        meta_params,
        source,
        held_out,
        solver=_solver(),
        damping=config.damping,
        memory=config.memory,
        out=out,
    )
    seconds = time.perf_counter() - start
    # Later events do not belong to this run.
    compiled, compiling[0] = compiling[0], float("nan")
    mi.check(result)
    # Measured before the table is read, which takes more memory than the run that wrote it.
    gigabytes = peak_gigabytes()
    manifest = mi.read_scores(out).metadata["manifest"]
    return {
        "path": f"streamed in batches of {manifest['batch_size']}",
        "tasks": len(source),
        "products": int(result.info.num_matvecs),
        "seconds": seconds - compiled,
        "compile_seconds": compiled,
        "rate": len(source) / (seconds - compiled),
        "gigabytes": gigabytes,
    }


def _in_memory(
    config: ScoringBenchConfig,
    problem: mi.Bilevel,
    meta_params: Any,
    tasks: mi.Task,
    held_out: mi.Task,
    batch_size: int | None,
) -> dict[str, Any]:
    make = mi.influence_scores(
        problem, mi.query_loss(problem), solver=_solver(), damping=config.damping, batch_size=batch_size
    )
    score = Compiled(make)
    result = mi.check(score(meta_params, tasks, held_out))
    seconds = []
    for _ in range(3):
        score(meta_params, tasks, held_out)
        seconds.append(score.run_seconds)
    median = statistics.median(seconds)
    count = len(result.task)
    return {
        "path": "in memory, all at once" if batch_size is None else f"in memory, in chunks of {batch_size}",
        "tasks": count,
        "products": int(result.info.num_matvecs),
        "seconds": median,
        "compile_seconds": score.compile_seconds,
        "rate": count / median,
        "gigabytes": peak_gigabytes(),
    }


def peak_gigabytes() -> float:
    """The largest resident size of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 1e9 if sys.platform == "darwin" else size * 1024 / 1e9


def markdown(
    config: ScoringBenchConfig, rows: list[dict[str, Any]], targets: dict[str, tuple[float, float, bool]]
) -> str:
    """The table, with the targets below."""
    examples = config.num_tasks * config.ways
    lines = [
        (
            f"{config.ways}-way {config.shots}-shot digits tasks, {config.queries} queries per class; implicit "
            f"logistic head on a 64-{'-'.join(map(str, config.widths))} tanh MLP; {jnp.result_type(float)}; "
            f"{jax.devices()[0].device_kind}, jax {jax.__version__}; streamed: {examples * config.shots} support and "
            f"{examples * config.queries} query examples"
        ),
        "",
        "| path | tasks | products | seconds | tasks/s | compile seconds | peak GB of the process so far |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['path']} | {row['tasks']} | {row['products']} | {row['seconds']:.1f} | {row['rate']:.0f} | "
        f"{row['compile_seconds']:.1f} | {row['gigabytes']:.2f} |"
        for row in rows
    ]
    lines += ["", "| target | measured | bar | met |", "|---|---:|---:|---|"]
    lines += [
        f"| {name} | {value:.2f} | {bar:g} | {'yes' if met else 'NO'} |" for name, (value, bar, met) in targets.items()
    ]
    return "\n".join([*lines, ""])
