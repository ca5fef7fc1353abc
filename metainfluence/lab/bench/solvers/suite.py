"""Solvers, curvatures and dampings compared with exact answers, in one run."""

import dataclasses
import json
import os
import time
from typing import Any

import jax
from rich.console import Console

from metainfluence.lab.bench.solvers import grid, problems, setup, tables, targets
from metainfluence.lab.bench.solvers.options import SolverBenchConfig, check
from metainfluence.lab.experiments import inner_solvers


def run(config: SolverBenchConfig) -> None:
    """Measure, print each table as soon as it is ready, and write them all.

    Raises:
      ValueError: an unknown table, problem, curvature or solver.
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
        # Written table by table, so that a stopped run leaves what it has measured.
        record = {"heading": heading, "seconds": time.perf_counter() - started, "rows": found}
        record["config"] = dataclasses.asdict(config)
        (config.out / "solvers.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")
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
        add("inner", list(inner_solvers.rows(config.inner.conditions, damping=config.inner.damping)))
    if "targets" in config.tables:
        rows, bars = targets.at_the_demo(config)
        add("demo", rows)
        rows, more = targets.with_many_meta_parameters(config)
        add("large", rows)
        add("targets", bars + more + targets.all_tasks_together(found.get("together", [])))

    seconds = time.perf_counter() - started
    shown = tables.all_of(config, found)
    text = "\n\n".join([f"{heading}; {seconds:.0f} s in all", *(table.markdown() for table in shown)])
    (config.out / "solvers.md").write_text(text + "\n", encoding="utf-8")
    for table in shown:
        table.print(console)
    console.print(f"\nWrote {config.out / 'solvers.md'} and {config.out / 'solvers.json'}; {seconds:.0f} s in all")
