"""What a reader asks first, answered from the rows of the tables in a sentence each."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from metainfluence.lab.experiments import verdicts
from metainfluence.lab.experiments.editing_tables import AGAIN, EDIT, ON, PREPARED, SHORT, difference
from metainfluence.lab.experiments.removal_tables import NOTHING, RANDOM, TRUTH, kinds_in, paired
from metainfluence.lab.experiments.results import TABLE

Rows = list[dict[str, Any]]
IMAGES = {data: name for data, name in verdicts.DETECTION.items() if name.startswith("table_")}


def lines(out: Path, size: str, earlier: str = "") -> list[str]:
    """Five sentences, of those experiments whose results are there; none where there are none.

    Args:
      out: folder with the folders of the experiments.
      size: "small" or "full".
      earlier: the report before, whose sentences are kept where rows of an experiment are no longer there, since rows
        are not stored.
    """
    before = dict(line.split("** ", 1) for line in earlier.splitlines() if "?** " in line)
    found: list[str] = []
    for names, asked in ((IMAGES, OF_TABLES), (verdicts.WORTH, OF_EDITS)):
        rows = {data: verdicts.rows_of(out, name, size) for data, name in names.items()}
        known = {data: own for data, own in rows.items() if any(row.get("picked") or "reached" in row for row in own)}
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
    return (
        "Accuracy after retraining without it, minus the same "
        f"for as many random tasks: {_each(tables, lambda rows: _against(rows, RANDOM))}."
    )


def _baselines(tables: dict[str, Rows]) -> str:
    def one(rows: Rows) -> str:
        return ", ".join(f"{name} {_against(rows, name)}" for name in verdicts.BASELINES)

    return f"The same against each: {_each(tables, one)}."


def _editing(edits: dict[str, Rows]) -> str:
    def one(rows: Rows) -> str:
        parts = []
        for count in dict.fromkeys(row["removed"] for row in rows if row["how"] == EDIT):
            edited, again = (verdicts.picked(rows, how=how, removed=count) for how in (EDIT, AGAIN))
            times = verdicts.mean(again, "seconds") / verdicts.mean(edited, "seconds")
            lost = verdicts.mean(edited, "accuracy") - verdicts.mean(again, "accuracy")
            on = verdicts.picked(rows, how=ON, removed=count)
            reached = verdicts.mean(edited, "seconds") / verdicts.mean(on, "seconds")
            there = "to the same held-out loss" if all(row["reached"] for row in on) else "short of it in some seed"
            more = "".join(_instead(rows, again, how, count) for how in (PREPARED, SHORT))
            parts.append(
                f"{count} of {edited[0]['of']} tasks {times:.1f} × as fast, accuracy {lost:+.4f}; training on, "
                f"{there}, is {reached:.1f} × as fast as the edit{more}"
            )
        return "; ".join(parts)

    return f"{_each(edits, one)}."


def _instead(rows: Rows, again: Rows, how: str, count: int) -> str:
    """Another way than edit, in time and accuracy against training from scratch; nothing where it was not tried."""
    own = verdicts.picked(rows, how=how, removed=count)
    if not own:
        return ""
    times, (kept, half, *_) = verdicts.mean(again, "seconds") / verdicts.mean(own, "seconds"), difference(own, again)
    name = (
        f"an edit prepared once, in {verdicts.mean(own, 'preparation'):.1f} s,"
        if how == PREPARED
        else f"training on for {own[0]['steps']} steps"
    )
    return f"; {name} is {times:.0f} × as fast, accuracy {kept:+.4f} [{kept - half:+.4f}, {kept + half:+.4f}]"


def _against(rows: Rows, name: str) -> str:
    """Retrained accuracy by the rule's estimator minus that by another method, with its 95 % interval."""
    level = [row for row in verdicts.picked(rows, level="task", how="retrained") if row.get("each") is not None]
    found = paired(level, [row for row in level if row["method"] == row["picked"]], lambda row: name)
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
    ("Is it better than without what a baseline calls harmful?", _baselines),
)
OF_EDITS = (("What is editing worth against training from scratch?", _editing),)
