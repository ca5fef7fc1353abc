"""What an option may be, stated next to its field: ranges of numbers, places to write to; one check for all."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """Numbers from `least` to `most`, both included, except that `above` leaves out `least`."""

    least: float
    most: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number is in the range; infinity and NaN never are."""
        above_least = self.least < value if self.above else self.least <= value
        return math.isfinite(value) and above_least and value <= self.most

    def __str__(self) -> str:
        """The range in words."""
        if self == Range(-math.inf):
            return "a finite number"
        if self.most < math.inf:
            return f"a number from {self.least:g} to {self.most:g}"
        if self == Range(1):
            return "a positive number"
        return f"a number {'above' if self.above else 'of at least'} {self.least:g}"


class Place(NamedTuple):
    """Where a command writes: a folder, which is created if it does not exist, or a file."""

    folder: bool

    def problem(self, path: Path) -> str | None:
        """Why nothing can be written there, for a message; None if it can."""
        kind = "a folder" if self.folder else "a file"
        if path.exists() and path.is_dir() != self.folder:
            return f"expected {kind} to write, got {path}, which is {'a file' if self.folder else 'a folder'}"
        above = path if self.folder else path.parent
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            return f"expected {kind} to write, got {path}, which lies below the file {above}"
        return None if os.access(above, os.W_OK | os.X_OK) else f"expected {kind} to write, got {path}: no permission"


Number = Annotated[float, Range(-math.inf)]
Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(0)]
Ways = Annotated[int, Range(2)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
OutFolder = Annotated[Path, Place(folder=True)]
OutFile = Annotated[Path, Place(folder=False)]


class RangeError(ValueError):
    """An option whose number is out of its range, or whose path cannot be written to."""


def check(config: Any, prefix: str = "", *, places: bool = True) -> None:
    """Raises RangeError, naming the option, if a field of a configuration violates its annotation.

    Args:
      config: a dataclass, with others nested in it.
      prefix: prefix of the options' names.
      places: whether to check paths too, before writing; otherwise paths are not touched.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check(value, f"{option}.", places=places)
            continue
        for allowed in allowed_by(hints[field.name]):
            for each in value if isinstance(value, tuple) else (value,):
                if (places or not isinstance(allowed, Place)) and (told := _problem(allowed, each)):
                    raise RangeError(f"--{option.replace('_', '-')}: {told}")


def allowed_by(hint: Any) -> list[Range | Place]:
    """The annotations of a type, including those of its parts, as in `Count | None`."""
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range | Place)]
    parts = get_args(hint)[:1] if get_origin(hint) is Annotated or own else get_args(hint)
    return own + [each for part in parts for each in allowed_by(part)]


def _problem(allowed: Range | Place, value: Any) -> str | None:
    if isinstance(allowed, Place):
        return allowed.problem(value) if isinstance(value, Path) else None
    if isinstance(value, int | float) and not allowed.holds(value):
        return f"expected {allowed}, got {value!r}"
    return None
