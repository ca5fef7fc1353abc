"""A score file as one HTML page: ranking, pictures, diagnostics, and what was run. It loads nothing and trusts nothing.

Whatever comes from the file is escaped, and the page's own policy lets no script run but the one whose hash it names.
"""

import base64
import hashlib
import html
import io
import json
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import metainfluence as mi
from metainfluence.diagnosis import remedy
from metainfluence.lab.data.places import Place
from metainfluence.lab.show.printing import facts
from metainfluence.scoring import Source
from metainfluence.scoring._table import info_of

ROLES = ("task", "support", "query")
LONGEST_CELL = 200
EXAMPLES_PER_TASK = 5


class Gallery(NamedTuple):
    """Where pictures come from.

    Attributes:
      source: the tasks.
      images: (a task's support or query) -> [n, H, W] or [n, H, W, C] from 0 to 1.
      place: (row of the score file) -> where its datum is in the source.
    """

    source: Source
    images: Callable[[Any], Any]
    place: Callable[[int], Place]

    def pictures(self, row: int) -> str:
        """An example, or some of a task's query examples, as the learner sees them.

        Raises:
          ValueError: images of a shape that no picture has.
        """
        task, side, example = self.place(row)
        single = self.source[task]
        side = side or "query"
        mask = getattr(single, f"{side}_mask")
        images = np.asarray(self.images(getattr(single, side)))
        images = images if mask is None else images[np.asarray(mask)]
        if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
            raise ValueError(f"images: expected [n, H, W] or [n, H, W, 3], got shape {images.shape}")
        if example is None:
            few = np.unique(np.linspace(0, len(images) - 1, EXAMPLES_PER_TASK).astype(int))
            return "".join(_img(images[k]) for k in few)
        if example is None or example >= len(images):
            raise ValueError(f"scores: expected {len(images)} {side} examples in task {task}, got more")
        return _img(images[example])


def _img(pixels: np.ndarray) -> str:
    levels = np.clip(np.nan_to_num(pixels) * 255, 0, 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.ndim == 3 and levels.shape[-1] == 1 else levels).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def page(
    table: mi.scoring.ScoreTable,
    *,
    title: str,
    most: int = 200,
    gallery: Gallery | None = None,
    meta_params: Any = None,
) -> str:
    """The page.

    Args:
      table: as read from a score file.
      title: of the page.
      most: rows of each role that are shown, half of them from either end of the ranking.
      gallery: for pictures; None for none.
      meta_params: λ, to which its distance from stationarity is then relative.

    Raises:
      ValueError: metadata that is not a score file's.
    """
    folder = files("metainfluence.lab.show") / "page"
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    template = string.Template((folder / "page.html").read_text(encoding="utf-8"))
    shown = chosen(table, most)
    return template.substitute(
        title=_text(title),
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        summary="".join(f"<p>{line}</p>" for line in summary(table, shown, gallery)),
        diagnostics=diagnostics(table.metadata, meta_params),
        headings=headings(table, gallery),
        rows="".join(rows(table, shown, gallery)),
        ran=ran(table.metadata),
    )


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _text(value: Any) -> str:
    """Anything as text that cannot be markup."""
    if value is None or value is np.ma.masked:
        return "–"
    written = str(value)
    return html.escape(written if len(written) <= LONGEST_CELL else f"{written[:LONGEST_CELL]} …")


def chosen(table: mi.scoring.ScoreTable, most: int) -> np.ndarray:
    """Rows that are shown, by role and rank, as [(row, rank)]."""
    found = []
    for role in ROLES:
        rows = np.flatnonzero(table.role == role)
        order = rows[np.argsort(table.score[rows], kind="stable")]
        ranks = np.arange(len(order))
        keep = (ranks < (most + 1) // 2) | (ranks >= len(order) - most // 2)
        found.append(np.stack([order[keep], ranks[keep] + 1], axis=1))
    return np.concatenate(found)


def summary(table: mi.scoring.ScoreTable, shown: np.ndarray, gallery: Gallery | None) -> Iterator[str]:
    """What there is, in sentences."""
    counts = {role: int(np.sum(table.role == role)) for role in ROLES}
    harmful = {role: int(np.sum((table.role == role) & (table.score < 0))) for role in ROLES}
    yield (
        f"{counts['task']} tasks, {counts['support']} support and {counts['query']} query examples were scored; "
        f"removing any one of {harmful['task']} tasks, {harmful['support']} support and {harmful['query']} query "
        "examples is predicted to lower the target."
    )
    yield (
        "A score is the predicted change of the target when the datum is removed: positive, it helps; negative, it "
        "harms. Ranks count from the most harmful datum of a role."
    )
    if len(shown) < len(table.score):
        yield f"Shown are {len(shown)} of {len(table.score)} rows, from both ends of each role's ranking."

    if gallery:
        yield f"Pictures are what the learner saw; those of a task are up to {EXAMPLES_PER_TASK} of its query examples."


def headings(table: mi.scoring.ScoreTable, gallery: Gallery | None) -> str:
    """The heading cells; a click sorts."""
    names = ["rank", "role", "task", "example", "score", *table.labels]
    cells = [f'<th aria-sort="none"><button type="button">{_text(name)}</button></th>' for name in names]
    return "".join([*cells, "<th>picture</th>"] if gallery else cells)


def rows(table: mi.scoring.ScoreTable, shown: np.ndarray, gallery: Gallery | None) -> Iterator[str]:
    """The body's rows."""
    for row, rank in shown.tolist():
        score = float(table.score[row])
        kind = "harms" if score < 0 else "helps"
        cells = [
            f'<td class="number">{rank}</td>',
            *(f"<td>{_text(column[row])}</td>" for column in (table.role, table.task, table.example)),
            f'<td class="number {kind}" data-value="{score!r}">{score:+.3e}</td>',
            *(f"<td>{_text(column[row])}</td>" for column in table.labels.values()),
        ]
        if gallery:
            cells.append(f'<td class="picture">{gallery.pictures(row)}</td>')
        yield f"<tr>{''.join(cells)}</tr>\n"


def diagnostics(metadata: Mapping[str, Any], meta_params: Any) -> str:
    """What the solve says of itself, and which error dominates.

    Raises:
      ValueError: no report on a solve.
    """
    try:
        info = info_of(metadata["solve"])
        budget, told = mi.error_budget(info, meta_params), facts(info)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"scores: expected a report on the solve in the file's metadata, got {error}") from error
    terms = [
        ("unfinished solve", budget.outer_residual, "bound on the solution's relative error by its residual"),
        ("rounding", budget.precision, "estimate of what the precision leaves"),
        ("inner minimisers", budget.inner_residual, "estimate of what tasks that are not adapted to the end leave"),
        (
            "distance from stationarity",
            budget.outer_stationarity,
            f"bound on the distance to the optimum presumed, {'not ' if meta_params is None else ''}relative to ‖λ‖",
        ),
    ]
    good = int(info.status) == mi.SolveStatus.CONVERGED
    verdict = "The solve converged." if good else f"The solve failed: {remedy(info)}."
    lines = [(name, value, meaning) for name, value, meaning in told]
    errors = [(name, f"{value:.1e}", meaning) for name, value, meaning in terms]
    skipped = metadata.get("skipped")
    left_out = "".join(f"<li>{_text(each)}</li>" for each in skipped) if isinstance(skipped, list) else ""
    return "".join(
        [
            f'<p class="{"good" if good else "bad"}">{_text(verdict)}</p>',
            f"<p>Error budget: {html.escape(budget.advice)}.</p>",
            _table(lines),
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
    told = {name: value for name, value in metadata.items() if name not in ("solve", "skipped")}
    return html.escape(json.dumps(told, indent=2, ensure_ascii=False))
