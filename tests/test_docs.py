"""The pages are right: their code runs, and all that they name is there."""

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import metainfluence as mi
from metainfluence.lab.commands import cli
from printed import all_printed, shown, without_numbers
from spectra import build, solve, unravel
from wrapping.page import SECTIONS, as_a_reader, execute

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metainfluence"
DOCS = PACKAGE / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
WITH_CODE = [name for name in PAGES if "```python" in PAGES[name] and name != "wrapping"]
API = {name: text for name, text in PAGES.items() if name.startswith("api_")}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", PAGES[name], flags=re.DOTALL | re.MULTILINE)


def rows(name):
    """First cells of a page's tables, without the code marks."""
    return re.findall(r"^\| `([^`]+)`", PAGES[name], flags=re.MULTILINE)


@pytest.fixture(scope="module")
def solver():
    """What the page's first block defines."""
    with as_a_reader(x64=False):
        return execute(blocks("contributing")[:1], {})["chebyshev"]


@pytest.fixture
def restored_precision():
    """`train` sets the precision of its process."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with as_a_reader(x64=False):
        scope = execute(blocks(name), {})
    printed = capsys.readouterr().out
    if name == "index":
        assert printed.split() == ["4"]
    if name == "episodes":
        assert printed.split() == ["7", "episode-0", "support", str(scope["listed"][0].support["id"][0])]
    if name == "one_level":
        # Row 7 is the damaged one; it is found by each of the four problems.
        found = printed.splitlines()
        assert found[:2] == ["training row 7"] * 2
        assert found[2:] == ["True", "smallest weight: row 7", "(1, 20) True", "real row 7"]
    if name == "lab":
        assert printed == "7 flipped labels\n"
    if name == "contributing":
        assert 0 < float(printed) < 1e-5
    if name == "many_devices":
        np.testing.assert_allclose(scope["in_a_run"].task, scope["in_one_call"].task, rtol=1e-4, atol=1e-7)
        assert len(mi.read_scores(tmp_path / "scores.parquet").score) == 12 * 11


@pytest.mark.usefixtures("restored_precision")
def test_commands_print_what_the_page_says(tmp_path):
    """Line by line, but for the numbers, which are those of one machine; `python tests/printed.py` writes them."""
    with as_a_reader(x64=True):
        found = list(all_printed(tmp_path))
    names = {command.split()[1] for command, _, _ in found}
    assert {"train", "score", "edit", "evaluate", "report", "bench", "--help"} <= names
    assert {command for command in cli.COMMANDS if f"$ metainfluence {command} " not in PAGES["command_line"]} == set()
    for command, expected, printed in found:
        assert without_numbers(printed) == without_numbers(expected), command
    # What was asked for happened, and the numbers that no machine changes are the page's.
    assert (tmp_path / "train-output" / "scores.html").is_file()
    assert found[0][2].splitlines()[0].split(":")[0] == found[0][1].splitlines()[0].split(":")[0]


def test_lines_that_are_too_long_are_cut_between_words():
    assert shown("one two\n" + "word " * 30) == "one two\n" + "word " * 22 + "word …\n"
    assert without_numbers("a  -1.5e-07 b2 12%, 3:4") == ["a 0 b2 0%, 0"]


def test_the_tests_of_wrapping_run_all_code_of_that_page():
    assert [block for found in SECTIONS.values() for block in found] == blocks("wrapping")


@pytest.mark.parametrize("name", PAGES)
def test_every_fence_says_what_it_holds(name):
    opened = re.findall(r"^ *```(.*)$", PAGES[name], flags=re.MULTILINE)[::2]
    assert set(opened) <= {"python", "text"}
    assert len(blocks(name)) == PAGES[name].count("```python")


def test_the_solver_on_the_page_takes_at_most_30_lines():
    _, _, code = blocks("contributing")[0].partition("def chebyshev")
    assert 0 < sum(1 for line in code.splitlines() if line.strip()) <= 30


@pytest.mark.parametrize("mode", ["eager", "vmap"])
def test_the_solver_on_the_page_solves(solver, mode, rng):
    built = build(np.linspace(0.0, 4.0, 12))
    operator = built.operator.damped(0.3)
    rhs = unravel(rng.normal(size=12))
    if mode == "eager":
        solution, info = solve(solver(80), operator, rhs, rhs)
    else:
        two = jax.tree.map(lambda leaf: jnp.stack([leaf + 1.0, leaf]), rhs)
        both = jax.jit(jax.vmap(lambda rhs: solve(solver(80), operator, rhs)))(two)
        solution, info = jax.tree.map(lambda leaf: leaf[1], both)
    assert info.status == mi.SolveStatus.CONVERGED
    exact, _ = solve(mi.solvers.dense(), operator, rhs)
    for ours, theirs in zip(jax.tree.leaves(solution), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spectrum", [np.linspace(-2.0, 4.0, 12), np.linspace(0.0, 4e4, 12)])
def test_the_solver_on_the_page_says_where_it_failed(solver, spectrum, rng):
    built = build(spectrum)
    rhs = unravel(rng.normal(size=12))
    solution, info = solve(solver(10), built.operator.damped(0.3), rhs)
    matrix = built.matrix + 0.3 * np.eye(12)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(rhs)])
    found = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(solution)])
    left = np.linalg.norm(flat - matrix @ found) / np.linalg.norm(flat)
    np.testing.assert_allclose(info.relative_residual, left, rtol=1e-6)
    with pytest.raises(mi.SolveError, match="MAX_STEPS"):
        mi.check(info)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https://", link):
            target, _, anchor = link.partition("#")
            path = (DOCS / target).resolve() if target else DOCS / f"{name}.md"
            assert path.is_file(), link
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
            assert not anchor or anchor in slugs, link


def resolve(name):
    """The object of a dotted name, which may be an attribute of a module or of a class in one."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return getattr(resolve(module), attribute)


@pytest.mark.parametrize("name", API)
def test_names_on_api_pages_exist(name):
    entries = re.findall(r"^::: (\S+)\n    options:\n      heading: mi\.(\S+)$", API[name], flags=re.MULTILINE)
    assert len(entries) == API[name].count(":::") > 0
    for path, heading in entries:
        public = mi
        for part in heading.split("."):
            public = getattr(public, part)
        assert resolve(path) is public, path


def test_all_that_is_exported_is_on_the_api_pages():
    paths = re.findall(r"^::: (\S+)$", "".join(API.values()), flags=re.MULTILINE)
    shown = {id(resolve(path)) for path in paths}
    for room in (mi, *(value for value in vars(mi).values() if inspect.ismodule(value) and hasattr(value, "__all__"))):
        names = getattr(room, "__all__", None) or [name for name in vars(room) if not name.startswith("_")]
        exported = {name: getattr(room, name) for name in names}
        assert not [name for name, value in exported.items() if not inspect.ismodule(value) and id(value) not in shown]


@pytest.mark.parametrize("name", PAGES)
def test_names_in_the_text_exist(name):
    for dotted in re.findall(r"`mi\.([a-zA-Z_][\w.]*\w)", PAGES[name]):
        public = mi
        for part in dotted.split("."):
            public = getattr(public, part)


@pytest.mark.parametrize("name", PAGES)
def test_files_in_the_text_exist(name):
    for path in re.findall(r"`((?:configs|tests|notebooks|metainfluence)/[\w./-]+)`", PAGES[name]):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"configs/\w+\.toml", PAGES[name]):
        assert (ROOT / path).is_file(), path


# The page of promises has a test of its own, which asks for more.
@pytest.mark.parametrize("name", [name for name in PAGES if name != "promises"])
def test_tests_in_the_text_exist(name):
    found = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES[name])
    assert len(found) == len(re.findall(r"\.py::", PAGES[name]))
    for path, function in found:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{function}"


def commands():
    """Command lines on the pages: in code spans, or lines of blocks of code, up to a comment."""
    found = []
    for text in PAGES.values():
        found += re.findall(r"(?:^    |`)(metainfluence [a-z][^`\n]*)", text, flags=re.MULTILINE)
    return sorted({line.partition("  #")[0].strip() for line in found})


def test_commands_in_the_text_exist(capsys):
    lines = commands()
    assert len(lines) >= 8
    helps = {}
    for line in lines:
        _, command, *arguments = shlex.split(line)
        if command not in helps:
            with pytest.raises(SystemExit) as ended:
                cli.main([command, "--help"])
            assert ended.value.code == 0, line
            helps[command] = capsys.readouterr().out
        for option in arguments:
            if option.startswith("--") and option not in ("--help", "--config"):
                assert re.search(rf"{option}\b", helps[command]), line


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_in_the_text_exist(name):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", PAGES[name], flags=re.MULTILINE)) <= set(targets)


def test_every_experiment_is_described():
    experiments = {path.stem for path in (ROOT / "configs").glob("*.toml") if "\nexperiment = " in path.read_text()}
    described = set(re.findall(r"configs/(\w+)\.toml", PAGES["reproduction"].partition("## The experiments")[2]))
    assert experiments <= described


def test_every_room_is_described_after_those_that_it_imports():
    rooms = rows("contributing")
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rooms) == {name for name in modules if not name.startswith("_")}
    for position, room in enumerate(rooms):
        single = PACKAGE / f"{room}.py"
        for path in [single] if single.exists() else sorted((PACKAGE / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            names = re.findall(r"^ *from metainfluence\.(\w+)", text, flags=re.MULTILINE)
            for line in re.findall(r"^ *from metainfluence import (.*)$", text, flags=re.MULTILINE):
                names += [part.split(" as ")[0].strip() for part in line.split(",")]
            assert not [name for name in names if name in rooms and rooms.index(name) > position], path


def test_limits_repeat_what_was_measured():
    """Two lines of the page go by the results' first table; where that changes, so must the page."""
    table = (ROOT / "notebooks" / "results" / "README.md").read_text(encoding="utf-8").partition("\n## Agreement")[0]
    ahead = [line for line in table.splitlines() if "its lead over the nearest baseline" in line]
    speed = [line for line in table.splitlines() if "training on to the same gap over edit" in line]
    assert "found them as well or better on some of the data" in PAGES["limits"]
    assert any("missed" in line for line in ahead)
    assert "took about as long as `mi.edit`" in PAGES["limits"]
    assert speed
    assert all(0.5 < float(line.split("|")[2].strip(" ×")) < 2 for line in speed)


def test_the_changelog_is_of_this_version():
    assert re.findall(r"^## (\S+)", PAGES["changelog"], flags=re.MULTILINE)[0] == VERSION


def test_the_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license"} <= set(citation)
    assert str(citation["version"]) == VERSION
    (paper,) = citation["references"]
    assert paper["title"] == "Evaluating Data Influence in Meta Learning"
    assert paper["doi"].endswith("2501.15963")
    for people in (citation["authors"], paper["authors"]):
        assert people
        assert all(set(person) in ({"name"}, {"given-names", "family-names"}) for person in people)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs and mkdocstrings, of the extra docs, are not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / ".mkdocs" / "mkdocs.yml", "-d", folder]
    # The variable silences a message of the theme about another program.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_built_with_every_page(site):
    assert {path.stem for path in site.glob("*.html")} == {*PAGES, "404"}
    assert (site / "results" / "index.html").is_file()


@pytest.mark.parametrize("name", PAGES)
def test_rows_of_tables_have_as_many_cells_as_their_heading(name):
    """A row with a bar too many would be shown without its last cells, and one with too few with empty ones."""
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = [re.sub(r"`[^`]*`|\\\|", "", line) for line in table.splitlines()]
        assert len(lines) > 2
        assert re.fullmatch(r"[|:\- ]+", lines[1])
        assert [line for line in lines if line.count("|") != lines[0].count("|")] == []


def test_the_site_shows_marks_as_they_are_meant(site):
    for name in PAGES:
        html = (site / f"{name}.html").read_text(encoding="utf-8").partition("<article")[2].partition("</article>")[0]
        text = re.sub(r"<[^>]*>", "", re.sub(r"<(pre|code).*?</\1>", "", html, flags=re.DOTALL))
        assert len(text) > 300, name
        # A table that is none shows its bars, and an underscore that was taken for a mark is gone from its symbol.
        assert not re.search(r"^ *\|.*\||```", text, flags=re.MULTILINE), name
        assert not re.search(r"<em>[^<]*[∂λθ]", html), name


def test_the_site_needs_no_network(site):
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^>]*>", html), path
        assert not re.findall(r"<link[^>]*rel=\"?stylesheet[^>]*href=\"?(?:https?:)?//[^>]*>", html), path
