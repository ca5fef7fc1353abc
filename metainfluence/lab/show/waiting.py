"""A line on a terminal that says what a silent command is doing; on pipes there is none.

It uses only the standard library, since it starts before anything else is imported.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

# Seconds between two lines, and how long others must have been silent: a bar writes more often.
TICK, QUIET = 0.2, 1.0

# JAX logs to these when it begins and ends compiling.
_LOGGERS = ("jax._src.interpreters.pxla", "jax._src.dispatch")
_ERASE = "\r\x1b[K"


class Waiting:
    """The activity that a command waits for.

    Args:
      stream: the terminal.
      name: name of the command.

    Attributes:
      thread: shows the activity every now and then, until the end.
    """

    def __init__(self, stream: Any, name: str):
        self._stream, self._name = stream, name
        self._lock = threading.RLock()
        self._phase, self._since = "importing", time.monotonic()
        self._shown, self._at_line_start, self._quiet_since = False, True, 0.0
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="metainfluence-waiting", daemon=True)

    def phase(self, name: str) -> None:
        """Begins another activity."""
        with self._lock:
            self._phase, self._since = name, time.monotonic()

    def before_write(self, text: str) -> None:
        """Makes room before others write."""
        with self._lock:
            self._erase()
            self._quiet_since = time.monotonic() + QUIET
            self._at_line_start = text.endswith("\n") if text else self._at_line_start

    def show(self) -> None:
        """Writes the line, unless others have written recently or have not finished their line."""
        with self._lock:
            now = time.monotonic()
            if now < self._quiet_since or not self._at_line_start:
                return
            text = f"{self._name}: {self._phase}, {now - self._since:.0f} s"
            self._write(_ERASE + text[: _width(self._stream) - 1])
            self._shown = True

    def _run(self) -> None:
        self.show()
        while not self._ended.wait(TICK):
            self.show()

    def end(self) -> None:
        """Ends the display."""
        self._ended.set()
        with self._lock:
            self._erase()

    def _erase(self) -> None:
        if self._shown:
            self._write(_ERASE)
            self._shown = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def _width(stream: Any) -> int:
    """Columns of a terminal; 80 if it does not report them."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


class _Told(logging.Filter):
    """Listens to what JAX logs about compiling, and passes on only what it would have shown anyway."""

    def __init__(self, waiting: Waiting):
        super().__init__()
        self._waiting = waiting

    def filter(self, record: logging.LogRecord) -> bool:
        message = str(record.msg)
        if message.startswith("Compiling ") and record.args:
            self._waiting.phase(f"compiling {record.args[0] if isinstance(record.args, tuple) else 'a program'}")
        elif message.startswith("Finished XLA compilation"):
            self._waiting.phase("running")
        return record.levelno >= logging.WARNING


class _Guarded:
    """A standard stream that clears the line before its text."""

    def __init__(self, stream: Any, waiting: Waiting):
        self._stream, self._waiting = stream, waiting

    def write(self, text: str) -> int:
        """Writes like a stream."""
        self._waiting.before_write(text)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def waiting(name: str) -> Iterator[Waiting | None]:
    """Shows on stderr, if that is a terminal, what is going on, within a moment; otherwise yields None.

    Args:
      name: name of the command.
    """
    stream: Any = sys.stderr
    if stream is None or not stream.isatty() or os.environ.get("TERM") == "dumb":
        yield None
        return
    found = Waiting(stream, name)
    told, loggers = _Told(found), [logging.getLogger(each) for each in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addFilter(told)
    out: Any = _Guarded(sys.stdout, found) if sys.stdout is not None else None
    errors: Any = _Guarded(stream, found)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            found.thread.start()
            yield found
    finally:
        found.end()
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeFilter(told)
            logger.setLevel(level)
