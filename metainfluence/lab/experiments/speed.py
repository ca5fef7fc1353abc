"""Compares one task's removal by `edit` with training on without it, to the same value of the objective."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.ranges import Count, Positive, Size
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.experiments.setting import SettingConfig, make
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import training_steps
from metainfluence.lab.show.plots import clean


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """Time to remove one task, by edit and by training on from λ."""

    title: str = "One removal"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage, learner and training."""
    num_removed: Count = 5
    """Tasks removed, one at a time."""
    polish: Size = 8
    """Newton steps on all tasks first, so that only the removal is left to descend."""
    tol: Positive = 0.1
    """Relative residual at which the edits' solves stop; the first-order error is larger than that."""
    learning_rates: tuple[Positive, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    """Adam's learning rates; the one that gets there first counts."""
    num_steps: Count = 400
    """Adam steps allowed."""


def run(config: SpeedConfig) -> Result:
    """Edits and trains on, for each removed task.

    Raises:
      ValueError: whatever `setting.make` refuses.
    """
    setting = make(config.setting)
    problem, tasks = setting.problem, setting.tasks.training
    weights = mi.unit_weights(tasks)
    damping = float(by.chosen_damping(setting).value)
    start = Compiled(mi.edit(problem, damping=damping, num_newton_steps=config.polish))(setting.trained, tasks, weights)
    objective = Compiled(mi.total_objective(problem))
    solver = mi.solvers.auto(tol=config.tol)
    edits = {
        name: Compiled(mi.edit(problem, solver=solver, damping=damping, num_newton_steps=steps))
        for name, steps in (("first order", 0), ("first order and one Newton step", 1))
    }
    bottom = Compiled(mi.edit(problem, damping=damping, num_newton_steps=config.polish))

    def train_on(rate: Any, meta_params: Any, tasks: mi.Task, weights: mi.Weights) -> jax.Array:
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
        steps = training_steps(problem, optimizer, config.num_steps)
        return steps(meta_params, optimizer.init(meta_params), tasks, weights)[2]

    training = Compiled(train_on)
    point = start.meta_params
    chosen = np.random.default_rng(config.setting.seed).permutation(len(weights.task))[: config.num_removed]
    rows: list[dict[str, Any]] = []
    curves: list[np.ndarray] = []
    for number, k in enumerate(chosen.tolist()):
        without = mi.drop(weights, tasks=[k])
        before = float(objective(point, tasks, without))
        lowest = float(objective(bottom(point, tasks, without).meta_params, tasks, without))
        losses = {}
        for rate in config.learning_rates:
            value = jax.numpy.asarray(rate)
            if number == 0:
                training(value, point, tasks, without)
            losses[rate] = np.asarray(training(value, point, tasks, without))
        per_step = training.run_seconds / config.num_steps
        curves.append(np.min(np.stack(list(losses.values())), axis=0) - lowest)
        for name, edit in edits.items():
            if number == 0:
                edit(point, tasks, without)
            reached = float(objective(edit(point, tasks, without).meta_params, tasks, without))
            steps = min((_first(values, reached) for values in losses.values()), default=config.num_steps)
            enough = steps < config.num_steps
            rows.append(
                {
                    "task": k,
                    "edit": name,
                    "gap_before": before - lowest,
                    "gap_after": reached - lowest,
                    "edit_seconds": edit.run_seconds,
                    "steps": steps,
                    "reached": enough,
                    "training_seconds": steps * per_step,
                    "ratio": steps * per_step / edit.run_seconds,
                }
            )
    headers = ("edit", "gap before", "gap after", "edit s", "Adam steps to the same", "their s", "ratio")
    cells = []
    for name in edits:
        own = [row for row in rows if row["edit"] == name]
        middle = {key: float(np.median([row[key] for row in own])) for key in own[0] if key not in ("edit", "reached")}
        least = "" if all(row["reached"] for row in own) else "≥ "
        cells.append(
            [name, middle["gap_before"], middle["gap_after"], middle["edit_seconds"],
             f"{least}{middle['steps']:.0f}", middle["training_seconds"], f"{least}{middle['ratio']:.1f}"]
        )  # fmt: skip
    note = (
        f"Medians over {config.num_removed} tasks removed one at a time. Gap: F without the task, above the lowest "
        f"that {config.polish} Newton steps reach. Adam starts from the same λ, full batch; of the learning rates "
        f"{', '.join(f'{rate:g}' for rate in config.learning_rates)} the one that gets there first counts, at most "
        f"{config.num_steps} steps. The edits' solves stop at relative residual {config.tol:g}. "
        f"Gradient norm before: {float(start.info.outer_gradient_norm[-1]):.1e}."
    )
    return Result(rows, {"Removal of one task": (headers, cells)}, picture(config, curves, rows), [note])


def _first(losses: np.ndarray, value: float) -> int:
    """The first step at which the objective is as low as `value`; the number of steps if it never is."""
    below = np.flatnonzero(losses <= value)
    return int(below[0]) if len(below) else len(losses)


def picture(config: SpeedConfig, curves: list[np.ndarray], rows: list[dict[str, Any]]) -> Figure:
    """The gap against Adam's steps, with the level that the edits reach."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(np.median(np.stack(curves), axis=0), color="#1b1b1b", label="Adam, best learning rate at each step")
    for name, color in zip(dict.fromkeys(row["edit"] for row in rows), ("#e08e1b", "#2a6fb0"), strict=False):
        gap = np.median([row["gap_after"] for row in rows if row["edit"] == name])
        ax.axhline(gap, color=color, label=f"edit: {name}")
    ax.set(yscale="log", xlabel="training steps from λ", ylabel="gap of the objective", title=config.title)
    ax.legend(frameon=False)
    clean(ax)
    return figure
