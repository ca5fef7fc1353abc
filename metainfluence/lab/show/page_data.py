"""What a report's page shows, as plain data for its script: scores as packed floats, names, few pictures."""

import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import metainfluence as mi
from metainfluence.lab.show.gallery import Shown

ROLES = ("task", "support", "query")
LONGEST_CELL = 200
MOST_WORST = 20_000  # scores of a role that the slider can remove
MOST_EXAMPLES = 20_000  # listed examples of a side; if there are more, those of the shown tasks and both ends
PICTURE_BYTES = 1_600_000
BINS = 72
FEW = 10  # examples of a side that are visible without a click, as in page.js


class Measured(NamedTuple):
    """What was measured without the worst of a role.

    Attributes:
      role: role of what was removed.
      removed: how many of the worst were removed.
      target: change of the target.
      after: sentence about the metric of `metainfluence evaluate`; "" if it did not run.
    """

    role: str
    removed: int
    target: float
    after: str = ""


def cell(value: Any) -> str:
    """Anything as text of bounded length."""
    if value is None or value is np.ma.masked:
        return "–"
    written = str(value)
    return written if len(written) <= LONGEST_CELL else f"{written[:LONGEST_CELL]} …"


def ranked(table: mi.scoring.ScoreTable, role: str) -> np.ndarray:
    """Rows of a role, from the most harmful to the most helpful."""
    rows = np.flatnonzero(table.role == role)
    return rows[np.argsort(table.score[rows], kind="stable")]


def ends(ranks: np.ndarray, most: int) -> np.ndarray:
    """The first and the last of a ranking, `most` in all, from the ends inwards: ranks 0, −1, 1, −2."""
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
    """The data that the page's script shows."""
    order = {role: ranked(table, role) for role in ROLES}
    position = {cell(table.task[row]): rank for rank, row in enumerate(order["task"].tolist())}
    shown = ends(np.arange(len(order["task"])), most)
    names = [cell(table.task[row]) for row in order["task"][shown].tolist()]
    pictures = _Pictures(example)
    listed = {side: _listed(table, order[side], names, most) for side in ROLES[1:]}
    # What is visible without a click comes first, from both ends of the ranking, while there is room.
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
                "task": [position.get(cell(table.task[row]), -1) for row in listed[side].tolist()],
                "ids": [cell(table.example[row]) for row in listed[side].tolist()],
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
    """Pictures and texts of rows, while there is room."""

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
            self.texts[row] = cell(found.text)
            self.room -= len(self.texts[row])

    def text(self, row: int) -> str:
        return self.texts.get(row, "")


def _by_task(table: mi.scoring.ScoreTable, rows: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows.tolist():
        found.setdefault(cell(table.task[row]), []).append(row)
    return found


def _listed(table: mi.scoring.ScoreTable, order: np.ndarray, names: Sequence[str], most: int) -> np.ndarray:
    """The rows of a side that are listed, by rank."""
    if len(order) <= MOST_EXAMPLES:
        return order
    kept = set(names)
    own = np.array([cell(task) in kept for task in table.task[order].tolist()], bool)
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
    """Edges of equal bins; 0 is an edge if scores have both signs."""
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
    """Scores, and the file's own columns with each distinct value stored once."""
    columns = []
    for name, values in table.labels.items():
        codes: dict[str, int] = {}
        found = [codes.setdefault(cell(values[row]), len(codes)) for row in rows.tolist()]
        if set(codes) != {"–"}:
            columns.append({"name": cell(name), "values": list(codes), "codes": found})
    return {"scores": _floats(table.score[rows]), "columns": columns}


def _floats(values: Any) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()
