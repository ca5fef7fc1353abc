"""`metainfluence evaluate`: the meta-parameters before and after an edit, on tasks that nothing else has seen."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metainfluence as mi
from metainfluence._disk import of_arrays, write_atomically
from metainfluence.evaluation import bootstrap, roc_auc
from metainfluence.lab.commands import _parameters as parameters
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import _tables as tables
from metainfluence.lab.commands.edit import CHANGE, EDITED
from metainfluence.lab.commands.job import Job, widened
from metainfluence.lab.commands.score import SCORES
from metainfluence.lab.data.fewshot import CLEAN
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, OutFile
from metainfluence.lab.learn.learners import mean_interval
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.show.printing import say, say_table

EVALUATION = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy before and after an edit on held-out tasks, and how well the scores find data known to be damaged."""

    run: Path | None = None
    """Folder that `metainfluence train` wrote."""
    problem: str | None = None
    """Instead of a run: MODULE:FUNCTION, as for `metainfluence score`; it returns `test`, and may return `metric`."""
    edited: Path | None = None
    """Edited meta-parameters; by default edited.npz in the run's folder or, with --problem, in the current folder."""
    scores: Path | None = None
    """Score file of the same meta-parameters; by default scores.parquet next to the edited ones or else in the run's
    folder, if it exists."""
    batch_size: Count = 50
    """Test tasks at a time."""
    out: OutFile | None = None
    """File to write; by default evaluation.json next to the edited meta-parameters."""


def run(config: EvaluateConfig) -> None:
    """Evaluates, writes the numbers and prints them.

    Raises:
      ConfigError: a problem without test tasks.
      FileNotFoundError: there are no edited meta-parameters.
      ValueError: they were not edited from the run's or the problem's.
    """
    home = config.run or Path()
    path = config.edited or home / EDITED
    job = runs.load(config.run, config.problem)
    if job.test is None or len(job.test) < 2:
        raise ConfigError(f"{config.problem}: test: expected at least two tasks to evaluate on, got {job.test}")
    edited = parameters.load(path, job.meta_params)
    refuse_others(path, job)
    table = scores_of(config, path, job)
    before, after = per_task(job, (job.meta_params, edited), config.batch_size)
    rows = {"before": before, "after": after, "after - before": after - before}
    found: dict[str, Any] = {
        "metric": "query loss" if job.metric is None else job.metric_name,
        "test_tasks": len(before),
        "edited": of_arrays(edited),
        **{
            name: dict(zip(("mean", "half_width"), mean_interval(values), strict=True)) for name, values in rows.items()
        },
    }
    if table is not None:
        found["detection"] = detection(table)
    out = config.out or path.parent / EVALUATION
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(found, indent=1, ensure_ascii=False).encode())
    cells = [(name, f"{found[name]['mean']:+.4f} ± {found[name]['half_width']:.4f}") for name in rows]
    say_table((found["metric"], f"mean over {len(before)} test tasks, 95 % interval"), cells)
    if table is not None:
        lines = [
            (name, f"{each['damaged']} of {each['all']}", f"{each['auc']:.3f} [{each['low']:.3f}, {each['high']:.3f}]")
            for name, each in found["detection"].items()
        ]
        if lines:
            say_table(("found by the scores", "damaged", "ROC AUC, 95 % interval"), lines)
        else:
            say("The score file names no damaged data, so nothing is known to be found")
    say(f"Wrote {out}")


def scores_of(config: EvaluateConfig, edited: Path, job: Job) -> mi.scoring.ScoreTable | None:
    """The score file that is named, or the one in the expected place; None if none is about these meta-parameters.

    Raises:
      FileNotFoundError: the named file does not exist.
      ValueError: the named file is about other meta-parameters.
    """
    places = [edited.parent, *([] if config.run is None else [config.run])]
    path = config.scores or next((each / SCORES for each in places if (each / SCORES).exists()), None)
    if path is None:
        say(f"Scores: none beside {edited}; --scores FILE names them")
        return None
    table = tables.read(path)
    if config.scores is None and not tables.is_about(table, job.meta_params):
        say(f"Scores: left out {path}, which is about other meta-parameters; --scores FILE names others")
        return None
    tables.refuse_others(table, path, job.meta_params)
    say(f"Scores: {path}")
    return table


def refuse_others(edited: Path, job: Job) -> None:
    """Raises ValueError if the file next to edited meta-parameters says that they were edited from others."""
    path = edited.with_name(CHANGE)
    try:
        told = json.loads(path.read_bytes())["meta_params"] if path.exists() else None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"edited: expected {path} as `metainfluence edit` writes it, got {error}") from error
    if told is not None and told != of_arrays(job.meta_params):
        raise ValueError(
            f"edited: expected an edit of these meta-parameters, got {edited}, which {path} says is of others; "
            "edit these, or name another --edited"
        )


def per_task(job: Job, points: Sequence[Any], batch_size: int) -> np.ndarray:
    """The metric of each test task at each of several meta-parameters, [points, n]."""
    metric = jax.vmap(mi.task_loss(job.problem), (None, 0)) if job.metric is None else job.metric
    compiled = Compiled(metric)
    assert job.test is not None
    found = np.full((len(points), len(job.test)), np.nan)
    for rows, tasks in batches(job.test, batch_size):
        for point, meta_params in enumerate(points):
            values = np.asarray(compiled(meta_params, tasks))
            if values.shape != rows.shape:
                raise ValueError(f"metric: expected one number for each of {len(rows)} tasks, got shape {values.shape}")
            if lost := np.flatnonzero(~np.isfinite(values)).tolist():
                which = ("before the edit", "after the edit")[point] if len(points) == 2 else f"at point {point}"
                raise ValueError(
                    f"metric: expected finite numbers, got {values[lost[0]]} for test task {int(rows[lost[0]])} {which}"
                )
            found[point, rows] = values
    return found


def batches(tasks: Any, batch_size: int) -> Iterator[tuple[np.ndarray, mi.Task]]:
    """Batches of one size, and their positions; the last may overlap the one before, so one program does all."""
    size = min(batch_size, len(tasks))
    for start in range(0, len(tasks), size):
        rows = np.arange(size) + min(start, len(tasks) - size)
        yield rows, mi.stack_tasks([widened(tasks[k]) for k in rows.tolist()])


def detection(table: mi.scoring.ScoreTable) -> dict[str, dict[str, Any]]:
    """How well scores find the data that a file's columns `harm` and `label_flipped` call damaged, if it has any."""
    found = {}
    for role, column in (("task", "harm"), ("support", "label_flipped"), ("query", "label_flipped")):
        if column not in table.labels:
            continue
        rows = table.role == role
        values = table.labels[column][rows]
        if column == "harm":
            damaged = np.array([value not in (None, CLEAN) for value in values])
        else:
            damaged = np.ma.filled(values, False).astype(bool)
        if damaged.any() and not damaged.all():
            auc = bootstrap(roc_auc, table.score[rows], damaged)
            found[role if role == "task" else f"{role} label"] = {
                "damaged": int(damaged.sum()),
                "all": len(damaged),
                "auc": float(auc.value),
                "low": float(auc.low),
                "high": float(auc.high),
            }
    return found


def plan(config: EvaluateConfig) -> mi.Plan:
    """What scoring the same would cost; an evaluation stays far below that."""
    job = runs.load(config.run, config.problem)
    return mi.preflight(job.problem)(job.meta_params, job.source)
