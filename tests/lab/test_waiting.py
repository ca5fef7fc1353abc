"""The line that says what a command is busy with: on terminals alone, and out of the way of what is printed."""

import contextlib
import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from metainfluence.lab.show import waiting as module

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "metainfluence", "demo", "--dry-run"]


def seconds_of(pid):
    """Processor time of a process; its wall time depends on what else runs."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor times are read from /proc")
def test_a_terminal_is_told_within_two_seconds():
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    with subprocess.Popen(COMMAND, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        first = os.read(ours, 4096).decode()
        took = seconds_of(process.pid)
        text = first
        try:
            while found := os.read(ours, 4096):
                text += found.decode()
        except OSError:  # Linux's way to say that nobody writes any more.
            pass
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert "metainfluence demo: importing, 0 s" in first
    assert took < 2
    # The line is gone before the first of what was asked for, and does not come again.
    assert text.rpartition("\x1b[K")[2].startswith("num_tasks = ")


def test_a_pipe_is_told_nothing():
    ended = subprocess.run(COMMAND, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert ended.stderr == b""
    assert ended.stdout.startswith(b"num_tasks = ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal whose line is shown when a test says so, and not by time."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(module, "TICK", 1000.0)
    monkeypatch.setattr(module, "QUIET", 0.0)
    return stream


@contextlib.contextmanager
def line_on(stream, name):
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), module.waiting(name) as line:
        yield line


def last(stream):
    return stream.getvalue().rpartition("\x1b[K")[2]


def test_what_is_compiled_is_named(terminal):
    seen = []

    def shown_while_it_compiles(record):
        line.show()
        seen.append(last(terminal))
        return True

    def named_program(x):
        return x + 1

    logger = logging.getLogger("jax._src.dispatch")
    with line_on(terminal, "metainfluence score") as line:
        # Before the line's own, which hears at the same time that the compiler has ended.
        logger.filters.insert(0, shown_while_it_compiles)
        try:
            jax.jit(named_program)(jnp.ones(3))
        finally:
            logger.removeFilter(shown_while_it_compiles)
        line.show()
        assert last(terminal) == "metainfluence score: running, 0 s"
    assert "metainfluence score: compiling jit(named_program), 0 s" in seen
    assert last(terminal) == ""
    assert not logger.filters
    assert logger.level == logging.NOTSET


def test_the_line_makes_room_for_what_is_printed(terminal):
    with line_on(terminal, "demo") as line:
        line.show()
        print("half a line", end="")
        line.show()
        assert last(terminal) == "half a line"
        print(", and the rest")
        line.show()
        assert terminal.getvalue().endswith("half a line, and the rest\n\r\x1b[Kdemo: importing, 0 s")
    assert terminal.getvalue().endswith("0 s\r\x1b[K")
    line.thread.join(timeout=10)
    assert not line.thread.is_alive()


def test_a_bar_that_moves_is_left_alone(terminal, monkeypatch):
    monkeypatch.setattr(module, "QUIET", 1000.0)
    with line_on(terminal, "demo") as line:
        print("▰▱▱\n", end="")
        line.show()
        assert terminal.getvalue().endswith("▰▱▱\n")
