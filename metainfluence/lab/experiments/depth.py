"""Accuracy and time against the number of Hessian products: Neumann's depth J, compared with conjugate gradients."""

import dataclasses
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.curvature import exact
from metainfluence.evaluation import roc_auc
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.measures import relative_error, spearman
from metainfluence.lab.experiments.ranges import Count
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.experiments.setting import SettingConfig, make
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.show.plots import error_against_products
from metainfluence.response import expand


@dataclasses.dataclass(frozen=True)
class DepthConfig:
    """Compares the scores after each step of an iterative solver with the converged ones."""

    title: str = "Depth of the series"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage, learner and training."""
    steps: Count = 200
    """J: terms of the series, or steps of the other solvers."""
    shown: tuple[Count, ...] = (1, 2, 5, 10, 20, 50, 100, 200)
    """Numbers of steps to show in the table."""


def run(config: DepthConfig) -> Result:
    """Traces each solver's scores step by step.

    Raises:
      ValueError: whatever `setting.make` refuses.
    """
    setting = make(config.setting)
    tasks = setting.tasks
    weights = mi.unit_weights(tasks.training)
    damping = by.chosen_damping(setting).value
    expansion = Compiled(expand(setting.problem, exact(), None))(setting.trained, tasks.training, weights)
    slope = jax.jit(jax.grad(setting.target))(setting.trained, tasks.held_out)
    operator = expansion.operator.damped(damping)

    def converged(operator: mi.Operator, slope: Any, expansion: Any) -> tuple[Any, mi.SolveInfo]:
        solver = mi.solvers.minres(tol=1e-10)
        solution, info = solver.solve(operator, solver.init(operator), slope)
        return expansion.mixed_transposed(solution).task, info

    exactly, info = Compiled(converged)(operator, slope, expansion)
    product = Compiled(lambda operator, vector: operator.matvec(vector))
    product(operator, slope)
    product(operator, slope)
    damaged = by.level_harm(setting, "task")
    solvers = {
        "Neumann": mi.solvers.neumann(config.steps),
        "CG": mi.solvers.cg(tol=1e-12, max_steps=config.steps),
        "MINRES": mi.solvers.minres(tol=1e-12, max_steps=config.steps),
    }
    rows: list[dict[str, Any]] = []
    for name, solver in solvers.items():

        def trace(operator: mi.Operator, slope: Any, expansion: Any, solver: mi.Solver = solver) -> mi.solvers.Trace:
            measure = lambda solution: expansion.mixed_transposed(solution).task  # noqa: E731
            return mi.solvers.anytime(solver, config.steps, measure=measure)(operator, slope)

        found = Compiled(trace)(operator, slope, expansion)
        for step in range(config.steps):
            scores = np.asarray(found.measured[step])
            row: dict[str, Any] = {"solver": name, "step": step + 1, "products": int(found.num_matvecs[step])}
            row |= {"residual": float(found.relative_residual[step]), "spearman": spearman(scores, np.asarray(exactly))}
            row |= {"error": relative_error(scores, np.asarray(exactly))}
            row |= {"seconds": row["products"] * product.run_seconds}
            row |= {"auc": roc_auc(scores, damaged)} if damaged.any() and np.all(np.isfinite(scores)) else {}
            rows.append(row)
    headers = ("solver", "steps", "products", "residual", "scores' error", "Spearman", "ROC AUC", "s")
    cells = [
        [row["solver"], row["step"], row["products"], row["residual"], row["error"], row["spearman"],
         row.get("auc", float("nan")), row["seconds"]]
        for row in rows if row["step"] in config.shown
    ]  # fmt: skip
    note = (
        f"Against scores at a residual of {float(info.relative_residual):.0e}; damping {float(damping):.2g}, by "
        "mi.damping.auto. Seconds: products times that of one. Neumann's scale takes 20 of its products."
    )
    return Result(rows, {"Steps": (headers, cells)}, picture(config, rows), [note])


def picture(config: DepthConfig, rows: list[dict[str, Any]]) -> Figure:
    """Error and rank correlation against products."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(config.title)
    error, ranks = figure.subplots(1, 2)
    curves: dict[str, dict[str, Any]] = {"error": {}, "spearman": {}}
    for name in dict.fromkeys(row["solver"] for row in rows):
        own = [row for row in rows if row["solver"] == name]
        for key, by_solver in curves.items():
            by_solver[name] = ([row["products"] for row in own], [row[key] for row in own])
    error_against_products(curves["error"], ax=error).set(title="Scores' error")
    error_against_products(curves["spearman"], ax=ranks).set(
        yscale="linear", ylabel="Spearman", title="Ranking of the tasks"
    )
    return figure
