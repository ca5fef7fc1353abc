"""`metainfluence edit`: removes some data from the meta-parameters without retraining."""

import dataclasses
import functools
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

import metainfluence as mi
from metainfluence._chunks import Chunks
from metainfluence._disk import of_arrays, write_atomically
from metainfluence.lab.commands import _parameters as parameters
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import _tables as tables
from metainfluence.lab.commands.job import Job, aimed, tolerance
from metainfluence.lab.data.places import Place, example_ids, locator, named, without
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, NotNegative, Number, OutFolder, Size
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.show.printing import OF_EDIT, check_solve, facts, say, say_budget, say_table
from metainfluence.response import gradient_map
from metainfluence.scoring import ids_of

EDITED, CHANGE = "edited.npz", "edited.json"
MOST_SHOWN = 20
RAISED = (
    "WARNING: ‖D_λF‖ rose: the edited meta-parameters are further from stationary than the unedited ones, by more than "
    "first order explains; do not trust this edit: raise --damping, remove less, or train on before scoring"
)


@dataclasses.dataclass(frozen=True)
class EditConfig:
    """Remove harmful data from the meta-parameters by influence and Newton steps, without retraining."""

    scores: Path | None = None
    """Score file written by `metainfluence score`; not with --remove."""
    run: Path | None = None
    """Folder that `metainfluence train` wrote; by default the one that holds the score file."""
    problem: str | None = None
    """Instead of a run: MODULE:FUNCTION, as for `metainfluence score`."""
    role: Literal["task", "support", "query"] = "task"
    """What to remove: tasks, or examples of the support or query side."""
    most_harmful: Count | None = None
    """Remove this many, those with the most negative scores."""
    harm_above: Number | None = None
    """Remove all whose removal is predicted to lower the target by more than this."""
    remove: tuple[str, ...] = ()
    """Remove these: ids of tasks, or TASK:EXAMPLE."""
    num_newton_steps: Size = 0
    """Newton steps after the first-order step; each needs a damped Hessian that is positive definite where the step
    starts. The default here is none, so that the change is what the scores predict; metainfluence.edit in Python takes
    1."""
    damping: NotNegative | Literal["auto"] = "auto"
    """Added to every eigenvalue of the total Hessian; auto, the default here, takes the score file's damping or, with
    --remove, follows the rule; metainfluence.edit in Python adds 0 by default."""
    batch_size: Count | None = None
    """Tasks at a time; by default as many as fit in memory."""
    out: OutFolder | None = None
    """Folder for edited.npz and edited.json; by default the run's or, without a run, the score file's."""


def located(scores: Path | None, run: Path | None, problem: str | None) -> Path | None:
    """The folder that `train` wrote: the one that is named, else the folder of the score file."""
    beside = scores is not None and (scores.parent / runs.CONFIG).exists()
    return scores.parent if run is None and problem is None and beside and scores is not None else run


def run(config: EditConfig) -> None:
    """Edits, writes both files and prints what changed.

    Raises:
      ConfigError: what to remove is not specified in exactly one way.
      ValueError: scores of other meta-parameters, or of data that the source does not hold; nothing to remove.
      SolveError: a solve failed; nothing is written.
    """
    check(config)
    if config.scores is not None:
        table = tables.read(config.scores)
    folder = located(config.scores, config.run, config.problem)
    job = aimed(runs.load(folder, config.problem))
    phi = job.phi()
    predicted: float | None = None
    damping: Any = config.damping
    if config.scores is None:
        chosen = named(job.source, config.remove, config.role)
    else:
        chosen, predicted = harmful(config, job, table)
        if damping == "auto":
            damping = table.metadata["solve"].get("damping", "auto")
    if not chosen:
        raise ValueError(f"remove: expected something to remove, got no {config.role} that is that harmful")
    tasks = job.stacked()
    edit = Compiled(
        mi.edit(
            job.problem,
            # Each of its few solves is at another λ. A preconditioner would take longer to compile than it saves.
            solver=mi.solvers.block_cg(tol=tolerance(job.meta_params, job.full)),
            damping=damping,
            batch_size=config.batch_size,
            num_newton_steps=config.num_newton_steps,
        )
    )
    weights = without(tasks, chosen)
    edited = edit(job.meta_params, tasks, weights)
    check_solve(edited, OF_EDIT)
    gradient = Compiled(
        functools.partial(gradient_map(job.problem, Chunks(config.batch_size, keep=False)), mi.curvature.exact())
    )
    with_all, unedited = (
        float(optax.tree.norm(gradient(job.meta_params, tasks, job.meta_params, each)[0]))
        for each in (mi.unit_weights(tasks), weights)
    )
    target = Compiled(phi)
    before, after = (float(target(at, *job.target_args)) for at in (job.meta_params, edited.meta_params))
    step = optax.tree.norm(optax.tree.sub(edited.meta_params, job.meta_params)) / optax.tree.norm(job.meta_params)
    out = config.out or folder or (config.scores.parent if config.scores is not None else Path())
    norms = np.asarray(edited.info.outer_gradient_norm)
    reached = len(norms) - 1
    change = {
        "removed": labels(job, chosen),
        "role": config.role,
        "target before": before,
        "target after": after,
        "change predicted by the scores": predicted,
        "relative change of the meta-parameters": float(step),
        "gradient norm with all data": with_all,
        "gradient norm before": unedited,
        "gradient norm after each step": norms.tolist(),
        "step lengths": np.asarray(edited.step_lengths).tolist(),
        "meta_params": of_arrays(job.meta_params),
        "edited": of_arrays(edited.meta_params),
    }
    parameters.save(out / EDITED, edited.meta_params)
    write_atomically(out / CHANGE, json.dumps(change, indent=1, ensure_ascii=False).encode(errors="replace"))
    tell(change)
    kept = jax.tree.map(lambda leaf: leaf[reached], edited.info)
    say_table(("", "", ""), facts(kept))
    say_budget(kept, edited.meta_params, OF_EDIT, own=folder is None)
    # A quadratic F cannot leave more: each component of D_λF ends between its values with all data and without the
    # removed data.
    if norms[reached] > math.hypot(with_all, unedited):
        say(RAISED)
    where = ["--problem", str(config.problem)] if folder is None else [str(folder)]
    where += ["--edited", str(out / EDITED), *([] if config.scores is None else ["--scores", str(config.scores)])]
    following = shlex.join(["metainfluence", "evaluate", *where])
    say(f"Wrote {out / EDITED} and {out / CHANGE}; next: {following}")


def tell(change: dict[str, Any]) -> None:
    """Prints what changed."""
    removed: Sequence[str] = change["removed"]
    shown = ", ".join(removed[:MOST_SHOWN]) + (
        f" and {len(removed) - MOST_SHOWN} more" if len(removed) > MOST_SHOWN else ""
    )
    say(f"Removed {len(removed)} ({change['role']}): {shown}")
    before, after, predicted = (
        change[key] for key in ("target before", "target after", "change predicted by the scores")
    )
    say(
        f"Target: {before:.5f} before, {after:.5f} after: {after - before:+.5f}"
        + ("" if predicted is None else f"; {predicted:+.5f} predicted by the scores, to first order")
    )
    say(f"Meta-parameters changed by {change['relative change of the meta-parameters']:.2%} of their norm")
    say(
        f"‖D_λF‖: {change['gradient norm with all data']:.1e} with all data; without the removed "
        f"{change['gradient norm before']:.1e} before the edit and "
        f"{', '.join(f'{each:.1e}' for each in change['gradient norm after each step'])} after"
        + (
            f"; parts of the steps taken: {', '.join(f'{each:g}' for each in change['step lengths'])}"
            if len(change["gradient norm after each step"]) > 1
            else ""
        )
    )


def check(config: EditConfig) -> None:
    """Raises ConfigError unless what to remove is specified in exactly one way."""
    ways = {
        "--most-harmful": config.most_harmful is not None,
        "--harm-above": config.harm_above is not None,
        "--remove": bool(config.remove),
    }
    given = [name for name, is_given in ways.items() if is_given]
    if len(given) != 1:
        raise ConfigError(f"expected one of {', '.join(ways)}, got {' and '.join(given) or 'none'}")
    if bool(config.remove) == (config.scores is not None):
        raise ConfigError(
            f"{given[0]}: expected {'no score file with it' if config.remove else 'a score file'}, got {config.scores}"
        )
    if config.most_harmful is not None and config.most_harmful < 1:
        raise ConfigError(f"--most-harmful: expected a positive number, got {config.most_harmful}")


def harmful(config: EditConfig, job: Job, table: mi.scoring.ScoreTable) -> tuple[list[Place], float]:
    """The data to remove according to the scores, and the change of the target that the scores predict.

    Raises:
      ValueError: scores of other meta-parameters, or too few rows.
    """
    assert config.scores is not None
    tables.refuse_others(table, config.scores, job.meta_params)
    rows = np.flatnonzero(table.role == config.role)
    rows = rows[np.argsort(table.score[rows], kind="stable")]
    if config.most_harmful is not None and config.most_harmful >= len(rows):
        raise ValueError(
            f"--most-harmful: expected fewer than the {len(rows)} rows about a {config.role}, got {config.most_harmful}"
        )
    if config.harm_above is not None:
        rows = rows[table.score[rows] < -config.harm_above]
    rows = rows[: config.most_harmful]
    place = locator(job.source, table)
    return [place(row) for row in rows.tolist()], float(np.sum(table.score[rows]))


def labels(job: Job, chosen: Sequence[Place]) -> list[str]:
    """The ids of the removed data."""
    ids = ids_of(job.source)
    found = []
    for place in chosen:
        name = str(ids[place.task])
        if place.side is not None and place.example is not None:
            name += f":{example_ids(job.source, place.task, place.side)[place.example]}"
        found.append(name)
    return found


def plan(config: EditConfig) -> mi.Plan:
    """What this will cost: each step is a solve."""
    check(config)
    job = runs.load(located(config.scores, config.run, config.problem), config.problem)
    return mi.preflight(job.problem, batch_size=config.batch_size)(job.meta_params, job.source)
