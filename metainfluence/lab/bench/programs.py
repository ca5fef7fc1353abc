"""How large the library's programs are: their lines of StableHLO over those of one Hessian product on the same problem.

Most of a first call is compile time, which grows with the program. Lines are counted rather than timed, so they are the
same on every machine; `lines` holds for one version of JAX.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi

NUM_TASKS, NUM_HELD_OUT, BATCH_SIZE = 30, 8, 7
_FEATURES, _WIDTH, _CLASSES, _SHOTS = 6, 16, 3, 5


class Case(NamedTuple):
    """A problem whose programs are lowered.

    Attributes:
      problem: the problem.
      meta_params: λ.
      tasks: `NUM_TASKS` training tasks.
      held_out: the target's tasks.
    """

    problem: mi.Bilevel
    meta_params: Any
    tasks: mi.Task
    held_out: mi.Task


class Row(NamedTuple):
    """One program.

    Attributes:
      case: "implicit head" or "unrolled SGD".
      program: its name in `BARS`, or "Hessian product".
      lines: lines of StableHLO.
      ratio: its lines over those of the Hessian product.
      trace_seconds: time to trace and lower.
      compile_seconds: compile time; NaN if not asked for.
    """

    case: str
    program: str
    lines: int
    ratio: float
    trace_seconds: float
    compile_seconds: float


# The most lines that each program may have, over the Hessian product's.
BARS = {
    "influence_scores, cg, damping 0.01": 2.2,
    "influence_scores, default solver": 2.8,
    "influence_scores, default solver, damping auto": 3.0,
    f"influence_scores, cg, batch_size {BATCH_SIZE}": 3.0,
    "edit, damping auto": 3.5,
}


def cases(count: Callable[[], None] = lambda: None) -> dict[str, Case]:
    """A small tanh MLP with an implicit head, and with five unrolled SGD steps on all weights.

    Args:
      count: called at every call of the user's inner loss.
    """
    rng = np.random.default_rng(0)

    def examples(number: int) -> dict[str, Any]:
        x = rng.normal(size=(number, _SHOTS, _FEATURES))
        return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, _CLASSES, size=(number, _SHOTS)))}

    def weights(*shape: int) -> Any:
        return jnp.asarray(0.4 * rng.normal(size=shape))

    layers = {"first": weights(_FEATURES, _WIDTH), "second": weights(_WIDTH, _WIDTH), "bias": weights(_WIDTH)}

    def features(params: Any, batch: Any) -> Any:
        return jnp.tanh(jnp.tanh(batch["x"] @ params["first"]) @ params["second"] + params["bias"][None])

    def losses(logits: Any, batch: Any) -> Any:
        count()
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def head_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return losses(features(meta_params, batch) @ params, batch)

    def network_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return losses(features(params, batch) @ params["head"], batch)

    head = mi.adaptation.implicit(
        head_loss,
        lambda meta_params, support: jnp.zeros((_WIDTH, _CLASSES)),
        regularizer=lambda params, meta_params: 0.05 * jnp.sum(params**2),
    )
    steps = mi.adaptation.unrolled(network_loss, lambda meta_params, support: meta_params, optax.sgd(0.1), 5)
    tasks, held_out = (mi.Task(examples(number), examples(number)) for number in (NUM_TASKS, NUM_HELD_OUT))
    regularizer = mi.l2(0.1)
    return {
        "implicit head": Case(mi.bilevel(head_loss, head, meta_regularizer=regularizer), layers, tasks, held_out),
        "unrolled SGD": Case(
            mi.bilevel(network_loss, steps, meta_regularizer=regularizer),
            {**layers, "head": weights(_WIDTH, _CLASSES)},
            tasks,
            held_out,
        ),
    }


def product(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One Hessian product, forward over reverse, with its arguments."""
    objective = mi.total_objective(case.problem)

    def run(meta_params: Any, vector: Any, tasks: mi.Task, weights: mi.Weights) -> Any:
        return jax.jvp(jax.grad(lambda m: objective(m, tasks, weights)), (meta_params,), (vector,))[1]

    return run, (case.meta_params, case.meta_params, case.tasks, mi.unit_weights(case.tasks))


def programs(case: Case) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The programs of `BARS` with their arguments."""
    problem, target, cg = case.problem, mi.query_loss(case.problem), mi.solvers.cg()
    scores = functools.partial(mi.influence_scores, problem, target)
    data = (case.meta_params, case.tasks, case.held_out)
    made: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (scores(solver=cg, damping=0.01), data),
        (scores(), data),
        (scores(damping="auto"), data),
        (scores(solver=cg, damping=0.01, batch_size=BATCH_SIZE), data),
        (mi.edit(problem, damping="auto"), (case.meta_params, case.tasks, mi.unit_weights(case.tasks))),
    ]
    return dict(zip(BARS, made, strict=True))


def lines(function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """Lines of the lowered program."""
    return len(jax.jit(function).lower(*args).as_text().splitlines())


def measure(*, compiled: bool = False) -> list[Row]:
    """Measures all programs of all cases."""
    rows: list[Row] = []
    for name, case in cases().items():
        base = 0
        for program, (function, args) in {"Hessian product": product(case), **programs(case)}.items():
            start = time.perf_counter()
            lowered = jax.jit(function).lower(*args)
            traced = time.perf_counter()
            seconds = float("nan")
            if compiled:
                lowered.compile()
                seconds = time.perf_counter() - traced
            count = len(lowered.as_text().splitlines())
            base = base or count
            rows.append(Row(name, program, count, count / base, traced - start, seconds))
    return rows


def markdown(rows: list[Row]) -> str:
    """The table."""
    head = [
        "| problem | program | lines | over one product | bar | trace, s | compile, s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    body = [
        f"| {row.case} | {row.program} | {row.lines} | {row.ratio:.2f} | {BARS.get(row.program, 1.0):.1f} | "
        f"{row.trace_seconds:.1f} | {row.compile_seconds:.1f} |"
        for row in rows
    ]
    return "\n".join([*head, *body, ""])
