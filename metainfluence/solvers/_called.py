"""Strategies that display as the call that made them, and are equal if the calls are."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
T = TypeVar("T", bound=tuple[Any, ...])

_PLAIN = (bool, int, float, str, type(None))


@dataclasses.dataclass(frozen=True)
class Called:
    """The call that made a strategy.

    Attributes:
      text: the call, without options at their defaults.
      made: the fields of what it made.
      named: whether the text says what the answer depends on; False for a strategy made of functions and given no name.
    """

    text: str
    made: tuple[Any, ...] = dataclasses.field(repr=False)
    named: bool = True


def called(make: Callable[P, T]) -> Callable[P, T]:
    """A maker whose strategies display as the call; the same plain options give the same object."""
    signature = inspect.signature(make)

    def fresh(*args: P.args, **kwargs: P.kwargs) -> T:
        made = make(*args, **kwargs)
        text = f"{make.__name__}({', '.join(_options(signature, args, kwargs))})"
        within = [value.called for value in [*args, *kwargs.values()] if hasattr(value, "called")]
        named = all(call is not None and call.named for call in within)
        return made._replace(called=Called(text, tuple(made), named))  # type: ignore[attr-defined]

    kept: Callable[..., T] = functools.lru_cache(maxsize=128, typed=True)(fresh)

    @functools.wraps(make)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        plain = all(type(value) in _PLAIN or hasattr(value, "called") for value in [*args, *kwargs.values()])
        # Equal programs then have equal cache keys; traced options give a new strategy each time.
        return kept(*args, **kwargs) if plain else fresh(*args, **kwargs)

    return run


def call_of(strategy: Any, name: str | None, maker: str, *functions: Any) -> Called:
    """The call of a strategy that was made of functions."""
    if name is None:
        text = f"{maker}({', '.join(_name(function) for function in functions)})"
    else:
        text = name if name.endswith(")") else f"{name}()"
    return Called(text, tuple(strategy), named=name is not None)


def shown(strategy: Any, kind: str, call: Called | None) -> str:
    """The call, and the fields replaced after it; without a call, the functions' names."""
    fields = [(name, value) for name, value in zip(strategy._fields, strategy, strict=True) if name != "called"]
    if call is None:
        return f"{kind}({', '.join(f'{name}={_name(value)}' for name, value in fields[:2])})"
    made = dict(zip(strategy._fields, call.made, strict=True))
    changed = [f"{name}={_name(value)}" for name, value in fields if value is not made[name]]
    return f"{call.text}._replace({', '.join(changed)})" if changed else call.text


def _options(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    given = signature.bind(*args, **kwargs).arguments
    options = []
    for name, value in given.items():
        parameter = signature.parameters[name]
        if type(value) is type(parameter.default) and type(value) in _PLAIN and value == parameter.default:
            continue
        text = _value(value)
        options.append(text if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else f"{name}={text}")
    return options


def _value(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return "<traced>"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and np.size(value) == 1:
        return repr(np.asarray(value).item())
    return repr(value)


def _name(value: Any) -> str:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({', '.join(map(_name, value))})"
    return getattr(value, "__qualname__", None) or repr(value)
