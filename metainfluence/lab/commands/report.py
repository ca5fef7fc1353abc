"""`metainfluence report`: a score file as one page that any browser shows."""

import dataclasses
from pathlib import Path

from metainfluence.files import write_atomically
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import _tables as tables
from metainfluence.lab.commands.config_files import ConfigError
from metainfluence.lab.commands.edit import located
from metainfluence.lab.data.places import locator
from metainfluence.lab.show import html_report
from metainfluence.lab.show.printing import say


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Write a score file's ranking, pictures and diagnostics as one HTML page that needs no network."""

    scores: Path | None = None
    """Score file of `metainfluence score`."""
    run: Path | None = None
    """Folder that `metainfluence train` wrote, for the pictures; none for that of the score file."""
    problem: str | None = None
    """Instead of a run: MODULE:FUNCTION, as for `metainfluence score`; it returns `images`."""
    most: int = 200
    """Rows of each role: half of them the most harmful, half the most helpful."""
    pictures: bool = True
    """Show the examples, where the source has images."""
    out: Path | None = None
    """Page to write; none for the score file's name with .html."""


def run(config: ReportConfig) -> None:
    """Writes the page.

    Raises:
      ConfigError: no score file is named.
      ValueError: it is none.
      FileNotFoundError: it is not there.
    """
    if config.scores is None:
        raise ConfigError("expected a score file: metainfluence report scores.parquet")
    if config.most < 2:
        raise ConfigError(f"--most: expected at least 2, got {config.most}")
    table = tables.read(config.scores)
    folder = located(config.scores, config.run, config.problem)
    job = runs.load(folder, config.problem) if config.pictures and (folder or config.problem) else None
    gallery, meta_params = None, None
    if job is not None:
        meta_params = job.meta_params
        if job.images is not None:
            gallery = html_report.Gallery(job.source, job.images, locator(job.source, table))
    page = html_report.page(table, title=config.scores.name, most=config.most, gallery=gallery, meta_params=meta_params)
    out = config.out or config.scores.with_suffix(".html")
    write_atomically(out, page.encode(errors="replace"))
    say(f"Wrote {out}, {len(page) / 1e6:.1f} MB: {'with' if gallery else 'without'} pictures")
