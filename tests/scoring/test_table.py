"""Score files: their columns, and what reads them."""

import sys

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

import metainfluence as mi
from metainfluence.scoring import _engine
from scoring import setting

TASKS = setting.tasks(7, ragged=True)


class Labelled(list):
    ids = tuple(f"t{k}" for k in range(7))

    def columns(self, k):
        support, query = len(self[k].support["y"]), len(self[k].query["y"])
        return {
            "example": (None, np.arange(support) + 100, np.arange(query) + 200),
            "kind": ("odd" if k % 2 else None, [None] * support, ["even"] * query),
            "weight": (0.5, np.ones(support), np.zeros(query)),
        }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("table") / "scores.parquet"
    return setting.score(Labelled(TASKS), out, batch_size=3, memory=1.0), out


def test_rows_are_those_of_real_tasks_and_examples_in_order(written):
    result, out = written
    table = mi.read_scores(out)
    expected = []
    for k, task in enumerate(TASKS):
        expected.append((f"t{k}", "task", None, result.task[k], "odd" if k % 2 else None, 0.5))
        for j, score in enumerate(result.support[k, : len(task.support["y"])]):
            expected += [(f"t{k}", "support", 100 + j, score, None, 1.0)]
        for j, score in enumerate(result.query[k, : len(task.query["y"])]):
            expected += [(f"t{k}", "query", 200 + j, score, "even", 0.0)]
    columns = (table.task, table.role, table.example, table.score, table.labels["kind"], table.labels["weight"])
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    assert result.ids.tolist() == list(Labelled.ids)
    # Padding has no row and no score.
    assert np.all(result.support[0, 3:] == 0)
    assert np.all(result.support[0, :3] != 0)


def test_the_file_is_plain_parquet(written):
    _, out = written
    table = pq.read_table(out)
    assert table.column_names == ["task", "role", "example", "score", "kind", "weight"]
    assert table["score"].type == "double"
    assert table["role"].to_pylist()[:4] == ["task", "support", "support", "support"]
    assert table["example"].null_count == 7


def test_the_solve_is_in_the_metadata(written):
    result, out = written
    solve = mi.read_scores(out).metadata["solve"]
    assert solve["status"] == "CONVERGED"
    for name in ("num_matvecs", "relative_residual", "min_curvature", "outer_gradient_norm", "damping"):
        assert solve[name] == getattr(result.info, name)


def test_scores_in_memory_make_the_same_file(written, tmp_path):
    _, out = written
    scores = setting.in_memory(TASKS)
    mi.scoring.write_scores(tmp_path / "new" / "scores.parquet", scores, mi.stack_tasks(TASKS), source=Labelled(TASKS))
    ours, theirs = mi.read_scores(tmp_path / "new" / "scores.parquet"), mi.read_scores(out)
    np.testing.assert_allclose(ours.score, theirs.score, rtol=1e-10, atol=1e-15)
    assert ours.example.tolist() == theirs.example.tolist()
    assert ours.labels["kind"].tolist() == theirs.labels["kind"].tolist()


def test_without_a_source_ids_are_positions(tmp_path):
    mi.scoring.write_scores(tmp_path / "scores.parquet", setting.in_memory(TASKS), mi.stack_tasks(TASKS))
    table = mi.read_scores(tmp_path / "scores.parquet")
    assert table.task[:6].tolist() == [0] * 6
    assert table.example[:6].tolist() == [None, 0, 1, 2, 0, 1]
    assert table.labels == {}


def test_pandas_is_imported_only_when_asked_for(written, monkeypatch):
    """Not among the extras, so a stand-in shows what it is handed."""
    frames = []
    monkeypatch.setitem(sys.modules, "pandas", type(sys)("pandas"))
    sys.modules["pandas"].DataFrame = lambda columns: frames.append(columns)
    mi.read_scores(written[1]).to_pandas()
    assert list(frames[0]) == ["task", "role", "example", "score", "kind", "weight"]


def test_a_column_may_be_null_in_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(_engine, "_ROWS_PER_SHARD", 1)

    class Late(list):
        def columns(self, k):
            support, query = len(self[k].support["y"]), len(self[k].query["y"])
            return {"note": ("late" if k == 6 else None, [None] * support, [None] * query)}

    setting.score(Late(TASKS), tmp_path / "scores.parquet", batch_size=3, memory=1.0)
    table = mi.read_scores(tmp_path / "scores.parquet")
    assert [(k, note) for k, note in zip(table.task, table.labels["note"], strict=True) if note] == [(6, "late")]


class Faulty(Labelled):
    def __init__(self, columns):
        super().__init__(TASKS)
        self.columns = lambda k: columns(self, k)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (
            lambda source, k: {"a": (1, [1], [1])},
            r"'a' of task 't0' as .*\[3 of its support.*, got \(1, ",
        ),
        (lambda source, k: {"a": "odd"}, r"\(value of the task, .* like \{\"harm\": .*, got 'odd'"),
        (lambda source, k: {"a": (1, ["x"] * (3 + k % 3), [2] * (2 + k % 4))}, "expected one type in 'a', got"),
        (lambda source, k: {f"c{k}": (1, [], [])}, r"expected the columns \['c0'\] of the first task"),
    ],
)
def test_columns_that_do_not_fit(columns, match, tmp_path):
    scores, tasks = setting.in_memory(TASKS), mi.stack_tasks(TASKS)
    with pytest.raises(ValueError, match=match):
        mi.scoring.write_scores(tmp_path / "scores.parquet", scores, tasks, source=Faulty(columns))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("columns", [{"a": "odd"}, {"a": (1, ["x"] * 4, [2] * 5)}, {"a": ("x", 3, ["x"] * 5)}])
def test_columns_that_do_not_fit_are_told_before_the_solve(columns, tmp_path, monkeypatch):
    def compute(*args):
        raise AssertionError

    class Wrong(list):
        def columns(self, k):
            return columns

    monkeypatch.setattr(_engine._Run, "compute", compute)
    with pytest.raises(ValueError, match=r"source\.columns: expected"):
        setting.score(Wrong(setting.tasks(3)), tmp_path / "scores.parquet")


def test_scores_of_other_tasks_are_refused(tmp_path):
    scores, tasks = setting.in_memory(TASKS), mi.stack_tasks(TASKS)
    with pytest.raises(ValueError, match=r"scores\.task: expected shape \(7,\), got \(6,\)"):
        mi.scoring.write_scores(tmp_path / "scores.parquet", scores._replace(task=jnp.ones(6)), tasks)
    with pytest.raises(ValueError, match="source: expected 7 tasks, got 6"):
        mi.scoring.write_scores(tmp_path / "scores.parquet", scores, tasks, source=TASKS[:6])


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="path: expected a score file"):
        mi.read_scores(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError):
        mi.read_scores(tmp_path / "b.parquet")


def test_a_missing_pyarrow_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'metainfluence\[lab\]'"):
        setting.score(TASKS, tmp_path / "scores.parquet")
