"""A bank of outcomes: targets after real retrainings, by which any scores can be judged without training again.

There is one Parquet file for each experiment. Its metadata hold the configuration, facts about the runs and a SHA-256
hash of everything in the file, so that a changed bank is refused.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metainfluence._disk import replacing
from metainfluence.lab.experiments.run_methods import Scored
from metainfluence.lab.experiments.runs import Truth

KEY = b"metainfluence bank"
FORMAT = 1


class BankError(ValueError):
    """A file that is not a bank, or a bank that was changed."""


class Account(NamedTuple):
    """Everything known about one training, from S starts.

    Attributes:
      name: name of the training.
      truth: the targets after retraining.
      damaged: bool [T], tasks that were damaged on purpose.
      ends: λ at the end of each run with all tasks, flat, [S, p].
      scores: scores [S, J, T] of every method that is kept, with the option in use.
      accuracies: (method, share of the tasks, accuracy after retraining without its worst [S]).
      facts: further facts about each run: one mapping per start.
      hashes: hashes of the data: name -> digest.
    """

    name: str
    truth: Truth
    damaged: np.ndarray
    ends: np.ndarray
    scores: list[Scored]
    accuracies: list[tuple[str, float, np.ndarray]]
    facts: list[dict[str, Any]]
    hashes: dict[str, str]


def save(path: Path, config: dict[str, Any], accounts: list[Account]) -> None:
    """Writes a bank.

    Args:
      path: the file.
      config: the experiment's configuration, in a form that JSON can hold.
      accounts: the accounts of its trainings.
    """
    rows = [row for account in accounts for row in rows_of(account)]
    about = [
        {"name": account.name, "facts": account.facts, "hashes": account.hashes, "shape": list(shape_of(account))}
        for account in accounts
    ]
    content = {"format": FORMAT, "config": config, "trainings": about}
    table = table_of(rows)
    metadata = {KEY: json.dumps({**content, "sha256": digest(table, content)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def load(path: Path) -> tuple[dict[str, Any], list[Account]]:
    """Reads a bank.

    Returns:
      The experiment's configuration, and the accounts.

    Raises:
      FileNotFoundError: there is no such file.
      BankError: it is not a bank, has another format, or was changed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a bank of outcomes, and there is none")
    try:
        table = pq.read_table(path)
        content = json.loads((table.schema.metadata or {})[KEY])
    except (pa.ArrowInvalid, OSError, KeyError, ValueError) as error:
        raise BankError(f"{path}: expected a bank of outcomes, got {error}") from error
    if content.get("format") != FORMAT:
        raise BankError(f"{path}: expected format {FORMAT}, got {content.get('format')!r}")
    stated = content.pop("sha256", None)
    found = digest(table, content)
    if stated != found:
        raise BankError(f"{path}: expected the content that was written, SHA-256 {stated}, got {found}; fetch it again")
    rows = table.to_pylist()
    return content["config"], [
        account_of(about, [row for row in rows if row["training"] == about["name"]]) for about in content["trainings"]
    ]


def digest(table: pa.Table, content: dict[str, Any]) -> str:
    """SHA-256 of the values, independent of the Parquet version that holds them."""
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for row in table.to_pylist():
        for name in ("training", "part", "key", "option"):
            found.update(f"{row[name]};".encode())
        found.update(f"{row['number']};{row['default']};".encode())
        for name, kind in (("lacks", "<i4"), ("values", "<f8"), ("scores", "<f4")):
            found.update(np.asarray(row[name] or [], kind).tobytes())
    return found.hexdigest()


def shape_of(account: Account) -> tuple[int, int, int]:
    """(S, J, T)."""
    first = next(iter(account.truth.changes.values()))
    return first.shape[0], first.shape[2], len(account.damaged)


def rows_of(account: Account) -> list[dict[str, Any]]:
    """One row per mask, end, matrix of scores and accuracy."""
    rows: list[dict[str, Any]] = []

    def add(part: str, key: str = "", **values: Any) -> None:
        rows.append({"training": account.name, "part": part, "key": key, **values})

    add("damaged", lacks=np.flatnonzero(account.damaged).tolist())
    for number, end in enumerate(account.ends):
        add("end", number=number, values=end.tolist())
    for key, masks in account.truth.kept.items():
        for number, mask in enumerate(masks):
            changes = account.truth.changes[key][:, number]
            add("outcome", key, number=number, lacks=np.flatnonzero(~mask).tolist(), values=np.ravel(changes).tolist())
    for each in account.scores:
        scores = np.ravel(each.scores).astype(np.float32).tolist()
        add("scores", each.method, option=each.option, default=each.default, scores=scores)
    for method, share, accuracies in account.accuracies:
        add("accuracy", method, option=f"{share:g}", values=accuracies.tolist())
    return rows


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table with Arrow types."""
    schema = pa.schema(
        {
            "training": pa.string(),
            "part": pa.string(),
            "key": pa.string(),
            "option": pa.string(),
            "number": pa.int32(),
            "default": pa.bool_(),
            "lacks": pa.list_(pa.int32()),
            "values": pa.list_(pa.float64()),
            "scores": pa.list_(pa.float32()),
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


def account_of(about: dict[str, Any], rows: list[dict[str, Any]]) -> Account:
    """The inverse of `rows_of`."""
    starts, targets, total = about["shape"]

    def of(part: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["part"] == part]

    kept: dict[str, list[np.ndarray]] = {}
    changes: dict[str, list[np.ndarray]] = {}
    for row in of("outcome"):
        kept.setdefault(row["key"], []).append(~mask_of(row["lacks"], total))
        changes.setdefault(row["key"], []).append(np.asarray(row["values"]).reshape(starts, targets))
    truth = Truth(
        {key: np.stack(masks) for key, masks in kept.items()},
        {key: np.stack(values, axis=1) for key, values in changes.items()},
    )
    scores = [
        Scored(row["key"], row["option"], row["default"], np.asarray(row["scores"]).reshape(starts, targets, total))
        for row in of("scores")
    ]
    accuracies = [(row["key"], float(row["option"]), np.asarray(row["values"])) for row in of("accuracy")]
    return Account(
        about["name"],
        truth,
        mask_of(of("damaged")[0]["lacks"], total),
        np.stack([np.asarray(row["values"]) for row in of("end")]),
        scores,
        accuracies,
        about["facts"],
        about["hashes"],
    )


def mask_of(places: list[int], total: int) -> np.ndarray:
    """A boolean mask, True at the given places."""
    mask = np.zeros(total, bool)
    mask[places] = True
    return mask
