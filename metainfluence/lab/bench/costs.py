"""What the library's parts cost, as ratios measured in one run."""

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import metainfluence as mi
from metainfluence.curvature import exact
from metainfluence.lab.bench import _convolution, import_time, networks, programs
from metainfluence.lab.bench._convolution import ConvolutionRatio, convolution_ratio, layer_costs
from metainfluence.lab.bench._output import publish
from metainfluence.lab.data import fewshot, omniglot
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFolder, Positive, Ways
from metainfluence.lab.learn.models import MLP, logistic_head_problem
from metainfluence.lab.learn.timing import Compiled
from metainfluence.response import expand


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Unit costs on Omniglot tasks: an implicit logistic head on a tanh MLP, in float64."""

    num_tasks: Count = 64
    """Tasks."""
    ways: Ways = 5
    """Classes per task."""
    shots: Count = 2
    """Support examples per class."""
    queries: Count = 5
    """Query examples per class."""
    widths: tuple[Count, ...] = (64, 32)
    """Layers of the feature extractor on 784 pixels."""
    head_l2: Positive = 0.1
    """Penalty of the head that each task fits."""
    damping: NotNegative = 5.0
    """Damping of the solves; λ is untrained here, so its Hessian needs some."""
    batch_size: Count = 16
    """Tasks per chunk, in the parts that measure chunks."""
    repeats: Count = 15
    """Timed runs of each; the median is reported."""
    num_separate: Count = 4
    """Right-hand sides solved one by one, from which the cost of one per task is extrapolated."""
    out: OutFolder = Path("bench-output")
    """Folder for bench.md and bench.json."""


def run(config: BenchConfig) -> None:
    """Measure, print, and write the table.

    Raises:
        FileNotFoundError: Omniglot is not prepared.
    """
    jax.config.update("jax_enable_x64", True)
    images, labels = omniglot.load()
    tasks = fewshot.materialize(
        fewshot.sample_tasks(
            labels, num_tasks=config.num_tasks, ways=config.ways, shots=config.shots, queries=config.queries, seed=0
        ),
        images,
    )
    model = MLP(config.widths)
    meta_params = model.init(jax.random.key(0), tasks.query.images[0])
    problem = logistic_head_problem(model, config.ways, head_l2=config.head_l2)
    rows = measure(config, problem, meta_params, tasks)
    convolution = convolution_ratio()
    with jax.enable_x64(False):
        layers = layer_costs()
    imports = import_time.measure()
    sizes, large, heads = programs.measure(compiled=True), networks.measure(), networks.heads()
    record = {
        "costs": rows,
        "convolution": convolution._asdict(),
        "layers": [row._asdict() for row in layers],
        "import": imports,
        "programs": [row._asdict() for row in sizes],
        "networks": [row._asdict() for row in large],
        "heads": [row._asdict() for row in heads],
    }
    tables = (
        _convolution.markdown(layers),
        programs.markdown(sizes),
        networks.markdown(large),
        networks.markdown_of_heads(heads),
    )
    text = "\n".join([markdown(config, rows, convolution, imports), *tables])
    publish("bench", config, text, **record)


def measure(config: BenchConfig, problem: mi.Bilevel, meta_params: Any, tasks: mi.Task) -> list[dict[str, Any]]:
    """Times every part; the first row is the meta-gradient epoch, to which the other rows' ratios refer."""
    rows: list[dict[str, Any]] = []

    def timed(name: str, function: Callable[..., Any], *args: Any, repeats: int = config.repeats) -> Any:
        compiled = Compiled(function)
        result = compiled(*args)
        seconds = []
        for _ in range(repeats):
            compiled(*args)
            seconds.append(compiled.run_seconds)
        median = statistics.median(seconds)
        epoch = rows[0]["seconds"] if rows else median
        rows.append(
            {"part": name, "seconds": median, "epochs": median / epoch, "compile_seconds": compiled.compile_seconds}
        )
        return result

    def epoch(meta_params: Any, tasks: mi.Task) -> Any:
        return jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(meta_params, tasks)

    weights = mi.unit_weights(tasks)
    gradients = timed("meta-gradient epoch: total gradients of all tasks", epoch, meta_params, tasks)
    timed("forward: losses of all tasks", jax.vmap(mi.task_loss(problem), in_axes=(None, 0)), meta_params, tasks)
    expansion = timed("linearise the gradient map", expand(problem, exact(), None), meta_params, tasks, weights)
    timed("Hessian product, linearised", lambda e, v: e.operator.matvec(v), expansion, meta_params)
    objective = jax.grad(mi.total_objective(problem))
    timed(
        "Hessian product, forward over reverse anew",
        lambda m, t, v: jax.jvp(lambda m: objective(m, t), (m,), (v,))[1],
        meta_params,
        tasks,
        meta_params,
    )
    chunked = mi.total_hessian(problem, batch_size=config.batch_size)
    timed(
        f"Hessian product, in chunks of {config.batch_size} tasks",
        lambda m, t, v: chunked(m, t).matvec(v),
        meta_params,
        tasks,
        meta_params,
    )
    timed(
        "scores of all tasks and examples, after the solve",
        lambda e, s: e.mixed_transposed(s),
        expansion,
        meta_params,
    )
    scores = mi.influence_scores(problem, mi.query_loss(problem), solver=mi.solvers.cg(), damping=config.damping)
    whole = timed("influence_scores, from λ to scores", scores, meta_params, tasks, tasks, repeats=3)
    mi.check(whole)
    rows[-1]["part"] += f" ({int(whole.info.num_matvecs)} products)"

    operator = expansion.operator.damped(config.damping)
    solver = mi.solvers.cg()
    rhs = jax.tree.map(lambda g: g / config.num_tasks, gradients)

    def solve(operator: mi.Operator, rhs: Any) -> Any:
        return solver.solve(operator, None, rhs)

    together = timed(
        f"task-IF solves: {config.num_tasks} right-hand sides in step",
        lambda o, b: jax.vmap(lambda b: solve(o, b))(b),
        operator,
        rhs,
        repeats=1,
    )
    mi.check(together[1])
    share = jax.tree.map(lambda b: b[: config.num_separate], rhs)
    timed(
        f"task-IF solves: {config.num_tasks} one by one, extrapolated from {config.num_separate}",
        lambda o, b: jax.lax.map(lambda b: solve(o, b), b),
        operator,
        share,
        repeats=1,
    )
    for key in ("seconds", "epochs"):
        rows[-1][key] *= config.num_tasks / config.num_separate
    return rows


def markdown(
    config: BenchConfig, rows: list[dict[str, Any]], convolution: ConvolutionRatio, imports: dict[str, float]
) -> str:
    """The table, and the ratios that are not part of it."""
    device = jax.devices()[0]
    lines = [
        (
            f"{config.num_tasks} {config.ways}-way {config.shots}-shot Omniglot tasks, "
            f"{config.queries} queries per class; "
            f"implicit logistic head on a 784-{'-'.join(map(str, config.widths))} tanh MLP; {jnp.result_type(float)}; "
            f"{device.platform} ({device.device_kind}), jax {jax.__version__}"
        ),
        "",
        "| part | seconds | meta-gradient epochs | compile seconds |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row['part']} | {row['seconds']:.4f} | {row['epochs']:.2f} | {row['compile_seconds']:.1f} |" for row in rows
    ]
    lines += [
        "",
        f"task-IF in step against one by one: {rows[-2]['seconds'] / rows[-1]['seconds']:.2f} ×",
        "",
        (
            f"MAML gradient of a Conv4 of width 32 on 8 tasks, lax.conv against one product with the windows: "
            f"{convolution.ratio:.1f} × ({convolution.lax_seconds:.3f} s against {convolution.windows_seconds:.3f} s; "
            f"nine shifted products: {convolution.shifted_seconds:.3f} s)"
        ),
        "",
        (
            f"`import metainfluence` against `import jax, optax`: {imports['ratio']:.2f} × "
            f"({imports['metainfluence']:.2f} s against {imports['dependencies']:.2f} s)"
        ),
        "",
    ]
    return "\n".join(lines)
