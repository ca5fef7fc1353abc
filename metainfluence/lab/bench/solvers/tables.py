"""The solver benchmark's tables, for the console and as Markdown."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from metainfluence.lab.bench.solvers.options import SolverBenchConfig

Row = dict[str, Any]
Column = tuple[str, str, Callable[[Any], str]]


def _error(value: float) -> str:
    return f"{value:.1e}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _rank(value: float) -> str:
    return f"{value:.4f}"


def _ratio(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _short(value: float) -> str:
    return f"{value:.3g}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a title, with a sentence that explains the columns."""

    title: str
    note: str
    columns: tuple[Column, ...]
    rows: list[Row]

    def cells(self) -> list[list[str]]:
        """The rows as text; a missing value is a dash."""
        return [["–" if row.get(key) is None else show(row[key]) for key, _, show in self.columns] for row in self.rows]

    def print(self, console: Console) -> None:
        """Prints the table to a console."""
        table = RichTable(title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
        for _, header, show in self.columns:
            table.add_column(header, justify="left" if show is str else "right")
        for cells in self.cells():
            table.add_row(*cells)
        console.print()
        console.print(table)
        console.print(self.note)

    def markdown(self) -> str:
        """The table as a Markdown section."""
        rule = [":---" if show is str else "---:" for _, _, show in self.columns]
        lines = [[header for _, header, _ in self.columns], rule, *self.cells()]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"### {self.title}\n\n{body}\n\n{self.note}"


PROBLEMS: tuple[Column, ...] = (
    ("problem", "problem", str),
    ("meta_parameters", "meta-parameters", _short),
    ("tasks", "tasks", _short),
    ("smallest", "smallest eigenvalue", _short),
    ("largest", "largest eigenvalue", _short),
    ("damping", "damping", _short),
    ("epoch_seconds", "epoch, s", _rank),
)
GRID: tuple[Column, ...] = (
    ("curvature", "curvature", str),
    ("solver", "solver", str),
    ("status", "status", str),
    ("products", "products", str),
    ("residual", "residual", _error),
    ("step_error", "Δλ error", _error),
    ("step_cosine", "Δλ cosine", _share),
    ("scores_error", "scores error", _error),
    ("spearman", "scores Spearman", _rank),
    ("epochs", "time, epochs", _ratio),
    ("megabytes", "memory, MB", _ratio),
)
BUDGETS: tuple[Column, ...] = (
    ("problem", "problem", str),
    ("solver", "solver", str),
    ("stop", "stopped at", str),
    ("status", "status", str),
    ("products", "products", str),
    ("residual", "residual", _error),
    ("scores_error", "scores error", _error),
    ("spearman", "scores Spearman", _rank),
    ("epochs", "solve, epochs", _ratio),
)
DEMO: tuple[Column, ...] = (
    ("damping", "damping", str),
    ("share", "of the largest", _rank),
    ("tol", "tol", _error),
    ("solver", "solver", str),
    ("status", "status", str),
    ("choice", "chose", str),
    ("products", "products", str),
    ("residual", "residual", _error),
    ("spearman", "scores Spearman", _rank),
    ("seconds", "s", _share),
)
LARGE: tuple[Column, ...] = (
    ("solver", "solver", str),
    ("status", "status", str),
    ("choice", "chose", str),
    ("damping", "damping", _short),
    ("share", "of the largest", _rank),
    ("products", "products", str),
    ("residual", "residual", _error),
    ("spearman", "scores Spearman", _rank),
    ("reference_residual", "of a reference at", _error),
    ("epochs", "time, epochs", _ratio),
    ("epoch_seconds", "epoch, s", _share),
    ("megabytes", "memory, MB", _ratio),
)
TOGETHER: tuple[Column, ...] = (
    ("problem", "problem", str),
    ("tasks", "tasks", _short),
    ("solver", "solver", str),
    ("status", "status (worst)", str),
    ("products", "products", str),
    ("residual", "residual (worst)", _error),
)
TARGETS: tuple[Column, ...] = (
    ("target", "", str),
    ("what", "what", str),
    ("value", "measured", _rank),
    ("bar", "bar", str),
    ("met", "", str),
)


def all_of(config: SolverBenchConfig, found: dict[str, list[Row]]) -> list[Table]:
    """Tables of what was measured."""
    size = "".join(f"{row['data']}, {row['meta_parameters']} meta-parameters. " for row in found.get("large", [])[:1])
    made = [
        Table(
            "Problems",
            "Trained on digits. Damping of the grid: "
            f"{config.damping.grid:.2g} of the largest eigenvalue, or twice the size of the most negative one.",
            PROBLEMS,
            found.get("problems", []),
        )
    ]
    for problem in config.problems:
        rows = [row for row in found.get("grid", []) if row["problem"] == problem]
        reasons = sorted({f"{row['solver']}: {row['reason'].split(';')[0]}" for row in rows if "reason" in row})
        made.append(
            Table(
                f"Solvers × curvatures: {problem}",
                "Errors against the exact curvature, diagonalised, at the same damping. Δλ: the step that removes the "
                "flipped tasks. Time: from λ to the scores of all tasks and examples, in meta-gradient epochs. "
                "Memory: of the compiled solve, its operator included. Time and memory are measured on the whole for "
                "the exact curvature but for dense; else the expansion, the solver's own work on the stored matrix, "
                "its products and the scores are measured each and added up, and the memory is that of a product. "
                + "".join(f"Not applicable: {reason}. " for reason in reasons),
                GRID,
                rows,
            )
        )
    made += [
        Table(
            "Accuracy against products",
            "Exact curvature at the grid's damping; time of the solve alone.",
            BUDGETS,
            found.get("budgets", []),
        ),
        *_removals(found.get("removals", [])),
        *_inner(found.get("inner", [])),
        Table(
            "At the demo's λ",
            "Of the solve for the scores of the held-out loss; Spearman with the scores at a residual of 1e-10.",
            DEMO,
            found.get("demo", []),
        ),
        Table(
            "Many meta-parameters",
            f"{size}From λ to the scores of all tasks and examples. The defaults choose the damping, which takes some "
            "of the products; to the others that damping is given.",
            LARGE,
            found.get("large", []),
        ),
        Table(
            "task-IF of all tasks",
            "Products for all right-hand sides at the same residual.",
            TOGETHER,
            found.get("together", []),
        ),
        Table("Targets", "", TARGETS, found.get("targets", [])),
    ]
    return [table for table in made if table.rows]


def _spread(rows: list[Row], fixed: tuple[str, ...], key: str, value: str) -> list[Row]:
    """One row for each combination of the fixed keys, with one column for each value of `key`."""
    wide: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        place = tuple(row[name] for name in fixed)
        wide.setdefault(place, {name: row[name] for name in fixed})[str(row[key])] = row[value]
    return list(wide.values())


def _removals(rows: list[Row]) -> list[Table]:
    """Two tables, with one column per damping."""
    fixed: tuple[Column, ...] = tuple((name, name, str) for name in ("problem", "curvature", "eigenvalues"))
    shares = dict.fromkeys(row["damping_share"] for row in rows)
    columns = fixed + tuple((str(share), f"damping {100 * share:g} %", _short) for share in shares)
    keys = tuple(key for key, _, _ in fixed)
    note = (
        "The step that removes the flipped tasks, solved exactly. Damping: share of the exact Hessian's largest "
        "eigenvalue. "
    )
    return [
        Table(
            "What a removal step gains",
            note + "Decrease of the objective without these tasks, F(λ, w') − F(λ', w'); negative: the step does harm. "
            "Last: how much lower it is after training on without these tasks than after training on with them.",
            (*columns, ("trained_decrease", "trained on", _short)),
            _spread(rows, (*keys, "trained_decrease"), "damping_share", "decrease"),
        ),
        Table(
            "Where a removal step points",
            note + "Cosine with the difference between training on without these tasks and with them.",
            columns,
            _spread(rows, keys, "damping_share", "cosine"),
        ),
    ]


def _inner(rows: list[Row]) -> list[Table]:
    """Two tables, with one row per condition number and one column per inner solver."""
    names = dict.fromkeys(row["inner_solver"] for row in rows)
    columns: tuple[Column, ...] = (("asked", "asked", _error), ("condition", "cond(H_in)", _error))
    columns += tuple((name, name, _error) for name in names)
    return [
        Table(
            f"Inner solvers: relative error of {what}",
            "Against the inner problem solved in the basis in which it is well conditioned. Implicit ones start at "
            "the exact minimum, so that their linear solves alone are judged.",
            columns,
            _spread(rows, ("asked", "condition"), "inner_solver", key),
        )
        for key, what in (("gradient_error", "total gradients"), ("task_if_error", "task-IF"))
    ]
