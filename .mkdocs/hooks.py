"""Brings into the site what lies outside the folder of pages: the results, to which pages link where they lie."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results"
LINK, TARGET = "../../notebooks/results/", "results/"
# Tables of eleven columns and code of 120 take more room than the theme gives.
WIDE = ".md-grid { max-width: 80rem }\n"


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the report, the pictures that it shows, and the stylesheet."""
    files.append(File.generated(config, "wide.css", content=WIDE))
    for path in [RESULTS / "README.md", *sorted(RESULTS.glob("*/*/picture.png"))]:
        name = path.relative_to(RESULTS).as_posix()
        files.append(File.generated(config, f"{TARGET}{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links at the places that `on_files` has given to what they link to."""
    return markdown.replace(f"]({LINK}", f"]({TARGET}")
