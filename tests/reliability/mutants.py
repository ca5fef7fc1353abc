"""Breaks the core in small ways, one at a time, and reports which breaks the tests do not see.

    python tests/reliability/mutants.py --count 100 --seed 0

Every mutant lives in a temporary copy of the package and its tests; the working tree is only read.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PROPERTIES = "tests/reliability/test_properties.py"
FAULTS = "tests/reliability/test_faults.py"
WALK = "tests/reliability/test_no_silent_approximation.py"
GOLDEN = "tests/reliability/test_golden.py"
REFUSALS = ["tests/test_bad_input.py", "tests/test_bad_options.py"]
# What each file's mutants are tried with: the quickest first, since the first failure ends a trial.
TESTS = {
    "influence.py": [GOLDEN, "tests/test_edit.py", *REFUSALS, PROPERTIES, "tests/test_transformations.py"],
    "operators.py": [GOLDEN, *REFUSALS, PROPERTIES, "tests/test_many_solves.py"],
    "bilevel.py": [GOLDEN, "tests/test_bilevel.py", *REFUSALS, PROPERTIES],
    "adaptation.py": [GOLDEN, "tests/test_adaptation.py", *REFUSALS, FAULTS],
    "solvers": [
        *REFUSALS[1:],
        "tests/test_solver_failures.py",
        "tests/test_solvers.py",
        "tests/test_many_solves.py",
        WALK,
    ],
}
COMPARISONS = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


class Mutant(NamedTuple):
    """One change of one file."""

    file: Path
    line: int
    kind: str
    source: str

    def diff(self) -> str:
        """The lines that changed."""
        before = (ROOT / self.file).read_text(encoding="utf-8").splitlines()
        changed = difflib.unified_diff(before, self.source.splitlines(), n=0, lineterm="")
        return "\n".join(line for line in list(changed)[3:])


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node can be replaced by, under a name."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield "comparison", _with(node, ops=[COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            yield "operator", _with(node, op=ARITHMETIC[type(op)]())
        case ast.BoolOp(op=op):
            yield "and/or", _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield "sign dropped", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", ast.Constant(value + 1)
            yield "constant", ast.Constant(value - 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield "branches", _with(node, body=orelse, orelse=body)
        case ast.If(test=test):
            yield "branches", ast.UnaryOp(ast.Not(), test)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that are run: no annotations, whose unions look like arithmetic."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _code(child)


def mutants_of(file: Path) -> list[Mutant]:
    """All mutants of a file, by its path from the root."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    starts = [sum(map(len, lines[:k])) for k in range(len(lines))]
    found = []
    tree = ast.parse(text)
    for node in _code(tree):
        # Aliases of types, at a module's own level, are no code either.
        if node in getattr(tree, "body", []) and isinstance(node, ast.Assign):
            continue
        for kind, new in changes(node):
            place = node.test if isinstance(node, ast.If) else node
            begin = starts[place.lineno - 1] + place.col_offset
            end = starts[place.end_lineno - 1] + place.end_col_offset
            content = text.encode()
            replaced = content[:begin] + f"({ast.unparse(new)})".encode() + content[end:]
            source = replaced.decode()
            try:
                ast.parse(source)
            except SyntaxError:
                continue
            found.append(Mutant(file, place.lineno, kind, source))
    return found


def tests_of(file: Path) -> list[str]:
    """The tests that a file's mutants are tried with."""
    return TESTS["solvers" if file.parent.name == "solvers" else file.name]


def run(folder: Path, tests: list[str], limit: float) -> str:
    """Outcome of the tests in the copy: "survived", "killed" or "timeout", which counts as killed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return "killed" if done.returncode else "survived"


def main() -> None:
    """Samples mutants, tries each, and prints a table and the survivors' changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one mutant's tests")
    parser.add_argument("--only", default="", help="a part of the names of the files to mutate")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no mutant after so long")
    options = parser.parse_args()
    core = [Path("metainfluence") / f"{name}.py" for name in ("influence", "operators", "bilevel", "adaptation")]
    core += sorted(path.relative_to(ROOT) for path in (ROOT / "metainfluence" / "solvers").glob("_*.py"))
    core = [file for file in core if file.name != "__init__.py" and options.only in str(file)]
    every = [mutant for file in core for mutant in mutants_of(file)]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    print(f"{len(chosen)} of {len(every)} mutants of {len(core)} files", flush=True)
    outcomes: list[tuple[Mutant, str]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("metainfluence", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        script = "import metainfluence; print(metainfluence.__file__)"
        place = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if not Path(place.strip()).is_relative_to(folder.resolve()):
            raise RuntimeError(f"expected the copy of the package to be imported, got {place}")
        for tests in {tuple(tests_of(mutant.file)) for mutant in chosen}:
            if run(folder, list(tests), 3 * options.limit) != "survived":
                raise RuntimeError(f"expected these tests to pass without a mutation: {' '.join(tests)}")
        for number, mutant in enumerate(chosen, 1):
            if time.monotonic() - began > options.seconds:
                break
            file, start = folder / mutant.file, time.monotonic()
            unchanged = file.read_text(encoding="utf-8")
            file.write_text(mutant.source, encoding="utf-8")
            outcome = run(folder, tests_of(mutant.file), options.limit)
            file.write_text(unchanged, encoding="utf-8")
            outcomes.append((mutant, outcome))
            seconds = time.monotonic() - start
            print(
                f"{number:4} {outcome:9} {seconds:5.0f} s  {mutant.file}:{mutant.line}  {mutant.kind}",
                flush=True,
            )
            if outcome == "survived":
                print(mutant.diff(), flush=True)
    survived = sum(outcome == "survived" for _, outcome in outcomes)
    print(f"{len(outcomes) - survived} of {len(outcomes)} mutants killed, {survived} survived")


if __name__ == "__main__":
    main()
