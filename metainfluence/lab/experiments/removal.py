"""Find what was damaged, take it away, train again: the paper's table and figures.

At each level (tasks, support examples, query examples) some data are damaged on purpose, every method scores all data,
and what it calls most harmful is removed, by retraining and by editing without retraining.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import optax
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.evaluation import bootstrap, found_at, roc_auc, roc_auc_difference
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.methods import Scored
from metainfluence.lab.experiments.ranges import Count, Share, Size
from metainfluence.lab.experiments.results import Result, interval
from metainfluence.lab.experiments.setting import SINUSOID, Setting, SettingConfig, make, performance
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.show import plots

LEVELS = ("task", "support", "query")
TRUTH = "what was damaged"
NOTHING = "nothing removed"
DETECTION_HEADERS = ("method", "ROC AUC", "exact influence ahead by", "found at 20 %", "found at 40 %", "score s")


@dataclasses.dataclass(frozen=True)
class LevelConfig:
    """Damage at one level, and how much is removed."""

    flipped: Share = 0.0
    """Share of tasks with flipped query labels."""
    shortcut: Share = 0.0
    """Share of tasks that teach a shortcut."""
    noise: Share = 0.0
    """Share of tasks whose images are noise."""
    flip_share: Share = 0.8
    """Of the labels of a task with flipped labels."""
    examples: Share = 0.0
    """Share of the level's examples with flipped labels; of support and query levels."""
    removed: Share = 0.4
    """Share of the level's data that every method takes away."""
    run: bool = False
    """Whether this level is run."""
    methods: tuple[str, ...] = ()
    """Methods at this level; none for those of all levels."""


@dataclasses.dataclass(frozen=True)
class RemovalConfig:
    """Detection of damaged data, and what becomes of the model without what each method calls harmful."""

    title: str = "Removal"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, learner and training; its damage is set by the levels."""
    task: LevelConfig = dataclasses.field(default_factory=LevelConfig)
    """Whole tasks."""
    support: LevelConfig = dataclasses.field(default_factory=LevelConfig)
    """Support examples."""
    query: LevelConfig = dataclasses.field(default_factory=LevelConfig)
    """Query examples."""
    methods: tuple[str, ...] = (
        by.INFLUENCE, "direct-IF", "EKFAC-IF", "TLXML", "TRAK", by.TRACIN, "gradient similarity", "plain loss",
        "random",
    )  # fmt: skip
    """Methods; see metainfluence.lab.experiments.methods."""
    retrained: tuple[str, ...] = (
        by.INFLUENCE, "direct-IF", "EKFAC-IF", "TRAK", by.TRACIN, "plain loss", "random",
    )  # fmt: skip
    """Of these, those whose choice is removed by retraining."""
    edited: tuple[str, ...] = (by.INFLUENCE,)
    """Of these, those whose choice is also removed by editing."""
    newton_steps: Size = 3
    """Of the edit."""
    curve: tuple[Share, ...] = ()
    """Shares removed for the curve of accuracy; none for no curve."""
    curve_methods: tuple[str, ...] = (by.INFLUENCE, "plain loss", by.TRACIN, "direct-IF", "random")
    """Methods in that curve."""
    seeds: tuple[Size, ...] = (0,)
    """Every seed is a repetition with other tasks, damage and start."""
    draws: Count = 1000
    """Of each bootstrap."""
    published: tuple[str, ...] = ()
    """Rows of the paper's own table, as "level, method, accuracy, seconds"."""


class Outcome(NamedTuple):
    """One level at one seed: rows of the Parquet file, and scores by method for the pictures."""

    rows: list[dict[str, Any]]
    scored: dict[str, np.ndarray]
    damaged: np.ndarray
    curve: dict[str, list[float]]


def run(config: RemovalConfig) -> Result:
    """Runs all levels at all seeds.

    Raises:
      ValueError: an unknown method, no level, or whatever `setting.make` refuses.
    """
    for field in ("methods", "retrained", "edited", "curve_methods"):
        by.check_names(field, getattr(config, field))
    levels = [level for level in LEVELS if getattr(config, level).run]
    for level in levels:
        by.check_names(f"{level}.methods", getattr(config, level).methods)
    if not levels:
        raise ValueError("experiment: expected run = true for at least one of task, support and query, got none")
    rows: list[dict[str, Any]] = []
    shown: dict[str, Outcome] = {}
    for level in levels:
        for seed in config.seeds:
            outcome = at_level(config, level, seed)
            rows += outcome.rows
            shown.setdefault(level, outcome)
    return Result(rows, tables(config, rows), picture(config, shown), notes(config, rows))


def level_setting(config: RemovalConfig, level: str, seed: int) -> Setting:
    """The setting damaged at one level, trained."""
    of_level = getattr(config, level)
    harm = dataclasses.replace(
        config.setting.harm,
        flipped=of_level.flipped,
        shortcut=of_level.shortcut,
        noise=of_level.noise,
        flip_share=of_level.flip_share,
        query_examples=of_level.examples if level == "query" else 0.0,
        support_examples=of_level.examples if level == "support" else 0.0,
    )
    return make(dataclasses.replace(config.setting, harm=harm, seed=config.setting.seed + seed))


def at_level(config: RemovalConfig, level: str, seed: int) -> Outcome:
    """Scores, detects, removes and edits at one level."""
    setting = level_setting(config, level, seed)
    of_level, perform = getattr(config, level), performance(setting)
    damaged = by.level_harm(setting, level)
    count = round(of_level.removed * len(damaged))
    rule = by.chosen_damping(setting)
    damping = float(rule.value)
    common = {"level": level, "seed": seed, "damping": damping, "removed": count, "of": len(damaged)}
    common |= {"damaged": int(damaged.sum()), "outer_gradient_norm": float(rule.outer_gradient_norm)}
    rows: list[dict[str, Any]] = []

    def removal(name: str, how: str, meta_params: Any, seconds: float, **more: Any) -> None:
        accuracy = learners.mean_interval(perform(meta_params))
        reached = {"accuracy": accuracy.mean, "half_width": accuracy.half_width}
        rows.append({**common, "method": name, "how": how, **reached, "seconds": seconds, **more})

    def retrain(removed: np.ndarray) -> tuple[Any, float]:
        done = setting.train(by.without(setting, level, removed), setting.initial)
        return done.meta_params, done.seconds

    removal(NOTHING, "trained", setting.trained, setting.full.seconds)
    removal(TRUTH, "retrained", *retrain(np.flatnonzero(damaged)))
    scored: dict[str, np.ndarray] = {}
    reference: np.ndarray | None = None
    for name in of_level.methods or config.methods:
        found = by.score(setting, name, damping)
        if found.scores is None:
            rows.append({**common, "method": name, "how": "scored", "reason": found.reason})
            continue
        values = by.level_scores(found.scores, level)
        scored[name] = values
        reference = values if name == by.INFLUENCE else reference
        rows.append({**common, "method": name, "how": "scored", **detection(config, found, values, damaged, reference)})
        worst = by.most_harmful(values, of_level.removed)
        if name in config.retrained:
            removal(name, "retrained", *retrain(worst))
        if name in config.edited:
            for how, edit in editors(config, setting, damping).items():
                program = Compiled(edit)
                weights = by.without(setting, level, worst)
                edited = program(setting.trained, setting.tasks.training, weights)
                removal(name, how, edited.meta_params, program.run_seconds)
    curve: dict[str, list[float]] = {}
    for name in config.curve_methods if config.curve else ():
        if name not in scored:
            continue
        for share in config.curve:
            meta_params, seconds = retrain(by.most_harmful(scored[name], share))
            removal(name, "curve", meta_params, seconds, share=share)
            curve.setdefault(name, []).append(rows[-1]["accuracy"])
    return Outcome(rows, scored, damaged, curve)


def editors(config: RemovalConfig, setting: Setting, damping: float) -> dict[str, Any]:
    """Ways to remove without retraining: influence with Newton steps, and what people would do instead."""
    problem, training = setting.problem, setting.config.training
    solver = mi.solvers.auto(tol=1e-3)
    steps = max(training.num_steps // 20, 1)
    return {
        "edited": mi.edit(problem, solver=solver, damping=damping, num_newton_steps=config.newton_steps),
        "gradient ascent": mi.baselines.gradient_ascent(problem, training.learning_rate, steps),
        "fine-tuned": mi.baselines.fine_tune(problem, optax.adam(training.learning_rate / 10), steps),
    }


def detection(
    config: RemovalConfig, found: Scored, values: np.ndarray, damaged: np.ndarray, reference: np.ndarray | None
) -> dict[str, Any]:
    """How well one method finds the damaged data."""
    area = bootstrap(roc_auc, values, damaged, num=config.draws)
    row: dict[str, Any] = {"auc": float(area.value), "auc_low": float(area.low), "auc_high": float(area.high)}
    row |= {f"found_at_{share:.0%}": found_at(values, damaged, share) for share in (0.1, 0.2, 0.4)}
    if found.name == by.INFLUENCE:
        assert found.scores is not None
        info = found.scores.info
        row |= {"status": mi.SolveStatus(int(info.status)).name, "matvecs": int(info.num_matvecs)}
        row |= {"residual": float(info.relative_residual)}
    elif reference is not None:
        ahead = roc_auc_difference(reference, values, damaged, num=config.draws)
        row |= {"ahead": float(ahead.value), "ahead_low": float(ahead.low), "ahead_high": float(ahead.high)}
    return {**row, "seconds": found.seconds}


def measured(config: RemovalConfig) -> str:
    """What `performance` measures."""
    return "minus the squared error" if config.setting.data.dataset == SINUSOID else "accuracy"


def tables(config: RemovalConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Detection and removal, by level; means over the seeds."""
    found: dict[str, Any] = {}
    measure = measured(config)
    for level in dict.fromkeys(row["level"] for row in rows):
        of_level = [row for row in rows if row["level"] == level]
        first = of_level[0]
        what = f"{first['damaged']} of {first['of']} {_plural(level)} damaged"
        seeds = f", means over {len(config.seeds)} seeds" if len(config.seeds) > 1 else ""
        found[f"Detection: {what}{seeds}"] = (DETECTION_HEADERS, detection_rows(of_level))
        removed = f"{first['removed']} {_plural(level)} removed"
        headers = ("chosen by", "how", measure, "± 95 %", "s")
        found[f"{measure.capitalize()} on clean test tasks, {removed}{seeds}"] = (headers, removal_rows(of_level))
    if config.published:
        cells = [[part.strip() for part in line.split(",")] for line in config.published]
        found["Published (arXiv 2501.15963), by other tasks, shots, networks and learning rates"] = (
            ("level", "method", "accuracy", "s"),
            cells,
        )
    return found


def detection_rows(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Cells of one level's detection."""
    cells: list[list[Any]] = []
    for name in dict.fromkeys(row["method"] for row in rows if row["how"] == "scored"):
        own = [row for row in rows if row["method"] == name and row["how"] == "scored"]
        if "auc" not in own[0]:
            cells.append([name, "not applicable", "", "", "", ""])
            continue
        area = interval(*(_mean(own, key) for key in ("auc", "auc_low", "auc_high")))
        ahead = ""
        if "ahead" in own[0]:
            ahead = interval(
                *(float(np.mean([row[key] for row in own])) for key in ("ahead", "ahead_low", "ahead_high"))
            )
        shares = [_mean(own, f"found_at_{share}") for share in ("20%", "40%")]
        cells.append([name, area, ahead, *(f"{share:.0%}" for share in shares), _mean(own, "seconds")])
    return cells


def removal_rows(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """Cells of one level's removals."""
    kept = [row for row in rows if row["how"] not in ("scored", "curve")]
    cells = []
    for name, how in dict.fromkeys((row["method"], row["how"]) for row in kept):
        own = [row for row in kept if (row["method"], row["how"]) == (name, how)]
        cells.append([name, how, *(_mean(own, key) for key in ("accuracy", "half_width", "seconds"))])
    return cells


def notes(config: RemovalConfig, rows: list[dict[str, Any]]) -> list[str]:
    """What the edit keeps of retraining's gain, and how scores compare with retraining without each task."""
    lines = []
    for level in dict.fromkeys(row["level"] for row in rows):
        own = [row for row in rows if row["level"] == level]
        by_how = {(row["method"], row["how"], row["seed"]): row for row in own}
        gains = []
        for seed in config.seeds:
            before = by_how[NOTHING, "trained", seed]["accuracy"]
            edited = by_how.get((by.INFLUENCE, "edited", seed))
            retrained = by_how.get((by.INFLUENCE, "retrained", seed))
            if edited and retrained:
                gains.append((edited["accuracy"] - before, retrained["accuracy"] - before))
        if gains:
            edit, again = np.mean(gains, axis=0)
            lines.append(
                f"{level.capitalize()} level: {measured(config)} gained by retraining without what influence chose: "
                f"{again:+.4f}; by editing instead: {edit:+.4f}."
            )
        if level == "task" and (by.INFLUENCE, "scored", config.seeds[0]) in by_how:
            seconds = _mean([row for row in own if (row["method"], row["how"]) == (by.INFLUENCE, "scored")], "seconds")
            training = _mean([row for row in own if row["how"] == "trained"], "seconds")
            count = own[0]["of"]
            lines.append(
                f"All scores took {seconds:.2f} s; one training takes {training:.2f} s, so that leaving out each of "
                f"the {count} tasks in turn would take {training * count / seconds:.0f} times as long."
            )
    return [part for line in lines for part in (line, "")]


def picture(config: RemovalConfig, shown: dict[str, Outcome]) -> Figure:
    """Detection curves for each level, and accuracy against the share removed where that was measured."""
    curves = {level: outcome for level, outcome in shown.items() if outcome.curve}
    figure = Figure(figsize=(5.2 * (len(shown) + len(curves)), 4.2), layout="constrained")
    figure.suptitle(config.title)
    axes = np.atleast_1d(figure.subplots(1, len(shown) + len(curves)))
    colors = dict(zip(by.NAMES, plots.METHOD_COLORS, strict=True))
    for ax, (level, outcome) in zip(axes, shown.items(), strict=False):
        plots.detection(outcome.scored, outcome.damaged, colors=colors, ax=ax)
        ax.set(title=f"Damaged {_plural(level)} found")
    for ax, (level, outcome) in zip(axes[len(shown) :], curves.items(), strict=True):
        for name, accuracies in outcome.curve.items():
            ax.plot(config.curve, accuracies, color=colors.get(name), marker="o", markersize=3, label=name)
        title = f"{measured(config).capitalize()} without the most harmful {_plural(level)}"
        ax.set(title=title, xlabel="share removed", ylabel=measured(config))
        ax.legend(frameon=False, fontsize="small")
        plots.clean(ax)
    return figure


def _plural(level: str) -> str:
    return "tasks" if level == "task" else f"{level} examples"


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
