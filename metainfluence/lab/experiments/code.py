"""What an experiment's results depend on in the code, so that a table older than the code can be told."""

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import metainfluence

ROOT = Path(metainfluence.__file__).parent
# What shows, measures time or reads a command line changes no result.
LEFT_OUT = ("lab/bench", "lab/show", "lab/commands", "docs")
EXPERIMENTS = "lab/experiments"
UNKNOWN = "of which no record was kept"


class _Bare(ast.NodeTransformer):
    """Drops docstrings and other bare constants."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else node


def digest(text: str) -> str:
    """A hash of a module that comments, docstrings and line breaks do not change."""
    tree = _Bare().visit(ast.parse(text))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


@functools.cache
def code_of(experiment: str) -> dict[str, str]:
    """Module -> its digest, of all modules that the results of an experiment may depend on.

    These are the core, the lab's data and learners, and of the experiments the one named and what it imports.
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
    """The experiment's module and those in its folder that it imports, and they in turn."""
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
    """The modules that differ, by name; `[UNKNOWN]` where what was run was not recorded."""
    if before is None:
        return [UNKNOWN]
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
