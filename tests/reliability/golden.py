"""Scores of three fixed problems, kept in golden.json: what must not change without anyone having meant it.

`python tests/reliability/golden.py` writes the file anew, from the inputs that it holds; look at the difference first.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    jax.config.update("jax_enable_x64", True)

from reliability import cases

PATH = Path(__file__).with_name("golden.json")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def stored() -> dict:
    """What the file holds."""
    return json.loads(PATH.read_text(encoding="utf-8"))


def drawn(numbers: dict) -> cases.Drawn:
    """The inputs, which are stored too, since random streams differ from one NumPy to the next."""
    arrays = {name: np.asarray(value) for name, value in numbers.items() if isinstance(value, list)}
    return cases.Drawn(**{**numbers, **arrays})


def scores(structure: cases.Structure, numbers: dict) -> dict[str, list]:
    """Scores of all data, in float64."""
    inputs = cases.inputs_of(structure, drawn(numbers))
    found = cases.values(cases.scores_of(structure)(inputs))._asdict()
    return {name: np.asarray(value, np.float64).tolist() for name, value in found.items()}


def fresh() -> dict:
    """Inputs for a first file."""
    rng = np.random.default_rng(2025)
    count = cases.SUPPORT + cases.QUERY
    return {
        "data": rng.normal(size=(cases.T, count, 3)).tolist(),
        "test": rng.normal(size=(1, count, 3)).tolist(),
        "lam": rng.normal(size=6).tolist(),
        "vectors": rng.normal(size=(2, 6)).tolist(),
        "weights": rng.uniform(0.5, 1.5, size=(cases.T, 1 + count)).tolist(),
        "counts": [[3, 2], [2, 1], [3, 2]],
        "damping": 1.0,
        "order": [0, 1, 2],
    }


def main() -> None:
    """Writes the file."""
    numbers = stored()["inputs"] if PATH.exists() else fresh()
    content = {
        "inputs": numbers,
        "tolerance": TOLERANCE,
        "scores": {str(structure): scores(structure, numbers) for structure in cases.STRUCTURES},
    }
    PATH.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
