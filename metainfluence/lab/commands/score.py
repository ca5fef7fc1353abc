"""`metainfluence score`: scores all tasks and examples; called again, it continues where it stopped."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import metainfluence as mi
from metainfluence._disk import of_arrays
from metainfluence.lab.commands import _estimators as estimators
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands.job import Job, aimed, tolerance
from metainfluence.lab.experiments import results
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFile, Positive
from metainfluence.lab.show.printing import OF_SCORE, check_solve, facts, say, say_budget, say_table
from metainfluence.scoring import ids_of

SCORES = "scores.parquet"
OF_OPTIMUM = ("solver", "tol", "max_steps", "curvature", "damping", "batch_size", "on_error")
MOST_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Predict the target without each task and each example, by one solve or one sweep; resumable."""

    run: Path | None = None
    """Folder that `metainfluence train` wrote."""
    problem: str | None = None
    """Instead of a run: your own MODULE:FUNCTION, which returns a dict with problem, meta_params, source, target_args
    and optionally target, test, metric, metric_name, images."""
    out: OutFile | None = None
    """Score file; by default scores.parquet in the run's folder or, with --problem, in the current folder."""
    by: Literal["auto", "trajectory", "segments", "optimum"] = "auto"
    """Which estimator: the derivative of the training run, its checkpoints, or the optimum; auto follows the rule of
    metainfluence.choose, and says which one it takes and why. The options from solver to on_error apply to optimum
    only."""
    smoothness: bool = True
    """Let the rule train eight more times, to measure whether the run's derivative predicts removals."""
    solver: Literal["cg", "minres", "auto"] = "cg"
    """minres is for a total Hessian that the damping leaves indefinite. auto is the default of the Python functions: it
    diagonalises the matrix up to 200 meta-parameters, and continues with |H| if H is indefinite."""
    tol: Positive | None = None
    """Relative residual to reach; by default 1e-6 in float64, 1e-4 in float32 (rounding leaves about 1e-5), and 2e-2 in
    half precision."""
    max_steps: Count | None = None
    """Steps of cg or minres; by default their own limit."""
    curvature: Literal["exact", "linearized", "gamma", "gauss_newton", "direct"] = "exact"
    """Which second-order operator to use."""
    damping: NotNegative | Literal["auto"] = "auto"
    """Added to every eigenvalue of the total Hessian; auto follows the rule of metainfluence.damping.auto."""
    batch_size: Count | None = None
    """Tasks at a time; by default as many as fit in memory."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a task that cannot be read."""
    resume: bool = True
    """Continue from what an earlier call left; otherwise start again."""


def run(config: ScoreConfig) -> None:
    """Scores, writes the file and prints the most harmful tasks.

    Raises:
      SolveError: the solve failed; the file is written and says so.
      PrecisionError: half precision changes the ranking of a few tasks' scores.
    """
    job = aimed(runs.load(config.run, config.problem))
    target = job.phi()
    out = config.out or (config.run or Path()) / SCORES
    there = out.exists() and config.resume
    if not there:
        probe(config, job, target)
    choice = chosen(config, job, out)
    if there:
        refuse_others(out, choice)
    say(f"By {choice.told}")
    told = {"run": origin(config, job)}
    if choice.name != estimators.OPTIMUM:
        found, there = estimators.score(job, choice, out, config.resume, told)
        tell(found, job, config, out, there, [str(each) for each in ids_of(job.source)])
        return
    found = mi.scoring.score(
        job.problem,
        target,
        job.meta_params,
        job.source,
        *job.target_args,
        out=out,
        solver=solver(config, job),
        curvature=curvature(config),
        damping=config.damping,
        batch_size=config.batch_size,
        on_error=config.on_error,
        resume=config.resume,
        metadata=told,
    )
    given: Any = found
    scores = mi.Scores(given.task, given.support, given.query, found.info)
    tell(scores, job, config, out, there, [str(each) for each in found.ids], list(found.skipped.values()))


def probe(config: ScoreConfig, job: Job, target: Any) -> None:
    """If the job computes in half precision, compares scores of a few tasks with those in full precision.

    Raises:
      PrecisionError: the ranking changes.
    """
    if job.full is None:
        return
    options: dict[str, Any] = {"damping": config.damping, "curvature": curvature(config), "solver": solver(config, job)}
    found = mi.mixed.probe(job.problem, job.full, target, **options)(job.meta_params, job.source, *job.target_args)
    say(
        f"Half precision: rank correlation {found.rank_correlation:.5f} with full precision, of {found.num_scores} "
        f"scores of a few tasks; relative error {found.error:.1e}"
    )


def refuse_others(out: Path, choice: estimators.Choice) -> None:
    """Raises ValueError if the existing file is by another estimator."""
    by = written_by(out).name
    if by != choice.name:
        raise ValueError(
            f"out: expected a new file or one of this run, got {out}, which differs in estimator: this run has "
            f"{choice.name!r}, that one {by!r}; --no-resume starts anew"
        )


def written_by(out: Path) -> estimators.Choice:
    """The estimator of a score file, and why it was chosen."""
    said = mi.read_scores(out).metadata.get("estimator")
    name, _, reason = (said if isinstance(said, str) else "optimum: as in the file that is there").partition(": ")
    return estimators.Choice(name, reason)


def chosen(config: ScoreConfig, job: Job, out: Path) -> estimators.Choice:
    """The estimator: the one that is asked for, that of an existing file, or the rule's."""
    asked = [name for name in OF_OPTIMUM if getattr(config, name) != getattr(ScoreConfig(), name)]
    option = f"--{asked[0].replace('_', '-')}" if asked else ""
    if config.by == estimators.AUTO and not option and config.resume and out.exists():
        return written_by(out)
    return estimators.chosen(job, config.by, option, config.smoothness)


def tell(
    scores: Any, job: Job, config: ScoreConfig, out: Path, there: bool, ids: Sequence[str], skipped: Sequence[str] = ()
) -> None:
    """Prints the most harmful tasks, what the scores rest on, and the next step.

    Raises:
      SolveError: what they rest on failed.
    """
    task = np.asarray(scores.task)
    say_table(("task", "score"), [(ids[k], f"{task[k]:+.3e}") for k in order(task)[:MOST_SHOWN]])
    harmful = "a score is the predicted change of the target on removal: negative harms"
    say(f"The most harmful of {len(ids)} tasks; {harmful}")
    for each in skipped:
        say(f"Left out: {each}")
    say_table(("", "", ""), facts(scores.info))
    # The scores themselves are passed, since some errors show only in them.
    say_budget(scores, job.meta_params, OF_SCORE, own=config.run is None)
    own = ["--problem", str(config.problem)] if config.run is None else ["--run", str(config.run)]
    own = [] if config.run is not None and config.run == out.parent else own
    following = shlex.join(["metainfluence", "edit", str(out), *own, "--most-harmful", "K"])
    told = f"{'Already in' if there else 'Wrote'} {out}"
    try:
        check_solve(scores, OF_SCORE)
    except mi.SolveError:
        # The next step is the cure, which the error names.
        say(told)
        raise
    say(f"{told}; next: {following}")


def order(scores: np.ndarray) -> np.ndarray:
    """Positions from the most harmful to the most helpful."""
    return np.argsort(scores, kind="stable")


def solver(config: ScoreConfig, job: Job) -> mi.Solver:
    """The solver that the options select.

    Raises:
      ConfigError: a number of steps for a solver that takes none.
    """
    options: dict[str, Any] = {"tol": tolerance(job.meta_params, job.full) if config.tol is None else config.tol}
    if config.max_steps is not None:
        if config.solver == "auto":
            raise ConfigError(f"--max-steps: expected --solver cg or minres with it, got {config.solver}")
        options["max_steps"] = config.max_steps
    if config.solver == "cg":
        return mi.solvers.cg(**options)
    return mi.solvers.auto(**options) if config.solver == "auto" else mi.solvers.minres(**options)


def curvature(config: ScoreConfig) -> mi.curvature.Curvature:
    """The curvature that the options select."""
    chosen: mi.curvature.Curvature = getattr(mi.curvature, config.curvature)()
    return chosen


def origin(config: ScoreConfig, job: Job) -> dict[str, Any]:
    """What the score file says about its origin, for readers; nothing is ever run because of it."""
    trained = {} if config.run is None else {"training": results.plain(runs.read(config.run))}
    given = ["--problem", config.problem or ""] if config.run is None else [str(config.run)]
    return {
        "command": shlex.join(["metainfluence", "score", *given]),
        "score": results.plain(config),
        **trained,
        "machine": results.machine(),
        "meta_params": of_arrays(job.meta_params),
    }


def plan(config: ScoreConfig) -> mi.Plan:
    """What this will cost."""
    job = runs.load(config.run, config.problem)
    return mi.preflight(job.problem, curvature=curvature(config), batch_size=config.batch_size)(
        job.meta_params, job.source
    )
