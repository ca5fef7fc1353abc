"""The three responses against retraining: leave-one-out and removals of several sizes, from one start, in one order.

The runs end nowhere near a stationary point, on purpose. Every estimator is judged by the same retrained models;
`optimum` at its best damping of a grid, which flatters it.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.evaluation import (
    leave_one_out,
    linear_datamodeling_score,
    loo_correlation,
    random_subsets,
    retrain,
    roc_auc,
)
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.experiments.setting import (
    SINUSOID,
    SettingConfig,
    Tasks,
    image_tasks,
    make_learner,
    sinusoid_tasks,
)
from metainfluence.lab.show.plots import METHOD_COLORS, clean


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam, as practitioners set it or made smooth; its rate falls to 0 along a cosine."""

    learning_rate: float = 0.01
    """At its height."""
    eps_root: float = 1e-5
    """Under Adam's root: the larger, the smoother."""
    warmup: int = 10
    """Steps up to the height; 0 for none."""
    num_steps: int = 100
    """Steps."""
    tasks_per_step: int | None = None
    """None for all tasks in every step."""
    num_checkpoints: int = 5
    """For segments; they divide num_steps."""


@dataclasses.dataclass(frozen=True)
class EstimatorsConfig:
    """Trajectory, segments and optimum against retraining."""

    title: str = "Trajectory, segments, optimum"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage and learner; its `training` is not used."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the start; tasks and damage are those of the setting."""
    removed: tuple[float, ...] = (0.05, 0.2, 0.5)
    """Shares of the tasks that subsets lack."""
    num_subsets: int = 40
    """Of each share."""
    num_left_out: int = 40
    """Tasks left out one at a time."""
    num_targets: int = 10
    """Groups of held-out tasks; the mean loss on each is one target."""
    dampings: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)
    """For optimum, in units of the largest |eigenvalue|."""
    together: int = 8
    """Retrainings run side by side."""
    draws: int = 1000
    """Of each bootstrap."""


class Seeded(NamedTuple):
    """One run and what it is judged by.

    Attributes:
      run: the training.
      start: λ before it.
      end: λ after it.
      kept: λ and optimiser states at the checkpoints.
      slopes: ∇φ of every target at the end, `[J, ...]`.
    """

    run: Any
    start: Any
    end: Any
    kept: list[tuple[Any, Any]]
    slopes: Any


def run(config: EstimatorsConfig, cache: Path | None = None) -> Result:
    """Trains, retrains and compares; rows come one by one to `cache`/rows.jsonl, too.

    Raises:
      ValueError: held-out tasks that the targets do not divide, checkpoints that do not divide the steps, or what
        `setting.image_tasks` and `setting.make_learner` refuse.
    """
    data = config.setting.data
    if data.num_held_out % config.num_targets:
        raise ValueError(
            f"num_targets: expected a divisor of num_held_out {data.num_held_out}, got {config.num_targets}"
        )
    jax.config.update("jax_enable_x64", config.setting.float64)
    tasks = sinusoid_tasks(config.setting) if data.dataset == SINUSOID else image_tasks(config.setting)
    learner = make_learner(config.setting.learner, tasks.training, data)
    rows: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    for seed in config.seeds:
        folder = None if cache is None else cache / f"seed{seed}"
        start = learner.init(jax.random.key(seed), tasks.training.support[0][0])
        found, fact = one_seed(config, tasks, learner.problem, start, folder)
        for row in found:
            row["seed"] = seed
        rows += found
        facts.append({"seed": seed, **fact})
        if cache is not None:
            with (cache / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in [facts[-1], *found])
    return Result(rows, tables(config, rows, facts), picture(config, rows), notes(config))


def optimizer_of(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam with its schedule."""
    return optax.adam(schedule_of(config), eps_root=config.eps_root)


def schedule_of(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of each step."""
    if not config.warmup:
        return optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    return optax.warmup_cosine_decay_schedule(
        config.learning_rate / config.warmup, config.learning_rate, config.warmup, config.num_steps
    )


def one_seed(
    config: EstimatorsConfig, tasks: Tasks, problem: mi.Bilevel, start: Any, cache: Path | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all estimators, and what is known of the run."""
    optimizer = config.optimizer
    training = mi.training(
        problem, optimizer_of(optimizer), optimizer.num_steps, tasks_per_step=optimizer.tasks_per_step
    )
    targets = jax.tree.map(lambda leaf: leaf.reshape(config.num_targets, -1, *leaf.shape[1:]), tasks.held_out)
    kept = states(training, start, tasks.training, optimizer.num_checkpoints)
    end = kept[-1][0]
    slopes = jax.jit(jax.vmap(jax.grad(mi.query_loss(problem)), in_axes=(None, 0)))(end, targets)
    seeded = Seeded(training, start, end, kept, slopes)
    truth = retrained(config, seeded, tasks, problem, targets, cache)
    measured: Any = mi.smoothness(training, runs_at_once=config.together)(start, tasks.training)
    gradient = jax.jit(lambda m: optax.tree.norm(jax.grad(mi.total_objective(problem))(m, tasks.training)))
    relative = float(gradient(end) / gradient(start))
    fact: dict[str, Any] = {
        "gradient_norm": float(gradient(end)),
        "gradient_norm_relative": relative,
        "meta_parameters": int(ravel_pytree(start)[0].size),
        **{name: getattr(measured, name) for name in ("score", "optimizer", "inner", "outer", "verdict")},
        "sign": float(np.mean(measured.sign)),
        "size": float(np.mean(measured.size)),
    }
    for share in (0.0, *config.removed):
        chosen = mi.choose(gradient_norm=relative, smoothness=measured, share_removed=share, run=True)
        fact[f"chosen_{share:g}"] = chosen.estimator
    rows = []
    for name, damping, scores in estimators(config, seeded, tasks, problem):
        row: dict[str, Any] = {"method": name, "damping": damping, **judged(config, scores, truth)}
        damaged = tasks.task_harm != "clean"
        if damaged.any():
            row["auc"] = float(roc_auc(scores.mean(0), damaged))
        rows.append(row)
    return rows, fact


def states(training: Any, start: Any, tasks: mi.Task, count: int) -> list[tuple[Any, Any]]:
    """λ and the optimiser's state after each of `count` equal parts of the run."""
    if training.num_steps % count:
        raise ValueError(f"num_checkpoints: expected a divisor of num_steps {training.num_steps}, got {count}")
    weights = mi.unit_weights(tasks)
    table = training.batches(len(weights.task))

    def step(state: Any, each: Any) -> tuple[Any, None]:
        number, row = each
        own = (tasks, weights) if row is None else jax.tree.map(lambda leaf: leaf[row], (tasks, weights))
        return training.step(state, number, *own)[0], None

    def part(state: Any, each: Any) -> tuple[Any, Any]:
        state, _ = jax.lax.scan(step, state, each)
        return state, state

    each = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), (jnp.arange(training.num_steps), table))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(lambda state: jax.lax.scan(part, state, each)[1])(training.begin(start))
    return [jax.tree.map(lambda leaf, k=k: leaf[k], found) for k in range(count)]


def retrained(
    config: EstimatorsConfig, seeded: Seeded, tasks: Tasks, problem: mi.Bilevel, targets: mi.Task, cache: Path | None
) -> dict[str, Any]:
    """What the targets become without single tasks, and without shares of them."""
    weights = mi.unit_weights(tasks.training)
    each = jax.jit(jax.vmap(jax.vmap(mi.query_loss(problem), in_axes=(None, 0)), in_axes=(0, None)))

    def train(weights: mi.Weights, start: Any, tasks: mi.Task) -> Any:
        return seeded.run(start, tasks, weights)

    def outcomes(name: str, interventions: mi.Weights) -> np.ndarray:
        folder = None if cache is None else cache / name
        again = retrain(train, batch_size=config.together, cache=folder)
        return np.asarray(each(again(interventions, seeded.start, tasks.training), targets))

    seed = config.setting.seed
    left_out = np.random.default_rng(seed).permutation(len(weights.task))[: config.num_left_out]
    here = np.asarray(each(jax.tree.map(lambda leaf: leaf[None], seeded.end), targets))[0]
    truth: dict[str, Any] = {
        "left_out": left_out,
        "changes": outcomes("left_out", leave_one_out(weights, tasks=left_out)) - here,
    }
    for share in config.removed:
        subsets, kept = random_subsets(weights, config.num_subsets, 1 - share, seed)
        truth[f"lds_{share:g}"] = (kept, outcomes(f"removed_{share:g}", subsets))
    return truth


def estimators(
    config: EstimatorsConfig, seeded: Seeded, tasks: Tasks, problem: mi.Bilevel
) -> Iterator[tuple[str, float | None, np.ndarray]]:
    """(name, damping, scores `[J, T]`) of every estimator."""
    training, optimizer = tasks.training, config.optimizer

    def asked(at: Any) -> np.ndarray:
        return -np.asarray(jax.jit(lambda at, slopes: at.vjp(slopes)[0].task)(at, seeded.slopes))

    at = mi.trajectory(seeded.run)(seeded.start, training)
    yield "trajectory", None, -np.asarray(at.vjp(seeded.slopes)[0].task)
    for place in ("end", "middle"):
        known = mi.checkpoints(
            seeded.kept,
            num_steps=optimizer.num_steps,
            learning_rate=schedule_of(optimizer),
            second_moments=True,
            eps_root=optimizer.eps_root,
            place=place,
        )
        yield f"segments, {place}", None, asked(mi.segments(problem)(known, training))
    dense = jax.jit(lambda m, t: mi.total_hessian(problem)(m, t).dense())(seeded.end, training)
    values, vectors = np.linalg.eigh(np.asarray(dense))
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])
    each = jax.jit(lambda m, t: flat(jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(m, t)))
    gradients = np.asarray(each(seeded.end, training)) / config.setting.data.num_tasks
    slopes = np.asarray(flat(seeded.slopes))
    for factor in config.dampings:
        damped = np.abs(values) + factor * np.max(np.abs(values))
        yield "optimum, |H|", factor, (slopes @ (vectors / damped)) @ (gradients @ vectors).T
    yield "gradient similarity", None, slopes @ gradients.T


def judged(config: EstimatorsConfig, scores: np.ndarray, truth: dict[str, Any]) -> dict[str, Any]:
    """One estimator against retraining: means over the targets."""
    left_out = truth["left_out"]
    loo = [
        float(loo_correlation(own[left_out], changes, num=config.draws).spearman.value)
        for own, changes in zip(scores, truth["changes"].T, strict=True)
    ]
    row: dict[str, Any] = {"loo": float(np.mean(loo))}
    for share in config.removed:
        kept, outcomes = truth[f"lds_{share:g}"]
        found = linear_datamodeling_score(scores, kept, outcomes, num=config.draws).mean
        row |= {f"lds_{share:g}": float(found.value), f"lds_{share:g}_low": float(found.low)}
        row[f"lds_{share:g}_high"] = float(found.high)
    return row


def best_rows(config: EstimatorsConfig, rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Each estimator's numbers of every seed; of several dampings the best for each number."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    columns = ["loo", *(f"lds_{share:g}" for share in config.removed), *(["auc"] if "auc" in rows[0] else [])]
    for name in names:
        found = {
            column: [
                max(row[column] for row in rows if row["method"] == name and row["seed"] == seed)
                for seed in config.seeds
            ]
            for column in columns
        }
        yield name, found


def tables(config: EstimatorsConfig, rows: list[dict[str, Any]], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and their range."""
    listed = list(best_rows(config, rows))
    headers = ["estimator", *listed[0][1]]
    cells = [
        [name, *(f"{np.mean(values):.2f} ({min(values):.2f} … {max(values):.2f})" for values in found.values())]
        for name, found in listed
    ]
    known = list(facts[0])
    shown = [
        [f"{fact[key]:.3g}" if isinstance(fact[key], float) else str(fact[key]) for key in known] for fact in facts
    ]
    return {"Agreement with retraining": (headers, cells), "The runs": (known, shown)}


def notes(config: EstimatorsConfig) -> list[str]:
    """What the numbers mean."""
    return [
        f"LOO: Spearman over {config.num_left_out} tasks, mean over {config.num_targets} targets.",
        f"LDS: {config.num_subsets} subsets that lack the share named.",
        "Everything is retrained from the same start in the same order.",
        f"Mean over {len(config.seeds)} seeds of the start, with the smallest and the largest.",
        f"optimum: the best of {len(config.dampings)} dampings for each column and seed.",
    ]


def picture(config: EstimatorsConfig, rows: list[dict[str, Any]]) -> Figure:
    """Bars of every estimator."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    listed = list(best_rows(config, rows))
    columns = list(listed[0][1])
    width = 0.8 / len(listed)
    for index, ((name, found), color) in enumerate(zip(listed, METHOD_COLORS, strict=False)):
        means = [float(np.mean(found[column])) for column in columns]
        axes.bar(np.arange(len(columns)) + index * width - 0.4, means, width, align="edge", label=name, color=color)
    axes.set_xticks(np.arange(len(columns)), columns)
    axes.set(title=config.title, ylabel="agreement")
    axes.legend(frameon=False, fontsize="small")
    clean(axes)
    return figure
