"""Runs the notebooks; as a script, saves them with what they print and draw.

python tests/notebook_runs.py [NAME ...]    # all of them where none is named
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "wrap_your_code", "choose_a_solver", "reproduce_the_paper", "beyond_images", "stopped_early")


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels of the interpreter that runs this, whatever kernels are registered."""

    def __init__(self, **options: Any):
        # Without folders of kernels, the interpreter's own is the only one left.
        super().__init__(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]), **options)


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(notebook: Any, *, timeout: int = 300) -> Any:
    """Runs every cell in the folder of the notebooks, by this interpreter; the same notebook, with new outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raises.
      nbclient.exceptions.CellTimeoutError: a cell takes longer than `timeout` seconds.
    """
    # Sockets that are files have no ports, which two kernels that start at once may choose alike.
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            kernel_manager_class=ThisInterpreter,
            config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
            timeout=timeout,
            record_timing=False,
            resources={"metadata": {"path": str(FOLDER)}},
            extra_arguments=["--HistoryManager.enabled=False"],
        )
        client.execute()
    return notebook


def tidy(notebook: Any) -> Any:
    """Takes out what differs from one run to the next though nothing has changed."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {}
        cell.id = f"cell-{number}"
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all where none is given")
    for name in parser.parse_args().names or NAMES:
        notebook = tidy(run(read(name)))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(name)


if __name__ == "__main__":
    main()
