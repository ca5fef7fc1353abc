"""Standard streams for commands: a reader that goes away, or a terminal that lacks a character, is no failure."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_FATAL = ("strict", "surrogateescape", "surrogatepass")


class Lenient:
    """A text stream that drops what it is given once its reader is gone, and replaces what its encoding lacks.

    Args:
      stream: a standard stream; None, as Python has it for one that was closed at the start, drops everything.
    """

    def __init__(self, stream: TextIO | None):
        # Never closed, like the standard streams themselves.
        self._stream: Any = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        # In the C locale Python's own choice is surrogateescape, which is as strict with what the encoding lacks.
        if hasattr(self._stream, "reconfigure") and self._stream.errors in _FATAL:
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Writes, as a stream does."""
        try:
            written: int = self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            written = len(text)
        return written

    def flush(self) -> None:
        """Flushes, as a stream does."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        # Under the stream's own number, so that Python's flush at exit and child processes find no broken pipe either.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Both standard streams as `Lenient` ones."""
    out: Any = Lenient(sys.stdout)
    errors: Any = Lenient(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:
            out.flush()
            errors.flush()
