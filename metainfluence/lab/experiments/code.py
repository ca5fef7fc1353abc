"""The code that an experiment's results depend on, so that a table older than the code can be recognised."""

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import metainfluence

ROOT = Path(metainfluence.__file__).parent
# Code that displays, measures time or reads a command line changes no result; neither does this module.
LEFT_OUT = ("lab/bench", "lab/show", "lab/commands", "lab/experiments/code.py", "docs")
EXPERIMENTS = "lab/experiments"
UNKNOWN = "of which no record was kept"


class _Bare(ast.NodeTransformer):
    """Drops docstrings and other bare constants, and the empty strings that Python 3.12 adds to f-strings."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
        return self.generic_visit(node)


def digest(text: str) -> str:
    """A hash of a module that does not depend on comments, docstrings, line breaks or the Python version."""
    return hashlib.sha256(_dumped(_Bare().visit(ast.parse(text))).encode()).hexdigest()[:12]


def _dumped(node: Any) -> str:
    """Like `ast.dump` of Python 3.13, which leaves out empty fields; earlier versions write them, and differ."""
    if isinstance(node, list):
        return f"[{', '.join(map(_dumped, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: getattr(node, name, None) for name in node._fields}
    kept = {
        name: value
        for name, value in fields.items()
        if value != [] and (value is not None or (isinstance(node, ast.Constant) and name == "value"))
    }
    return f"{type(node).__name__}({', '.join(f'{name}={_dumped(value)}' for name, value in kept.items())})"


@functools.cache
def code_of(experiment: str) -> dict[str, str]:
    """Module -> its digest, for all modules that the results of an experiment may depend on.

    These are the core, the lab's data and learners, the named experiment and what it imports.
    """
    files = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
    own = _imported(experiment)
    names = [
        name
        for name in files
        if not name.startswith(LEFT_OUT) and (not name.startswith(EXPERIMENTS) or Path(name).stem in own)
    ]
    return {name: digest(files[name].read_text(encoding="utf-8")) for name in names}


def _imported(experiment: str) -> set[str]:
    """The experiment's module and the modules in its folder that it imports, directly or indirectly."""
    found, left = set(), [experiment]
    while left:
        stem = left.pop()
        path = ROOT / EXPERIMENTS / f"{stem}.py"
        if stem in found or not path.exists():
            continue
        found.add(stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                left += [alias.name for alias in node.names if node.module == "metainfluence.lab.experiments"]
                if node.module.startswith("metainfluence.lab.experiments."):
                    left.append(node.module.rpartition(".")[2])
    return found


def changed(before: Mapping[str, str] | None, now: Mapping[str, str]) -> list[str]:
    """The modules that differ, by name; `[UNKNOWN]` if the code of the run was not recorded."""
    if before is None:
        return [UNKNOWN]
    counted = (name for name in {*before, *now} if not name.startswith(LEFT_OUT))
    return sorted(name for name in counted if before.get(name) != now.get(name))
