"""Functions that a user names on the command line, as `module:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """Invalid options, or an invalid file of options."""


def named_function(name: str, option: str) -> Callable[..., Any]:
    """The function `module:function`, found on Python's module path or in the current directory.

    Args:
      name: the function's name.
      option: the option that names it, for messages.

    Raises:
      ConfigError: there is no such module or function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise ConfigError(f"{option}: expected MODULE:FUNCTION, got {name!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        known = importlib.util.find_spec(module_name)
    except (ModuleNotFoundError, ValueError):
        known = None
    if known is None:
        raise ConfigError(
            f"{option}: expected a module in {here} or installed, got {module_name!r}, which there is not"
        )
    function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise ConfigError(f"{option}: expected a function in {module_name}, got {function_name!r}, which there is not")
    found: Callable[..., Any] = function
    return found
