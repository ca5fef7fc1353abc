"""The user's functions as functions of the program, traced once however often they are called."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])


def outline(*functions: Any) -> Callable[[F], F]:
    """`jax.jit`, or, where one of the functions closes over a traced value, nothing.

    JAX keeps what it has traced of a function by its identity and the shapes of its arguments. Values that a function
    closes over are kept with it, and traced ones do not outlive the trace that they belong to.
    """
    if any(closes_over_traced(function, set()) for function in functions):
        return lambda fn: fn
    return jax.jit  # type: ignore[return-value]


def closes_over_traced(value: Any, seen: set[int]) -> bool:
    """Whether a traced value is found in functions and what they close over; `seen` holds what was looked at."""
    if isinstance(value, jax.core.Tracer):
        return True
    if id(value) in seen:
        return False
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
    return any(closes_over_traced(item, seen) for item in inside)
