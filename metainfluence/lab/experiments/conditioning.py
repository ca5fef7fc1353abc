"""Sensitivity to conditioning: inner solvers' errors against the inner Hessian's condition number."""

import dataclasses
from typing import Any

import jax
from matplotlib.figure import Figure

from metainfluence.lab.experiments import inner_solvers
from metainfluence.lab.experiments.ranges import Positive
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.show.plots import clean


@dataclasses.dataclass(frozen=True)
class ConditioningConfig:
    """Errors of total gradients and of task-IF against the condition number of the inner problems."""

    title: str = "Conditioning of the inner problem"
    """Heading of the results."""
    conditions: tuple[Positive, ...] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
    """Condition numbers to aim for."""


def run(config: ConditioningConfig) -> Result:
    """Measures every inner solver at every condition number."""
    jax.config.update("jax_enable_x64", True)
    rows: list[dict[str, Any]] = list(inner_solvers.rows(config.conditions))
    names = list(dict.fromkeys(row["inner_solver"] for row in rows))
    conditions = list(dict.fromkeys(row["asked"] for row in rows))
    tables, figure = {}, Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(config.title)
    kinds = {"gradient_error": "Relative error of total gradients", "task_if_error": "Relative error of task-IF"}
    for ax, (key, title) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        by = {(row["inner_solver"], row["asked"]): row[key] for row in rows}
        for name in names:
            ax.plot(conditions, [by[name, asked] for asked in conditions], marker="o", ms=3, label=name)
        ax.set(xscale="log", yscale="log", xlabel="cond(H_in)", title=title)
        clean(ax)
        tables[title] = (("cond(H_in)", *names), [[asked, *(by[n, asked] for n in names)] for asked in conditions])
    ax.legend(frameon=False, fontsize="x-small")
    return Result(rows, tables, figure)
