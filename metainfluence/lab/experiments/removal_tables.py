"""Tables, sentences and the picture about what was found and removed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.results import interval
from metainfluence.lab.show import plots

TRUTH = "what was damaged"
NOTHING = "nothing removed"
RANDOM = "random"
AS_MANY = "random, as many: "
DETECTION_HEADERS = ("method", "ROC AUC", "the rule's estimator ahead by", "found at 20 %", "found at 40 %", "score s")
GUESSING = "by a learner that may only guess"
BETTER, MISLABELLED = "which make the learner worse", "which are mislabelled"
Rows = list[dict[str, Any]]


class Outcome(NamedTuple):
    """One level at one seed: rows of the Parquet file, and scores by method for the pictures."""

    rows: Rows
    scored: dict[str, np.ndarray]
    damaged: np.ndarray
    curve: dict[str, list[float]]


def guesses(row: Mapping[str, Any]) -> bool:
    """Whether a learner's accuracy is indistinguishable from guessing; never for regression."""
    return row["chance"] is not None and row["accuracy"] - row["half_width"] <= row["chance"]


def warnings_of(rows: Rows) -> list[str]:
    """Warnings to read before any score: a learner that may be no better than guessing."""
    return [
        f"{row['level'].capitalize()} level, seed {row['seed']}: the learner has learnt nothing that can be told from "
        f"guessing: accuracy {row['accuracy']:.3f} ± {row['half_width']:.3f}, chance {row['chance']:.3f}. No score "
        "below says anything about influence."
        for row in rows
        if row["how"] == "trained" and guesses(row)
    ]


def tables(rows: Rows, measure: str, seeds: Sequence[int], published: Sequence[str]) -> dict[str, Any]:
    """Detection and removal, by level; means over the seeds."""
    found: dict[str, Any] = {}
    for level in dict.fromkeys(row["level"] for row in rows):
        of_level = [row for row in rows if row["level"] == level]
        first = of_level[0]
        what = f"{first['damaged']} of {first['of']} {plural(level)} damaged"
        if any(guesses(row) for row in of_level if row["how"] == "trained"):
            what += f", {GUESSING}"
        over = f", means over {len(seeds)} seeds" if len(seeds) > 1 else ""
        asks = ("asks",) if level == "support" else ()
        found[f"Detection: {what}{over}"] = (
            (*DETECTION_HEADERS, *(f"ROC AUC, {kind}" for kind in kinds_in(of_level)), *asks),
            detection_rows(of_level),
        )
        removed = f"{first['removed']} {plural(level)} removed"
        headers = ("chosen by", "how", measure, "± 95 %", "minus random's", "the rule's estimator ahead by", "s")
        found[f"{measure.capitalize()} on clean test tasks, {removed}{over}"] = (
            (*headers, *asks),
            removal_rows(of_level),
        )
    if published:
        cells = [[part.strip() for part in line.split(",")] for line in published]
        found["Published (arXiv 2501.15963), by other tasks, shots, networks and learning rates"] = (
            ("level", "method", "accuracy", "s"),
            cells,
        )
    return found


def kinds_in(rows: Rows) -> list[str]:
    """The kinds of damage that were distinguished."""
    return [
        key.removeprefix("auc ") for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("auc ")
    ]


def detection_rows(rows: Rows) -> list[list[Any]]:
    """Cells of one level's detection."""
    cells: list[list[Any]] = []
    for name in dict.fromkeys(row["method"] for row in rows if row["how"] == "scored"):
        own = [row for row in rows if row["method"] == name and row["how"] == "scored"]
        kinds = kinds_in(rows)
        asks = _asks(own[0])
        if not all("auc" in row for row in own):
            cells.append([name, "not applicable", "", "", "", "", *("" for _ in kinds), *asks])
            continue
        area = interval(*(_mean(own, key) for key in ("auc", "auc_low", "auc_high")))
        ahead = ""
        if all("ahead" in row for row in own):
            ahead = interval(*(_mean(own, key) for key in ("ahead", "ahead_low", "ahead_high")))
        shares = [_mean(own, f"found_at_{share}") for share in ("20%", "40%")]
        each = (f"{_mean(own, f'auc {kind}'):.3f}" for kind in kinds)
        cells.append([name, area, ahead, *(f"{share:.0%}" for share in shares), _mean(own, "seconds"), *each, *asks])
    return cells


def removal_rows(rows: Rows) -> list[list[Any]]:
    """Cells of one level's removals."""
    kept = [row for row in rows if row["how"] not in ("scored", "curve")]
    picked = {row["seed"]: row["picked"] for row in rows}
    cells = []
    for name, how in dict.fromkeys((row["method"], row["how"]) for row in kept):
        own = [row for row in kept if (row["method"], row["how"]) == (name, how)]
        above, behind = "", ""
        if name == NOTHING and any(map(guesses, own)):
            how = f"{how}, {GUESSING}"
        if name != RANDOM and not name.startswith(AS_MANY):
            above = signed(paired(kept, own, lambda row: RANDOM))
        if how == "retrained" and not name.startswith((TRUTH, AS_MANY)) and name not in picked.values():
            behind = signed(paired(kept, own, lambda row: picked[row["seed"]], sign=-1))
        numbers = [_mean(own, key) for key in ("accuracy", "half_width")]
        cells.append([name, how, *numbers, above, behind, _mean(own, "seconds"), *_asks(own[0])])
    return cells


def paired(rows: Rows, own: Rows, other: Any, sign: int = 1) -> tuple[float, float, int, int] | None:
    """The difference of retrained accuracies on the same test tasks, seed by seed.

    Args:
      rows: rows of one level.
      own: rows of one method, one per seed.
      other: (row) -> the method to compare with.
      sign: −1 for the other minus this one.

    Returns:
      The mean over seeds and tasks, half the width of its 95 % interval over the test tasks of these seeds, the number
      of seeds in which it is above 0, and the number of seeds; None if a seed lacks the other method.
    """
    by_seed = {(row["method"], row["seed"]): row for row in rows if row["how"] == "retrained"}
    differences = []
    for row in own:
        found = by_seed.get((other(row), row["seed"]))
        if found is None:
            return None
        differences.append(sign * (np.asarray(row["each"]) - np.asarray(found["each"])))
    return over_seeds(differences)


def over_seeds(differences: Sequence[np.ndarray]) -> tuple[float, float, int, int]:
    """What `paired` returns, from the differences of the test tasks, one array per seed."""
    means = np.array([each.mean() for each in differences])
    variance = sum(each.var(ddof=1) / len(each) for each in differences) / len(means) ** 2
    return float(means.mean()), float(1.96 * variance**0.5), int((means > 0).sum()), len(means)


def signed(found: tuple[float, float, int, int] | None) -> str:
    """A difference with its interval."""
    if found is None:
        return ""
    value, half, above, seeds = found
    return f"{value:+.4f} [{value - half:+.4f}, {value + half:+.4f}]; {above} of {seeds} seeds above 0"


def notes(rows: Rows, measure: str, seeds: Sequence[int]) -> list[str]:
    """What the rule chose, how much of retraining's gain the edit keeps, and what scores save."""
    lines = []
    for level in dict.fromkeys(row["level"] for row in rows):
        own = [row for row in rows if row["level"] == level]
        by_how = {(row["method"], row["how"], row["seed"]): row for row in own}
        reasons = dict.fromkeys(f"{row['picked']} ({row['picked_because']})" for row in own)
        lines.append(f"{level.capitalize()} level: the rule, `metainfluence.choose`, names {'; '.join(reasons)}.")
        lines += confidence(own)
        lines += harms(own, measure)
        gains = []
        for seed in seeds:
            before = by_how[NOTHING, "trained", seed]["accuracy"]
            edited = by_how.get((by.INFLUENCE, "edited", seed))
            retrained = by_how.get((by.INFLUENCE, "retrained", seed))
            if edited and retrained:
                gains.append((edited["accuracy"] - before, retrained["accuracy"] - before))
        if gains:
            edit, again = np.mean(gains, axis=0)
            lines.append(
                f"{level.capitalize()} level: {measure} gained by retraining without what {by.INFLUENCE} chose: "
                f"{again:+.4f}; by editing instead: {edit:+.4f}."
            )
        if level == "task" and (by.INFLUENCE, "scored", seeds[0]) in by_how:
            seconds = _mean([row for row in own if (row["method"], row["how"]) == (by.INFLUENCE, "scored")], "seconds")
            training = _mean([row for row in own if row["how"] == "trained"], "seconds")
            count = own[0]["of"]
            lines.append(
                f"All scores took {seconds:.2f} s; one training takes {training:.2f} s, so that leaving out each of "
                f"the {count} tasks in turn would take {training * count / seconds:.0f} times as long."
            )
    return [part for line in lines for part in (line, "")]


def confidence(rows: Rows) -> list[str]:
    """How sure the learner is about unseen classes, since the held-out loss depends on that too."""
    own = [row for row in rows if row["how"] == "trained" and row.get(by.HELD_OUT[1]) is not None]
    if not own:
        return []
    loss, calibrated = (_mean(own, key) for key in by.HELD_OUT)
    told = (
        f"Held-out loss {loss:.3f}; at the temperature that fits it best {calibrated:.3f}: the difference is how sure "
        "the outputs are, which the loss depends on and the accuracy does not."
    )
    return [told]


def harms(rows: Rows, measure: str) -> list[str]:
    """Whether each kind of damage does harm: retraining without exactly those tasks, against as many random ones."""
    lines = []
    for kind in kinds_in(rows):
        own = [row for row in rows if row["method"] == f"{TRUTH}, {kind}"]
        names = {row["method"] for row in rows if row["method"].startswith(AS_MANY)}
        found = paired(rows, own, lambda row, names=names: min(names)) if len(names) == 1 else None
        if found is None:
            continue
        does = "does harm" if found[0] - found[1] > 0 else "does no harm that could be seen"
        lines.append(
            f"Damage by {kind} {does}: {measure} after retraining without exactly those tasks, minus the same without "
            f"as many random ones, is {signed(found)}."
        )
    return lines


def picture(title: str, shares: Sequence[float], shown: Mapping[str, Outcome], measure: str) -> Figure:
    """Detection curves for each level, and accuracy against the share removed if that was measured."""
    curves = {level: outcome for level, outcome in shown.items() if outcome.curve}
    figure = Figure(figsize=(5.2 * (len(shown) + len(curves)), 4.2), layout="constrained")
    figure.suptitle(title)
    axes = np.atleast_1d(figure.subplots(1, len(shown) + len(curves)))
    colors = dict(zip(by.NAMES, plots.METHOD_COLORS, strict=True))
    for ax, (level, outcome) in zip(axes, shown.items(), strict=False):
        plots.detection(outcome.scored, outcome.damaged, colors=colors, ax=ax)
        ax.set(title=f"Damaged {plural(level)} found")
    for ax, (level, outcome) in zip(axes[len(shown) :], curves.items(), strict=True):
        for name, accuracies in outcome.curve.items():
            ax.plot(shares, accuracies, color=colors.get(name), marker="o", markersize=3, label=name)
        ax.set(
            title=f"{measure.capitalize()} without the most harmful {plural(level)}",
            xlabel="share removed",
            ylabel=measure,
        )
        ax.legend(frameon=False, fontsize="small")
        plots.clean(ax)
    return figure


def plural(level: str) -> str:
    """The plural name of the level's data."""
    return "tasks" if level == "task" else f"{level} examples"


def _asks(row: Mapping[str, Any]) -> list[str]:
    """Which of two questions a method answers at the support level."""
    if row["level"] != "support":
        return []
    return [MISLABELLED if row["method"] == by.OWN else "" if row["method"] in (TRUTH, NOTHING) else BETTER]


def _mean(rows: Rows, key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
