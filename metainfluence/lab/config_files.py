"""Configuration files: TOML whose keys are the fields of a configuration dataclass."""

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints


class ConfigError(ValueError):
    """A configuration file that makes no sense."""


def read_config(path: Path, suites: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Reads a TOML file.

    Args:
      path: the file; its key `suite` names one of the suites.
      suites: those that there are; the first is the default.

    Returns:
      The suite, and all other keys.

    Raises:
      ConfigError: a file that cannot be read or is no TOML, or an unknown suite.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    suite = values.pop("suite", suites[0])
    if suite not in suites:
        raise ConfigError(f"{path}: suite: expected one of {', '.join(suites)}; got {suite!r}")
    return suite, values


def as_arguments(values: dict[str, Any], config: Any, path: Path, prefix: str = "") -> list[str]:
    """The command-line arguments that say the same as a configuration file.

    Args:
      values: the file's keys; a table is a nested configuration.
      config: the configuration dataclass.
      path: of the file, for messages.
      prefix: of nested keys.

    Raises:
      ConfigError: a key that is no field; a table where none belongs, or no table where one does.
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
            arguments += [f"--{option}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return arguments
