"""What the benchmarks write: a table on the terminal and as Markdown, and its numbers as JSON."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.markdown import Markdown


def publish(name: str, config: Any, table: str, **record: Any) -> dict[str, Any]:
    """Writes a table and the record to the folder `config.out`, as name.md and name.json, and prints the table.

    Returns:
      The record, with the configuration.
    """
    written = {"config": dataclasses.asdict(config) | {"out": str(config.out)}, **record}
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / f"{name}.md").write_text(table, encoding="utf-8")
    (config.out / f"{name}.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    Console().print(Markdown(table))
    return written
