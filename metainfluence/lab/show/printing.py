"""What the commands print: results on standard output, progress on standard error."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console

import metainfluence as mi


def say(text: str) -> None:
    """Prints a line at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def progress_console() -> Console:
    """Where progress goes: bars on a terminal, else plain lines."""
    return Console(stderr=True, highlight=False)


def facts(info: mi.SolveInfo) -> list[tuple[str, str, str]]:
    """What a solve says of itself: name, value, and what that means."""
    met = (
        ("products with the total Hessian", info.num_matvecs, "d", "what the solve took"),
        ("relative residual", info.relative_residual, ".1e", "‖b − Hx‖ / ‖b‖, recomputed at the end"),
        ("smallest curvature", info.min_curvature, ".1e", "not positive: H has directions along which λ is no minimum"),
        ("damping", info.damping, ".1e", "added to every eigenvalue of H"),
        ("outer gradient norm", info.outer_gradient_norm, ".1e", "‖D_λF‖: how far λ is from the optimum presumed"),
        (
            "inner gradient norm",
            info.inner_gradient_norm,
            ".1e",
            "‖∂_θ L_in‖, the largest: how well tasks were adapted to",
        ),
    )
    status = mi.SolveStatus(int(info.status))
    lines = [("status", status.name, "whether the solve reached what was asked for")]
    return lines + [
        (name, format(value.item(), form), meaning) for name, value, form, meaning in met if value is not None
    ]


def say_budget(result: Any, meta_params: Any) -> None:
    """Prints which error dominates, and what to do about it."""
    say(f"Error budget (distance from stationarity relative to ‖λ‖): {mi.error_budget(result, meta_params).advice}")


def check_solve(result: Any) -> None:
    """As `metainfluence.check`, without the budget and its warnings, which `say_budget` has printed.

    Raises:
      SolveError: as `check`.
    """
    try:
        with warnings.catch_warnings():
            for told in (mi.SlopeWarning, mi.CouplingWarning):
                warnings.simplefilter("ignore", told)
            mi.check(result)
    except mi.SolveError as error:
        raise mi.SolveError(str(error).partition(" Error budget: ")[0]) from error


def say_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints cells in columns, the last one ragged."""
    lines = [list(map(str, row)) for row in (headers, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(headers))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
