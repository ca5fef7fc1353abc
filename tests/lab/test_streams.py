"""Readers that go away and terminals that lack a character: results are written before they are shown."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lab.calls import TRAIN, done
from metainfluence.lab.bench._output import publish
from metainfluence.lab.bench.costs import BenchConfig
from metainfluence.lab.commands import cli

ROOT = Path(__file__).resolve().parents[2]


def through(stream, *args):
    """The exit status of a command whose standard output is a stream."""
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(io.StringIO()):
            cli.entry([str(arg) for arg in args])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, and what the commands that made it said comes next."""
    folder = tmp_path_factory.mktemp("with blanks") / "a run"
    commands = {
        "train": [*TRAIN, "--training.num-steps", "2", "--out", folder],
        "score": [folder, "--damping", "1"],
        "edit": [folder / "scores.parquet", "--most-harmful", "3"],
    }
    said = {name: done(name, *args).rpartition("next: ")[2] for name, args in commands.items()}
    (folder / "said.json").write_text(json.dumps(said))
    return folder


@pytest.fixture
def nobody():
    """A stream whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        yield stream


def test_what_comes_next_is_quoted(folder):
    said, name = json.loads((folder / "said.json").read_text()), str(folder)
    assert said["train"] == f"metainfluence score '{name}'\n"
    assert said["score"] == f"metainfluence edit '{name}/scores.parquet' --most-harmful K\n"
    assert shlex.split(said["edit"])[1:] == [
        *("evaluate", name, "--edited", f"{name}/edited.npz", "--scores", f"{name}/scores.parquet")
    ]


def test_results_are_written_before_they_are_shown(folder, nobody, tmp_path):
    out = tmp_path / "new" / "evaluation.json"
    assert through(nobody, "evaluate", folder, "--out", out) == 0
    assert set(json.loads(out.read_text())["before"]) == {"mean", "half_width"}


def test_a_reader_that_goes_away_is_no_failure(folder, nobody, tmp_path):
    assert through(nobody, "score", folder, "--damping", "1") == 0
    assert through(nobody, "train", "--help") == 0
    assert through(nobody, "reproduce", "--help") == 0
    assert through(nobody, "train", "--dry-run", *TRAIN) == 0
    assert through(nobody, "report", folder / "scores.parquet", "--out", tmp_path / "new" / "page.html") == 0
    assert (tmp_path / "new" / "page.html").exists()


@pytest.mark.parametrize("shell", ['"$@" >&- 2>&-', '"$@" | true; exit ${PIPESTATUS[0]}'])
def test_closed_streams_of_a_process_are_no_failure(shell, folder):
    args = [sys.executable, "-m", "metainfluence", "train", "--config", folder / "train.toml", "--out", folder]
    line = ["bash", "-c", shell, "bash", *map(str, args)]
    ended = subprocess.run(line, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


# The last is what Python makes of the C locale.
@pytest.mark.parametrize(
    ("encoding", "errors"), [("latin-1", "strict"), ("ascii", "strict"), ("ascii", "surrogateescape")]
)
def test_a_terminal_that_lacks_characters_gets_others(encoding, errors, folder):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    assert through(stream, "score", folder, "--damping", "1") == 0
    stream.flush()
    text = stream.buffer.getvalue()
    # ‖b − Hx‖ / ‖b‖
    assert b"?b ? Hx? / ?b?" in text
    assert b"next: metainfluence edit" in text


def test_results_of_benchmarks_are_written_before_they_are_shown(tmp_path, monkeypatch):
    def gone(*args):
        raise SystemExit(1)

    monkeypatch.setattr("rich.console.Console.print", gone)
    with pytest.raises(SystemExit):
        publish("costs", BenchConfig(out=tmp_path / "new"), "| ‖b‖ |", numbers=[1])
    assert (tmp_path / "new" / "costs.md").read_text(encoding="utf-8") == "| ‖b‖ |"
    assert json.loads((tmp_path / "new" / "costs.json").read_text())["numbers"] == [1]
