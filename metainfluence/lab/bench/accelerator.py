"""One script for a GPU that times everything in five minutes, each part in its own process with a time limit.

A part that is cut short keeps its rows: they are written as they are measured.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from metainfluence._disk import write_atomically, write_manifest
from metainfluence.lab.bench._output import publish
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, OutFolder, Positive, Ways

# part -> its share of the time, from what was expected of one H100.
SHARES = {
    "precision": 0.13,
    "convolution": 0.13,
    "maml": 0.16,
    "head": 0.16,
    "cold 64": 0.14,
    "cold 512": 0.18,
    "trajectory": 0.1,
}

# Peak float32 operations and bytes of memory per second, from the makers' data sheets, without matrix units.
PEAKS = {
    "H100": (67e12, 3.35e12),
    "H200": (67e12, 4.8e12),
    "A100": (19.5e12, 2.0e12),
    "L4": (30e12, 0.3e12),
    "T4": (8.1e12, 0.32e12),
}

COLUMNS = ("part", "what", "tasks", "compile_seconds", "seconds", "per_second", "tflops", "share", "bandwidth", "error")


@dataclasses.dataclass(frozen=True)
class AcceleratorBenchConfig:
    """Conv4 on random images: MAML 1-shot, an implicit head 5-shot; on the device that JAX finds."""

    size: Count = 84
    """Height and width of the images, which have three channels."""
    width: Count = 64
    """Channels of every layer."""
    depth: Count = 4
    """Layers."""
    ways: Ways = 5
    """Classes per task."""
    queries: Count = 15
    """Query examples per class."""
    inner_steps: Count = 5
    """Inner gradient steps of MAML."""
    num_tasks: tuple[Count, ...] = (8, 64)
    """Numbers of tasks that are scored."""
    at_once: Count = 8
    """Tasks in one meta-gradient."""
    cold: tuple[Count, Count] = (64, 512)
    """Numbers of tasks that are scored from a cold process."""
    train_steps: Count = 200
    """Training steps of the trajectory."""
    repeats: Count = 3
    """Timed runs of each; the shortest counts."""
    parts: tuple[str, ...] = tuple(SHARES)
    """Parts to measure, in this order."""
    seconds: Positive = 300.0
    """Time for all parts together. A part that has used up its share is stopped and the next one begins; time that a
    part leaves over is not given to others."""
    out: OutFolder = Path("bench-output")
    """Folder for accelerator.md and accelerator.json."""


def run(config: AcceleratorBenchConfig) -> None:
    """Measure one part after the other, and write the table after every row.

    Raises:
        ConfigError: an unknown part.
    """
    unknown = [part for part in config.parts if part not in SHARES]
    if unknown:
        raise ConfigError(f"parts: expected some of {', '.join(SHARES)}, got {unknown[0]!r}")
    record: dict[str, Any] = {"device": {}, "rows": [], "parts": {}}
    config.out.mkdir(parents=True, exist_ok=True)
    for part in config.parts:
        _part(config, part, record)
    publish("accelerator", config, markdown(record), **record)


def _part(config: AcceleratorBenchConfig, part: str, record: dict[str, Any]) -> None:
    """Runs a part in its own process until it ends or its time is up, and meanwhile reads what it writes."""
    lines = config.out / f"accelerator-{part.replace(' ', '-')}.jsonl"
    log = lines.with_suffix(".log")
    lines.write_text("", encoding="utf-8")
    values = json.dumps(dataclasses.asdict(config) | {"out": str(config.out)})
    command = [sys.executable, "-m", "metainfluence.lab.bench._accelerator_parts", part, values, str(lines)]
    limit = config.seconds * SHARES[part]
    # A program from JAX's cache would hide how long compiling takes.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": ""}
    Console().print(f"{part}: at most {limit:.0f} s")
    start, before = time.monotonic(), list(record["rows"])
    with (
        log.open("w", encoding="utf-8") as said,
        subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() - start < limit:
                time.sleep(0.2)
                _take(config, record, before, lines)
        finally:
            ended = process.poll()
            process.kill()
    _take(config, record, before, lines)
    took = time.monotonic() - start
    end = "stopped at its limit" if ended is None else "done" if ended == 0 else f"failed, see {log.name}"
    record["parts"][part] = {"end": end, "seconds": took, "limit": limit}
    _write(config, record)
    Console().print(f"{part}: {end} after {took:.0f} s")


def _take(config: AcceleratorBenchConfig, record: dict[str, Any], before: list[Any], lines: Path) -> None:
    """Adds a part's new rows to the record, and writes the record if there are any."""
    # The last line may be half written.
    whole = lines.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    found = [json.loads(line) for line in whole]
    rows = before + [row for row in found if "device" not in row]
    device = next((row["device"] for row in found if "device" in row), record["device"])
    if rows != record["rows"] or device != record["device"]:
        record["rows"], record["device"] = rows, device
        _write(config, record)


def _write(config: AcceleratorBenchConfig, record: dict[str, Any]) -> None:
    values = {"config": dataclasses.asdict(config) | {"out": str(config.out)}, **record}
    # If the run is killed, the previous table stays.
    write_manifest(config.out / "accelerator.json", values)
    write_atomically(config.out / "accelerator.md", markdown(record).encode())


def markdown(record: dict[str, Any]) -> str:
    """The table so far."""
    device = ", ".join(f"{name} {value}" for name, value in record["device"].items())
    lines = [device or "no device yet", "", f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in COLUMNS)} |" for row in record["rows"]]
    lines += ["", "| part | end | seconds | limit |", "|---|---|---:|---:|"]
    lines += [
        f"| {part} | {row['end']} | {row['seconds']:.0f} | {row['limit']:.0f} |"
        for part, row in record["parts"].items()
    ]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
