"""Digits that float32 loses against float64, strategy by strategy.

`python tests/reliability/precision.py` measures all of them and writes the tables into the page of promises.
"""

import sys
from pathlib import Path

import jax
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    jax.config.update("jax_enable_x64", True)

import metainfluence as mi
from metainfluence.solvers import SolveStatus
from reliability import cases, golden
from reliability import test_no_silent_approximation as walk

PAGE = Path(mi.__file__).parent / "docs" / "promises.md"
BEGIN, END = "<!-- digits lost: begin -->", "<!-- digits lost: end -->"
EPS = float(np.finfo(np.float32).eps)
CONDITIONS = (10, 1e3, 1e5)
NUM_DRAWS = 15
PROBLEMS = [
    *(cases.Structure("closed_form", curvature, True) for curvature in walk.CURVATURES),
    cases.Structure("unrolled", "exact", True),
    cases.Structure("implicit", "exact", True),
]
# The operators here have inputs of equal second moments, so that the basis of ekfac is arbitrary, in float64 too.
SOLVERS = [name for name in walk.SOLVERS if name not in ("identity", "ekfac")]


def lost(found, expected):
    """Decimal digits of float32's 6.9 that are not right."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return max(0.0, float(np.log10(max(error, EPS) / EPS)))


def scores(structure):
    """Digits lost by all scores of the golden problem, dense solve."""
    inputs = cases.inputs_of(structure, golden.drawn(golden.stored()["inputs"]))
    expected = cases.ravel(cases.values(cases.scores_of(structure)(inputs)))
    single = jax.tree.map(np.asarray, cases.cast(inputs, "float32"))
    with jax.enable_x64(False):
        found = cases.values(cases.scores_of(structure._replace(dtype="float32"))(single))
    assert {leaf.dtype for leaf in found} == {np.dtype("float32")}
    return lost(cases.ravel(found), expected)


def solve(name, condition):
    """Digits lost by a solver at a condition number against itself in float64, and its status in float32.

    The median over operators and right-hand sides, since one of them alone says little: MINRES loses 2 to
    5 digits at 1e5.
    """
    drawn = [_solve_one(name, condition, seed) for seed in range(NUM_DRAWS)]
    statuses = [status for _, status in drawn]
    return float(np.median([digits for digits, _ in drawn])), max(set(statuses), key=statuses.count)


def _solve_one(name, condition, seed):
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.normal(size=(walk.SIZE, walk.SIZE)))[0]
    spectrum, rhs = np.geomspace(1 / condition, 1, walk.SIZE), rng.normal(size=walk.SIZE)
    expected, _ = walk.solving(name, 0)(vectors, spectrum, rhs)
    with jax.enable_x64(False):
        single = [np.asarray(part, np.float32) for part in (vectors, spectrum, rhs)]
        solution, info = walk.solving(name, 0)(*single)
    assert solution.dtype == np.float32
    return lost(solution, expected), SolveStatus(int(info.status))


def tables():
    """Both tables."""
    lines = ["| scores by the dense solver | digits lost |", "|:---|---:|"]
    lines += [f"| {structure.adapt}, {structure.curvature} | {scores(structure):.1f} |" for structure in PROBLEMS]
    heads = [f"condition number {condition:.0e}" for condition in CONDITIONS]
    lines += ["", f"| solver | {' | '.join(heads)} |", "|:---|" + "---:|" * len(heads)]
    for name in SOLVERS:
        cells = []
        for condition in CONDITIONS:
            digits, status = solve(name, condition)
            cells.append(f"{digits:.1f}" + ("" if status == SolveStatus.CONVERGED else f" {status.name}"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stored():
    """Rows of the page's tables, by their first cell."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text[text.index(BEGIN) : text.index(END)].splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    found = tables()
    print(found)
    PAGE.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
