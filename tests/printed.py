"""Runs the commands on the page about the command line; as a script, writes what they print into the page.

python tests/printed.py            # minutes; those that take long are run as well
python tests/printed.py --quick    # but for those
"""

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import metainfluence as mi

ROOT = Path(mi.__file__).resolve().parents[1]
PAGE = ROOT / "metainfluence" / "docs" / "command_line.md"
BLOCK = re.compile(r"^```text\n\$ (metainfluence [^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LONGEST = 116
SLOW = "  # "  # between a command and the remark that it takes long


def run(command: str) -> str:
    """What a command prints on standard output, in the current folder."""
    from metainfluence.lab.commands import cli

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.entry(shlex.split(command.partition(SLOW)[0])[1:])
        except SystemExit as ended:
            if ended.code:
                raise
    return shown(printed.getvalue())


def shown(text: str) -> str:
    """Output as the page has it: lines that are too long are cut between two words."""
    lines = (line.rstrip() for line in text.splitlines())
    return "".join(f"{line if len(line) <= LONGEST else line[:LONGEST].rpartition(' ')[0] + ' …'}\n" for line in lines)


def without_numbers(text: str) -> list[str]:
    """Lines with every number, and every run of blanks, made one and the same."""
    return [
        " ".join(re.sub(r"(?<![\w.])[-+]?\d[\d.,:]*(?:e[-+]?\d+)?", "0", line).split()) for line in text.splitlines()
    ]


def all_printed(folder: Path, *, slow: bool = False) -> Iterator[tuple[str, str, str]]:
    """Runs the page's commands one after the other: each with what the page says and what was printed.

    The folder becomes the current one, with what the page says lies there. Commands that take long are run if `slow`.
    """
    text = PAGE.read_text(encoding="utf-8")
    (module,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (folder / "mymodule.py").write_text(module, encoding="utf-8")
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder):
        for command, expected in BLOCK.findall(text):
            if slow or SLOW not in command:
                yield command, expected, run(command)


def main() -> None:
    """Writes the page."""
    text = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for command, expected, printed in all_printed(Path(folder), slow="--quick" not in sys.argv):
            text = text.replace(f"$ {command}\n{expected}```", f"$ {command}\n{printed}```")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
