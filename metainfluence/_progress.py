"""Signs of life of a long run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

_LOG = logging.getLogger("metainfluence")
_SECONDS_BETWEEN_LINES = 10.0
_BEGINNING = "{phase}: reading and compiling"


class Progress(NamedTuple):
    """Where a run is.

    Attributes:
      phase: "gradient", "damping", "solve" or "scores".
      product: Hessian products of this phase so far.
      done: batches done in this pass.
      total: batches of this pass.
      residual: the solver's relative residual, where it reports one.
      min_curvature: the smallest curvature that it has met.
      seconds_left: of this pass.
    """

    phase: str
    product: int = 0
    done: int = 0
    total: int = 0
    residual: float | None = None
    min_curvature: float | None = None
    seconds_left: float | None = None

    def __str__(self) -> str:
        """One line."""
        parts = [self.phase]
        if self.product:
            parts.append(f"product {self.product}")
        parts.append(f"batch {self.done}/{self.total}")
        if self.residual is not None:
            parts.append(f"residual {self.residual:.1e}")
        if self.min_curvature is not None:
            parts.append(f"smallest curvature {self.min_curvature:.1e}")
        if self.seconds_left is not None:
            parts.append(f"{self.seconds_left:.0f} s left")
        return ", ".join(parts)


class Reporter:
    """Keeps track of where a run is, and reports it.

    Args:
      tell: called after every batch.
      begin: called with the name of each phase, whose programs are compiled before its first batch is done.
    """

    def __init__(self, tell: Callable[[Progress], None], begin: Callable[[str], None] = lambda phase: None):
        self._tell, self._begin = tell, begin
        self._now = Progress("gradient")
        self._start = time.perf_counter()

    def phase(self, name: str) -> None:
        """A new phase begins."""
        self._now = Progress(name)
        self._begin(name)

    def solved(self, residual: float | None, min_curvature: float) -> None:
        """A solver's step is done."""
        self._now = self._now._replace(residual=residual, min_curvature=min_curvature)
        self._tell(self._now)

    def batch(self, done: int, total: int) -> None:
        """A batch of a pass is done."""
        now = time.perf_counter()
        if done <= 1:
            self._start = now
            product = self._now.product + (self._now.phase in ("damping", "solve"))
            self._now = self._now._replace(product=product, seconds_left=None)
        else:
            self._now = self._now._replace(seconds_left=(now - self._start) / (done - 1) * (total - done))
        self._now = self._now._replace(done=done, total=total)
        self._tell(self._now)


@contextlib.contextmanager
def reporter(progress: bool | Callable[[Progress], None]) -> Iterator[Reporter]:
    """True shows a bar, or lines where stderr is no terminal; without rich, lines in the log `metainfluence`."""
    if progress is False:
        yield Reporter(lambda now: None)
        return
    if progress is not True:
        yield Reporter(progress)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield Reporter(_now_and_then(lambda line: _LOG.info("%s", line)))
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Reporter(_now_and_then(lambda line: console.print(line, highlight=False)))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(_BEGINNING.format(phase="gradient"))
        yield Reporter(
            lambda now: bar.update(task, description=str(now), completed=now.done, total=now.total),
            lambda phase: bar.update(task, description=_BEGINNING.format(phase=phase), completed=0),
        )


def _now_and_then(write: Callable[[str], None]) -> Callable[[Progress], None]:
    last = [time.perf_counter()]

    def tell(now: Progress) -> None:
        if time.perf_counter() - last[0] > _SECONDS_BETWEEN_LINES:
            last[0] = time.perf_counter()
            write(str(now))

    return tell
