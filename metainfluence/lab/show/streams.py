"""Standard streams for commands, for which a vanished reader or a missing character is no failure."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_FATAL = ("strict", "surrogateescape", "surrogatepass")


class Lenient:
    """A text stream that drops its input once its reader is gone, and replaces characters that its encoding lacks.

    Args:
      stream: a standard stream; None, which Python uses for a stream closed at startup, drops everything.
    """

    def __init__(self, stream: TextIO | None):
        # Never closed, like the standard streams themselves.
        self._stream: Any = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        # In the C locale Python itself uses surrogateescape, which is just as strict about missing characters.
        if hasattr(self._stream, "reconfigure") and self._stream.errors in _FATAL:
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Writes like a stream."""
        try:
            written: int = self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            written = len(text)
        return written

    def flush(self) -> None:
        """Flushes like a stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        # Reuses the stream's descriptor, so that Python's flush at exit and child processes find no broken pipe either.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Makes both standard streams `Lenient`."""
    out: Any = Lenient(sys.stdout)
    errors: Any = Lenient(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:
            out.flush()
            errors.flush()
