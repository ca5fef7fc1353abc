"""The promises about the results, each with what was measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from metainfluence.lab.experiments import accuracies
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.agreement import EXACT
from metainfluence.lab.experiments.editing_tables import AGAIN, EDIT, PREPARED, difference
from metainfluence.lab.experiments.removal_tables import NOTHING, RANDOM, paired, signed
from metainfluence.lab.experiments.results import ROWS, interval, markdown

DETECTION = {
    "digits": "detection_digits",
    "Omniglot": "table_omniglot",
    "MNIST": "table_mnist",
    "mini-ImageNet": "table_mini_imagenet",
}
EXAMPLES = {"Omniglot, examples": "examples_omniglot", "mini-ImageNet, examples": "examples_mini_imagenet"}
EDITING = {"MNIST, 80 % flipped": "figure2_mnist", "sinusoids": "regression"}
WORTH = {"Omniglot": "editing_omniglot", "mini-ImageNet": "editing_mini_imagenet"}
ALONE = {"Omniglot": "leaving_omniglot", "mini-ImageNet": "leaving_mini_imagenet"}
BASELINES = ("direct-IF", "EKFAC-IF", "TRAK", by.TRACIN)
AGREEMENT = {"implicit head": "agreement_head", "iMAML": "agreement_imaml", "MAML": "agreement_maml"}
SURROGATES = ("linearized", "gamma", "Gauss-Newton")
FOUND, SUPPORT, KEPT, TIMES, TIMES_MANY, TRUE = 0.95, 0.9, 0.95, 20.0, 10.0, 0.95
FOUND_IN = {"mini-ImageNet": 0.9}


class Verdict(NamedTuple):
    """One promise: what, the measurement, the bar, and whether it is met; None if there is nothing to judge."""

    what: str
    measured: str
    bar: str
    met: bool | None


def rows_of(out: Path, name: str, size: str) -> list[dict[str, Any]]:
    """The rows of one experiment; none if it was not run."""
    path = out / name / size / ROWS
    return pq.read_table(path).to_pylist() if path.exists() else []


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """Mean of a key over seeds."""
    return sum(row[key] for row in rows) / len(rows)


def picked(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def learner(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Whether anything can be concluded about influence at all."""
    trained = picked(rows, method=NOTHING, how="trained")
    if not trained or trained[0].get("chance") is None:
        return
    least = min(row["accuracy"] - row["half_width"] for row in trained)
    chance = trained[0]["chance"]
    what = f"{data}: the learner's accuracy, lower end of the 95 % interval, the least of all seeds and levels"
    yield Verdict(what, f"{least:.3f}", f"> {chance:.3f}, chance", least > chance)


def learners(out: Path) -> Iterator[Verdict]:
    """The accuracy that learners should reach on classes, or curves, that they have not seen."""
    for record in accuracies.records(out).values():
        config, regression = record["config"], record["chance"] is None
        data = config["data"]
        shape = f"{data['shots']} points" if regression else f"{data['ways']}-way {data['shots']}-shot"
        of = "squared error on curves" if regression else "accuracy on classes"
        tests = [(shape, record["accuracy"], record["half_width"], config["least"])]
        tests += [
            (f"{data['ways']}-way {name}", *measured, bar)
            for (name, measured), bar in zip(record["also"].items(), config["also_least"], strict=False)
        ]
        for shape, value, half, bar in tests:
            if bar is not None:
                what = f"{config['learner']['kind']} on {data['dataset']}: {of} never trained on, {shape}"
                met = value <= bar if regression else value >= bar
                yield Verdict(what, f"{value:.3f} ± {half:.3f}", f"{'≤' if regression else '≥'} {bar:g}", met)


def by_rule(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the estimator that the rule named before any score was known, if it was run; otherwise of optimum."""
    own = [row for row in rows if row["method"] == row.get("picked")]
    return own or picked(rows, method=by.INFLUENCE)


def detection(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Damaged tasks found, and the lead over every baseline."""
    level = picked(rows, level="task", how="scored")
    exact = by_rule(level)
    if not exact:
        return
    area, bar = mean(exact, "auc"), FOUND_IN.get(data, FOUND)
    yield Verdict(f"{data}: ROC AUC of damaged tasks, {exact[0]['method']}", f"{area:.3f}", f"≥ {bar}", area >= bar)
    others = [row for row in level if row.get("ahead_low") is not None and row["method"] not in by.ESTIMATORS]
    names = dict.fromkeys(row["method"] for row in others)
    least = {name: mean(picked(others, method=name), "ahead_low") for name in names}
    if least:
        nearest = min(least, key=lambda name: least[name])
        yield Verdict(
            f"{data}: its lead over the nearest baseline ({nearest}), lower end of the 95 % interval",
            f"{least[nearest]:+.3f}",
            "> 0",
            least[nearest] > 0,
        )


def removed(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Accuracy after retraining without what the rule's estimator calls harmful, against random and the baselines."""
    level = [row for row in picked(rows, level="task", how="retrained") if row.get("each") is not None]
    own = [row for row in level if row["method"] == row.get("picked")]
    if not own:
        return
    for name in (RANDOM, *BASELINES):
        found = paired(level, own, lambda row, name=name: name)
        if found is None:
            continue
        what = f"{data}: accuracy after removing what {own[0]['method']} chose, minus the same for {name}"
        met = found[0] - found[1] > 0 if name == RANDOM else found[0] >= 0
        yield Verdict(what, signed(found), "interval above 0" if name == RANDOM else "≥ 0", met)


def alone(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Whether the derivative of the run predicts, for single tasks, what training without them finds."""
    for row in picked(rows, method=by.TRAJECTORY, how="scored"):
        what = f"{data}, one task left out: Spearman correlation of {by.TRAJECTORY} with training again"
        told = interval(*(row[f"spearman{end}"] for end in ("", "_low", "_high")))
        yield Verdict(what, told, f"≥ {TRUE}", row["spearman"] >= TRUE)


def worth(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Compares editing with training from scratch: in time and, for a prepared edit, in accuracy too."""
    edits = [row for row in rows if row["how"] in (EDIT, PREPARED)]
    for count, how in dict.fromkeys((row["removed"], row["how"]) for row in edits):
        own, scratch = picked(edits, removed=count, how=how), picked(rows, removed=count, how=AGAIN)
        times = mean(scratch, "seconds") / mean(own, "seconds")
        bar = TIMES if count == 1 else TIMES_MANY
        what = f"{data}, edited: training from scratch without {count} of {own[0]['of']} tasks over {how}, in time"
        if how == EDIT:
            yield Verdict(what, f"{times:.1f} ×", f"≥ {bar:g} ×", times >= bar)
            continue
        kept, half, *_ = difference(own, scratch)
        yield Verdict(
            f"{what}, and accuracy ({mean(own, 'preparation'):.1f} s of preparing left out)",
            f"{times:.0f} ×, {kept:+.4f} ± {half:.4f}",
            f"≥ {bar:g} ×, nothing lost beyond the interval",
            times >= bar and kept + half >= 0,
        )


def support(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """How well flipped support examples are found."""
    for name in (by.OWN, by.INFLUENCE):
        found = picked(rows, level="support", how="scored", method=name)
        if found:
            area = mean(found, "auc")
            what = f"{data}: ROC AUC of flipped support examples, {name}"
            yield Verdict(what, f"{area:.3f}", f"≥ {SUPPORT}", area >= SUPPORT)


def editing(data: str, rows: list[dict[str, Any]]) -> Iterator[Verdict]:
    """How much of the accuracy gained by retraining edit keeps, and what scores save."""
    level = picked(rows, level="task")
    edited, retrained = (picked(level, method=by.INFLUENCE, how=how) for how in ("edited", "retrained"))
    before, scored = picked(level, method=NOTHING), picked(level, method=by.INFLUENCE, how="scored")
    if edited and retrained and before:
        gain, kept = (mean(found, "accuracy") - mean(before, "accuracy") for found in (retrained, edited))
        what = f"{data}: accuracy gained by edit, of what retraining gains ({gain:+.4f})"
        yield Verdict(what, f"{kept:+.4f}", f"≥ {KEPT:.0%} of it", kept >= KEPT * gain if gain > 0 else None)
    if scored and before:
        times = mean(before, "seconds") * level[0]["of"] / mean(scored, "seconds")
        what = f"{data}: retraining without each task in turn over all scores, in time"
        yield Verdict(what, f"{times:.0f} ×", f"≥ {TIMES:g} ×", times >= TIMES)


def agreement(out: Path, size: str) -> Iterator[Verdict]:
    """Compares exact influence at the automatic damping with every other method at its default, by LDS."""
    ahead = {}
    for problem, name in AGREEMENT.items():
        rows = [row for row in picked(rows_of(out, name, size), default=True) if row["lds"] == row["lds"]]
        exact = picked(rows, method=EXACT)
        if not exact:
            continue
        for kind, names in (("baseline", None), ("surrogate of the total Hessian", SURROGATES)):
            others = {
                row["method"]: row
                for row in rows
                if not row["method"].startswith(EXACT) and (row["method"] in SURROGATES) == (names is not None)
            }
            best = max(others.values(), key=lambda row: row["lds"])
            met = bool(exact[0]["lds"] >= best["lds"])
            if names is None:
                ahead[problem] = met
            spread = interval(*(best[key] for key in ("lds", "lds_low", "lds_high")))
            yield Verdict(
                f"{problem}: LDS of exact influence against the best {kind}, {best['method']} ({spread})",
                interval(*(exact[0][key] for key in ("lds", "lds_low", "lds_high"))),
                f"≥ {best['lds']:.3f}",
                met,
            )
    if ahead:
        count = sum(ahead.values())
        what = "Problems on which exact influence is at or above every baseline by LDS"
        yield Verdict(what, f"{count} of {len(ahead)}", "≥ 2 of 3", count >= 2 and len(ahead) == len(AGREEMENT))


def speed(out: Path, size: str) -> Iterator[Verdict]:
    """Compares one removal by edit with training on."""
    rows = rows_of(out, "speed", size)
    for name in dict.fromkeys(row["edit"] for row in rows):
        ratios = sorted(row["ratio"] for row in picked(rows, edit=name))
        middle = ratios[len(ratios) // 2]
        what = f"One removal, {name}: training on to the same gap over edit, in time"
        yield Verdict(what, f"{middle:.1f} ×", f"≥ {TIMES:g} ×", middle >= TIMES)


def all_of(out: Path, size: str) -> list[Verdict]:
    """Verdicts on all promises whose experiments were run."""
    found: list[Verdict] = list(learners(out))
    for data, name in DETECTION.items():
        rows = rows_of(out, name, size)
        for kind in (learner, detection, removed, support, editing):
            found += kind(data, rows)
    for data, name in EXAMPLES.items():
        found += support(data, rows_of(out, name, size))
    for data, name in ALONE.items():
        found += alone(data, rows_of(out, name, size))
    for data, name in WORTH.items():
        found += worth(data, rows_of(out, name, size))
    for data, name in EDITING.items():
        found += editing(data, rows_of(out, name, size))
    return [*found, *agreement(out, size), *speed(out, size)]


def lines(out: Path, size: str, earlier: str = "") -> list[str]:
    """A table of the promises, for the report.

    Args:
      out: folder with the folders of the experiments.
      size: "small" or "full".
      earlier: the previous report; its lines are kept if there is nothing newer, since rows are not stored.
    """
    title, headers = "## What was promised", ("promise", "measured", "bar", "")
    words = {True: "met", False: "missed", None: "no gain to keep"}
    cells = [[v.what, v.measured, v.bar, words[v.met]] for v in all_of(out, size)]
    made = markdown(headers, cells)[2:]
    about = {_about(line) for line in made}
    _, _, table = earlier.partition(f"{title}\n")
    before = [line for line in table.partition("\n#")[0].splitlines() if line.startswith("| ")][2:]
    rows = [*made, *(line for line in before if _about(line) not in about)]
    return [title, "", *markdown(headers, [[""] * len(headers)])[:2], *rows] if rows else []


def _about(line: str) -> str:
    """The subject of a line of the table: the data, the learner, or the removal."""
    return line.partition(" | ")[0].partition(":")[0]
