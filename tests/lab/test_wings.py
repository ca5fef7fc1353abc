"""The lab's subpackages: data flows one way, and what is private to one stays in it."""

import ast
from pathlib import Path

import pytest

LAB = Path(__file__).resolve().parents[2] / "metainfluence" / "lab"
WINGS = ("data", "learn", "show", "experiments", "bench", "commands")
MODULES = sorted(LAB.glob("*/**/*.py"))


def imported(tree):
    """The modules of the lab that a module names in its imports, as parts after `metainfluence.lab`."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[2:] for name in names if name.startswith("metainfluence.lab."))


def test_every_module_is_in_a_wing():
    assert {path.name for path in LAB.glob("*.py")} == {"__init__.py"}
    assert {path.relative_to(LAB).parts[0] for path in MODULES} == set(WINGS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(LAB).as_posix())
def test_a_wing_imports_from_those_before_it(path):
    wing = path.relative_to(LAB).parts[0]
    for other, *rest in imported(ast.parse(path.read_text(encoding="utf-8"))):
        assert WINGS.index(other) <= WINGS.index(wing), (other, rest)
        if other != wing:
            assert not [name for name in rest if name.startswith("_")], (other, rest)
