"""What the demo prints; all numbers are passed in."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import metainfluence as mi
from metainfluence.evaluation import found_at, roc_auc
from metainfluence.lab.data.fewshot import CLEAN, FLIPPED, SHORTCUT, FewShotTasks
from metainfluence.lab.show.printing import OF_DEMO, in_options

SHARES = (0.1, 0.2, 0.4)


class Removal(NamedTuple):
    """One way to find the held-out loss without the flagged tasks, and its cost."""

    name: str
    held_out_loss: float
    compile_seconds: float
    run_seconds: float


def console() -> Console:
    """A console that does not wrap tables when it writes to a file or a pipe."""
    # Paths are not markup.
    plain = Console(highlight=False, markup=False, emoji=False)
    return plain if plain.is_terminal else Console(highlight=False, markup=False, emoji=False, width=120)


def _table(console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 1) -> None:
    """Print a table whose first `text` columns are words and whose other columns are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column, header in enumerate(headers):
        table.add_column(header, justify="left" if column < text else "right")
    for row in rows:
        table.add_row(*map(str, row))
    console.print()
    console.print(table)


def setting(console: Console, config: Any, truth: np.ndarray) -> None:
    """Say what is run, and on which data."""
    kinds = ", ".join(f"{np.sum(truth == kind)} {kind}" for kind in (CLEAN, FLIPPED, SHORTCUT))
    console.print(
        f"{len(truth)} {config.ways}-way {config.shots}-shot tasks on scikit-learn's digits ({kinds}); "
        f"{config.num_held_out} clean held-out tasks on other images\n"
        f"jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores, float64"
    )


def diagnostics(console: Console, info: mi.SolveInfo, budget: mi.ErrorBudget) -> None:
    """Print what the solve reports about itself, and what limits the scores."""
    assert info.outer_gradient_norm is not None
    assert info.inner_gradient_norm is not None
    assert info.damping is not None
    rows = [
        ("status", mi.SolveStatus(int(info.status)).name),
        ("products with the total Hessian", int(info.num_matvecs)),
        ("relative residual, from real products", f"{float(info.relative_residual):.1e}"),
        ("smallest curvature seen, damping included", f"{float(info.min_curvature):.1e}"),
        ("stationarity, gradient norm of F", f"{float(info.outer_gradient_norm):.1e}"),
        ("stationarity, largest inner gradient norm", f"{float(info.inner_gradient_norm):.1e}"),
        ("damping", f"{float(info.damping):.1e}"),
    ]
    _table(console, "The solve", ("", ""), rows)
    console.print(f"Error budget: {in_options(budget.advice, OF_DEMO)}")


def most_harmful(console: Console, scores: mi.Scores, tasks: FewShotTasks, truth: np.ndarray, count: int = 10) -> None:
    """Print the most harmful tasks and examples, with their ids and the ground truth."""
    values = np.asarray(scores.task)
    rows = [
        (k, " ".join(map(str, tasks.classes[k])), truth[k], f"{values[k]:+.2e}")
        for k in np.argsort(values, kind="stable")[:count]
    ]
    _table(console, "Most harmful tasks", ("task", "classes", "ground truth", "score"), rows, text=3)

    examples = [
        (role, *place, ids[place], flipped[place], value)
        for role, ids, flipped, of_role in (
            ("support", tasks.support_ids, tasks.support_flipped, np.asarray(scores.support)),
            ("query", tasks.query_ids, tasks.query_flipped, np.asarray(scores.query)),
        )
        for place, value in np.ndenumerate(of_role)
    ]
    lines = [
        (example, role, task, "this label flipped" if flipped else truth[task], f"{value:+.2e}")
        for role, task, _, example, flipped, value in sorted(examples, key=lambda row: row[-1])[:count]
    ]
    _table(console, "Most harmful examples", ("example", "role", "task", "ground truth", "score"), lines, text=4)


def detection(
    console: Console,
    methods: Mapping[str, np.ndarray],
    truth: np.ndarray,
    query_scores: np.ndarray,
    query_flipped: np.ndarray,
) -> None:
    """Print the share of harmful tasks found, and the ROC AUC, overall and for each kind of harm."""
    rows = []
    for kind, damaged in {"all": truth != CLEAN, FLIPPED: truth == FLIPPED, SHORTCUT: truth == SHORTCUT}.items():
        others = damaged | (truth == CLEAN)
        for name, scores in methods.items():
            draws = np.atleast_2d(scores)
            found = [np.mean([found_at(draw, damaged, share) for draw in draws]) for share in SHARES]
            area = np.mean([roc_auc(draw[others], damaged[others]) for draw in draws])
            rows.append((kind, name, *(f"{share:.0%}" for share in found), f"{area:.3f}"))
    headers = ("harm", "method", *(f"found at {share:.0%}" for share in SHARES), "ROC AUC")
    _table(console, "Harmful tasks found, against the share of all tasks inspected", headers, rows, text=2)
    console.print(
        f"Flipped query labels among all {query_flipped.size} query labels, by exact influence: "
        f"ROC AUC {roc_auc(query_scores.ravel(), query_flipped.ravel()):.3f}"
    )


def removal(console: Console, flagged: np.ndarray, truth: np.ndarray, before: float, rows: Sequence[Removal]) -> None:
    """Print the held-out loss without the flagged tasks, as found in each way, with the run times."""
    console.print()
    console.print(
        f"Flagged: the {len(flagged)} tasks with a negative score (removing them is predicted to lower the held-out "
        f"loss); {np.sum(truth[flagged] != CLEAN)} of them are harmful. Held-out loss with all tasks: {before:.4f}"
    )
    lines = [
        (name, f"{loss:.4f}", f"{loss - before:+.4f}", f"{run_seconds:.1f}", f"{compile_seconds:.1f}")
        for name, loss, compile_seconds, run_seconds in rows
    ]
    headers = ("without the flagged tasks", "held-out loss", "change", "run s", "compile s")
    _table(console, "Removal", headers, lines)


def files(console: Console, out: Path, seconds: float) -> None:
    """Say what was written and how long everything took."""
    console.print(
        f"\nWrote {out / 'scores.parquet'} and {out / 'scores.png'}; {seconds:.0f} s in all, compiling included",
        soft_wrap=True,
    )
