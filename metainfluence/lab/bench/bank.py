"""Compares any scores with the outcomes of real retrainings, which are stored in banks: nothing is trained again."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metainfluence.lab.bench._output import publish
from metainfluence.lab.experiments import bank, estimators, judging
from metainfluence.lab.experiments.named import named_function
from metainfluence.lab.experiments.ranges import Count, OutFolder
from metainfluence.lab.experiments.results import markdown
from metainfluence.lab.experiments.run_methods import Scored
from metainfluence.lab.experiments.run_tables import agreement_table, column_name, entry, overall_table, result_of
from metainfluence.lab.experiments.runs import Case


@dataclasses.dataclass(frozen=True)
class BankBenchConfig:
    """Compare a method's scores with the outcomes in banks, next to all others; without one, rebuild the tables."""

    banks: tuple[str, ...] = ("bank.parquet",)
    """Files that `metainfluence reproduce` wrote for experiments of the kind estimators."""
    method: str | None = None
    """Your own MODULE:FUNCTION: (metainfluence.lab.experiments.runs.Case) -> scores [T], the same for all targets, or
    [J, T], the predicted change of each of the J targets when a task is removed."""
    draws: Count = 200
    """Draws of each bootstrap."""
    out: OutFolder = Path("bank-output")
    """Folder for bank.md and bank.json."""


def run(config: BankBenchConfig) -> dict[str, Any]:
    """Judges, prints, and writes the tables.

    Raises:
      ConfigError: there is no such function.
      BankError: a bank that was changed, or whose tasks come out differently on this machine.
      ValueError: scores of another shape, or not finite.
      FileNotFoundError: a bank, or its data, is missing.
    """
    method = None if config.method is None else named_function(config.method, "--method")
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    read: list[tuple[Any, Sequence[bank.Account]]] = []
    for name in config.banks:
        stored, accounts = bank.load(Path(name))
        experiment = dataclasses.replace(estimators.config_of(stored), draws=config.draws)
        read.append((experiment, accounts))
        if method is None:
            result = result_of(experiment, accounts)
            tables, found = result.tables, result.rows
        else:
            tables, found = beside(experiment, accounts, method, str(config.method))
        lines += [f"## {experiment.title}", ""]
        for title, (headers, cells) in tables.items():
            lines += [f"### {title}", "", *markdown(headers, cells), ""]
        rows += [{"bank": name, **row} for row in found]
    if method is None:
        headers, cells = overall_table(read)
        lines += ["## All together", "", *markdown(headers, cells), ""]
    return publish("bank", config, "\n".join(lines), rows=rows)


def beside(
    config: estimators.EstimatorsConfig, accounts: Sequence[bank.Account], method: Callable[[Case], Any], name: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tables and rows of a method next to those of a bank, each at its default."""
    tasks, learner = estimators.data_of(config)
    tables: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for account in accounts:
        check_hashes(account, estimators.hashes_of(tasks))
        cases = estimators.cases_of(config, account.name, tasks, learner, account.ends)
        shape = bank.shape_of(account)[1:]
        scores = np.stack([checked(method(case), shape, case.name) for case in cases])
        others = judging.in_use(account.scores, account.truth, best=False)
        found = judging.judged(account, [Scored(name, "", True, scores), *others], config.draws)
        tables[f"{account.name}: agreement with retraining"] = agreement_table(found)
        columns = list(found.ahead)
        cells = [
            [other, *(entry(found.ahead[column], k, "+") for column in columns)]
            for k, other in enumerate(found.names)
            if k
        ]
        tables[f"{account.name}: {name} minus each"] = (["minus", *map(column_name, columns)], cells)
        own = {column: [float(end[0]) for end in found.agreement[column]] for column in columns}
        rows.append({"training": account.name, "method": name, "auc": float(found.auc[0]), **own})
    return tables, rows


def check_hashes(account: bank.Account, hashes: dict[str, str]) -> None:
    """Raises BankError unless the tasks made here are those of the bank."""
    other = [name for name in hashes if hashes[name] != account.hashes.get(name)]
    if other:
        raise bank.BankError(
            f"bank: expected the tasks that its outcomes are of, got others ({', '.join(other)}): another version of "
            "the dataset, of scikit-learn or of this library"
        )


def checked(scores: Any, shape: tuple[int, int], case: str) -> np.ndarray:
    """Scores as [J, T].

    Raises:
      ValueError: scores of another shape, or not finite.
    """
    found = np.asarray(scores, float)
    if found.shape not in (shape, shape[1:]):
        raise ValueError(
            f"--method: expected scores {list(shape[1:])} or {list(shape)}, got {list(found.shape)} ({case})"
        )
    if not np.all(np.isfinite(found)):
        raise ValueError(f"--method: expected finite scores, got {int(np.sum(~np.isfinite(found)))} others ({case})")
    return np.broadcast_to(found, shape)
