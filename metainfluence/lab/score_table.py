"""Scores as a table: one row per task and per example, written as Parquet."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import metainfluence as mi
from metainfluence.lab.fewshot import FewShotTasks, harm

SCHEMA = pa.schema(
    [
        ("task", pa.int32()),  # row of the task list
        ("role", pa.string()),  # task, support or query
        ("example", pa.int32()),  # id into the dataset; null in a task's own row
        ("score", pa.float64()),  # predicted change of the target on removal; negative harms
        ("harm", pa.string()),  # ground truth: what was done to the task
        ("label_flipped", pa.bool_()),  # ground truth: whether this very example's label was replaced; null for a task
    ]
)
METADATA_KEY = b"metainfluence"


def score_table(scores: mi.Scores, tasks: FewShotTasks, metadata: Mapping[str, Any] | None = None) -> pa.Table:
    """Lay scores out in rows: all tasks, then all support, then all query examples, each in the order of the list.

    Args:
      scores: of these tasks.
      tasks: T tasks, for ids and ground truth.
      metadata: anything JSON can hold; the solve's diagnostics are added under "solve".
    """
    num_tasks, truth = len(tasks.classes), harm(tasks)
    info = {name: np.asarray(value).tolist() for name, value in scores.info._asdict().items() if value is not None}
    info["status"] = mi.SolveStatus(info["status"]).name

    def rows(role: str, values: Any, ids: Any, flipped: Any) -> pa.Table:
        values = np.asarray(values, np.float64)
        task = np.repeat(np.arange(num_tasks), values.size // num_tasks)
        columns = [task, [role] * values.size, ids, values.ravel(), truth[task], flipped]
        return pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], SCHEMA)

    untouched = np.zeros(tasks.support_ids.size, bool)
    table = pa.concat_tables(
        [
            rows("task", scores.task, [None] * num_tasks, [None] * num_tasks),
            rows("support", scores.support, tasks.support_ids.ravel(), untouched),
            rows("query", scores.query, tasks.query_ids.ravel(), tasks.query_flipped.ravel()),
        ]
    )
    return table.replace_schema_metadata({METADATA_KEY: json.dumps({**(metadata or {}), "solve": info})})


def write(table: pa.Table, path: Path) -> None:
    """Write the table, metadata included."""
    pq.write_table(table, path)


def read(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table written by `write`, and its metadata."""
    table = pq.read_table(path)
    return table, json.loads(table.schema.metadata[METADATA_KEY])
