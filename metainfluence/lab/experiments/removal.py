"""Finds what was damaged, removes it, trains again: the paper's table and figures.

At each level (tasks, support examples, query examples) some data are damaged on purpose and every method scores all
data. What a method calls most harmful is then removed, by retraining and by editing without retraining.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import optax

import metainfluence as mi
from metainfluence.evaluation import bootstrap, found_at, roc_auc, roc_auc_difference
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.kept import Kept
from metainfluence.lab.experiments.ranges import Count, Share, Size
from metainfluence.lab.experiments.removal_tables import (
    AS_MANY,
    NOTHING,
    TRUTH,
    Outcome,
    notes,
    picture,
    tables,
    warnings_of,
)  # fmt: skip
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.experiments.setting import SINUSOID, Setting, SettingConfig, make, performance
from metainfluence.lab.learn.timing import Compiled

LEVELS = ("task", "support", "query")


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
    """Share of the labels flipped in a task with flipped labels."""
    examples: Share = 0.0
    """Share of the level's examples with flipped labels; for the support and query levels."""
    removed: Share = 0.4
    """Share of the level's data that every method removes."""
    run: bool = False
    """Whether this level is run."""
    methods: tuple[str, ...] = ()
    """Methods at this level; by default those of all levels."""
    retrained: tuple[str, ...] = ()
    """Methods at this level whose choice is removed by retraining; by default those of all levels."""


@dataclasses.dataclass(frozen=True)
class RemovalConfig:
    """Detection of damaged data, and the model without what each method calls harmful."""

    title: str = "Removal"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, learner and training; the levels set its damage."""
    task: LevelConfig = dataclasses.field(default_factory=LevelConfig)
    """Damage and removal of complete tasks."""
    support: LevelConfig = dataclasses.field(default_factory=LevelConfig)
    """Damage and removal of support examples."""
    query: LevelConfig = dataclasses.field(default_factory=LevelConfig)
    """Damage and removal of query examples."""
    methods: tuple[str, ...] = (
        by.INFLUENCE, "direct-IF", "EKFAC-IF", "TLXML", "TRAK", by.TRACIN, "gradient similarity", "plain loss",
        "random",
    )  # fmt: skip
    """Methods; see metainfluence.lab.experiments.methods."""
    retrained: tuple[str, ...] = (
        by.INFLUENCE, "direct-IF", "EKFAC-IF", "TRAK", by.TRACIN, "plain loss", "random",
    )  # fmt: skip
    """Methods whose choice is removed by retraining."""
    edited: tuple[str, ...] = (by.INFLUENCE,)
    """Methods whose choice is also removed by editing."""
    solves: by.SolvesConfig = dataclasses.field(default_factory=by.SolvesConfig)
    """Costs allowed for the estimators."""
    newton_steps: Size = 3
    """Newton steps of the edit."""
    curve: tuple[Share, ...] = ()
    """Shares removed, for the curve of accuracy; by default no curve."""
    curve_methods: tuple[str, ...] = (by.INFLUENCE, "plain loss", by.TRACIN, "direct-IF", "random")
    """Methods in that curve."""
    seeds: tuple[Size, ...] = (0,)
    """Seeds; each is a repetition with other tasks, damage and start."""
    draws: Count = 1000
    """Draws of each bootstrap."""
    published: tuple[str, ...] = ()
    """Rows of the paper's own table, as "level, method, accuracy, seconds"."""


def run(config: RemovalConfig, cache: Path | None = None) -> Result:
    """Runs all levels at all seeds; trainings and scores are kept in `cache` as soon as they are finished.

    Raises:
      ValueError: an unknown method, no level, or whatever `setting.make` refuses.
    """
    for field in ("methods", "retrained", "edited", "curve_methods"):
        by.check_names(field, getattr(config, field))
    levels = [level for level in LEVELS if getattr(config, level).run]
    for level in levels:
        for field in ("methods", "retrained"):
            by.check_names(f"{level}.{field}", getattr(getattr(config, level), field))
    if not levels:
        raise ValueError("experiment: expected run = true for at least one of task, support and query, got none")
    rows: list[dict[str, Any]] = []
    shown: dict[str, Outcome] = {}
    for seed in config.seeds:
        for level in levels:
            outcome = at_level(config, level, seed, Kept(cache).below(f"{level}-{seed}"))
            rows += outcome.rows
            shown.setdefault(level, outcome)
    rows.sort(key=lambda row: levels.index(row["level"]))
    measure = "minus the squared error" if config.setting.data.dataset == SINUSOID else "accuracy"
    return Result(
        rows,
        tables(rows, measure, config.seeds, config.published),
        picture(config.title, config.curve, shown, measure),
        notes(rows, measure, config.seeds),
        warnings_of(rows),
    )


def level_setting(config: RemovalConfig, level: str, seed: int, kept: Kept) -> Setting:
    """The setting with damage at one level, trained."""
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
    return make(dataclasses.replace(config.setting, harm=harm, seed=config.setting.seed + seed), kept)


def at_level(config: RemovalConfig, level: str, seed: int, kept: Kept) -> Outcome:
    """Scores, detects, removes and edits at one level."""
    setting = level_setting(config, level, seed, kept)
    of_level, perform = getattr(config, level), performance(setting)
    damaged = by.level_harm(setting, level)
    count = round(of_level.removed * len(damaged))
    rule = kept("rule", lambda: _rule(config, setting))
    damping = float(rule["damping"])
    common = {"level": level, "seed": seed, "damping": damping, "removed": count, "of": len(damaged)}
    common |= {"damaged": int(damaged.sum()), "outer_gradient_norm": float(rule["outer_gradient_norm"])}
    picked = mi.choose(
        gradient_norm=float(rule["gradient_norm_relative"]), share_removed=of_level.removed, run=True, checkpoints=True
    )
    common["chance"] = None if config.setting.data.dataset == SINUSOID else 1 / config.setting.data.ways
    common |= {key: float(rule[key]) for key in by.HELD_OUT if key in rule}
    common |= {"picked": picked.estimator, "picked_because": picked.reason}
    rows: list[dict[str, Any]] = []

    def removal(name: str, how: str, make_one: Any, **more: Any) -> float:
        def reached() -> dict[str, Any]:
            meta_params, seconds = make_one()
            return {"each": perform(meta_params), "seconds": seconds}

        found = kept(f"{how} {name}{''.join(f' {value:g}' for value in more.values())}", reached)
        each = found["each"]
        half = 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5
        accuracy = {"accuracy": float(each.mean()), "half_width": half, "each": each.tolist()}
        rows.append({**common, "method": name, "how": how, **accuracy, "seconds": float(found["seconds"]), **more})
        return accuracy["accuracy"]

    def retrained(removed: np.ndarray) -> tuple[Any, float]:
        done = setting.train(by.without(setting, level, removed), setting.initial)
        return done.meta_params, done.seconds

    removal(NOTHING, "trained", lambda: (setting.trained, setting.full.seconds))
    removal(TRUTH, "retrained", lambda: retrained(np.flatnonzero(damaged)))
    kinds = kinds_of(setting, level)
    for kind, own in kinds.items():
        removal(f"{TRUTH}, {kind}", "retrained", functools.partial(retrained, np.flatnonzero(own)))
    for size in {int(own.sum()) for own in kinds.values()}:
        drawn = np.random.default_rng([seed, size]).permutation(len(damaged))[:size]
        removal(f"{AS_MANY}{size}", "retrained", functools.partial(retrained, drawn))
    scored: dict[str, np.ndarray] = {}
    reference: np.ndarray | None = None
    # The reference for the other methods: the one that the rule names, if it is among them.
    names = of_level.methods or config.methods
    first = picked.estimator if picked.estimator in names else by.INFLUENCE
    for name in sorted(names, key=lambda name: name != first):
        found = kept(f"scored {name}", functools.partial(_scored, config, setting, name, damping))
        if "reason" in found:
            rows.append({**common, "method": name, "how": "scored", "reason": str(found["reason"])})
            continue
        values = np.ravel(found[level])
        scored[name] = values
        reference = values if name == first else reference
        each = {f"auc {kind}": _among_clean(values, damaged, own) for kind, own in kinds.items()}
        more = detection(config, found, values, damaged, reference)
        rows.append({**common, "method": name, "how": "scored", **more, **each})
        worst = by.most_harmful(values, of_level.removed)
        if name in (of_level.retrained or config.retrained):
            removal(name, "retrained", functools.partial(retrained, worst))
        if name in config.edited:
            for how, edit in editors(config, setting, damping).items():
                removal(name, how, functools.partial(_edited, setting, level, edit, worst))
    curve: dict[str, list[float]] = {}
    for name in config.curve_methods if config.curve else ():
        if name not in scored:
            continue
        for share in config.curve:
            worst = by.most_harmful(scored[name], share)
            curve.setdefault(name, []).append(removal(name, "curve", functools.partial(retrained, worst), share=share))
    return Outcome(rows, scored, damaged, curve)


def kinds_of(setting: Setting, level: str) -> dict[str, np.ndarray]:
    """Which tasks were damaged in which way; empty at the other levels, and if all were damaged in the same way."""
    harm = setting.tasks.task_harm
    kinds = sorted(set(harm[by.level_harm(setting, level)])) if level == "task" else []
    return {str(kind): harm == kind for kind in kinds} if len(kinds) > 1 else {}


def _among_clean(values: np.ndarray, damaged: np.ndarray, own: np.ndarray) -> float:
    """ROC AUC of one kind of damage against undamaged data."""
    judged = own | ~damaged
    return float(roc_auc(values[judged], own[judged]))


def _rule(config: RemovalConfig, setting: Setting) -> dict[str, Any]:
    rule = by.chosen_damping(setting, config.solves.damping_rank)
    return {
        "damping": rule.value,
        "outer_gradient_norm": rule.outer_gradient_norm,
        "gradient_norm_relative": by.gradient_ratio(setting),
        **by.held_out_losses(setting),
    }


def _scored(config: RemovalConfig, setting: Setting, name: str, damping: float) -> dict[str, Any]:
    """One method's scores as arrays, or why there are none."""
    found = by.score(setting, name, damping, config.solves)
    if found.scores is None:
        return {"reason": found.reason}
    arrays = {level: getattr(found.scores, level) for level in LEVELS} | {"seconds": found.seconds}
    if name == by.INFLUENCE:
        info = found.scores.info
        arrays |= {"status": mi.SolveStatus(int(info.status)).name, "matvecs": int(info.num_matvecs)}
        arrays |= {"residual": float(info.relative_residual)}
    return arrays


def _edited(setting: Setting, level: str, edit: Any, removed: np.ndarray) -> tuple[Any, float]:
    program = Compiled(edit)
    edited = program(setting.trained, setting.tasks.training, by.without(setting, level, removed))
    return edited.meta_params, program.run_seconds


def editors(config: RemovalConfig, setting: Setting, damping: float) -> dict[str, Any]:
    """Ways to remove data without retraining: influence with Newton steps, and common alternatives."""
    problem, training = setting.problem, setting.config.training
    solver = mi.solvers.auto(tol=1e-3)
    steps = max(training.num_steps // 20, 1)
    return {
        "edited": mi.edit(problem, solver=solver, damping=damping, num_newton_steps=config.newton_steps),
        "gradient ascent": mi.baselines.gradient_ascent(problem, training.learning_rate, steps),
        "fine-tuned": mi.baselines.fine_tune(problem, optax.adam(training.learning_rate / 10), steps),
    }


def detection(
    config: RemovalConfig,
    found: dict[str, np.ndarray],
    values: np.ndarray,
    damaged: np.ndarray,
    reference: np.ndarray | None,
) -> dict[str, Any]:
    """How well one method finds the damaged data."""
    area = bootstrap(roc_auc, values, damaged, num=config.draws)
    row: dict[str, Any] = {"auc": float(area.value), "auc_low": float(area.low), "auc_high": float(area.high)}
    row |= {f"found_at_{share:.0%}": found_at(values, damaged, share) for share in (0.1, 0.2, 0.4)}
    row |= {key: found[key].item() for key in ("status", "matvecs", "residual") if key in found}
    if reference is not None and reference is not values:
        ahead = roc_auc_difference(reference, values, damaged, num=config.draws)
        row |= {"ahead": float(ahead.value), "ahead_low": float(ahead.low), "ahead_high": float(ahead.high)}
    return {**row, "seconds": float(found["seconds"])}
