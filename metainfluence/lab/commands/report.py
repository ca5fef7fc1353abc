"""`metainfluence report`: shows a score file as one page for any browser."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import metainfluence as mi
from metainfluence._disk import write_atomically
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import _tables as tables
from metainfluence.lab.commands.edit import CHANGE, located
from metainfluence.lab.commands.evaluate import EVALUATION
from metainfluence.lab.data.places import locator
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import OutFile, Range
from metainfluence.lab.show import html_report
from metainfluence.lab.show.gallery import Shown, gallery
from metainfluence.lab.show.page_data import ROLES, Measured, ranked
from metainfluence.lab.show.printing import say


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write scores, the worst and the best tasks with their examples, and diagnostics as one HTML page."""

    scores: Path | None = None
    """Score file written by `metainfluence score`."""
    run: Path | None = None
    """Folder that `metainfluence train` wrote, for the examples; by default the one that holds the score file."""
    problem: str | None = None
    """Instead of a run: MODULE:FUNCTION, as for `metainfluence score`; it may return `images` or `text`."""
    most: Annotated[int, Range(2)] = 24
    """Tasks shown with their examples: half of them the most harmful, half the most helpful."""
    pictures: bool = True
    """Show the examples, as pictures or text; otherwise their ids."""
    out: OutFile | None = None
    """Page to write; by default the score file's name with .html."""


def run(config: ReportConfig) -> None:
    """Writes the page.

    Raises:
      ConfigError: no score file is named.
      ValueError: it is not a score file.
      FileNotFoundError: it does not exist.
    """
    if config.scores is None:
        raise ConfigError("expected a score file: metainfluence report scores.parquet")
    table = tables.read(config.scores)
    folder = located(config.scores, config.run, config.problem)
    job = runs.load(folder, config.problem) if config.pictures and (folder or config.problem) else None
    example: Callable[[int], Shown] | None = None
    if job is not None:
        example = gallery(job.source, locator(job.source, table), images=job.images, text=job.text)
    page = html_report.page(
        table,
        most=config.most,
        example=example,
        measured=measured(config.scores.parent, table),
        meta_params=None if job is None else job.meta_params,
    )
    out = config.out or config.scores.with_suffix(".html")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode(errors="replace"))
    kind = "without pictures" if job is None or job.images is None else "with pictures"
    say(f"Wrote {out}, {len(page) / 1e6:.1f} MB: {kind}")


def measured(folder: Path, table: mi.scoring.ScoreTable) -> Measured | None:
    """What `edit` and `evaluate` measured without the worst of a role; None if they did not, or for other scores.

    Raises:
      ValueError: one of their files is invalid.
    """
    change = _read(folder / CHANGE)
    run: Any = table.metadata.get("run")
    if change is None or not isinstance(run, dict) or change.get("meta_params") != run.get("meta_params"):
        return None
    role, removed = change.get("role"), change.get("removed")
    if role not in ROLES or not isinstance(removed, list):
        return None
    worst = ranked(table, role)[: len(removed)].tolist()
    names = {str(table.task[row]) + ("" if role == "task" else f":{table.example[row]}") for row in worst}
    if names != set(map(str, removed)):
        return None
    target = _finite(folder / CHANGE, change, "target after") - _finite(folder / CHANGE, change, "target before")
    found = _read(folder / EVALUATION)
    after = ""
    if found is not None and found.get("edited") is not None and found.get("edited") == change.get("edited"):
        place = folder / EVALUATION
        rows = {
            name: found[name] for name in ("before", "after", "after - before") if isinstance(found.get(name), dict)
        }
        if len(rows) == 3:
            before, later, by = (_finite(place, rows[name], "mean") for name in rows)
            half = _finite(place, rows["after - before"], "half_width")
            metric = str(found.get("metric")).capitalize()
            went = f"{before:.4f} → {later:.4f} ({by:+.4f} ± {half:.4f})"
            after = f"{metric} on {found.get('test_tasks')} test tasks: {went}."
    return Measured(role, len(removed), target, after)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes()) if path.exists() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a file that metainfluence wrote, got {error}") from error
    return found if isinstance(found, dict) else None


def _finite(path: Path, found: dict[str, Any], name: str) -> float:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{path}: {name}: expected a finite number, got {value!r}")
    return float(value)
