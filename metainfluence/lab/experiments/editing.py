"""What editing is worth: removing one task, 5 % and 40 % of the tasks by `edit`, by retraining or by training on.

An edit can be prepared once for all removals: the response at the trained λ, with the curvature of a sample of the
tasks, is computed in advance. A removal then costs only the gradients of the removed tasks.

Training on starts at the trained λ and uses batches of the remaining tasks. It runs until the loss on held-out tasks is
as low as the edit's, at the learning rate that gets there first. A second variant runs for a share of the training
steps, with a learning rate that falls to 0.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.editing_tables import (
    AGAIN,
    BEFORE,
    EDIT,
    ON,
    PREPARED,
    SHORT,
    cells_of,
    notes,
    picture,
)
from metainfluence.lab.experiments.kept import Kept
from metainfluence.lab.experiments.ranges import Count, Positive, Share, Size
from metainfluence.lab.experiments.removal_tables import GUESSING
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.experiments.setting import SINUSOID, Setting, SettingConfig, make, performance
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import training_steps

LEVEL = "task"
FRESH = 1000


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """Compares editing with training from scratch and with training on, in time and in accuracy."""

    title: str = "What editing is worth"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage, learner and training."""
    removed: tuple[Share, ...] = (0.0, 0.05, 0.4)
    """Shares of the tasks to remove, most harmful first; 0 for one task."""
    chosen_by: str = by.SEGMENTS
    """The method that selects the harmful tasks."""
    solves: by.SolvesConfig = dataclasses.field(default_factory=by.SolvesConfig)
    """Costs allowed for the selection."""
    newton_steps: Size = 0
    """Newton steps of the edit, after its first-order step."""
    tol: Positive = 0.1
    """Relative residual at which the edit's solves stop."""
    sampled_tasks: Count | None = None
    """Tasks whose curvature stands in for that of all tasks in the prepared edit; by default a sixteenth of them."""
    sampled_rank: Count = 100
    """Products with that curvature during preparation."""
    learning_rates: tuple[Positive, ...] = (1e-4, 1e-3)
    """Adam's learning rates, for training on to the edit's held-out loss."""
    short: Share = 0.1
    """Share of the training steps that the short training on takes."""
    short_rate: Positive | None = None
    """Adam's peak learning rate in that variant; by default that of training."""
    block: Count = 5
    """Steps of training on between two checks of the held-out loss."""
    most_blocks: Count = 20
    """Number of checks after which training on is given up."""
    seeds: tuple[Size, ...] = (0, 1, 2)
    """Seeds; each is a repetition with other tasks, damage and start."""


def run(config: EditingConfig, cache: Path | None = None) -> Result:
    """Removes, edits and trains; every part is kept in `cache` as soon as it is finished.

    Raises:
      ValueError: an unknown method; whatever `setting.make` refuses.
    """
    by.check_names("chosen_by", [config.chosen_by])
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        rows += at_seed(config, seed, Kept(cache).below(str(seed)))
    warnings = [
        f"Seed {row['seed']}: the learner has learnt nothing that can be told from guessing: accuracy "
        f"{row['accuracy']:.3f} ± {row['half_width']:.3f}, chance {row['chance']:.3f}."
        for row in rows
        if row["how"] == BEFORE and row["chance"] is not None and row["accuracy"] - row["half_width"] <= row["chance"]
    ]
    guessing = f", {GUESSING}" if warnings else ""
    headers = (
        "tasks removed", "how", "s", "s of training from scratch over it", "held-out loss", "accuracy", "± 95 %",
        "accuracy minus that of training from scratch",
    )  # fmt: skip
    over = f", means over {len(config.seeds)} seeds" if len(config.seeds) > 1 else ""
    table = {f"Time without compiling, and what is kept{over}{guessing}": (headers, cells_of(rows))}
    return Result(rows, table, picture(config.title, rows), notes(config, rows), warnings)


def at_seed(config: EditingConfig, seed: int, kept: Kept) -> list[dict[str, Any]]:
    """All removals of one training."""
    setting = make(dataclasses.replace(config.setting, seed=config.setting.seed + seed), kept)
    perform, tasks = performance(setting), setting.tasks.training
    held_out = Compiled(setting.target)
    rule = kept("damping", lambda: {"damping": by.chosen_damping(setting, config.solves.damping_rank).value})
    damping = float(rule["damping"])
    scores = kept(f"scored {config.chosen_by}", lambda: _scores(config, setting, damping))["scores"]
    edit = Compiled(
        mi.edit(
            setting.problem,
            solver=mi.solvers.auto(tol=config.tol),
            damping=damping,
            num_newton_steps=config.newton_steps,
        )
    )
    total = len(scores)
    response = Compiled(
        mi.optimum(
            setting.problem,
            solver=mi.solvers.sampled(config.sampled_tasks, rank=config.sampled_rank),
            damping=damping,
        )
    )
    made: list[Any] = []
    removal, left_over = (Compiled(one) for one in removal_of(setting.problem, total))
    chance = None if config.setting.data.dataset == SINUSOID else 1 / config.setting.data.ways
    rows: list[dict[str, Any]] = []

    def row(how: str, count: int, make_one: Any, **more: Any) -> dict[str, Any]:
        def reached() -> dict[str, Any]:
            meta_params, seconds, extra = make_one()
            loss = held_out(meta_params, setting.tasks.held_out)
            return {"each": perform(meta_params), "seconds": seconds, "loss": loss, **extra}

        found = kept(f"{how} {count}", reached)
        each = found.pop("each")
        measured = {key: value.item() for key, value in found.items()}
        half = 1.96 * float(each.std(ddof=1)) / len(each) ** 0.5
        place = {"seed": seed, "how": how, "removed": count, "of": total, "chance": chance}
        rows.append(
            {**place, **more, **measured, "accuracy": float(each.mean()), "half_width": half, "each": each.tolist()}
        )
        return rows[-1]

    row(BEFORE, 0, lambda: (setting.trained, setting.full.seconds, {}))
    for share in config.removed:
        count = max(1, round(share * total))
        chosen = np.argsort(scores, kind="stable")[:count]
        weights = by.without(setting, LEVEL, chosen)

        def edited(weights: mi.Weights = weights) -> tuple[Any, float, dict[str, Any]]:
            done = edit(setting.trained, tasks, weights)
            return done.meta_params, edit.run_seconds, {"products": int(done.info.num_matvecs.sum())}

        def again(weights: mi.Weights = weights) -> tuple[Any, float, dict[str, Any]]:
            done = setting.train(weights, setting.initial)
            return done.meta_params, done.seconds, {}

        def answered(chosen: np.ndarray = chosen) -> tuple[Any, float, dict[str, Any]]:
            if not made:
                made.extend((response(setting.trained, tasks), response.run_seconds))
            gone = jax.tree.map(lambda leaf: leaf[chosen], tasks)
            meta_params = removal(made[0], gone)
            more = {"preparation": made[1], "residual": left_over(made[0], gone)}
            return meta_params, removal.run_seconds, more

        by_edit = row(EDIT, count, edited)
        row(PREPARED, count, answered)
        row(AGAIN, count, again)
        row(SHORT, count, lambda weights=weights: trained_shortly(config, setting, weights))
        goal = by_edit["loss"]
        row(ON, count, lambda weights=weights, goal=goal: trained_on(config, setting, weights, goal))
    return rows


def _scores(config: EditingConfig, setting: Setting, damping: float) -> dict[str, Any]:
    found = by.score(setting, config.chosen_by, damping, config.solves)
    if found.scores is None:
        raise ValueError(
            f"chosen_by: expected a method that applies to this learner, got {config.chosen_by!r}: {found.reason}"
        )
    return {"scores": by.level_scores(found.scores, LEVEL), "seconds": found.seconds}


def removal_of(problem: mi.Bilevel, total: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Makes two functions of (response, the removed tasks): λ without them, and the relative residual of its solve.

    Removing complete tasks takes only their own gradients. A direction in all weights could not exploit that.
    """
    loss = mi.task_loss(problem)

    def slope(at: Any, gone: mi.Task) -> Any:
        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(at.meta_params, gone, mi.unit_weights(gone))
        return jax.tree.map(lambda leaf: leaf.sum(0) / total, gradients)

    def removal(at: Any, gone: mi.Task) -> Any:
        return optax.tree.add(at.meta_params, at.solve(slope(at, gone))[0])

    # A separate function, since it takes a product with the curvature of all tasks.
    return removal, lambda at, gone: at.solve(slope(at, gone))[1].relative_residual


def trained_shortly(config: EditingConfig, setting: Setting, weights: mi.Weights) -> tuple[Any, float, dict[str, Any]]:
    """λ after a share of the training steps, from the trained λ and without the tasks of weight 0, and the seconds."""
    training = setting.config.training
    count = max(1, round(config.short * training.num_steps))
    rate = training.learning_rate if config.short_rate is None else config.short_rate
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, count), eps_root=training.eps_root)
    steps = Compiled(training_steps(setting.problem, optimizer, count, tasks_per_step=training.tasks_per_step))
    state = (setting.trained, optimizer.init(setting.trained))
    order = jnp.asarray(FRESH + setting.config.seed)
    meta_params = steps(*state, setting.tasks.training, weights, jnp.asarray(0), order)[0]
    return meta_params, steps.run_seconds, {"steps": count}


def trained_on(
    config: EditingConfig, setting: Setting, weights: mi.Weights, goal: float
) -> tuple[Any, float, dict[str, Any]]:
    """λ once training on reaches a held-out loss of `goal`, the seconds of its steps, their number, and whether it did.

    Evaluating the loss is not timed.
    """
    loss = Compiled(setting.target)
    best: tuple[int, Any, float, bool] | None = None
    for rate in config.learning_rates:
        optimizer = optax.adam(rate)
        steps = Compiled(
            training_steps(
                setting.problem, optimizer, config.block, tasks_per_step=setting.config.training.tasks_per_step
            )
        )
        state, seconds = (setting.trained, optimizer.init(setting.trained)), 0.0
        for number in range(1, config.most_blocks + 1):
            first = jnp.asarray((number - 1) * config.block)
            *state, _ = steps(*state, setting.tasks.training, weights, first, jnp.asarray(FRESH + setting.config.seed))
            seconds += steps.run_seconds
            reached = bool(loss(state[0], setting.tasks.held_out) <= goal)
            if reached and (best is None or not best[3] or number < best[0]):
                best = (number, state[0], seconds, True)
            if reached:
                break
        if best is None:
            best = (config.most_blocks, state[0], seconds, False)
    assert best is not None
    number, meta_params, seconds, reached = best
    return meta_params, seconds, {"steps": number * config.block, "reached": reached}
