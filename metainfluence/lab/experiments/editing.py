"""What editing is worth: one task, 5 % and 40 % of the tasks removed by `edit`, by training again, by training on.

Training on starts at the trained λ, takes batches of the tasks that are left, and counts until the loss on held-out
tasks is as low as the edit's, at the learning rate that gets there first.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.kept import Kept
from metainfluence.lab.experiments.ranges import Count, Positive, Share, Size
from metainfluence.lab.experiments.removal_tables import GUESSING, signed
from metainfluence.lab.experiments.results import Result
from metainfluence.lab.experiments.setting import SINUSOID, Setting, SettingConfig, make, performance
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import training_steps
from metainfluence.lab.show.plots import clean

LEVEL = "task"
EDIT, AGAIN, ON, BEFORE = "edit", "trained from scratch", "trained on", "nothing removed"
FRESH = 1000


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """Edit against training from scratch and against training on, in time and in accuracy."""

    title: str = "What editing is worth"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage, learner and training."""
    removed: tuple[Share, ...] = (0.0, 0.05, 0.4)
    """Shares of the tasks that go, most harmful first; 0 for one task."""
    chosen_by: str = by.SEGMENTS
    """The method that calls them harmful."""
    solves: by.SolvesConfig = dataclasses.field(default_factory=by.SolvesConfig)
    """What choosing may cost."""
    newton_steps: Size = 0
    """Of the edit, after its first-order step."""
    tol: Positive = 0.1
    """Relative residual at which the edit's solves stop."""
    learning_rates: tuple[Positive, ...] = (1e-4, 1e-3)
    """Adam's, when training on."""
    block: Count = 5
    """Steps of training on between two looks at the held-out loss."""
    most_blocks: Count = 20
    """Looks, after which training on is given up."""
    seeds: tuple[Size, ...] = (0, 1, 2)
    """Every seed is a repetition with other tasks, damage and start."""


def run(config: EditingConfig, cache: Path | None = None) -> Result:
    """Removes, edits, trains; every part is kept in `cache` as it comes.

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
    held_out = Compiled(mi.query_loss(setting.problem))
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
        weights = by.without(setting, LEVEL, np.argsort(scores, kind="stable")[:count])

        def edited(weights: mi.Weights = weights) -> tuple[Any, float, dict[str, Any]]:
            done = edit(setting.trained, tasks, weights)
            return done.meta_params, edit.run_seconds, {"products": int(done.info.num_matvecs.sum())}

        def again(weights: mi.Weights = weights) -> tuple[Any, float, dict[str, Any]]:
            done = setting.train(weights, setting.initial)
            return done.meta_params, done.seconds, {}

        by_edit = row(EDIT, count, edited)
        row(AGAIN, count, again)
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


def trained_on(
    config: EditingConfig, setting: Setting, weights: mi.Weights, goal: float
) -> tuple[Any, float, dict[str, Any]]:
    """λ where training on first has a held-out loss of `goal`, the seconds of those steps, their number; and if it has.

    Looking at the loss is not counted.
    """
    loss = Compiled(mi.query_loss(setting.problem))
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


def cells_of(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The table: means over the seeds."""
    cells = []
    for count, how in dict.fromkeys((row["removed"], row["how"]) for row in rows):
        own = [row for row in rows if (row["removed"], row["how"]) == (count, how)]
        scratch = [row for row in rows if (row["removed"], row["how"]) == (count, AGAIN)]
        mean = {key: float(np.mean([row[key] for row in own])) for key in ("seconds", "loss", "accuracy", "half_width")}
        name, times, kept = how, "", ""
        if how == ON:
            steps = ", ".join(str(row["steps"]) if row["reached"] else f"> {row['steps']}" for row in own)
            name = f"{how}, {steps} steps"
        if how == EDIT:
            name = f"{how}, {np.mean([row['products'] for row in own]):.0f} products"
        if how in (EDIT, ON) and scratch:
            times = ratio(rows, count, how)
            kept = signed(_difference(own, scratch))
        cells.append(
            [f"{count} of {own[0]['of']}", name, mean["seconds"], times, mean["loss"], mean["accuracy"],
             mean["half_width"], kept]
        )  # fmt: skip
    return cells


def ratio(rows: list[dict[str, Any]], count: int, how: str) -> str:
    """Training from scratch over this, in time, for every seed."""
    seconds = {(row["seed"], row["how"]): row["seconds"] for row in rows if row["removed"] == count}
    each = [seconds[seed, AGAIN] / seconds[seed, how] for seed in dict.fromkeys(seed for seed, _ in seconds)]
    return f"{np.mean(each):.1f} × ({', '.join(f'{value:.1f}' for value in each)})"


def _difference(own: list[dict[str, Any]], scratch: list[dict[str, Any]]) -> tuple[float, float, int, int]:
    pairs = [np.asarray(a["each"]) - np.asarray(b["each"]) for a, b in zip(own, scratch, strict=True)]
    means = np.array([pair.mean() for pair in pairs])
    variance = sum(pair.var(ddof=1) / len(pair) for pair in pairs) / len(pairs) ** 2
    return float(means.mean()), float(1.96 * variance**0.5), int((means > 0).sum()), len(pairs)


def notes(config: EditingConfig, rows: list[dict[str, Any]]) -> list[str]:
    """How the three were made, and what a product costs in steps of training."""
    edits = [row for row in rows if row["how"] == EDIT]
    products = sum(row["products"] for row in edits)
    per_product = sum(row["seconds"] for row in edits) / max(products, 1)
    steps = config.setting.training.num_steps
    per_step = float(np.mean([row["seconds"] for row in rows if row["how"] in (AGAIN, BEFORE)])) / steps
    made = (
        f"What goes is what {config.chosen_by} calls most harmful. The edit solves to a relative residual of "
        f"{config.tol:g} and takes {config.newton_steps} Newton steps. Training on takes Adam at "
        f"{', '.join(f'{rate:g}' for rate in config.learning_rates)}, whichever has the edit's held-out loss first, at "
        f"most {config.block * config.most_blocks} steps."
    )
    costs = (
        f"A product with the total Hessian, all of the edit divided by its products, took {per_product:.3g} s; a step "
        f"of training {per_step:.3g} s. So an edit of n products takes as long as {per_product / per_step:.1f} n steps "
        f"of the {steps} that training takes."
    )
    return [made, "", costs]


def picture(title: str, rows: list[dict[str, Any]]) -> Figure:
    """Seconds against accuracy."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    ax = figure.subplots()
    for how, color in ((EDIT, "#e08e1b"), (ON, "#2a6fb0"), (AGAIN, "#1b1b1b"), (BEFORE, "#8a8f98")):
        own = [row for row in rows if row["how"] == how]
        ax.scatter([row["seconds"] for row in own], [row["accuracy"] for row in own], color=color, label=how)
    ax.set(xscale="log", xlabel="seconds without compiling", ylabel="accuracy on test tasks", title=title)
    ax.legend(frameon=False)
    clean(ax)
    return figure
