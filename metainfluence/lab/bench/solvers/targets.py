"""The solvers' targets, each bar with the measured number."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence import damping
from metainfluence.curvature import exact
from metainfluence.lab.bench.solvers import problems
from metainfluence.lab.bench.solvers.measure import NO_LIMIT, Program, solver_program, status_name
from metainfluence.lab.bench.solvers.options import SolverBenchConfig
from metainfluence.lab.experiments.measures import spearman
from metainfluence.response import expand, rule

DEMO_SOLVERS = ("cg", "cg + sampled", "block_cg", "auto")
LOOSE_SOLVERS = ("cg", "auto")
SHARES = (None, 0.01, 0.03)  # of the largest eigenvalue; None: what damping="auto" chooses
PRODUCTS_SHARE, RANKING, LOOSE_TOL, EPOCHS, LARGE_RANKING, TOGETHER_SHARE = 0.5, 0.999, 1e-3, 40.0, 0.99, 0.25
Row = dict[str, Any]


def target(name: str, what: str, value: float, bar: float, *, at_most: bool, sound: bool = True) -> Row:
    """One bar; it counts as not met if a solve that it rests on did not converge."""
    met = sound and (value <= bar if at_most else value >= bar)
    return {
        "target": name,
        "what": what,
        "value": value,
        "bar": f"{'≤' if at_most else '≥'} {bar:g}",
        "met": "met" if met else "missed" if sound else "missed: a solve did not converge",
    }


def at_the_demo(config: SolverBenchConfig) -> tuple[list[Row], list[Row]]:
    """Products and rankings at the demo's λ: the solves, and targets (a) and (b)."""
    setting = problems.of_demo(config.digits)
    point = (setting.meta_params, setting.tasks, mi.unit_weights(setting.tasks))
    program = Program(expand(setting.problem, exact(), None), *point)
    expansion = program(*point)
    chooser = Program(rule, expansion.operator, expansion.gradient, setting.meta_params)
    chosen = chooser(expansion.operator, expansion.gradient, setting.meta_params)
    slope = jax.jit(jax.grad(mi.query_loss(setting.problem)))(setting.meta_params, setting.held_out)
    scores = Program(lambda expansion, solution: expansion.mixed_transposed(solution).task, expansion, slope)
    programs = {name: solver_program(config, name, expansion.operator, slope) for name in DEMO_SOLVERS}

    rows: list[Row] = []
    targets: list[Row] = []
    for share in SHARES:
        value = float(chosen.value) if share is None else share * float(chosen.largest)
        operator = expansion.operator.damped(value)

        def solve(name, tol, operator=operator):
            return programs[name](operator, slope, jnp.asarray(tol), jnp.int32(NO_LIMIT))

        solution, reference = solve("auto", 1e-10)
        exactly = np.asarray(scores(expansion, solution))
        label = "auto" if share is None else f"{share:.0%}"
        for tol in (config.solve.tol, LOOSE_TOL):
            for name in DEMO_SOLVERS if tol == config.solve.tol else LOOSE_SOLVERS:
                solution, info = solve(name, tol)
                choice = None if info.choice is None else mi.solvers.Choice(int(info.choice)).name
                rows.append(
                    {
                        "damping": label,
                        "value": value,
                        "share": value / float(chosen.largest),
                        "tol": tol,
                        "solver": name,
                        "status": status_name(info),
                        "choice": choice or "",
                        "products": int(info.num_matvecs),
                        "residual": float(info.relative_residual),
                        "spearman": spearman(np.asarray(scores(expansion, solution)), exactly),
                        "seconds": programs[name].seconds,
                    }
                )
        by = {(row["solver"], row["tol"]): row for row in rows if row["damping"] == label}
        plain, found = by["cg", config.solve.tol], by["auto", config.solve.tol]
        sound = plain["status"] == found["status"] == "CONVERGED"
        targets.append(
            target(
                "a",
                f"demo's λ, damping {label} ({value:.2g}): products of auto over those of cg, "
                f"residual {config.solve.tol:g} ({found['products']} / {plain['products']})",
                found["products"] / plain["products"],
                PRODUCTS_SHARE,
                at_most=True,
                sound=sound,
            )
        )
        targets.append(
            target(
                "b",
                f"demo's λ, damping {label}: Spearman of the tasks' scores at residual {LOOSE_TOL:g} (auto) with those "
                f"at {float(reference.relative_residual):.0e}",
                by["auto", LOOSE_TOL]["spearman"],
                RANKING,
                at_most=False,
                sound=status_name(reference) == "CONVERGED",
            )
        )
    return rows, targets


def with_many_meta_parameters(config: SolverBenchConfig) -> tuple[list[Row], list[Row]]:
    """Scores of everything with many meta-parameters: what was run, and target (c).

    Three runs: the defaults, which choose the damping; the default solver given that damping; and plain CG given that
    damping. The references are CG's at a residual of 1e-8.
    """
    setting, data = problems.large(config)
    problem, point = setting.problem, (setting.meta_params, setting.tasks, setting.held_out)
    gradients = Program(jax.vmap(mi.total_gradient(problem), in_axes=(None, 0)), *point[:2])
    gradients.measure(*point[:2], repeats=3 * config.repeats)
    chosen = jax.jit(damping.auto(problem))(*point[:2])

    def scores(make_solver, meta_params, tasks, held_out, tol, damping="auto"):
        score = mi.influence_scores(problem, mi.query_loss(problem), solver=make_solver(tol=tol), damping=damping)
        return score(meta_params, tasks, held_out)

    by_auto, by_cg = (functools.partial(scores, make) for make in (mi.solvers.auto, mi.solvers.cg))
    tol, given = jnp.asarray(config.large.tol), chosen.value
    plain = Program(by_cg, *point, tol, given)
    table: list[Row] = []
    targets: list[Row] = []
    for name, function, dampings in (("defaults", by_auto, ()), ("auto", by_auto, (given,)), ("cg", by_cg, (given,))):
        program = plain if function is by_cg else Program(function, *point, tol, *dampings)
        result = program.measure(*point, tol, *dampings, repeats=config.repeats)
        seconds, megabytes = program.seconds, program.megabytes
        reference = plain(*point, jnp.asarray(1e-8), result.info.damping)
        solved = status_name(result.info) == "CONVERGED"
        sound = solved and status_name(reference.info) == "CONVERGED"
        choice = result.info.choice
        row = {
            "solver": name,
            "data": data,
            "meta_parameters": sum(leaf.size for leaf in jax.tree.leaves(setting.meta_params)),
            "damping": float(result.info.damping),
            "share": float(result.info.damping / chosen.largest),
            "status": status_name(result.info),
            "choice": "" if choice is None else mi.solvers.Choice(int(choice)).name,
            "products": int(result.info.num_matvecs),
            "residual": float(result.info.relative_residual),
            "reference_residual": float(reference.info.relative_residual),
            "epoch_seconds": gradients.seconds,
            "seconds": seconds,
            "epochs": seconds / gradients.seconds,
            "spearman": spearman(np.asarray(result.task), np.asarray(reference.task)),
            "megabytes": megabytes,
        }
        what = f"{row['meta_parameters']} meta-parameters, {data}, {name}, damping {row['share']:.2%} of the largest: "
        cost = f"meta-gradient epochs for all scores at residual {row['residual']:.0e}"
        ranking = f"Spearman with the scores at residual {row['reference_residual']:.0e}"
        targets.append(target("c", what + cost, row["epochs"], EPOCHS, at_most=True, sound=solved))
        targets.append(target("c", what + ranking, row["spearman"], LARGE_RANKING, at_most=False, sound=sound))
        table.append(row)
    return table, targets


def all_tasks_together(rows: list[Row]) -> list[Row]:
    """Target (d), from the rows made by `grid.together`."""
    alone = {row["problem"]: row for row in rows if row["solver"].startswith("cg")}
    return [
        target(
            "d",
            f"{row['problem']}, task-IF of {row['tasks']} tasks: products of {row['solver']} over those of separate cg "
            f"({row['products']} / {alone[row['problem']]['products']})",
            row["products"] / alone[row["problem"]]["products"],
            TOGETHER_SHARE,
            at_most=True,
            sound=row["status"] == alone[row["problem"]]["status"] == "CONVERGED",
        )
        for row in rows
        if row is not alone[row["problem"]]
    ]
