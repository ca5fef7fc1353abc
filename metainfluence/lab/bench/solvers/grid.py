"""Every solver × every curvature against the exact answer, accuracy against products, and gains of removal steps."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence.lab.bench.solvers.measure import NO_LIMIT, SOLVERS, Program, status_name
from metainfluence.lab.bench.solvers.options import SolverBenchConfig
from metainfluence.lab.bench.solvers.setup import Measured, cost, program_for
from metainfluence.lab.experiments.measures import cosine, flat, relative_error, spearman

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)
BY_STEPS = ("neumann", "cg", "cg + sampled", "minres")
BY_TOLERANCE = ("auto",)
Row = dict[str, Any]


def steps_of(config: SolverBenchConfig, solver: str) -> jax.Array:
    """The limit on a solver's steps, unless another is asked for."""
    return jnp.int32(config.solve.num_terms if solver == "neumann" else NO_LIMIT)


def cells(config: SolverBenchConfig, measured: Measured) -> Iterator[Row]:
    """Rows of the grid: for each curvature and solver one solve for the scores and one for the removal step."""
    exact_step = flat(measured.solved(measured.removal))
    exact_scores = measured.task_scores(measured.solved(measured.slope))
    tol = jnp.asarray(config.solve.tol)
    for curvature in config.curvatures:
        for solver in config.solvers:
            program, operator = program_for(config, measured, curvature, solver)
            row: Row = {"problem": measured.name, "curvature": curvature, "solver": solver}
            if isinstance(program, str):
                yield row | {"status": "not applicable", "reason": program}
                continue
            steps = steps_of(config, solver)
            step, _ = program(operator, measured.removal, tol, steps)
            solution, info = program.measure(operator, measured.slope, tol, steps, repeats=config.repeats)
            scores, step = measured.task_scores(solution), flat(step)
            seconds, megabytes = cost(measured, curvature, solver, program, int(info.num_matvecs))
            yield row | {
                "status": status_name(info),
                "products": int(info.num_matvecs),
                "residual": float(info.relative_residual),
                "step_error": relative_error(step, exact_step),
                "step_cosine": cosine(step, exact_step),
                "scores_error": relative_error(scores, exact_scores),
                "spearman": spearman(scores, exact_scores),
                "epochs": (seconds + measured.scores.seconds) / measured.epoch_seconds,
                "megabytes": megabytes,
            }


def budgets(config: SolverBenchConfig, measured: Measured) -> Iterator[Row]:
    """Rows of accuracy and time against J, from the programs that the grid has compiled for the exact curvature."""
    exact_scores = measured.task_scores(measured.solved(measured.slope))
    runs = [
        (name, jnp.asarray(1e-12), jnp.int32(steps))
        for name in BY_STEPS
        if name in config.solvers
        for steps in config.solve.budgets
    ]
    runs += [
        (name, jnp.asarray(tol), jnp.int32(NO_LIMIT))
        for name in BY_TOLERANCE
        if name in config.solvers
        for tol in TOLERANCES
    ]
    for name, tol, steps in runs:
        program, operator = program_for(config, measured, "exact", name)
        if isinstance(program, str):
            continue
        solution, info = program.measure(operator, measured.slope, tol, steps, repeats=config.repeats)
        scores = measured.task_scores(solution)
        yield {
            "problem": measured.name,
            "solver": name,
            "stop": f"tol {float(tol):.0e}" if name in BY_TOLERANCE else f"{int(steps)} steps",
            "status": status_name(info),
            "products": int(info.num_matvecs),
            "residual": float(info.relative_residual),
            "scores_error": relative_error(scores, exact_scores),
            "spearman": spearman(scores, exact_scores),
            "epochs": program.seconds / measured.epoch_seconds,
        }


def removals(config: SolverBenchConfig, measured: Measured) -> Iterator[Row]:
    """Rows of the gain of one removal step, by curvature, sign of the eigenvalues and damping, all solved exactly.

    The step to λ without the flipped tasks is judged by how much it lowers the objective without them, F(λ', w'). It
    should predict the difference between training on from λ without these tasks and training on with them.
    """
    setting, domain = measured.setting, measured.exact.operator.domain
    objective = jax.jit(mi.total_objective(setting.problem))
    rhs = np.asarray(domain.ravel(measured.removal))

    def value(meta_params: Any) -> float:
        return float(objective(meta_params, setting.tasks, setting.without))

    before = value(setting.meta_params)
    trained, largest = value(setting.trained_on) - value(setting.retrained), measured.curved["exact"].eigen.values[-1]
    truth = flat(setting.retrained) - flat(setting.trained_on)
    for curvature in config.curvatures:
        eigen = measured.curved[curvature].eigen
        for absolute in (False, True):
            for share in config.damping.removals:
                step = -eigen.solve(rhs, share * largest, absolute=absolute)
                moved = jax.tree.map(jnp.add, setting.meta_params, domain.unravel(jnp.asarray(step)))
                yield {
                    "problem": measured.name,
                    "curvature": curvature,
                    "eigenvalues": "absolute" if absolute else "as they are",
                    "damping_share": share,
                    "decrease": before - value(moved),
                    "trained_decrease": trained,
                    "cosine": cosine(step, truth),
                    "length": float(np.linalg.norm(step) / np.linalg.norm(truth)),
                }


def facts(measured: Measured) -> Row:
    """Facts about the problem."""
    values, shape = measured.curved["exact"].eigen.values, jnp.shape(measured.setting.tasks.query.labels)
    return {
        "problem": measured.name,
        "meta_parameters": len(values),
        "tasks": shape[0],
        "smallest": float(values[0]),
        "largest": float(values[-1]),
        "damping": measured.damping,
        "epoch_seconds": measured.epoch_seconds,
    }


def together(config: SolverBenchConfig, measured: Measured) -> list[Row]:
    """Products for task-IF of all tasks at one tolerance: separate CG solves, and solvers that solve all together."""
    setting, tol = measured.setting, jnp.asarray(config.solve.tol)
    operator = measured.exact.operator.damped(measured.damping)
    gradients = jax.jit(jax.vmap(mi.total_gradient(setting.problem), in_axes=(None, 0)))
    rhs = gradients(setting.meta_params, setting.tasks)

    def separate(operator, rhs, tol):
        return jax.vmap(lambda b: mi.solvers.cg(tol=tol).solve(operator, None, b)[1])(rhs)

    info = Program(separate, operator, rhs, tol)(operator, rhs, tol)
    rows = [
        {
            "solver": "cg, each alone",
            "products": int(np.sum(info.num_matvecs)),
            "residual": float(np.max(info.relative_residual)),
            "status": status_name(info),
        }
    ]
    for name in ("block_cg", "auto"):

        def jointly(operator, rhs, tol, name=name):
            solver = SOLVERS[name](config, tol, None)
            assert solver.solve_many is not None
            return solver.solve_many(operator, solver.init(operator), rhs)[1]

        info = Program(jointly, operator, rhs, tol)(operator, rhs, tol)
        rows.append(
            {
                "solver": name,
                # Products for one basis, which all right-hand sides share.
                "products": int(np.max(info.num_matvecs)),
                "residual": float(np.max(info.relative_residual)),
                "status": status_name(info),
            }
        )
    return [{"problem": measured.name, "tasks": len(info.status)} | row for row in rows]
