"""Leaving one task out of a trained few-shot learner: compares every method's prediction with training again.

Training again gives the truth that a score of a single task estimates. It is therefore the upper limit for telling
damaged tasks apart: a score that does so better than the truth answers another question.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from metainfluence.evaluation import bootstrap, loo_correlation, roc_auc
from metainfluence.lab.data.fewshot import CLEAN
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.kept import Kept
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count
from metainfluence.lab.experiments.results import Result, interval
from metainfluence.lab.experiments.setting import SINUSOID, Setting, SettingConfig, make, performance
from metainfluence.lab.show.plots import predicted_and_retrained

TRUTH = "training without it"


@dataclasses.dataclass(frozen=True)
class LeavingConfig:
    """Compares predictions with retraining, one task at a time."""

    title: str = "One task left out"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage, learner and training."""
    each: Count = 22
    """Tasks of each kind, including undamaged ones, that are left out one at a time."""
    methods: tuple[str, ...] = (
        by.TRAJECTORY, by.SEGMENTS, by.INFLUENCE, "direct-IF", "TRAK", by.TRACIN, "gradient similarity", "plain loss",
        "random",
    )  # fmt: skip
    """Methods; see metainfluence.lab.experiments.methods."""
    solves: by.SolvesConfig = dataclasses.field(default_factory=by.SolvesConfig)
    """Costs allowed for the estimators."""
    draws: Count = 1000
    """Draws of each bootstrap."""


def run(config: LeavingConfig, cache: Path | None = None) -> Result:
    """Trains, scores, and trains again without each of some tasks; finished parts are kept in `cache` at once.

    Raises:
      ConfigError: fewer tasks of a kind than should be left out.
      ValueError: an unknown method; whatever `setting.make` refuses.
    """
    by.check_names("methods", config.methods)
    kept = Kept(cache)
    setting = make(config.setting, kept)
    harm, loss = setting.tasks.task_harm, jax.jit(setting.target)
    chosen = _chosen(harm, config)
    before = kept("with all", lambda: _measured(setting, loss))
    found = [kept(f"without {task}", functools.partial(_without, setting, loss, task)) for task in chosen.tolist()]
    changes = np.asarray([each["loss"] for each in found]) - before["loss"]
    kinds = harm[chosen]
    rule = kept("damping", lambda: {"damping": by.chosen_damping(setting, config.solves.damping_rank).value})
    score = functools.partial(_scored, config, setting, float(rule["damping"]))
    scored = {name: kept(f"scored {name}", functools.partial(score, name)) for name in config.methods}
    rows = [{"method": TRUTH, "how": "retrained", **areas(changes, kinds, config.draws)}]
    predicted = {}
    for name, values in scored.items():
        if "reason" in values:
            rows.append({"method": name, "how": "scored", "reason": str(values["reason"])})
            continue
        predicted[name] = values["task"][chosen]
        rows.append(
            {
                "method": name,
                "how": "scored",
                "seconds": float(values["seconds"]),
                **agreement(predicted[name], changes, config.draws),
                **areas(predicted[name], kinds, config.draws),
            }
        )
    rows += [
        {"method": TRUTH, "how": "left out", "task": int(task), "kind": str(kind), "change": float(change)}
        for task, kind, change in zip(chosen, kinds, changes, strict=True)
    ]
    seconds = float(np.mean([each["seconds"] for each in found]))
    accuracy = before["each"]
    half = 1.96 * float(accuracy.std(ddof=1)) / len(accuracy) ** 0.5
    regression = config.setting.data.dataset == SINUSOID
    chance = None if regression else 1 / config.setting.data.ways
    told = f"{accuracy.mean():.3f} ± {half:.3f}"
    warnings = []
    if chance is not None and accuracy.mean() - half <= chance:
        warnings.append(
            f"The learner has learnt nothing that can be told from guessing: accuracy {told}, chance {chance:.3f}."
        )
    return Result(
        rows,
        {
            f"{len(chosen)} of {len(harm)} tasks left out one at a time": agreement_table(rows),
            "What leaving them out does": changes_table(rows),
        },
        picture(config.title, predicted, changes, kinds),
        notes(
            rows,
            seconds,
            f"with all tasks the held-out loss is {before['loss']:.3f}, and "
            f"{'minus the squared error' if regression else 'the accuracy'} on test tasks {told}",
        ),
        warnings,
    )


def _chosen(harm: np.ndarray, config: LeavingConfig) -> np.ndarray:
    """The same number of tasks of each kind, drawn by the setting's seed."""
    generator = np.random.default_rng(config.setting.seed)
    drawn = []
    for kind in sorted(set(harm)):
        own = np.flatnonzero(harm == kind)
        if len(own) < config.each:
            raise ConfigError(
                f"--each: expected at most the {len(own)} tasks of the kind {str(kind)!r}, got {config.each}"
            )
        drawn.append(generator.permutation(own)[: config.each])
    return np.concatenate(drawn)


def _measured(setting: Setting, loss: Any) -> dict[str, Any]:
    return {"loss": loss(setting.trained, setting.tasks.held_out), "each": performance(setting)(setting.trained)}


def _without(setting: Setting, loss: Any, task: int) -> dict[str, Any]:
    done = setting.train(by.without(setting, "task", np.asarray([task])), setting.initial)
    return {"loss": loss(done.meta_params, setting.tasks.held_out), "seconds": done.seconds}


def _scored(config: LeavingConfig, setting: Setting, damping: float, name: str) -> dict[str, Any]:
    found = by.score(setting, name, damping, config.solves)
    return {"reason": found.reason} if found.scores is None else {"task": found.scores.task, "seconds": found.seconds}


def agreement(predicted: np.ndarray, changes: np.ndarray, draws: int) -> dict[str, float]:
    """Correlations of predicted and actual changes, with 95 % intervals over the tasks."""
    found = loo_correlation(predicted, changes, num=draws)
    return {
        f"{name}{end}": float(value)
        for name, estimate in found._asdict().items()
        for end, value in zip(("", "_low", "_high"), estimate, strict=True)
    }


def areas(values: np.ndarray, kinds: np.ndarray, draws: int) -> dict[str, float]:
    """ROC AUC of each kind of damage against undamaged tasks, with 95 % intervals over the tasks."""
    found = {}
    for kind in sorted(set(kinds) - {CLEAN}):
        judged = (kinds == kind) | (kinds == CLEAN)
        area = bootstrap(roc_auc, values[judged], kinds[judged] == kind, num=draws)
        for end, value in zip(("", "_low", "_high"), area, strict=True):
            found[f"auc {kind}{end}"] = float(value)
    return found


def agreement_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Methods, the truth first, then by rank correlation with it."""
    (truth,) = (row for row in rows if row["how"] == "retrained")
    scored = [row for row in rows if row["how"] == "scored"]
    kinds = [
        key.removeprefix("auc ") for key in truth if key.startswith("auc ") and not key.endswith(("_low", "_high"))
    ]

    def cells(row: dict[str, Any]) -> list[Any]:
        keys = ("spearman", "pearson", *(f"auc {kind}" for kind in kinds))
        shown = [interval(*(row[f"{key}{end}"] for end in ("", "_low", "_high"))) if key in row else "" for key in keys]
        return [row["method"], *shown, f"{row['seconds']:.3g}" if "seconds" in row else row.get("reason", "")]

    ordered = sorted(scored, key=lambda row: -np.nan_to_num(row.get("spearman", np.nan), nan=-2.0))
    headers = ["method", "Spearman with it", "Pearson", *(f"ROC AUC, {kind}" for kind in kinds), "score s"]
    return headers, [cells(row) for row in (truth, *ordered)]


def changes_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The mean change of the target by kind."""
    out = [row for row in rows if row["how"] == "left out"]
    cells: list[list[Any]] = []
    for kind in dict.fromkeys(row["kind"] for row in out):
        own = np.asarray([row["change"] for row in out if row["kind"] == kind])
        half = 1.96 * own.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else float("nan")
        cells.append([kind, len(own), f"{own.mean():+.2e}", f"{half:.1e}", f"{np.mean(own < 0):.0%}"])
    return ["kind", "tasks", "change of the held-out loss", "± 95 %", "better without"], cells


def notes(rows: list[dict[str, Any]], seconds: float, learner: str) -> list[str]:
    """Explanations of the numbers."""
    kinds = dict.fromkeys(row["kind"] for row in rows if row["how"] == "left out" and row["kind"] != CLEAN)
    (truth,) = (row for row in rows if row["how"] == "retrained")
    told = ", ".join(f"{truth[f'auc {kind}']:.2f} of {kind}" for kind in kinds)
    meaning = (
        "The first row is the truth for single tasks: it tells damaged tasks from others with a ROC AUC of "
        f"{told}. "
        "A score with a higher area and a lower correlation answers another question than what the target becomes "
        "without the task."
    )
    trained = (
        f"Everything is trained again from the same start in the same order, in {seconds:.3g} s for each task; "
        f"{learner}. Intervals are over the tasks."
    )
    return [trained, *([meaning] if kinds else [])]


def picture(title: str, predicted: dict[str, np.ndarray], changes: np.ndarray, kinds: np.ndarray) -> Figure:
    """Predicted against actual changes, for the first three methods."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    names = list(predicted)[:3]
    for axes, name in zip(
        np.ravel(np.asarray(figure.subplots(1, max(len(names), 1), squeeze=False))), names, strict=False
    ):
        predicted_and_retrained(predicted[name], changes, harm=kinds, ax=axes)
        axes.set_title(f"{name}: {axes.get_title()}", fontsize="medium")
    figure.suptitle(title)
    return figure
