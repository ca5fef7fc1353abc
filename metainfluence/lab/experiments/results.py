"""What an experiment writes: a Parquet file of its rows, a picture, a Markdown table, and what it ran on."""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from metainfluence._disk import remove_empty, write_atomically
from metainfluence.lab.experiments.code import UNKNOWN, changed

RECORD, ROWS, PICTURE, TABLE = "ran.json", "results.parquet", "picture.png", "table.md"
CACHE, OWNER = "cache", "of.json"


class Result(NamedTuple):
    """What an experiment found.

    Attributes:
      rows: one mapping per row of the Parquet file; missing keys are null.
      tables: title -> (headers, rows of cells), for the Markdown.
      figure: the picture.
      notes: sentences for the Markdown, below the tables.
      warnings: sentences to read before any table.
    """

    rows: list[dict[str, Any]]
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]]
    figure: Figure
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


class OtherConfigError(ValueError):
    """A results folder that another configuration, or other code, has written."""


def plain(config: Any) -> dict[str, Any]:
    """A configuration in a form that JSON can hold."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return found


def digest(config: Any) -> str:
    """A fingerprint of a configuration."""
    return hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two configurations differ, with both values."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} here")
    return found


def finished(folder: Path, config: Any, code: Mapping[str, str]) -> bool:
    """Whether the folder holds this configuration's results, made by this code.

    Args:
      folder: folder of one experiment at one size.
      config: the experiment's configuration.
      code: the digests from `code_of`.

    Raises:
      OtherConfigError: it holds other results; the message names the fields or modules that differ.
    """
    path = folder / RECORD
    if not path.exists():
        return False
    _refuse_others(folder, json.loads(path.read_text(encoding="utf-8")), config, code)
    return True


def claim(folder: Path, config: Any, code: Mapping[str, str]) -> Path:
    """Reserves the folder's cache for this configuration and this code, and returns it.

    Raises:
      OtherConfigError: it belongs to another, interrupted run.
    """
    path = folder / CACHE / OWNER
    if path.exists():
        _refuse_others(folder / CACHE, json.loads(path.read_text(encoding="utf-8")), config, code)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"config": plain(config), "code": code}).encode())
    return path.parent


def release(folder: Path, made: Sequence[Path] = ()) -> None:
    """Undoes `claim` if nothing has been kept, so that a refused run leaves no folder behind.

    Args:
      folder: folder of the experiment.
      made: folders that `claim` made, the lowest first.
    """
    cache = folder / CACHE
    if not any(path.is_file() and path != cache / OWNER for path in cache.rglob("*")):
        shutil.rmtree(cache)
        remove_empty(made)


def _refuse_others(folder: Path, record: Mapping[str, Any], config: Any, code: Mapping[str, str]) -> None:
    if record["config"] != plain(config):
        listed = "; ".join(differences(record["config"], plain(config)))
        raise OtherConfigError(
            f"{folder}: written by another configuration ({listed}); name another --out, or remove that folder"
        )
    modules = changed(record.get("code"), code)
    if modules:
        what = UNKNOWN if modules == [UNKNOWN] else f"({shortened(modules)} changed since)"
        raise OtherConfigError(f"{folder}: written by other code {what}; name another --out, or remove that folder")


def outdated(folder: Path, code: Mapping[str, str]) -> list[str]:
    """The modules that changed since the folder's results were made; none if there are no results."""
    path = folder / RECORD
    return changed(json.loads(path.read_text(encoding="utf-8")).get("code"), code) if path.exists() else []


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def machine() -> dict[str, Any]:
    """The machine that the experiment runs on."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} ({device.device_kind})",
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write(
    result: Result, config: Any, folder: Path, *, title: str, command: str, seconds: float, code: Mapping[str, str]
) -> None:
    """Writes the files; the record, which marks the experiment as finished, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"metainfluence": json.dumps({"config": plain(config), "machine": machine()})}
    pq.write_table(pa.Table.from_pylist(aligned(result.rows)).replace_schema_metadata(metadata), folder / ROWS)
    result.figure.savefig(folder / PICTURE, dpi=110)
    ran = machine()
    where = f"{ran['cores']} cores, {ran['device']}, jax {ran['jax']}, {seconds:.0f} s in all, {ran['date']}"
    lines = [f"## {title}", "", f"`{command}`: {where}.", ""]
    for warning in result.warnings:
        lines += [f"**{warning}**", ""]
    lines += [f"![{title}]({PICTURE})"]
    for name, (headers, rows) in result.tables.items():
        lines += ["", f"### {name}", "", *markdown(headers, rows)]
    if result.notes:
        lines += ["", *result.notes]
    (folder / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {"config": plain(config), "machine": ran, "seconds": seconds, "command": command, "title": title}
    record["code"] = dict(code)
    temporary = folder / f"{RECORD}.new"
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(folder / RECORD)


def aligned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the same keys, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table; columns whose cells are all numbers are right-aligned."""
    numeric = [all(isinstance(row[k], (int, float)) for row in rows) for k in range(len(headers))]
    marks = ["---:" if number else ":---" for number in numeric]
    body = [[_cell(value) for value in row] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (headers, marks, *body)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def interval(value: float, low: float, high: float) -> str:
    """A number with its interval."""
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"
