"""The user's functions as functions in the program, traced once however often they are called."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def outline(*functions: Any) -> Callable[[F], F]:
    """`jax.jit`; where one of the functions closes over a traced value, the identity.

    JAX caches what it has traced of a function by its identity and the shapes of its arguments. Values that a function
    closes over are cached with it, and traced ones are invalid after the trace that they belong to.
    """
    if any(closes_over_traced(function, set()) for function in functions):
        return lambda fn: fn
    return jax.jit  # type: ignore[return-value]


def closes_over_traced(value: Any, seen: set[int]) -> bool:
    """Whether a traced value is found in functions and what they close over; `seen` holds what was looked at."""
    return next(_traced_in(value, seen), None) is not None


def refuse_differentiated(name: str, value: Any) -> None:
    """Raises TypeError where what a derivative treats as constant closes over a value that is differentiated."""
    for found in _traced_in(value, set()):
        if type(found).__name__ in ("JVPTracer", "LinearizeTracer"):
            raise TypeError(
                f"{name}: expected a function that closes over no value that is being differentiated, got one with "
                f"{found.aval.str_short()}; the answer does not depend on it: pass it through jax.lax.stop_gradient "
                "first, and what the answer is to depend on as part of meta_params or of the task"
            )


def _traced_in(value: Any, seen: set[int]) -> Iterator[Any]:
    """The traced values in functions and what they close over."""
    if isinstance(value, jax.core.Tracer):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        # A cell without content belongs to a name that is not bound yet.
        cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        inside = [*(cell.cell_contents for cell in cells), *(value.__defaults__ or ())]
        inside += (value.__kwdefaults__ or {}).values()
    elif isinstance(value, types.MethodType):
        inside = [value.__func__, value.__self__]
    elif isinstance(value, (tuple, list)):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif hasattr(value, "__wrapped__"):
        inside = [value.__wrapped__]
    for item in inside:
        yield from _traced_in(item, seen)
