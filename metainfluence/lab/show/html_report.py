"""A score file as one HTML page that loads nothing and trusts nothing.

What comes from the file is escaped, and the page's own policy lets no script run but the one whose hash it names. All tasks are in
the page, by their scores as packed floats; examples and pictures are those of the worst and the best tasks.
"""

import base64
import hashlib
import html
import json
import string
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

import metainfluence as mi
from metainfluence.diagnosis import remedy
from metainfluence.lab.show.gallery import Shown
from metainfluence.lab.show.printing import facts
from metainfluence.scoring._table import info_of

ROLES = ("task", "support", "query")
LONGEST_CELL = 200
MOST_WORST = 20_000  # scores of a role that the slider can take away
MOST_EXAMPLES = 20_000  # of a side that are listed; where there are more, those of the shown tasks and both ends
PICTURE_BYTES = 1_600_000
BINS = 72
FEW = 10  # examples of a side that are seen without a click, as in page.js


class Measured(NamedTuple):
    """What was measured without the worst of a role.

    Attributes:
      role: of what was removed.
      removed: how many of the worst were.
      target: change of the target.
      after: sentence about the metric of `metainfluence evaluate`; "" where it did not run.
    """

    role: str
    removed: int
    target: float
    after: str = ""


def page(
    table: mi.scoring.ScoreTable,
    *,
    title: str | None = None,
    most: int = 24,
    example: Callable[[int], Shown] | None = None,
    measured: Measured | None = None,
    meta_params: Any = None,
) -> str:
    """The page.

    Args:
      table: as read from a score file.
      title: of the page; None for what the file says it is about.
      most: tasks that are shown with their examples, half of them from either end of the ranking; and so of single
        examples.
      example: (row about an example) -> its picture or text; None for none.
      measured: without the worst, beside what is predicted.
      meta_params: λ, to which its distance from stationarity is then relative.

    Raises:
      ValueError: metadata that is not a score file's.
    """
    folder = files("metainfluence.lab.show") / "page"
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    template = string.Template((folder / "page.html").read_text(encoding="utf-8"))
    info, budget = told(table.metadata, meta_params)
    return template.substitute(
        title=_text(subject(table) if title is None else title),
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        verdict=_text(verdict(table, info, budget)),
        judged="good" if believed(info, budget) else "bad",
        estimator=_text(estimator(table.metadata, info)),
        diagnostics=diagnostics(table.metadata, info, budget, meta_params is not None),
        ran=ran(table.metadata),
        data=html.escape(json.dumps(packed(table, most, example, measured), ensure_ascii=False), quote=False),
    )


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _cell(value: Any) -> str:
    """Anything as text of bounded length."""
    if value is None or value is np.ma.masked:
        return "–"
    written = str(value)
    return written if len(written) <= LONGEST_CELL else f"{written[:LONGEST_CELL]} …"


def _text(value: Any) -> str:
    """Anything as text that cannot be markup."""
    return html.escape(_cell(value))


def told(metadata: Mapping[str, Any], meta_params: Any) -> tuple[mi.SolveInfo, mi.ErrorBudget]:
    """What the solve says of itself, and its budget of errors.

    Raises:
      ValueError: no report on a solve.
    """
    try:
        info = info_of(metadata["solve"])
        facts(info)
        return info, mi.error_budget(info, meta_params)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"scores: expected a report on the solve in the file's metadata, got {error}") from error


def subject(table: mi.scoring.ScoreTable) -> str:
    """What the page is about."""
    count = int(np.sum(table.role == "task"))
    run: Any = table.metadata.get("run")
    try:
        name = str(run["training"]["data"]["dataset"])
    except (LookupError, TypeError):
        name = ""
    return f"Which of {count} {name + ' ' if name else ''}tasks help, and which harm"


def believed(info: mi.SolveInfo, budget: mi.ErrorBudget) -> bool:
    """Whether the solve converged and no source of error is above a tenth."""
    worst = getattr(budget, budget.dominant)
    return int(info.status) == mi.SolveStatus.CONVERGED and bool(budget.min_curvature > 0) and bool(worst <= 0.1)


def verdict(table: mi.scoring.ScoreTable, info: mi.SolveInfo, budget: mi.ErrorBudget) -> str:
    """What was found, and whether to believe it, in one sentence."""
    scores = table.score[table.role == "task"]
    harmful = scores[scores < 0]
    if len(harmful):
        found = (
            f"{len(harmful)} of {len(scores)} tasks harm, and without them the target is predicted to change by "
            f"{signed(float(harmful.sum()))}"
        )
    else:
        found = f"None of {len(scores)} tasks harms"
    worst = float(getattr(budget, budget.dominant))
    source = {
        "outer_residual": "the unfinished solve",
        "precision": "rounding",
        "inner_residual": "tasks that are not adapted to the end",
        "outer_stationarity": "λ that is not trained to the end",
    }.get(budget.dominant, budget.dominant)
    if int(info.status) != mi.SolveStatus.CONVERGED:
        return f"{found}; do not believe it: the solve failed."
    if not budget.min_curvature > 0:
        return f"{found}; do not believe the numbers: λ is no minimum along a direction that the solve met."
    if believed(info, budget):
        return f"{found}; believe it: no source of error that was looked for is above {max(worst, 1e-9):.1g}."
    return f"{found}; believe the order rather than the numbers: {source} may shift them by {worst:.1g}, relatively."


def signed(value: float) -> str:
    """A number as the page's script writes it."""
    digits, _, power = f"{abs(value):.2e}".partition("e")
    return f"{'−' if value < 0 else '+'}{digits}e{int(power)}".replace("e-", "e−")


def estimator(metadata: Mapping[str, Any], info: mi.SolveInfo) -> str:
    """Which estimator the scores are by, and why."""
    run: Any = metadata.get("run")
    asked = run.get("score") if isinstance(run, Mapping) else None
    asked = asked if isinstance(asked, Mapping) else {}
    named = metadata.get("estimator")
    if isinstance(named, str):
        return f"Estimator: {named}."
    parts = [f"{asked.get('curvature', 'the file does not say which')} curvature"]
    if "solver" in asked:
        parts.append(f"solver {asked['solver']}")
    if info.damping is not None:
        chosen = " by the rule" if asked.get("damping") == "auto" else ""
        parts.append(f"damping {float(info.damping):.1e}{chosen}")
    why = ""
    if info.outer_gradient_norm is not None:
        why = f", which takes λ for a minimum of F; ‖D_λF‖ is {float(info.outer_gradient_norm):.1e}"
    return f"Estimator: the response of an optimum ({', '.join(parts)}){why}."


def diagnostics(metadata: Mapping[str, Any], info: mi.SolveInfo, budget: mi.ErrorBudget, relative: bool) -> str:
    """What the solve says of itself, and which error dominates."""
    terms = [
        ("unfinished solve", budget.outer_residual, "bound on the solution's relative error by its residual"),
        ("rounding", budget.precision, "estimate of what the precision leaves"),
        ("inner minimisers", budget.inner_residual, "estimate of what tasks that are not adapted to the end leave"),
        (
            "distance from stationarity",
            budget.outer_stationarity,
            f"bound on the distance to the optimum presumed, {'' if relative else 'not '}relative to ‖λ‖",
        ),
    ]
    good = int(info.status) == mi.SolveStatus.CONVERGED
    line = "The solve converged." if good else f"The solve failed: {remedy(info)}."
    errors = [(name, f"{value:.1e}", meaning) for name, value, meaning in terms]
    skipped = metadata.get("skipped")
    left_out = "".join(f"<li>{_text(each)}</li>" for each in skipped) if isinstance(skipped, list) else ""
    return "".join(
        [
            f'<p class="{"good" if good else "bad"}">{_text(line)}</p>',
            f"<p>Error budget: {html.escape(budget.advice)}.</p>",
            _table(facts(info)),
            "<h3>Error budget, by source</h3>",
            _table(errors),
            f"<h3>Tasks left out</h3><ul>{left_out}</ul>" if left_out else "",
        ]
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{_text(cell)}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def ran(metadata: Mapping[str, Any]) -> str:
    """What the file says of how it was made, all of it."""
    kept = {name: value for name, value in metadata.items() if name not in ("solve", "skipped")}
    return html.escape(json.dumps(kept, indent=2, ensure_ascii=False))


def ranked(table: mi.scoring.ScoreTable, role: str) -> np.ndarray:
    """Rows of a role, from the most harmful to the most helpful."""
    rows = np.flatnonzero(table.role == role)
    return rows[np.argsort(table.score[rows], kind="stable")]


def ends(ranks: np.ndarray, most: int) -> np.ndarray:
    """The first and the last of a ranking, `most` in all, those at the ends first: 0, −1, 1, −2 …"""
    count = len(ranks)
    if count <= most:
        return ranks
    worst, best = ranks[: (most + 1) // 2], ranks[count - most // 2 :][::-1]
    return np.array([*(each for pair in zip(worst, best, strict=False) for each in pair), *worst[len(best) :]], int)


def packed(
    table: mi.scoring.ScoreTable,
    most: int,
    example: Callable[[int], Shown] | None,
    measured: Measured | None,
) -> dict[str, Any]:
    """What the page's script shows."""
    order = {role: ranked(table, role) for role in ROLES}
    position = {_cell(table.task[row]): rank for rank, row in enumerate(order["task"].tolist())}
    shown = ends(np.arange(len(order["task"])), most)
    names = [_cell(table.task[row]) for row in order["task"][shown].tolist()]
    pictures = _Pictures(example)
    listed = {side: _listed(table, order[side], names, most) for side in ROLES[1:]}
    # What can be seen without a click comes first, from both ends of the ranking, as long as there is room.
    own = {side: _by_task(table, listed[side]) for side in ROLES[1:]}
    each_task = [own[side].get(name, []) for name in names for side in ROLES[1:]]
    at_the_ends = [ends(order[side], most).tolist() for side in ROLES[1:]]
    for rows in [*(rows[:FEW] for rows in each_task), *at_the_ends, *(rows[FEW:] for rows in each_task)]:
        for row in rows:
            pictures.add(row)
    return {
        "roles": [_role(table, role, order[role]) for role in ROLES],
        "tasks": {"ids": list(position), **_columns(table, order["task"])},
        "examples": {
            side: {
                "task": [position.get(_cell(table.task[row]), -1) for row in listed[side].tolist()],
                "ids": [_cell(table.example[row]) for row in listed[side].tolist()],
                "rank": np.searchsorted(table.score[order[side]], table.score[listed[side]]).tolist(),
                "picture": [pictures.index.get(row, -1) for row in listed[side].tolist()],
                "text": [pictures.text(row) for row in listed[side].tolist()],
                **_columns(table, listed[side]),
            }
            for side in ROLES[1:]
        },
        "pictures": pictures.found,
        "shown": shown.tolist(),
        "measured": None if measured is None else measured._asdict(),
    }


class _Pictures:
    """Pictures and texts of rows, as long as there is room."""

    def __init__(self, example: Callable[[int], Shown] | None):
        self.example, self.room = example, PICTURE_BYTES
        self.found: list[str] = []
        self.index: dict[int, int] = {}
        self.texts: dict[int, str] = {}

    def add(self, row: int) -> None:
        if self.example is None or self.room <= 0 or row in self.index or row in self.texts:
            return
        found = self.example(row)
        if found.picture is not None:
            self.index[row] = len(self.found)
            self.found.append(found.picture)
            self.room -= len(found.picture)
        if found.text is not None:
            self.texts[row] = _cell(found.text)
            self.room -= len(self.texts[row])

    def text(self, row: int) -> str:
        return self.texts.get(row, "")


def _by_task(table: mi.scoring.ScoreTable, rows: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows.tolist():
        found.setdefault(_cell(table.task[row]), []).append(row)
    return found


def _listed(table: mi.scoring.ScoreTable, order: np.ndarray, names: Sequence[str], most: int) -> np.ndarray:
    """The rows of a side that are listed, by rank."""
    if len(order) <= MOST_EXAMPLES:
        return order
    kept = set(names)
    own = np.array([_cell(task) in kept for task in table.task[order].tolist()], bool)
    own[ends(np.arange(len(order)), 2 * (MOST_EXAMPLES // 20))] = True
    return order[own]


def _role(table: mi.scoring.ScoreTable, role: str, order: np.ndarray) -> dict[str, Any]:
    scores = np.asarray(table.score[order], float)
    finite = scores[np.isfinite(scores)]
    edges = _edges(finite)
    return {
        "name": role,
        "count": len(order),
        "harmful": int(np.sum(scores < 0)),
        "worst": _floats(scores[:MOST_WORST]),
        "edges": edges.tolist(),
        "counts": np.histogram(finite, edges)[0].tolist() if len(edges) > 1 else [],
    }


def _edges(scores: np.ndarray) -> np.ndarray:
    """Edges of equal bins, of which 0 is one where scores have both signs."""
    if not len(scores):
        return np.zeros(0)
    low, high = float(scores.min()), float(scores.max())
    if not low < high:
        return np.array([low - 0.5, high + 0.5]) if abs(low) < 1 else np.array([low, low + abs(low)])
    if low >= 0 or high <= 0:
        return np.linspace(low, high, BINS + 1)
    below = min(max(round(BINS * -low / (high - low)), 1), BINS - 1)
    width = max(-low / below, high / (BINS - below))
    return width * np.arange(-np.ceil(-low / width - 1e-9), np.ceil(high / width - 1e-9) + 1)


def _columns(table: mi.scoring.ScoreTable, rows: np.ndarray) -> dict[str, Any]:
    """Scores, and the file's own columns with every distinct value once."""
    columns = []
    for name, values in table.labels.items():
        codes: dict[str, int] = {}
        found = [codes.setdefault(_cell(values[row]), len(codes)) for row in rows.tolist()]
        if set(codes) != {"–"}:
            columns.append({"name": _cell(name), "values": list(codes), "codes": found})
    return {"scores": _floats(table.score[rows]), "columns": columns}


def _floats(values: Any) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
