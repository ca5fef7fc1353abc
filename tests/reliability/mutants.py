"""Breaks the core in small ways, one at a time, and reports which breaks the tests do not see.

    python tests/reliability/mutants.py --count 100 --seed 0 --out mutants.jsonl
    python tests/reliability/mutants.py --report mutants.jsonl

Every mutant lives in a temporary copy of the package and its tests; the working tree is only read. A run that finds
outcomes in its file goes on after them. What survives the tests of its own file is tried with the wider ones.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
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
SMALL_PRINT = "tests/reliability/test_small_print.py"
REFUSALS = ["tests/test_bad_input.py", "tests/test_bad_options.py"]
CORE = ("influence", "operators", "problem", "adaptation", "minimizers", "subspace", "krylov", "_edit")
# What each file's mutants are tried with: the quickest first, since the first failure ends a trial.
TESTS = {
    "influence.py": [
        GOLDEN,
        SMALL_PRINT,
        *REFUSALS,
        "tests/test_edit.py",
        PROPERTIES,
        "tests/test_transformations.py",
        "tests/test_influence.py",
    ],
    "_edit.py": ["tests/test_edit.py", GOLDEN],
    "operators.py": [GOLDEN, SMALL_PRINT, *REFUSALS, PROPERTIES, "tests/test_many_solves.py"],
    "problem.py": [GOLDEN, "tests/test_bilevel.py", *REFUSALS, PROPERTIES],
    "adaptation.py": [GOLDEN, SMALL_PRINT, *REFUSALS, "tests/test_adaptation.py", FAULTS],
    "minimizers.py": [FAULTS, "tests/test_adaptation.py"],
    "_ekfac.py": [SMALL_PRINT, *REFUSALS[1:], "tests/ekfac/test_solver.py", "tests/test_solver_failures.py", WALK],
    "solvers": [
        SMALL_PRINT,
        *REFUSALS[1:],
        "tests/test_solver_failures.py",
        "tests/test_subspace.py",
        "tests/test_solvers.py",
        "tests/test_many_solves.py",
        WALK,
    ],
}
# What is tried next, with all that survived.
WIDER = [
    "tests/test_influence.py",
    "tests/test_oracles.py",
    "tests/test_edit.py",
    "tests/test_bilevel.py",
    "tests/test_curvature.py",
    "tests/test_solver_failures.py",
    "tests/test_many_solves.py",
    "tests/test_transformations.py",
    "tests/test_padding_chunks.py",
    "tests/test_damping.py",
    "tests/test_float32.py",
    FAULTS,
    WALK,
    PROPERTIES,
    "tests/test_solvers.py",
    "tests/ekfac/test_solver.py",
    "tests/wrapping/test_hvp.py",
    "tests/test_preflight.py",
    "tests/scoring/test_engine.py",
]
# Changes that change no answer, by file and changed line, with the reason; found by reading them.
_MASKED = "the divisor is that of a lane which the outer `where` leaves out"
_ONE_AXIS = "the array has one axis, so that its first is its last"
_FORCING = "the last directions become more or less accurate than they need to be"
EQUIVALENT = {
    ("influence.py", "split = 1 + own.support.shape[(-1)]"): _ONE_AXIS,
    (
        "adaptation.py",
        'total = weighted_sum(check_losses(losses, coefficients.shape[(-1)], "inner_loss"), coefficients)',
    ): _ONE_AXIS,
    ("minimizers.py", "forcing = jnp.clip(jnp.sqrt(here.norm / scale), (-0.9999), 0.1)"): _FORCING,
    (
        "minimizers.py",
        "along = jnp.maximum(jnp.vdot(unit, products[(2)]), 0)",
    ): "JAX takes the last of two for an index beyond it",
    (
        "minimizers.py",
        "solver = solvers.cg(tol=tol, max_steps=min((3) * domain.size + 10, 100))",
    ): "conjugate gradients end within `size` steps but for rounding, and the margin is free",
    ("_base.py", "return names[(-1)]"): "a single code has a single name",
    ("_kit.py", "divisor = select(moved, square, (0))"): _MASKED,
    ("_dense.py", "inverse = jnp.where(zero, 0, 1 / jnp.where(zero, (0), values))"): _MASKED,
    ("_minres.py", "vector=remainder / jnp.where(beta > 0, beta, (2)),"): "the remainder is 0 where beta is",
    ("_minres.py", "steps_left=jnp.where(singular, (-1), carry.steps_left - 1),"): "no steps are left either way",
    ("_neumann.py", "rounding = (15) * jnp.finfo(term.dtype).eps"): "a margin over rounding, taken large enough",
    (
        "_neumann.py",
        "product = after(operator.flat_matvec(vector / jnp.where(size > 0, size, (2))))",
    ): "the vector is 0 where its size is",
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

    @property
    def key(self) -> str:
        """The same for the same change of the same file."""
        return hashlib.sha256(f"{self.file}\0{self.source}".encode()).hexdigest()[:16]

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


def core_files() -> list[Path]:
    """The files that are broken, by their paths from the root."""
    core = [Path("metainfluence") / f"{name}.py" for name in CORE]
    core += sorted(path.relative_to(ROOT) for path in (ROOT / "metainfluence" / "solvers").glob("_*.py"))
    return [file for file in core if file.name != "__init__.py"]


def tests_of(file: Path) -> list[str]:
    """The tests that a file's mutants are tried with."""
    return TESTS.get(file.name, TESTS["solvers"])


def run(folder: Path, tests: list[str], limit: int) -> tuple[str, str]:
    """Outcome of the tests in the copy: "survived", "killed" or "timeout", which counts as killed; and what failed."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]

    def bounded() -> None:
        # Of the processor's time, since a machine with other work takes any time.
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            timeout=50 * limit,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=bounded,
        )
    except subprocess.TimeoutExpired:
        return "timeout", ""
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout", ""
    if done.returncode not in (0, 1, 2, 4):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return ("killed" if done.returncode else "survived"), failed[1] if failed else ""


def pass_unchanged(folder: Path, tests: list[str], limit: int, out: Path | None) -> None:
    """Raises unless the tests pass without a mutation; once for every test of a file of outcomes."""
    known = {test for record in records_in(out) for test in record.get("unchanged", [])}
    new = [test for test in tests if test not in known]
    if not new:
        return
    outcome, by = run(folder, new, 10 * limit)
    if outcome != "survived":
        raise RuntimeError(f"expected the tests to pass without a mutation, got {outcome} by {by}")
    append(out, {"unchanged": new})


def trial(folder: Path, mutant: Mutant, tests: list[str], limit: int, out: Path | None) -> dict[str, object]:
    """What becomes of a mutant by these tests."""
    pass_unchanged(folder, tests, limit, out)
    file, start = folder / mutant.file, time.monotonic()
    unchanged = file.read_text(encoding="utf-8")
    file.write_text(mutant.source, encoding="utf-8")
    outcome, by = run(folder, tests, limit)
    file.write_text(unchanged, encoding="utf-8")
    return {
        "key": mutant.key,
        "file": str(mutant.file),
        "line": mutant.line,
        "kind": mutant.kind,
        "outcome": outcome,
        "by": by,
        "tests": tests,
        "seconds": round(time.monotonic() - start, 1),
        "diff": mutant.diff(),
    }


def copy_of_the_tree(folder: Path) -> None:
    """Copies the package and its tests, and looks that it is these that a test imports."""
    for part in ("metainfluence", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    script = "import metainfluence; print(metainfluence.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    place = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout
    if not Path(place.strip()).is_relative_to(folder.resolve()):
        raise RuntimeError(f"expected the copy of the package to be imported, got {place}")


def records_in(path: Path | None) -> list[dict]:
    """The records that a file holds: outcomes, and which tests were seen to pass without a mutation."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcomes_in(path: Path | None) -> dict[str, dict]:
    """The outcomes that a file holds, the last of each mutant."""
    return {record["key"]: record for record in records_in(path) if "outcome" in record}


def append(path: Path | None, record: dict) -> None:
    """Adds a record to a file."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def reason(outcome: dict) -> str | None:
    """Why a survivor changes no answer, or None where that is not known."""
    added = [line[1:].strip() for line in outcome["diff"].splitlines() if line.startswith("+")]
    if any("strict=(False)" in line for line in added):
        return "a guard against our own mistakes: both are of one length"
    return EQUIVALENT.get((Path(outcome["file"]).name, " ".join(added)))


def report(outcomes: list[dict]) -> str:
    """How many were killed in which file, and the survivors."""
    lines = []
    for file in sorted({outcome["file"] for outcome in outcomes}):
        own = [outcome for outcome in outcomes if outcome["file"] == file]
        lines.append(f"{sum(o['outcome'] != 'survived' for o in own):4} of {len(own):3} killed in {file}")
    survivors = [outcome for outcome in outcomes if outcome["outcome"] == "survived"]
    named = sum(reason(outcome) is not None for outcome in survivors)
    for outcome in survivors:
        why = reason(outcome) or "not looked at yet"
        lines.append(f"survived: {outcome['file']}:{outcome['line']} ({why})\n{outcome['diff']}")
    killed = len(outcomes) - len(survivors)
    summary = f"{killed} of {len(outcomes)} mutants killed, {len(survivors)} survived, {named} of these equivalent"
    return "\n".join([*lines, summary])


def main() -> None:
    """Samples mutants, tries each, and prints a table and the survivors' changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=900, help="seconds of the processor for a mutant's tests")
    parser.add_argument("--only", default="", help="a part of the names of the files to mutate")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no mutant after so long")
    parser.add_argument("--out", type=Path, help="file to which outcomes are appended, one JSON object a line")
    parser.add_argument("--report", type=Path, help="only print what this file holds")
    options = parser.parse_args()
    if options.report:
        print(report(list(outcomes_in(options.report).values())))
        return
    core = [file for file in core_files() if options.only in str(file)]
    every = [mutant for file in core for mutant in mutants_of(file)]
    chosen = random.Random(options.seed).sample(every, min(options.count, len(every)))
    known = {mutant.key for mutant in chosen}
    outcomes = {key: outcome for key, outcome in outcomes_in(options.out).items() if key in known}
    print(f"{len(chosen)} of {len(every)} mutants of {len(core)} files, {len(outcomes)} tried before", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_tree(folder)
        # All with the quick tests first, then those that survived with the wider ones.
        for wider in (False, True):
            for mutant in chosen:
                own = tests_of(mutant.file)
                tests = [test for test in WIDER if test not in own] if wider else own
                before = outcomes.get(mutant.key)
                if before and (not wider or before["outcome"] != "survived" or before["tests"] == tests):
                    continue
                if wider and before and reason(before):
                    continue
                if time.monotonic() - began > options.seconds:
                    break
                found = trial(folder, mutant, tests, 3 * options.limit if wider else options.limit, options.out)
                outcomes[mutant.key] = found
                append(options.out, found)
                print("{outcome:9} {seconds:5} s  {file}:{line}  {kind}  {by}".format(**found), flush=True)
    print(report(list(outcomes.values())))


if __name__ == "__main__":
    main()
