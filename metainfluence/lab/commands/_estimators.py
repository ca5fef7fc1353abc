"""Chooses which of the three responses a run is scored by, and scores by the two that use the run itself."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import metainfluence as mi
from metainfluence._disk import difference, library, of_arrays, of_function
from metainfluence.lab.commands.job import Job
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.show.printing import OF_SCORE, in_options, say
from metainfluence.response import check_target_slope

AUTO, TRAJECTORY, SEGMENTS, OPTIMUM = "auto", "trajectory", "segments", "optimum"
# Remove a quarter and all of a group, for two groups, in both directions: eight runs.
STEP_SIZES, DIRECTIONS = (0.25, 1.0), 2
# Training with a large rate moves far and takes many products; a segment stops early if fewer are enough. The remaining
# error is small compared with what segments leave out.
RANK, TOL = 128, 0.05


class Choice(NamedTuple):
    """An estimator and the reason for it.

    Attributes:
      name: "trajectory", "segments" or "optimum".
      reason: one sentence.
      smoothness: score, verdict and advice, if it was measured.
    """

    name: str
    reason: str
    smoothness: dict[str, Any] | None = None

    @property
    def told(self) -> str:
        """The choice as text for users."""
        return f"{self.name}: {self.reason}"


def chosen(job: Job, by: str, asked: str, smooth: bool) -> Choice:
    """The estimator that is asked for, or the one that `metainfluence.choose` picks.

    Args:
      job: what is scored.
      by: "auto", or one of the three.
      asked: a given option that only the optimum's solve has; "" if there is none.
      smooth: whether smoothness may be measured, at the cost of eight runs.

    Raises:
      ConfigError: an estimator for which the job has no run or no checkpoints; an option that it does not have.
    """
    if by != AUTO:
        check(job, by, asked)
        return Choice(by, f"as --by {by} asks for")
    if asked:
        return Choice(OPTIMUM, f"{asked} is of the optimum's solve, and the other estimators solve nothing")
    norm = None
    if job.run is not None:
        say("Which estimator: measuring how stationary λ is")
        norm = stationarity(job)
    known = job.checkpoints is not None
    found = mi.choose(gradient_norm=norm, run=job.run is not None, checkpoints=known)
    if found.estimator != TRAJECTORY or not smooth:
        return Choice(found.estimator, in_options(found.reason, OF_SCORE))
    say("Which estimator: training eight times, to measure how smoothly the run answers the data")
    measured: Any = mi.smoothness(
        job.run, step_sizes=STEP_SIZES, num_directions=DIRECTIONS, parts=False, runs_at_once=4
    )(job.start, job.stacked())
    facts = {"score": float(measured.score), "verdict": measured.verdict, "advice": measured.advice}
    found = mi.choose(gradient_norm=norm, smoothness=measured, run=True, checkpoints=known)
    if found.estimator == SEGMENTS and not known:
        return Choice(TRAJECTORY, f"{found.reason}, but no checkpoints are left for segments", facts)
    return Choice(found.estimator, in_options(found.reason, OF_SCORE), facts)


def check(job: Job, by: str, asked: str) -> None:
    """Raises ConfigError if a job lacks what an estimator needs, or an option does not belong to the estimator."""
    if by == OPTIMUM:
        return
    if asked:
        raise ConfigError(f"{asked}: expected with --by optimum alone, got --by {by}")
    if by == TRAJECTORY and job.run is None:
        raise ConfigError(
            "--by trajectory: expected a run that `metainfluence train` wrote, or a problem whose function returns run "
            "and start; got neither"
        )
    if by == SEGMENTS and job.checkpoints is None:
        raise ConfigError(
            "--by segments: expected the states that `metainfluence train` keeps, or a problem whose function returns "
            "checkpoints; got none: train again into a new folder, or score --by trajectory"
        )


def stationarity(job: Job) -> float:
    """‖D_λF‖ at λ, relative to its value where the training started."""
    objective = mi.total_objective(job.problem)
    norm = jax.jit(lambda m, tasks: optax.tree.norm(jax.grad(objective)(m, tasks)))
    tasks = job.stacked()
    start = job.start if job.run.problem is not None else job.run.meta_params(job.start)
    return float(norm(job.meta_params, tasks) / norm(start, tasks))


def manifest(job: Job, choice: Choice) -> dict[str, Any]:
    """Everything that scores by a run depend on."""
    tasks = job.stacked()
    target = job.phi()
    return {
        "estimator": choice.name,
        "library": library(),
        "jax": jax.__version__,
        "meta_params": of_arrays(job.meta_params),
        "start": of_arrays(job.start),
        "run": None if job.run is None else of_function(job.run, job.start, tasks),
        "checkpoints": of_arrays(job.checkpoints),
        "target": of_function(jax.grad(target), job.meta_params, *job.target_args),
        "target_args": of_arrays(job.target_args),
        "source": of_arrays(tasks),
        "batch_size": None,
        "kept_bytes": 0,
    }


def score(job: Job, choice: Choice, out: Path, resume: bool, metadata: Mapping[str, Any]) -> tuple[Any, bool]:
    """Scores a job by its run, into a file; an existing file is read.

    Args:
      job: what is scored.
      choice: trajectory or segments.
      out: the file; while this runs, a folder next to it holds the run's states, from which a later call continues.
      resume: whether to continue from existing files; otherwise start again.
      metadata: metadata for the file.

    Returns:
      The scores, and whether they already existed.

    Raises:
      ValueError: the file holds other scores; the target's gradient is not finite.
    """
    about = manifest(job, choice)
    if out.exists() and resume:
        table = mi.read_scores(out)
        found = difference(about, table.metadata.get("manifest", {}))
        if found is not None:
            raise ValueError(
                f"out: expected a new file or one of this run, got {out}, which differs in {found}; --no-resume starts "
                "anew"
            )
        return from_file(out), True
    tasks, phi = job.stacked(), job.phi()
    # Checked before the run starts and its states are kept.
    check_target(job)
    folder = out.with_name(f"{out.name}.run")
    if choice.name == TRAJECTORY:
        at: Any = mi.trajectory(job.run, store=folder.resolve(), resume=resume)(job.start, tasks, end=job.meta_params)
    else:
        at = jax.jit(lambda known, tasks: mi.segments(job.problem, rank=RANK, tol=TOL)(known, tasks))(
            [each._replace(step=None) for each in job.checkpoints or ()], tasks
        )
    scores = mi.scores(at, phi)(*job.target_args)
    own: dict[str, Any] = {
        "estimator": choice.told,
        "smoothness": choice.smoothness,
        "score": "predicted change of the target on removal: positive helps, negative harms",
        "skipped": [],
        "manifest": about,
    }
    mi.scoring.write_scores(out, scores, tasks, source=job.source, metadata={**metadata, **own})
    shutil.rmtree(folder, ignore_errors=True)
    return scores, False


def check_target(job: Job) -> None:
    """Raises ValueError if the target's gradient at λ is not finite."""
    check_target_slope(jax.jit(jax.grad(job.phi()))(job.meta_params, *job.target_args), job.target_args)


def from_file(path: Path) -> mi.Scores:
    """Reads scores from a file, in the form that `score` returns."""
    found = mi.scoring.read_dense(path)
    info: Any = mi.scoring.info_of(mi.read_scores(path).metadata["solve"])
    task, support, query = map(jnp.asarray, (found.task, found.support, found.query))
    return mi.Scores(task, support, query, info)
