"""Every line of the page of promises names tests that exist."""

import ast
import re
from pathlib import Path

import metainfluence as mi

ROOT = Path(__file__).parents[2]
PAGE = Path(mi.__file__).parent / "docs" / "promises.md"


def named(text):
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)


def test_every_promise_names_tests_that_exist():
    text = PAGE.read_text(encoding="utf-8")
    # The tables of digits are measurements.
    promises, _ = text.split("<!-- digits lost: begin -->")
    lines = [line for line in promises.splitlines() if line.startswith("|")]
    rows = [line for line in lines if not re.match(r"\| promise \||\|:---", line)]
    assert len(rows) > 50
    assert not [row for row in rows if not named(row)]
    # Promised, how tested, cases tried, failures found and mended.
    assert not [row for row in rows if len(row.strip("| ").split(" | ")) != 4]
    # What looks like a test but does not read as one would go unchecked.
    assert len(named(text)) == text.count("::")
    for path, name in named(text):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.startswith("test_"), name
        assert name in functions, f"{path}::{name}"
