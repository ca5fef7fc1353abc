"""Brings the results, which lie outside the folder of pages, into the site; pages link to them where they lie."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"
LINK, TARGET = "../../notebooks/results/", "results/"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the report and the pictures that it shows."""
    for path in [RESULTS / "README.md", *sorted(RESULTS.glob("*/*/picture.png"))]:
        name = path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, f"{TARGET}{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links at the places that `on_files` has given to what they link to."""
    return markdown.replace(f"]({LINK}", f"]({TARGET}")
