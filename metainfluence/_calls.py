"""Functions that are handed in: refused, or explained, with the signature that is expected."""

from __future__ import annotations

import contextlib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def check_function(name: str, value: Any, expected: str, *arguments: Any) -> None:
    """Raises TypeError unless `value` can be called with that many arguments, by its signature where it shows one."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function {expected}, got {reprlib.repr(value)}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name}: expected a function {expected}, got one of {signature}: {error}") from None


@contextlib.contextmanager
def calling(name: str, signature: str) -> Iterator[None]:
    """Notes at an error that arguments of another kind than a function expects make, how it is called."""
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        # Of functions that call each other, the innermost is meant.
        if not getattr(error, "__notes__", None):
            error.add_note(f"{name} is called as {name}{signature}")
        raise


def maker(call: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function that makes a function, to be told how both are called where a call mixes them up.

    Args:
      call: the second call, "(meta_params, tasks)".
    """

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(fn)
        first = ", ".join(
            name for name, each in signature.parameters.items() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        )

        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                usage = f"{fn.__name__}({first}, …){call}"
                raise TypeError(f"{fn.__name__}: {error}; it makes a function, which takes the data: {usage}") from None
            return fn(*args, **kwargs)

        return run

    return decorate
