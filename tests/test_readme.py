"""The README is short, its example runs as printed and finds what it plants, and its links lead somewhere."""

import re
from pathlib import Path

import jax
import pytest

import metainfluence as mi

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = Path(mi.__file__).parent / "docs" / "index.md"


def example(text=README):
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def test_it_is_read_in_a_minute():
    assert len(README.splitlines()) <= 90
    assert len(README.split()) <= 800
    assert README.index("![") < README.index("make demo") < README.index("```python")


def test_the_example_is_short():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 100


def test_the_first_page_has_the_same_example():
    assert example(INDEX.read_text(encoding="utf-8")) == example()


@pytest.mark.parametrize("x64", [True, False])
def test_the_example_finds_the_planted_task(x64, capsys):
    # A reader runs it in a fresh interpreter, whose promotion is not strict.
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(example(), "README.md", "exec"), {})
    assert capsys.readouterr().out == "4\n"


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(links) > 8
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).is_file()]


def test_calls_in_the_table_exist():
    names = re.findall(r"`mi\.([\w.]+)`", README)
    assert len(names) > 8
    for name in names:
        found = mi
        for part in name.split("."):
            found = getattr(found, part)
