"""The notebooks run, are right in what they claim (their last cells assert it), and are saved with their outputs.

`python tests/notebook_runs.py` saves them anew.
"""

import copy
import re

import nbformat
import pytest

import notebook_runs

# Where files lie is the machine's business: POSIX folders that hold them, and Windows drives.
ABSOLUTE = re.compile(r"(?<![\w./])/(?:home|root|usr|opt|tmp|var|work|content|Users|mnt)/|\b[A-Z]:\\")
SIZE = 400_000


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """All text that cells printed or showed."""
    for cell in code(notebook):
        for output in cell.outputs:
            shown = output.get("data", {})
            yield from (output.get("text", ""), *(shown[kind] for kind in shown if kind.startswith("text/")))


def check_outputs(notebook):
    """Raises AssertionError unless every cell ran once, in order, without an error or a word on stderr."""
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    errors = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not errors, errors
    assert cells[-1].outputs, "the last cell asserts, and says what it has found"
    assert any("image/png" in output.get("data", {}) for output in outputs)


LONG = {"beyond_images", "choose_a_solver", "stopped_early"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in notebook_runs.NAMES]
)
def test_runs(name):
    notebook = copy.deepcopy(notebook_runs.read(name))
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    check_outputs(notebook_runs.run(notebook))


@pytest.mark.parametrize("name", notebook_runs.NAMES)
def test_is_saved_with_its_outputs(name):
    path = notebook_runs.FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < SIZE
    notebook = notebook_runs.read(name)
    nbformat.validate(notebook)
    check_outputs(notebook)
    assert not [text for text in texts(notebook) if ABSOLUTE.search(text)]


@pytest.mark.parametrize("name", notebook_runs.NAMES)
def test_can_be_opened_in_colab(name):
    cells = notebook_runs.read(name).cells
    assert cells[0].cell_type == "code"
    assert "%pip install -q 'metainfluence[lab]'" in cells[0].source
    assert cells[1].source.startswith("# ")
    assert "assert " in code(notebook_runs.read(name))[-1].source


def test_all_notebooks_are_known():
    assert {path.stem for path in notebook_runs.FOLDER.glob("*.ipynb")} == set(notebook_runs.NAMES)


def test_a_cell_that_raises_is_an_error():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(Exception, match="AssertionError"):
        notebook_runs.run(notebook)


def test_warnings_are_seen():
    source = "import warnings\nwarnings.warn('look')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    with pytest.raises(AssertionError, match="look"):
        check_outputs(notebook_runs.run(notebook))
