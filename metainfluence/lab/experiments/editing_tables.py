"""The tables on what editing is worth: from rows to cells, sentences and a picture."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metainfluence.lab.experiments.removal_tables import over_seeds, signed
from metainfluence.lab.show.plots import clean

EDIT, PREPARED, AGAIN = "edit", "edit, prepared once", "trained from scratch"
ON, SHORT, BEFORE = "trained on", "trained on for a share of the steps", "nothing removed"
TIMES = 20


def cells_of(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The table's cells: means over the seeds."""
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
        if how == PREPARED:
            name = f"{how}, in {np.mean([row['preparation'] for row in own]):.3g} s"
        if how == SHORT:
            name = f"{ON} for {own[0]['steps']} steps"
        if how not in (BEFORE, AGAIN) and scratch:
            times = ratio(rows, count, how)
            kept = signed(difference(own, scratch))
        cells.append(
            [f"{count} of {own[0]['of']}", name, mean["seconds"], times, mean["loss"], mean["accuracy"],
             mean["half_width"], kept]
        )  # fmt: skip
    return cells


def ratio(rows: list[dict[str, Any]], count: int, how: str) -> str:
    """Time of training from scratch over that of this way, for every seed."""
    seconds = {(row["seed"], row["how"]): row["seconds"] for row in rows if row["removed"] == count}
    each = [seconds[seed, AGAIN] / seconds[seed, how] for seed in dict.fromkeys(seed for seed, _ in seconds)]
    return f"{np.mean(each):.1f} × ({', '.join(f'{value:.1f}' for value in each)})"


def difference(own: list[dict[str, Any]], scratch: list[dict[str, Any]]) -> tuple[float, float, int, int]:
    """Accuracy minus that of training from scratch on the same test tasks, as from `removal_tables.paired`."""
    return over_seeds([np.asarray(a["each"]) - np.asarray(b["each"]) for a, b in zip(own, scratch, strict=True)])


def notes(config: Any, rows: list[dict[str, Any]]) -> list[str]:
    """How the three were made, and the cost of a product in training steps."""
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
    rate = config.setting.training.learning_rate if config.short_rate is None else config.short_rate
    shortly = (
        f"Training on for {config.short:g} of the steps starts at a learning rate of {rate:g}, which falls to 0 along "
        f"a cosine; training from scratch takes {config.setting.training.learning_rate:g}."
    )
    return [made, "", costs, "", *prepared_notes(config, rows), "", shortly]


def prepared_notes(config: Any, rows: list[dict[str, Any]]) -> list[str]:
    """What preparing costs, and after how many removals it pays off."""
    own = [row for row in rows if row["how"] == PREPARED]
    if not own:
        return []
    preparation = float(np.mean([row["preparation"] for row in own]))
    residual = float(np.mean([row["residual"] for row in own]))
    scratch = float(np.mean([row["seconds"] for row in rows if row["how"] == AGAIN]))
    one = float(np.mean([row["seconds"] for row in own if row["removed"] == own[0]["removed"]]))
    wanted = TIMES * preparation / (scratch - TIMES * one)
    pays = (
        f"{int(np.ceil(wanted))} removals that share it are, with it, {TIMES:g} × as fast as training from scratch for "
        "each"
        if wanted > 0
        else f"even without it a removal is not {TIMES:g} × as fast as training from scratch"
    )
    sample = "a sixteenth" if config.sampled_tasks is None else f"{config.sampled_tasks}"
    text = (
        f"The prepared edit solves with the curvature of {sample} of the tasks, {config.sampled_rank} products with "
        f"it, made once in {preparation:.3g} s, which the column of seconds does not hold: one removal with its "
        f"preparation is {scratch / (preparation + one):.1f} × as fast as training from scratch, and {pays}. It is a "
        f"step and no solution: its relative residual is {residual:.2g} with the curvature of all tasks, where edit "
        f"asks for {config.tol:g}."
    )
    return [text]


def picture(title: str, rows: list[dict[str, Any]]) -> Figure:
    """A plot of accuracy against seconds."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    ax = figure.subplots()
    colors = {
        EDIT: "#e08e1b",
        PREPARED: "#b03a2e",
        ON: "#2a6fb0",
        SHORT: "#7fb2de",
        AGAIN: "#1b1b1b",
        BEFORE: "#8a8f98",
    }
    for how, color in colors.items():
        own = [row for row in rows if row["how"] == how]
        ax.scatter([row["seconds"] for row in own], [row["accuracy"] for row in own], color=color, label=how)
    ax.set(xscale="log", xlabel="seconds without compiling", ylabel="accuracy on test tasks", title=title)
    ax.legend(frameon=False)
    clean(ax)
    return figure
