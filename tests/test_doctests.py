"""The examples in docstrings, run; every public function of the modules named here has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

PUBLIC = ("metainfluence.solvers", "metainfluence.operators")
PUBLIC_RUNS = (
    "metainfluence.training",
    "metainfluence.response._trajectory",
    "metainfluence.response._segments",
    "metainfluence.response._checkpoints",
    "metainfluence.trust._smoothness",
    "metainfluence.trust._choose",
    "metainfluence.baselines",
    "metainfluence.evaluation",
    "metainfluence.scoring",
    "metainfluence.ekfac",
)


def functions_of(name):
    """The public functions of a module, by name."""
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith(("_", "check_"))]
    found = {key: getattr(module, key) for key in names}
    return {key: fn for key, fn in found.items() if inspect.isfunction(fn) and fn.__module__.startswith(name)}


def modules_of(name):
    """A module and those in it."""
    module = importlib.import_module(name)
    inside = pkgutil.iter_modules(module.__path__) if hasattr(module, "__path__") else ()
    return [name, *(f"{name}.{part.name}" for part in inside)]


@pytest.mark.parametrize("name", PUBLIC + PUBLIC_RUNS)
def test_every_public_function_has_an_example(name):
    functions = functions_of(name)
    assert functions
    bare = [key for key, fn in functions.items() if not doctest.DocTestFinder().find(fn, key)[0].examples]
    assert not bare, f"without an example in the docstring: {bare}"


@pytest.mark.parametrize("module", [part for name in PUBLIC + PUBLIC_RUNS for part in modules_of(name)])
def test_examples_show_what_comes_out(module):
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
