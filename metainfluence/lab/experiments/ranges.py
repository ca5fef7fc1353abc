"""Ranges of options: what a number may be, beside the field that holds it, and one check for all of them."""

import dataclasses
import math
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Numbers from `least` to `most`, both included unless `above` leaves out the least."""

    least: float
    most: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range; infinity and NaN are in none."""
        above_least = self.least < value if self.above else self.least <= value
        return math.isfinite(value) and above_least and value <= self.most

    def __str__(self) -> str:
        """The range in words."""
        if self.most < math.inf:
            return f"a number from {self.least:g} to {self.most:g}"
        if self == Range(1):
            return "a positive number"
        return f"a number {'above' if self.above else 'of at least'} {self.least:g}"


Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(0)]
Ways = Annotated[int, Range(2)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]


class RangeError(ValueError):
    """An option whose number is out of its range."""


def check(config: Any, prefix: str = "") -> None:
    """Raises RangeError, naming the option, where a field of a configuration is out of the range it is annotated with.

    Args:
      config: a dataclass, with others nested in it.
      prefix: of the options' names.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check(value, f"{option}.")
            continue
        for allowed in _ranges(hints[field.name]):
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not allowed.holds(number):
                    raise RangeError(f"--{option.replace('_', '-')}: expected {allowed}, got {number!r}")


def _ranges(hint: Any) -> list[Range]:
    """The ranges that a type is annotated with, its parts included, as in `Count | None`."""
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)]
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated or own else get_args(hint)
    return own + [each for part in parts for each in _ranges(part)]
