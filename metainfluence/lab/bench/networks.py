"""What a convolutional network's programs would cost on an accelerator, measured without one.

Programs are lowered for CUDA from shapes alone, on any machine. What is counted are lines of StableHLO, which decide
how long compiling takes, and the bytes and operations of a linearisation. Nothing is compiled or run.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import metainfluence as mi
from metainfluence.curvature import exact
from metainfluence.data import resolve_weights
from metainfluence.lab.bench._counting import count
from metainfluence.lab.data.fewshot import Batch
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.models import Conv4, cross_entropy, linear, zero_linear
from metainfluence.response import batch_pull, linearised_bytes

WAYS = 5

# Bars: lines of all scores in chunks over those of one product; bytes of one task's linearisation at full size;
# operations of a product with that linearisation over those with one that keeps everything.
MOST_LINES, MOST_BYTES, MOST_FLOPS = 3.0, 1.2e9, 1.35


class Setting(NamedTuple):
    """A network and its tasks.

    Attributes:
      size: height and width of the images, which have three channels.
      width: channels of the network's layers.
      queries: query examples per class.
      steps: gradient steps of MAML.
      num_tasks: training tasks.
      batch_size: tasks per chunk.
    """

    size: int = 84
    width: int = 64
    queries: int = 15
    steps: int = 5
    num_tasks: int = 64
    batch_size: int = 8


class Row(NamedTuple):
    """One learner.

    Attributes:
      case: "MAML" or "implicit head".
      product_lines: lines of one Hessian product, forward over reverse.
      scores_lines: lines of `influence_scores` in chunks.
      lines_ratio: `scores_lines` over `product_lines`.
      whole_bytes: bytes of one task's linearisation if everything is kept.
      lean_bytes: the same if only what is expensive to compute is kept.
      flops_ratio: operations of a product with the lean linearisation over those with the other.
    """

    case: str
    product_lines: int
    scores_lines: int
    lines_ratio: float
    whole_bytes: float
    lean_bytes: float
    flops_ratio: float


def case(name: str, setting: Setting) -> tuple[mi.Bilevel, Any, mi.Task, mi.Task]:
    """A problem, and the shapes of λ, training tasks and held-out tasks: MAML is 1-shot, the head 5-shot."""
    network = Conv4(setting.width, normalization="group", impl="windows")
    learner, shots = {
        "MAML": lambda: (learners.maml(network, WAYS, steps=setting.steps), 1),
        "implicit head": lambda: (learners.implicit_head(network, WAYS), 5),
    }[name]()

    def side(number: int, per_class: int) -> Batch:
        lead = (number, WAYS * per_class)
        return _batch((*lead, setting.size, setting.size, 3), lead)

    def tasks(number: int) -> mi.Task:
        return mi.Task(side(number, shots), side(number, setting.queries))

    one = jax.ShapeDtypeStruct((WAYS, setting.size, setting.size, 3), jnp.float32)
    return learner.problem, jax.eval_shape(learner.init, jax.random.key(0), one), tasks(setting.num_tasks), tasks(8)


def _batch(images: tuple[int, ...], labels: tuple[int, ...]) -> Any:
    """The shapes of a batch."""
    shapes: Any = (jax.ShapeDtypeStruct(images, jnp.float32), jax.ShapeDtypeStruct(labels, jnp.int32))
    return Batch(*shapes)


def lowered(function: Any, *args: Any) -> str:
    """A program lowered for CUDA."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def lines(function: Any, *args: Any) -> int:
    """Lines of a program lowered for CUDA."""
    return len(lowered(function, *args).splitlines())


class HeadRow(NamedTuple):
    """Total gradients of tasks that fit a head, for one way to fit it and one to differentiate the fit.

    Attributes:
      how: the minimiser and the linear solver.
      loops: loops in the program, each iteration of which waits for the one before.
      products: matrix products.
      lines: lines of StableHLO.
    """

    how: str
    loops: int
    products: int
    lines: int


def heads(width: int = 64, num_tasks: int = 64) -> list[HeadRow]:
    """A logistic head on few features, fitted by loops of small products or by a few large operations."""

    def losses(head: Any, meta_params: Any, batch: Batch) -> jax.Array:
        return cross_entropy(linear(head, jnp.tanh(batch.images @ meta_params)), batch.labels)

    def penalty(head: Any, meta_params: Any) -> jax.Array:
        return 0.05 * optax.tree.norm(head, squared=True)

    def side(number: int) -> Batch:
        lead = (num_tasks, WAYS * number)
        return _batch((*lead, width), lead)

    direct = mi.solvers.dense(method="cholesky")
    rows = []
    with jax.enable_x64(False):
        start = zero_linear(width, WAYS, jnp.float32)
        for how, minimizer, solver in (
            ("newton_cg, cg", mi.adaptation.newton_cg(), mi.solvers.cg()),
            ("newton, dense", mi.adaptation.newton(), direct),
        ):
            fit = mi.adaptation.implicit(
                losses, lambda m, s: start, minimizer=minimizer, linear_solver=solver, regularizer=penalty
            )
            gradients = jax.vmap(mi.total_gradient(mi.bilevel(losses, fit)), in_axes=(None, 0))
            at = jax.ShapeDtypeStruct((width, width), jnp.float32)
            text = lowered(gradients, at, mi.Task(side(5), side(15)))
            loops, products = text.count("stablehlo.while"), text.count("stablehlo.dot_general")
            rows.append(HeadRow(how, loops, products, len(text.splitlines())))
    return rows


def measure(setting: Setting | None = None) -> list[Row]:
    """Measures both learners in float32, as on an accelerator."""
    with jax.enable_x64(False):
        return [_measured(name, Setting() if setting is None else setting) for name in ("MAML", "implicit head")]


def _measured(name: str, setting: Setting) -> Row:
    problem, at, tasks, held_out = case(name, setting)
    objective = mi.total_objective(problem)

    def product(meta_params: Any, vector: Any, tasks: mi.Task) -> Any:
        return jax.jvp(jax.grad(lambda m: objective(m, tasks)), (meta_params,), (vector,))[1]

    scores = mi.influence_scores(problem, mi.query_loss(problem), batch_size=setting.batch_size)
    base, whole = lines(product, at, at, tasks), lines(scores, at, tasks, held_out)
    flops = {lean: _flops(problem, at, tasks, lean) for lean in (False, True)}
    return Row(
        name,
        base,
        whole,
        whole / base,
        linearised_bytes(problem, exact(), at, tasks),
        linearised_bytes(problem, exact(), at, tasks, lean=True),
        flops[True] / flops[False],
    )


def _flops(problem: mi.Bilevel, at: Any, tasks: mi.Task, lean: bool) -> float:
    """Operations of one product with one task's linearisation."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), tasks)
    weights = jax.eval_shape(lambda: resolve_weights(None, one))
    pull = jax.eval_shape(lambda *data: batch_pull(problem, exact(), *data, lean=lean), at, one, weights)
    return count(lambda pull, vector: pull.product()(vector), pull, at).flops


def markdown(rows: list[Row], setting: Setting | None = None) -> str:
    """The table."""
    chosen = Setting() if setting is None else setting
    head = [
        (
            f"Conv4-{chosen.width}, {chosen.size} × {chosen.size}, lowered for CUDA; scores of {chosen.num_tasks} "
            f"tasks in chunks of {chosen.batch_size}"
        ),
        "",
        "| problem | lines of a product | of all scores | ratio | bar | GB of a task | lean | bar | operations | bar |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    body = [
        f"| {row.case} | {row.product_lines} | {row.scores_lines} | {row.lines_ratio:.2f} | {MOST_LINES:.1f} | "
        f"{row.whole_bytes / 1e9:.2f} | {row.lean_bytes / 1e9:.2f} | {MOST_BYTES / 1e9:.1f} | "
        f"{row.flops_ratio:.2f} × | {MOST_FLOPS:.2f} × |"
        for row in rows
    ]
    return "\n".join([*head, *body, ""])


def markdown_of_heads(rows: list[HeadRow]) -> str:
    """The table."""
    head = ["| head fitted and differentiated by | loops | products | lines |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *(f"| {row.how} | {row.loops} | {row.products} | {row.lines} |" for row in rows), ""])
