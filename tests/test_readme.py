"""The README's example runs as printed, and finds what it plants."""

import re
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


def example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return code


def test_example_has_25_lines():
    assert sum(1 for line in example().splitlines() if line.strip()) <= 25


@pytest.mark.parametrize("x64", [True, False])
def test_example_finds_the_planted_task(x64, capsys):
    scope = {}
    # A reader runs it in a fresh interpreter, whose promotion is not strict.
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(example(), str(README), "exec"), scope)
    assert scope["worst"].tolist() == [7]
    problem, held_out = scope["problem"], scope["held_out"]
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss = scope["mi"].query_loss(problem)
        assert loss(scope["edited"].meta_params, held_out) < loss(scope["meta_params"], held_out)
    assert "relative_residual" in capsys.readouterr().out
