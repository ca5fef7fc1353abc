"""Answers to a reader's first questions, from the rows of the tables, in a sentence each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments import verdicts
from metainfluence.lab.experiments.editing_tables import AGAIN, EDIT, PREPARED, SHORT, difference
from metainfluence.lab.experiments.removal_tables import NOTHING, RANDOM, TRUTH, kinds_in, paired
from metainfluence.lab.experiments.results import TABLE

Rows = list[dict[str, Any]]
# Rows that can be shown have one of these keys.
SHOWING = {"picked", "reached", "spearman"}
IMAGES = {data: name for data, name in verdicts.DETECTION.items() if name.startswith("table_")}


def lines(out: Path, size: str, earlier: str = "") -> list[str]:
    """Five sentences about the experiments whose results exist; nothing without any.

    Args:
      out: folder with the folders of the experiments.
      size: "small" or "full".
      earlier: the previous report; its sentences are kept if an experiment's rows no longer exist, since rows are not
        stored.
    """
    before = dict(line.split("** ", 1) for line in earlier.splitlines() if "?** " in line)
    found: list[str] = []
    for names, asked in ((IMAGES, OF_TABLES), (verdicts.ALONE, OF_SINGLE), (verdicts.WORTH, OF_EDITS)):
        rows = {data: verdicts.rows_of(out, name, size) for data, name in names.items()}
        known = {data: own for data, own in rows.items() if any(SHOWING & row.keys() for row in own)}
        ran = {data for data, name in names.items() if (out / name / size / TABLE).exists()}
        for number, (question, answer) in enumerate(asked, start=len(found) + 1):
            kept = None if ran <= set(known) else before.get(f"{number}. **{question}")
            if kept or known:
                found.append(f"{number}. **{question}** {kept or answer(known)}")
    return found


def _learners(tables: dict[str, Rows]) -> str:
    def one(rows: Rows) -> str:
        level = verdicts.picked(rows, level="task")
        whole, clean = (verdicts.mean(verdicts.picked(level, method=name), "accuracy") for name in (NOTHING, TRUTH))
        return f"{whole:.1%}, and without exactly what was damaged {clean:.1%} (chance {level[0]['chance']:.0%})"

    return f"Trained on all tasks, damaged ones included: {_each(tables, one)}."


def _detection(tables: dict[str, Rows]) -> str:
    def one(rows: Rows) -> str:
        own = verdicts.by_rule(verdicts.picked(rows, level="task", how="scored"))
        kinds = ", ".join(f"{kind} {verdicts.mean(own, f'auc {kind}'):.3f}" for kind in kinds_in(own))
        return f"{verdicts.mean(own, 'auc'):.3f}{f' ({kinds})' if kinds else ''}"

    return (
        f"ROC AUC of {_names(tables)}, which the rule names before any score is "
        f"known: {_each(tables, one)}; which kinds of damage do harm at all is said below each table."
    )


def _gain(tables: dict[str, Rows]) -> str:
    def nearest(rows: Rows) -> str:
        ahead = {name: found for name in verdicts.BASELINES if (found := _ahead(rows, name)) is not None}
        name = min(ahead, key=lambda name: ahead[name][0], default="none of them")
        return f"{_shown(ahead.get(name))} ({name})"

    return (
        "Accuracy after retraining without it, minus the same "
        f"for as many random tasks: {_each(tables, lambda rows: _shown(_ahead(rows, RANDOM)))}; "
        f"minus the same for the nearest of {', '.join(verdicts.BASELINES)}: {_each(tables, nearest)}."
    )


def _alone(runs: dict[str, Rows]) -> str:
    def one(rows: Rows) -> str:
        scored = {row["method"]: row["spearman"] for row in rows if row.get("spearman") is not None}
        own = f"{scored[by.TRAJECTORY]:.2f}" if by.TRAJECTORY in scored else "unknown"
        baselines = [name for name in scored if name not in by.ESTIMATORS]
        best = max(baselines, key=lambda name: scored[name], default="none")
        (truth,) = verdicts.picked(rows, how="retrained")
        kinds = dict.fromkeys(row["kind"] for row in verdicts.picked(rows, how="left out"))
        areas = ", ".join(f"{kind} {truth[f'auc {kind}']:.2f}" for kind in kinds if f"auc {kind}" in truth)
        nearest = f"best baseline: {best}{f' {scored[best]:.2f}' if baselines else ''}"
        return f"{own} ({nearest}; ROC AUC of the truth: {areas or 'unknown'})"

    return (
        f"Spearman correlation of {by.TRAJECTORY} with training again without each of some tasks: {_each(runs, one)}."
    )


def _editing(edits: dict[str, Rows]) -> str:
    def one(rows: Rows) -> str:
        own = verdicts.picked(rows, how=PREPARED)
        if not own:
            return "unknown"
        parts = [
            f"without {count} of {own[0]['of']} tasks {_times(rows, PREPARED, count):.3g} × "
            f"({_shown(difference(verdicts.picked(own, removed=count), _scratch(rows, count)))})"
            for count in _ends(rows)
        ]
        return f"{', '.join(parts)}, after {verdicts.mean(own, 'preparation'):.1f} s of preparing"

    found = [
        f"An edit prepared once is so many times faster, and changes the accuracy by so much: {_each(edits, one)}."
    ]
    steps = [str(row["steps"]) for rows in edits.values() for row in verdicts.picked(rows, how=SHORT)]
    for how, name in (
        (EDIT, "An edit by itself"),
        (SHORT, f"Training on for {' or '.join(dict.fromkeys(steps))} steps"),
    ):
        times = [
            _times(rows, how, count)
            for rows in edits.values()
            for count in _ends(rows)
            if verdicts.picked(rows, how=how, removed=count)
        ]
        if times:
            found.append(f"{name}: {min(times):.2g} to {max(times):.2g} × as fast.")
    return " ".join(found)


def _ends(rows: Rows) -> list[int]:
    """The smallest and the largest number of removed tasks."""
    counts = [row["removed"] for row in verdicts.picked(rows, how=EDIT)]
    return list(dict.fromkeys((min(counts), max(counts))))


def _scratch(rows: Rows, count: int) -> Rows:
    return verdicts.picked(rows, how=AGAIN, removed=count)


def _times(rows: Rows, how: str, count: int) -> float:
    """Seconds of training from scratch over those of another way to remove that many tasks."""
    own = verdicts.picked(rows, how=how, removed=count)
    return verdicts.mean(_scratch(rows, count), "seconds") / verdicts.mean(own, "seconds")


def _ahead(rows: Rows, name: str) -> tuple[float, float, int, int] | None:
    """Retrained accuracy by the rule's estimator minus that by another method, as from `removal_tables.paired`."""
    level = [row for row in verdicts.picked(rows, level="task", how="retrained") if row.get("each") is not None]
    return paired(level, [row for row in level if row["method"] == row["picked"]], lambda row: name)


def _shown(found: tuple[float, float, int, int] | None) -> str:
    """A difference with its 95 % interval."""
    return "unknown" if found is None else f"{found[0]:+.4f} [{found[0] - found[1]:+.4f}, {found[0] + found[1]:+.4f}]"


def _names(tables: dict[str, Rows]) -> str:
    picked = (row["picked"] for rows in tables.values() for row in verdicts.picked(rows, level="task"))
    return " or ".join(dict.fromkeys(picked))


def _each(tables: dict[str, Rows], say: Callable[[Rows], str]) -> str:
    parts: Sequence[str] = [f"{data} {say(rows)}" for data, rows in tables.items()]
    return "; ".join(parts)


OF_TABLES = (
    ("How good are the learners?", _learners),
    ("Do the scores find damaged tasks?", _detection),
    ("Is a model better without what they call harmful?", _gain),
)
OF_SINGLE = (("Does a task's score say what training without it says?", _alone),)
OF_EDITS = (("What is editing worth against training from scratch?", _editing),)
