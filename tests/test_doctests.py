"""The examples in docstrings, run; every public function of the modules named here has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

PUBLIC = (
    "metainfluence.adaptation",
    "metainfluence.baselines",
    "metainfluence.curvature",
    "metainfluence.damping",
    "metainfluence.data",
    "metainfluence.ekfac",
    "metainfluence.evaluation",
    "metainfluence.influence",
    "metainfluence.minimizers",
    "metainfluence.operators",
    "metainfluence.problem",
    "metainfluence.response",
    "metainfluence.scoring",
    "metainfluence.solvers",
    "metainfluence.spectra",
    "metainfluence.training",
    "metainfluence.trust",
)


def functions_of(name):
    """The public functions of a module, by name; some are written in another."""
    module = importlib.import_module(name)
    found = {key: getattr(module, key) for key in module.__all__}
    return {key: fn for key, fn in found.items() if inspect.isfunction(fn)}


def modules_of(name):
    """A module, those in it, and those where its functions are written."""
    module = importlib.import_module(name)
    inside = pkgutil.iter_modules(module.__path__) if hasattr(module, "__path__") else ()
    written = (fn.__module__ for fn in functions_of(name).values())
    return {name, *(f"{name}.{part.name}" for part in inside), *written}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_has_an_example(name):
    functions = functions_of(name)
    assert functions
    bare = [key for key, fn in functions.items() if not doctest.DocTestFinder().find(fn, key)[0].examples]
    assert not bare, f"without an example in the docstring: {bare}"


@pytest.mark.parametrize("module", sorted(set().union(*map(modules_of, PUBLIC))))
def test_examples_show_what_comes_out(module):
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
