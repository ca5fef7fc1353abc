"""Score files: one Parquet table with a row for each task and each example, and the report on the solve with it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Shaped

from metainfluence import _memory
from metainfluence._disk import replacing
from metainfluence._source import Source, ids_of
from metainfluence.data import Task, sizes
from metainfluence.influence import Scores
from metainfluence.response import RunInfo, SegmentsInfo
from metainfluence.solvers import SolveInfo, SolveStatus

ROLES = ("task", "support", "query")
_METADATA = b"metainfluence"
_ROWS_PER_GROUP = 1 << 17
_LONGEST_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class ScoreTable:
    """A score file's content, one entry per row; nulls are masked (`numpy.ma`), or None among strings.

    Rows follow the source's order of tasks: the task's own row, then its support, then its query examples.

    Attributes:
      task: ids of the tasks.
      role: "task", "support" or "query".
      example: ids of the examples, null in a task's own row.
      score: predicted change of the target on removal; positive helps, negative harms.
      labels: the source's further columns.
      metadata: "solve", the report on the solve under the names of `SolveInfo`; and what the writer added.
    """

    task: Shaped[np.ndarray, " rows"]
    role: Shaped[np.ndarray, " rows"]
    example: Shaped[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]
    labels: dict[str, Shaped[np.ndarray, " rows"]]
    metadata: dict[str, Any]

    def to_pandas(self) -> Any:
        """The rows as a data frame; needs pandas."""
        pd: Any = importlib.import_module("pandas")
        return pd.DataFrame(
            {"task": self.task, "role": self.role, "example": self.example, "score": self.score, **self.labels}
        )


def read_scores(path: Path | str) -> ScoreTable:
    """Reads a score file.

    It is plain Parquet, so pandas and DuckDB read it as well: columns task, role, example, score, and the source's own.

    Args:
      path: as given to `scoring.score` for `out`, or to `scoring.write_scores`.

    Raises:
      ValueError: not a Parquet file, a damaged one, one without scores, or one with more rows than fit in memory.
      FileNotFoundError: there is no such file.
      ModuleNotFoundError: pyarrow is missing.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> scores = mi.influence_scores(problem, lambda m: m, solver=mi.solvers.dense())(jnp.asarray(2.0), tasks)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     mi.scoring.write_scores(Path(folder) / "scores.parquet", scores, tasks)
      ...     table = mi.read_scores(Path(folder) / "scores.parquet")
      >>> table.role.tolist()
      ['task', 'query', 'task', 'query', 'task', 'query']
      >>> table.score[table.role == "task"].round(3).tolist(), table.metadata["solve"]["status"]
      ([0.667, 0.333, -1.0], 'CONVERGED')
    """
    metadata = metadata_of(path)
    with _refused(path):
        found = parquet().read_metadata(path)
        # Runs of equal values take no room in a file, so its own size tells nothing of what reading it allocates.
        needed, there = 8 * found.num_rows * found.num_columns, _physical_memory()
        if needed > there:
            raise ValueError(
                f"{found.num_rows} rows of {found.num_columns} columns take {needed} bytes, of {there} that there are"
            )
        table = parquet().read_table(path)
        table.validate(full=True)
        missing = {"task", "role", "example", "score"} - set(table.column_names)
        if missing or not arrow().types.is_floating(table["score"].type):
            raise ValueError(f"columns {table.schema.to_string(show_schema_metadata=False)}")
        columns = {name: _numpy(table[name]) for name in table.column_names}
    known = {name: columns.pop(name) for name in ("task", "role", "example", "score")}
    return ScoreTable(**known, labels=columns, metadata=metadata)


def metadata_of(path: Path | str) -> dict[str, Any]:
    """What a score file says of itself.

    Raises:
      ValueError: it is no score file.
      FileNotFoundError: there is no such file.
    """
    with _refused(path):
        found = (parquet().read_schema(path).metadata or {}).get(_METADATA)
        metadata = None if found is None else json.loads(found)
    if not isinstance(metadata, dict):
        raise ValueError(f"path: expected a score file of metainfluence, got {path} without its metadata")
    return metadata


@contextlib.contextmanager
def _refused(path: Path | str) -> Iterator[None]:
    """Turns what readers raise over content other than a score file's into a ValueError that names the file."""
    try:
        yield
    except (OSError, LookupError, ValueError, RecursionError, arrow().ArrowException) as error:
        # Pyarrow also raises OSError for damage, but without the errno of an error of the operating system.
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"path: expected a score file of metainfluence, got {path}: {error}") from error


def _physical_memory() -> float:
    """Bytes of memory that the machine, or the job that this runs in, has."""
    return _memory.most()


def write_scores(
    path: Path | str,
    scores: Scores,
    tasks: Task,
    *,
    source: Source | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes scores that fit in memory to the kind of file that `scoring.score` writes.

    Args:
      path: of the file, replaced as a whole.
      scores: of `tasks`, with one report on the solve.
      tasks: stacked, for their masks: padding has no row.
      source: of the same tasks, for `ids` and `columns`, see `scoring.Source`; None for positions alone.
      metadata: anything JSON can hold.

    Raises:
      ValueError: scores, tasks and source with different numbers of tasks.
      ModuleNotFoundError: pyarrow is missing.

    Examples:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> scores = mi.influence_scores(problem, lambda m: m, solver=mi.solvers.dense())(jnp.asarray(2.0), tasks)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "scores.parquet"
      ...     mi.scoring.write_scores(path, scores, tasks, metadata={"model": "a mean"})
      ...     table = mi.read_scores(path)
      >>> table.score.round(3).tolist(), table.metadata["model"]  # each task's row, and its query example's
      ([0.667, 0.667, 0.333, 0.333, -1.0, -1.0], 'a mean')
    """
    size = sizes(tasks)
    shapes = size.shapes()
    for name, shape in shapes.items():
        if np.shape(getattr(scores, name)) != shape:
            raise ValueError(f"scores.{name}: expected shape {shape}, got {np.shape(getattr(scores, name))}")
    ids: Sequence[Any] = range(size.lead[0]) if source is None else ids_of(source)
    if len(ids) != size.lead[0]:
        raise ValueError(f"source: expected {size.lead[0]} tasks, got {len(ids)}")
    masks = [
        np.ones(shapes[side], bool) if mask is None else np.asarray(mask)
        for side, mask in (("support", tasks.support_mask), ("query", tasks.query_mask))
    ]
    values = [np.asarray(value) for value in (scores.task, scores.support, scores.query)]
    table = rows(ids, values, masks, columns_of(source, range(len(ids))))
    write_tables(Path(path), lambda: [table], {**(metadata or {}), "solve": report(scores.info)})


def columns_of(source: Source | None, positions: Iterable[int]) -> list[Mapping[str, Any]]:
    """The source's own columns of some tasks."""
    describe = getattr(source, "columns", None)
    return [{} if describe is None else describe(position) for position in positions]


def rows(
    ids: Sequence[Any],
    scores: Sequence[Float[np.ndarray, "..."]],
    masks: Sequence[Bool[np.ndarray, "b n"]],
    columns: Sequence[Mapping[str, Any]],
) -> Any:
    """The rows of b tasks.

    Args:
      ids: of the tasks.
      scores: `[b]`, `[b, n_support]`, `[b, n_query]`.
      masks: `[b, n_support]`, `[b, n_query]`, False on padding.
      columns: of each task, see `Source`.
    """
    pa = arrow()
    counts = [np.ones(len(ids), int), *(mask.sum(axis=1) for mask in masks)]
    positions = [np.repeat(np.arange(len(ids)), count) for count in counts]
    order = np.argsort(np.concatenate(positions), kind="stable")

    def column(name: str, parts: Sequence[Any]) -> Any:
        arrays = [pa.array(part) for part in parts]
        kinds = {array.type for array in arrays if array.type != pa.null()}
        if len(kinds) > 1:
            raise ValueError(f"source.columns: expected one type in {name!r}, got {', '.join(map(str, kinds))}")
        kind = kinds.pop() if kinds else pa.null()
        return pa.concat_arrays([array.cast(kind) for array in arrays]).take(pa.array(order))

    names = list(columns[0]) if columns else []
    if any(list(each) != names for each in columns):
        raise ValueError(f"source.columns: expected the columns {names} of the first task in every task")
    for id_, each, *lengths in zip(ids, columns, *counts[1:], strict=True):
        _check_columns(each, id_, lengths)
    own = {
        name: column(name, [[each[name][0] for each in columns], *(_joined(columns, name, side) for side in (1, 2))])
        for name in names
    }
    if "example" not in own:
        ranks = [np.concatenate([np.arange(n) for n in count]) for count in counts[1:]]
        own["example"] = column("example", [[None] * len(ids), *ranks])
    codes = np.repeat(np.arange(3, dtype=np.int8), [count.sum() for count in counts])[order]
    values = np.concatenate([scores[0], *(value[mask] for value, mask in zip(scores[1:], masks, strict=True))])
    known = {
        "task": pa.array(list(ids)).take(pa.array(np.concatenate(positions)[order])),
        "role": pa.DictionaryArray.from_arrays(codes, list(ROLES)),
        "example": own.pop("example"),
        "score": pa.array(values[order]),
    }
    return pa.table({**known, **own})


def _check_columns(columns: Mapping[str, Any], id_: Any, lengths: Sequence[int]) -> None:
    """Raises ValueError unless each of a task's columns is (its value, one per support, one per query example)."""
    n_support, n_query = lengths
    for name, value in columns.items():
        sides = value[1:] if isinstance(value, (tuple, list)) and len(value) == 3 else ()
        got = [len(side) if hasattr(side, "__len__") and not isinstance(side, (str, bytes)) else None for side in sides]
        if got != [n_support, n_query]:
            short = repr(value) if len(repr(value)) <= _LONGEST_SHOWN else f"{repr(value)[:_LONGEST_SHOWN]} …"
            raise ValueError(
                f"source.columns: expected {name!r} of task {id_!r} as (value of the task, [{n_support} of its support "
                f'examples], [{n_query} of its query examples]), like {{"harm": ("clean", ["clean"] * {n_support}, '
                f'["clean"] * {n_query})}}, got {short}'
            )


def _joined(columns: Sequence[Mapping[str, Any]], name: str, side: int) -> Any:
    values = [each[name][side] for each in columns]
    if all(isinstance(value, np.ndarray) for value in values):
        return np.concatenate(values)
    return [item for value in values for item in value]


def write_tables(path: Path, tables: Callable[[], Iterable[Any]], metadata: Mapping[str, Any]) -> None:
    """Writes tables one after the other to one file, which is complete or absent.

    Args:
      path: of the file.
      tables: returns the tables; called twice, first to look at their types, since a column may be all null in some.
      metadata: anything JSON can hold.
    """
    pa, pq = arrow(), parquet()
    schema = pa.unify_schemas([table.schema for table in tables() if len(table)], promote_options="permissive")
    schema = schema.with_metadata({_METADATA: json.dumps(metadata)})
    waiting: list[Any] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:

        def write() -> None:
            rows = pa.concat_tables(waiting)
            # pyarrow's own limit of a group, 1048576 rows, would cut a task in two.
            writer.write_table(rows, row_group_size=len(rows))
            waiting.clear()

        for table in filter(len, tables()):
            waiting.append(table.cast(schema))
            if sum(len(each) for each in waiting) >= _ROWS_PER_GROUP:
                write()
        if waiting:
            write()


def encoded(tables: Sequence[Any]) -> bytes:
    """Tables, one after the other, as the bytes of a Parquet file."""
    pa = arrow()
    sink = pa.BufferOutputStream()
    parquet().write_table(pa.concat_tables([pa.table({}), *tables], promote_options="permissive"), sink)
    return sink.getvalue().to_pybytes()


def decoded(content: bytes) -> Any:
    """Inverse of `encoded`."""
    return parquet().read_table(arrow().BufferReader(content))


_KINDS: dict[str, Any] = {"optimum": SolveInfo, "trajectory": RunInfo, "segments": SegmentsInfo}


def report(info: Any) -> dict[str, Any]:
    """A report on one answer as JSON; a run's is without its smoothness, which no sweep measures."""
    given = {name: np.asarray(value).tolist() for name, value in info._asdict().items() if _is_number(name, value)}
    if "status" in given:
        given["status"] = SolveStatus(given["status"]).name
    (kind,) = (name for name, kind in _KINDS.items() if isinstance(info, kind))
    return given if kind == "optimum" else {"kind": kind, **given}


def info_of(report: Mapping[str, Any]) -> Any:
    """Inverse of `report`."""
    values = dict(report)
    kind = _KINDS[values.pop("kind", "optimum")]
    if "status" in kind._fields:
        values["status"] = SolveStatus[values["status"]].value
    known: dict[str, Any] = {name: jax.numpy.asarray(value) for name, value in values.items()}
    # A run's report may lack what was not known.
    missing: dict[str, Any] = dict.fromkeys(RunInfo._fields) if kind is RunInfo else {}
    return kind(**{**missing, **known})


def _is_number(name: str, value: Any) -> bool:
    return value is not None and name != "smoothness"


class Dense(NamedTuple):
    """Scores as arrays.

    Attributes:
      ids: of the tasks, `[T]`.
      task: `[T]`.
      support: `[T, n_support]`, 0 on padding.
      query: `[T, n_query]`.
    """

    ids: Shaped[np.ndarray, " T"]
    task: Float[np.ndarray, " T"]
    support: Float[np.ndarray, "T n_support"]
    query: Float[np.ndarray, "T n_query"]


def read_dense(path: Path) -> Dense:
    """A score file's scores as arrays, read part by part, since its rows take several times as much memory."""
    names = ["task", "role", "score"]
    with parquet().ParquetFile(path) as file:
        groups = [_dense(file.read_row_group(group, columns=names)) for group in range(file.num_row_groups)]

    def joined(name: str) -> Any:
        parts = [getattr(group, name) for group in groups]
        found = np.zeros((sum(map(len, parts)), max(part.shape[1] for part in parts)), parts[0].dtype)
        start = 0
        for part in parts:
            found[start : start + len(part), : part.shape[1]] = part
            start += len(part)
        return found

    ids, task = (np.concatenate([getattr(group, name) for group in groups]) for name in ("ids", "task"))
    return Dense(ids, task, joined("support"), joined("query"))


def _dense(table: Any) -> Dense:
    """Scores of whole tasks."""
    ids, role, score = (_numpy(table[name]) for name in ("task", "role", "score"))
    own = role == "task"
    index = np.cumsum(own) - 1
    total = int(own.sum())

    def side(name: str) -> Any:
        chosen = role == name
        of_task = index[chosen]
        counts = np.bincount(of_task, minlength=total)
        first = np.cumsum(counts) - counts
        found = np.zeros((total, int(np.max(counts, initial=0))), score.dtype)
        found[of_task, np.arange(len(of_task)) - first[of_task]] = score[chosen]
        return found

    return Dense(ids[own], score[own], side("support"), side("query"))


def _numpy(column: Any) -> Any:
    pa = arrow()
    if pa.types.is_string(column.type):
        column = column.dictionary_encode()
    column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        # Only as many objects as there are different ones; the last is for null.
        values = np.asarray([*column.dictionary.to_pylist(), None], object)
        return values[column.indices.fill_null(len(values) - 1).to_numpy()]
    if column.null_count == 0:
        return column.to_numpy(zero_copy_only=False)
    if column.null_count == len(column):
        return np.ma.masked_all(len(column))
    mask = np.asarray(column.is_null())
    filler = pa.scalar(False) if pa.types.is_boolean(column.type) else pa.scalar(0).cast(column.type)
    return np.ma.MaskedArray(column.fill_null(filler).to_numpy(zero_copy_only=False), mask)


def arrow() -> Any:
    """The package pyarrow.

    Raises:
      ModuleNotFoundError: it is missing.
    """
    try:
        import pyarrow as pa
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "score files need pyarrow, of the lab extra: pip install 'metainfluence[lab]'", name="pyarrow"
        ) from error
    return pa


def parquet() -> Any:
    """Pyarrow's module for Parquet; raises as `arrow` does."""
    arrow()
    import pyarrow.parquet as pq

    return pq
