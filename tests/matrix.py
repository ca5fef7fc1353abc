"""`make test-matrix`: wheel and sdist in empty environments, on every Python found and the oldest and newest JAX.

Each environment holds the core alone. What is run there is outside the repository: the import, the README's example,
and two features of the lab, which must name the extra that they need.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
AGES = ("oldest", "newest")
KINDS = ("wheel", "sdist")
# A lower bound that was released before this Python, and so has no wheel for it, and the first version that has one.
FIRST_WHEEL = {("numpy", "3.13"): "2.1"}
NAMES_THE_EXTRA = "pip install 'metainfluence[lab]'"

SMOKE = """
import sys
from importlib.metadata import version
from pathlib import Path

import metainfluence as mi

assert Path(sys.prefix) in Path(mi.__file__).parents, mi.__file__
assert not {"flax", "tensorflow", "matplotlib", "pyarrow"} & set(sys.modules)
scope = {}
exec(compile(Path("example.py").read_text(encoding="utf-8"), "example.py", "exec"), scope)
assert scope["worst"].tolist() == [7], scope["worst"]
held_out, loss = scope["held_out"], mi.query_loss(scope["problem"])
assert loss(scope["edited"].meta_params, held_out) < loss(scope["meta_params"], held_out)
try:
    mi.read_scores("scores.parquet")
except ModuleNotFoundError as error:
    assert "metainfluence[lab]" in str(error), error
else:
    raise AssertionError("reads Parquet without pyarrow")
print("jax", version("jax"), "numpy", version("numpy"))
"""


class Cell(NamedTuple):
    """One environment of the matrix, and how it went."""

    python: str
    age: str
    kind: str
    outcome: str
    detail: str


def find_python(wanted: str) -> str | None:
    """The interpreter of a version, from PATH or pyenv; None where there is none that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{wanted}"), *sorted(pyenv.glob(f"versions/{wanted}.*/bin/python"), reverse=True)]
    for candidate in filter(None, candidates):
        # Executed, since a name on PATH may be a shim with nothing behind it.
        asked = [candidate, "-c", "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == wanted:
            return str(candidate)
    return None


def lower_bounds(dependencies: Sequence[str], python: str) -> list[str]:
    """The oldest version of each requirement that `python` can install, pinned.

    Raises:
      ValueError: a requirement that is not of the form name>=version.
    """
    pins = []
    for requirement in dependencies:
        parts = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", requirement)
        if parts is None:
            raise ValueError(f"dependencies: expected name>=version, got {requirement!r}")
        name, version = parts.groups()
        pins.append(f"{name}=={FIRST_WHEEL.get((name, python), version)}")
    return pins


def readme_example() -> str:
    """The README's only block of Python."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


def build(folder: Path) -> dict[str, Path]:
    """Builds the sdist and the wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def check_environment(interpreter: str, distribution: Path, pins: Sequence[str], folder: Path) -> str:
    """Installs a distribution into an empty environment and runs the smoke test there.

    Returns:
      What was installed.

    Raises:
      AssertionError: a step failed; the message ends with the last lines that it printed.
    """
    binaries = folder / "venv" / "bin"
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path, expected: int = 0) -> str:
        done = subprocess.run(command, cwd=folder, env=outside, capture_output=True, text=True, check=False)
        said = f"{done.stdout}{done.stderr}"
        assert done.returncode == expected, "\n".join([f"{Path(command[0]).name}:", *said.strip().splitlines()[-6:]])
        return said

    run(interpreter, "-m", "venv", folder / "venv")
    run(binaries / "pip", "install", "--quiet", "--disable-pip-version-check", distribution, *pins)
    run(binaries / "pip", "--disable-pip-version-check", "check")
    (folder / "example.py").write_text(readme_example(), encoding="utf-8")
    (folder / "smoke.py").write_text(SMOKE, encoding="utf-8")
    installed = run(binaries / "python", "smoke.py").strip().splitlines()[-1]
    refused = run(binaries / "metainfluence", "demo", expected=1)
    assert NAMES_THE_EXTRA in refused, refused
    return installed


def check_cell(python: str, age: str, kind: str, distribution: Path, dependencies: Sequence[str]) -> Cell:
    """Runs one cell; a failure is its outcome, and no exception."""
    interpreter = find_python(python)
    if interpreter is None:
        return Cell(python, age, kind, "skipped", f"no Python {python} with venv was found")
    pins = lower_bounds(dependencies, python) if age == "oldest" else []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            installed = check_environment(interpreter, distribution, pins, Path(folder))
        except AssertionError as error:
            return Cell(python, age, kind, "failed", str(error))
    return Cell(python, age, kind, "passed", f"{installed}, {time.perf_counter() - started:.0f} s")


def table(cells: Sequence[Cell]) -> str:
    """The cells as aligned text."""
    rows = [("Python", "jax", "from", "outcome", "")]
    rows += [(cell.python, cell.age, cell.kind, cell.outcome, cell.detail.replace("\n", "\n    ")) for cell in cells]
    return "\n".join(f"{a:<8}{b:<8}{c:<7}{d:<9}{e}".rstrip() for a, b, c, d, e in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the matrix.

    Returns:
      How many cells failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS)
    parser.add_argument("--jax", nargs="+", choices=AGES, default=AGES)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    asked = parser.parse_args(arguments)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        distributions = build(Path(folder))
        for python in asked.python:
            for age in asked.jax:
                for kind in asked.kind:
                    cells.append(check_cell(python, age, kind, distributions[kind], project["dependencies"]))
                    print(f"{python}, {age} jax, {kind}: {cells[-1].outcome}", flush=True)
    print(f"\n{table(cells)}")
    return sum(cell.outcome == "failed" for cell in cells)


if __name__ == "__main__":
    raise SystemExit(main())
