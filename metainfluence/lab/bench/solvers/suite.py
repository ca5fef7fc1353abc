"""Solvers, curvatures and dampings measured against exact answers, in one run."""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from metainfluence.lab.bench.solvers import grid, problems, setup, tables, targets
from metainfluence.lab.bench.solvers.measure import CURVATURES, SOLVERS
from metainfluence.lab.experiments import inner_solvers
from metainfluence.lab.experiments.demo import DemoConfig

TABLES = ("grid", "budgets", "removals", "inner", "targets")


@dataclasses.dataclass(frozen=True)
class SolverBenchConfig:
    """Solvers × curvatures on three problems on digits, inner solvers, and the solvers' targets; in float64."""

    tables: tuple[str, ...] = TABLES
    """What to measure: of grid, budgets, removals, inner, targets."""
    problems: tuple[str, ...] = ("anil", "imaml", "maml")
    """Of anil (implicit head), imaml (whole network, proximal), maml (whole network, unrolled)."""
    curvatures: tuple[str, ...] = tuple(CURVATURES)
    """Of exact, linearized, gamma, gauss_newton, direct."""
    solvers: tuple[str, ...] = tuple(SOLVERS)
    """In the grid; names as in the table."""
    tol: float = 1e-6
    """Relative residual at which solves stop."""
    rank: int = 50
    """Of nystrom and lanczos."""
    num_terms: int = 50
    """Of the Neumann series."""
    budgets: tuple[int, ...] = (5, 10, 20, 40, 80)
    """Steps at which accuracy is measured."""
    damping_share: float = 0.01
    """The grid's damping as a share of the exact Hessian's largest eigenvalue; more where H needs it."""
    damping_shares: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Dampings of the removal steps, as shares of the exact Hessian's largest eigenvalue."""
    repeats: int = 3
    """Timed runs; the median is reported."""
    num_tasks: int = 64
    """Tasks of the grid's problems."""
    num_flipped: int = 8
    """Of these, with flipped query labels; they are what is removed."""
    ways: int = 5
    """Classes per task."""
    shots: int = 2
    """Support examples per class."""
    queries: int = 5
    """Query examples per class."""
    anil_widths: tuple[int, ...] = (6, 6)
    """Layers of anil's feature extractor."""
    head_l2: float = 0.1
    """Penalty of anil's head."""
    hidden: int = 4
    """Hidden units of imaml's and maml's network."""
    proximal: float = 1.0
    """Weight of imaml's proximal term."""
    inner_learning_rate: float = 0.1
    """Of maml's gradient steps."""
    inner_steps: int = 5
    """maml's gradient steps."""
    meta_l2: float = 1e-3
    """Penalty of the meta-parameters."""
    learning_rate: float = 0.02
    """Adam's in meta-training, falling to 0 along a cosine."""
    num_steps: int = 100
    """Meta-training steps."""
    conditions: tuple[float, ...] = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
    """Condition numbers of the inner problems."""
    together: tuple[str, ...] = ("anil",)
    """Of the problems, those on which task-IF of all tasks is solved."""
    inner_damping: float = 0.1
    """Of task-IF on these."""
    digits: DemoConfig = dataclasses.field(default_factory=DemoConfig)
    """The demo at whose meta-parameters the targets are measured."""
    large_widths: tuple[int, ...] = (120, 48)
    """Feature extractor of the problem with many meta-parameters, on 28 × 28 pixels."""
    large_num_tasks: int = 64
    """Its tasks."""
    large_steps: int = 150
    """Its meta-training steps."""
    large_learning_rate: float = 0.002
    """Adam's there."""
    large_tol: float = 1e-3
    """Relative residual of its timed solve."""
    seed: int = 0
    """Of tasks and initial parameters."""
    out: Path = Path("bench-output")
    """Folder for solvers.md and solvers.json."""


def check(config: SolverBenchConfig) -> None:
    """Raises ValueError for names that there are not."""
    known = {
        "tables": TABLES,
        "problems": problems.PROBLEMS,
        "curvatures": CURVATURES,
        "solvers": SOLVERS,
        "together": problems.PROBLEMS,
    }
    for field, allowed in known.items():
        for name in getattr(config, field):
            if name not in allowed:
                raise ValueError(f"{field}: expected some of {', '.join(allowed)}; got {name!r}")


def run(config: SolverBenchConfig) -> None:
    """Measure, print each table as soon as it is there, and write them all.

    Raises:
      ValueError: a table, problem, curvature or solver that there is not.
    """
    check(config)
    jax.config.update("jax_enable_x64", True)
    started = time.perf_counter()
    config.out.mkdir(parents=True, exist_ok=True)
    plain = Console(highlight=False)
    console = plain if plain.is_terminal else Console(highlight=False, width=160)
    device = jax.devices()[0]
    heading = (
        f"`metainfluence bench`, suite solvers: {os.cpu_count()} cores, {device.platform} ({device.device_kind}), "
        f"jax {jax.__version__}, float64"
    )
    console.print(heading)
    found: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, rows: list[dict[str, Any]]) -> None:
        found.setdefault(name, []).extend(rows)
        # Written as it comes, so that a run that is stopped leaves what it has measured.
        record = {"heading": heading, "seconds": time.perf_counter() - started, "rows": found}
        record["config"] = dataclasses.asdict(config)
        (config.out / "solvers.json").write_text(json.dumps(record, indent=1, default=str))
        console.print(f"{name}: {len(rows)} rows more, {time.perf_counter() - started:.0f} s", style="dim")

    for name in config.problems:
        if not {"grid", "budgets", "removals", "targets"} & set(config.tables):
            break
        measured = setup.measure(config, name, problems.small(config, name))
        add("problems", [grid.facts(measured)])
        if "grid" in config.tables:
            add("grid", list(grid.cells(config, measured)))
        if "budgets" in config.tables:
            add("budgets", list(grid.budgets(config, measured)))
        if "removals" in config.tables:
            add("removals", list(grid.removals(config, measured)))
        if "targets" in config.tables and name in config.together:
            add("together", grid.together(config, measured))
    if "inner" in config.tables:
        add("inner", list(inner_solvers.rows(config.conditions, damping=config.inner_damping)))
    if "targets" in config.tables:
        rows, bars = targets.at_the_demo(config)
        add("demo", rows)
        rows, more = targets.with_many_meta_parameters(config)
        add("large", rows)
        add("targets", bars + more + targets.all_tasks_together(found.get("together", [])))

    seconds = time.perf_counter() - started
    shown = tables.all_of(config, found)
    for table in shown:
        table.print(console)
    text = "\n\n".join([f"{heading}; {seconds:.0f} s in all", *(table.markdown() for table in shown)])
    (config.out / "solvers.md").write_text(text + "\n")
    console.print(f"\nWrote {config.out / 'solvers.md'} and {config.out / 'solvers.json'}; {seconds:.0f} s in all")
