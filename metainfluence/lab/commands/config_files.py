"""Configuration files: TOML whose keys are the fields of a configuration dataclass."""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from metainfluence.lab.experiments import ranges
from metainfluence.lab.experiments.named import ConfigError

# Far larger than any configuration.
_MOST_BYTES = 1 << 20


def load_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
      ConfigError: a file that cannot be read, is too large or is not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) <= _MOST_BYTES:
            # With or without the byte-order mark that some editors write.
            return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected TOML in UTF-8, got {error}") from error
    # Values nested deeper than Python's stack are a RecursionError; TOML's own errors are ValueErrors.
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    raise ConfigError(f"{path}: expected a configuration of at most {_MOST_BYTES} bytes, got more")


def read_config(path: Path, suites: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Reads a TOML file.

    Args:
      path: the file; its key `suite` names one of the suites.
      suites: the known suites; the first is the default.

    Returns:
      The suite, and all other keys.

    Raises:
      ConfigError: a file that cannot be read, is too large or is not TOML, or an unknown suite.
    """
    values = load_toml(path)
    suite = values.pop("suite", suites[0])
    if suite not in suites:
        raise ConfigError(f"{path}: suite: expected one of {', '.join(suites)}; got {suite!r}")
    return suite, values


def as_arguments(values: dict[str, Any], config: Any, path: Path, prefix: str = "") -> list[str]:
    """The command-line arguments that are equivalent to a configuration file.

    Args:
      values: the file's keys; a table is a nested configuration.
      config: the configuration dataclass.
      path: the file, for messages.
      prefix: prefix of nested keys.

    Raises:
      ConfigError: an unknown key; a table where none belongs, or no table where one does; a string that the command
        line would read as another option.
    """
    types = get_type_hints(config)
    names = [field.name for field in dataclasses.fields(config)]
    arguments = []
    for key, value in values.items():
        if key not in names:
            table = f"[{prefix.removesuffix('.')}] " if prefix else ""
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{path}: unknown key {prefix + key!r}; {table}allows {', '.join(names)}; nearest is {near!r}"
            )
        nested = dataclasses.is_dataclass(types[key])
        if isinstance(value, dict) != nested:
            raise ConfigError(f"{path}: {prefix + key}: expected {'a table' if nested else 'a value'}, got {value!r}")
        option = f"{prefix}{key}".replace("_", "-")
        if nested:
            arguments += as_arguments(value, types[key], path, f"{prefix}{key}.")
        elif isinstance(value, bool):
            head, _, name = option.rpartition(".")
            flag = name if value else f"no-{name}"
            arguments.append(f"--{head}.{flag}" if head else f"--{flag}")
        else:
            items = value if isinstance(value, list) else [value]
            for item in items:
                if isinstance(item, str) and item.startswith("-"):
                    raise ConfigError(f"{path}: {prefix + key}: expected no string that starts with '-', got {item!r}")
            arguments += [f"--{option}", *map(str, items)]
    return arguments


def options_of(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names of a configuration's fields and the options that set them, including those of nested configurations."""
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(types[field.name]):
            yield from options_of(types[field.name], f"{prefix}{field.name}.")
        else:
            yield field.name, f"--{prefix}{field.name}".replace("_", "-")


def check_ranges(config: Any, *, places: bool = True) -> None:
    """Raises ConfigError, naming the option, if a number is out of range or, with `places`, a path is unusable."""
    try:
        ranges.check(config, places=places)
    except ranges.RangeError as error:
        raise ConfigError(str(error)) from error


def as_toml(config: Any, prefix: str = "", leave_out: Sequence[str] = ()) -> str:
    """A configuration as TOML; fields that are None are left out, as TOML has no null."""
    tables, lines = [], []
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            tables.append(f"\n[{prefix}{field.name}]\n{as_toml(value, f'{prefix}{field.name}.')}")
        elif value is not None:
            # JSON's scalars and lists are also valid TOML.
            lines.append(f"{field.name} = {json.dumps(value, default=str, ensure_ascii=False)}\n")
    return "".join([*lines, *tables])
