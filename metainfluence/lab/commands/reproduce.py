"""Runs experiments from TOML files, one at a time or all of them, and reports what they found."""

import argparse
import difflib
import importlib
import inspect
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from metainfluence._disk import missing
from metainfluence.lab.commands.config_files import as_arguments, as_toml, check_ranges, load_toml
from metainfluence.lab.experiments import accuracies, answers, results, verdicts
from metainfluence.lab.experiments.code import UNKNOWN, code_of
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Place
from metainfluence.lab.show.printing import say

# experiment -> (module, configuration dataclass); the module's `run` makes a `results.Result` from the configuration.
EXPERIMENTS = {
    name: (f"metainfluence.lab.experiments.{name}", f"{name.capitalize()}Config")
    for name in ("removal", "agreement", "estimators", "depth", "conditioning", "speed", "editing", "leaving")
}
SIZES = ("small", "full")
PARTS = ("experiment", "common", *SIZES)
REPORT = "README.md"
# With a budget, the paper's tables come first, then the banks of outcomes, then the rest by name.
FIRST = (
    "table_omniglot", "table_mini_imagenet", "agreement_runs_maml", "agreement_runs_imaml", "agreement_runs_anil",
    "agreement_runs_head",
)  # fmt: skip
CUT = 75
"""Exit status of a run whose time was up; sysexits.h calls it EX_TEMPFAIL, try again."""


def read(path: Path, size: str) -> tuple[str, dict[str, Any]]:
    """Reads an experiment's file.

    Args:
      path: TOML with the key `experiment` and the tables `common`, `small` and `full`.
      size: "small" or "full"; its table overrides `common`.

    Returns:
      The experiment's name, and the fields of its configuration.

    Raises:
      ConfigError: a file that cannot be read or is not TOML, an unknown experiment or key, or a size that the file
        lacks.
    """
    values = load_toml(path)
    name = values.get("experiment")
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(str(name), EXPERIMENTS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"{path}: experiment: expected one of {', '.join(EXPERIMENTS)}; got {name!r}; nearest is {near!r}"
        )
    for key, value in values.items():
        if key not in PARTS:
            near = difflib.get_close_matches(key, PARTS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path}: unknown key {key!r}; expected {', '.join(PARTS)}; nearest is {near!r}")
        if key != "experiment" and not isinstance(value, dict):
            raise ConfigError(f"{path}: {key}: expected a table, got {value!r}")
    if size not in values:
        raise ConfigError(f"{path}: expected a table [{size}], got {', '.join(values)}")
    return str(name), merged(values.get("common", {}), values[size])


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """One table overridden by another, down to single fields."""
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            both[key] = merged(base[key], over[key])
    return both


def configured(path: Path, size: str, overrides: Sequence[str]) -> tuple[Any, Any]:
    """The function that runs an experiment, and its configuration.

    Raises:
      ConfigError: as `read`; an unknown field, or a number out of its range.
      SystemExit: options that make no sense.
    """
    name, values = read(path, size)
    module_name, kind = EXPERIMENTS[name]
    module = importlib.import_module(module_name)
    config = getattr(module, kind)
    given = as_arguments(values, config, path)
    parsed = tyro.cli(config, prog=f"metainfluence reproduce --config {path}", args=[*given, *overrides])
    check_ranges(parsed)
    return module.run, parsed


def compile_quickly() -> None:
    """Turns off XLA's newer CPU emitters: they compile three times as slowly, and compiling dominates experiments."""
    if version("jaxlib").startswith(("0.8", "0.9", "0.10")) and "xla_cpu_use_fusion_emitters" not in os.environ.get(
        "XLA_FLAGS", ""
    ):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"


def check_out(out: Path) -> None:
    """Raises ConfigError if results cannot be written to a folder."""
    if told := Place(folder=True).problem(out):
        raise ConfigError(f"--out: {told}")


def run_one(path: Path, size: str, out: Path, overrides: Sequence[str]) -> Path:
    """Runs one experiment, unless its results already exist.

    Returns:
      The folder with its results.

    Raises:
      ConfigError: as `configured`; an `out` that cannot be written to.
      OtherConfigError: the folder holds results of another configuration, or of other code.
    """
    run, config = configured(path, size, overrides)
    check_out(out)
    folder, code = out / path.stem / size, code_of(run.__module__.rpartition(".")[2])
    if results.finished(folder, config, code):
        say(f"{path.stem}, {size}: already in {folder}")
        return folder
    compile_quickly()
    keeps = "cache" in inspect.signature(run).parameters
    # Finished parts are kept at once, so that an interrupted run continues where it stopped.
    made = missing(folder)
    more = {"cache": results.claim(folder, config, code)} if keeps else {}
    say(f"{path.stem}, {size}: {config.title}")
    started = time.perf_counter()
    try:
        found = run(config, **more)
    except Exception:
        if keeps:
            results.release(folder, made)
        raise
    seconds = time.perf_counter() - started
    command = shlex.join(["metainfluence", "reproduce", "--config", str(path), "--size", size, *overrides])
    results.write(found, config, folder, title=config.title, command=command, seconds=seconds, code=code)
    say(f"{path.stem}, {size}: {seconds:.0f} s, in {folder}")
    return folder


def show(path: Path, size: str, out: Path, overrides: Sequence[str]) -> None:
    """Prints what `run_one` would run, and whether its results already exist.

    Raises:
      ConfigError: as `configured`.
      OtherConfigError: as `run_one`.
    """
    run, config = configured(path, size, overrides)
    folder = out / path.stem / size
    there = results.finished(folder, config, code_of(run.__module__.rpartition(".")[2]))
    say(f"# {path}, {size}: {'already' if there else 'would be'} in {folder}")
    say(as_toml(config))


def run_all(folder: Path, size: str, out: Path, budget: float | None = None) -> int:
    """Runs every experiment of a folder, each in its own process, and writes the report.

    Args:
      folder: folder of the TOML files.
      size: "small" or "full".
      out: folder for the results.
      budget: seconds after which the current experiment is stopped, keeping its finished parts, and no other begins;
        those in FIRST then come first. None for no limit.

    Returns:
      The exit status: 0; 1 if an experiment failed, with its message on standard error; CUT if the time was up.
    """
    check_out(out)
    started, failed, left = time.monotonic(), 0, []
    paths = experiment_files(folder, size)
    if budget is not None:
        paths.sort(key=lambda path: (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem))
    for path in paths:
        remaining = None if budget is None else budget - (time.monotonic() - started)
        if remaining is not None and remaining <= 0:
            left.append(path.stem)
            continue
        command = [sys.executable, "-m", "metainfluence", "reproduce", "--config", str(path), "--size", size]
        try:
            done = subprocess.run([*command, "--out", str(out)], check=False, timeout=remaining)
        except subprocess.TimeoutExpired:
            left.append(path.stem)
            continue
        failed += done.returncode != 0
    report(sorted(paths), size, out)
    say(f"Wrote {out / REPORT}; {len(paths) - failed - len(left)} of {len(paths)} experiments are there")
    if left:
        say(f"The {budget:g} s are up: left are {', '.join(left)}; the same command goes on where this one stopped")
    return 1 if failed else CUT if left else 0


def experiment_files(folder: Path, size: str) -> list[Path]:
    """The TOML files in a folder that name an experiment, except those of another size only."""
    named = re.compile(r"^experiment\s*=", re.MULTILINE)
    found = []
    for path in sorted(folder.glob("*.toml")):
        text = path.read_text(encoding="utf-8-sig")
        has = [one for one in SIZES if re.search(rf"^\[{one}[.\]]", text, re.MULTILINE)]
        if named.search(text) and (size in has or not has):
            found.append(path)
    return found


def report(paths: Sequence[Path], size: str, out: Path) -> None:
    """Writes one page with all existing results, starting with what was promised of them."""
    sections, missing, older = [], [], []
    for path in paths:
        folder = out / path.stem / size
        if not (folder / results.TABLE).exists():
            missing.append(path.stem)
            continue
        modules = results.outdated(folder, code_of(read(path, size)[0]))
        if modules:
            older.append(path.stem if modules == [UNKNOWN] else f"{path.stem} ({results.shortened(modules)})")
        text = (folder / results.TABLE).read_text(encoding="utf-8")
        sections.append(text.replace(f"({results.PICTURE})", f"({path.stem}/{size}/{results.PICTURE})"))
    older += [
        name if modules == [UNKNOWN] else f"{name} ({results.shortened(modules)})"
        for name, modules in accuracies.outdated(out).items()
    ]
    sections += accuracies.sections(out)
    earlier = (out / REPORT).read_text(encoding="utf-8") if (out / REPORT).exists() else ""
    lines = [
        "# Results",
        "",
        *(f"{line}\n" for line in answers.lines(out, size, earlier)),
        f"Written by `metainfluence reproduce --all --size {size}`. Every section names the command that made it;",
        "that command also leaves the rows behind the tables, as a Parquet file beside the picture.",
        "",
        *verdicts.lines(out, size, earlier),
    ]
    if older:
        known = "with what changed since where that is known"
        lines += ["", f"**Older than the code that they speak of**, {known}: {'; '.join(older)}."]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text("\n".join(lines) + "\n\n" + "\n".join(sections), encoding="utf-8")
    if older:
        say(f"Older than the code: {'; '.join(older)}")


def main(args: Sequence[str]) -> None:
    """Parses the arguments of `metainfluence reproduce`.

    Raises:
      SystemExit: 0 after --help, 1 if an experiment of --all failed, 2 for arguments or files that make no sense, CUT
        if the time of --budget was up.
    """
    parser = argparse.ArgumentParser(
        prog="metainfluence reproduce",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.fill(
            "Run an experiment from its TOML file, or all of them, and write a Parquet of its rows, a picture, "
            "a Markdown table and what it ran on. What is finished is not run again. Further options override the "
            "experiment's fields, as --setting.training.num-steps 10; --config FILE --help lists them.",
            100,
        ),
        epilog="Examples:\n  metainfluence reproduce --config configs/table_omniglot.toml\n"
        "  metainfluence reproduce --config configs/speed.toml --dry-run\n  metainfluence reproduce --all\n"
        "  metainfluence reproduce --all --size full --budget 480",
        add_help=False,
    )
    parser.add_argument("--config", type=Path, help="TOML file of one experiment")
    parser.add_argument("--all", action="store_true", help="every experiment in --configs, and the report")
    parser.add_argument("--report", action="store_true", help="only the report, of what is there")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"with --all: seconds to use, what matters most first; {CUT} if some are left",
    )
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder of TOML files (default: configs)")
    parser.add_argument("--size", choices=SIZES, default="small", help="small: minutes on two cores (default)")
    parser.add_argument("--out", type=Path, default=Path("notebooks/results"), help="default: notebooks/results")
    parser.add_argument("--dry-run", action="store_true", help="show the configurations and what is there; run nothing")
    parser.add_argument(
        "-h", "--help", action="store_true", help="this text, or, with --config, the experiment's fields"
    )
    known, rest = parser.parse_known_args(list(args))
    if known.help and known.config is None:
        parser.print_help()
        raise SystemExit(0)
    if known.report and known.dry_run:
        parser.error("expected --dry-run with --config or --all, got it with --report")
    if (known.config is not None) + known.all + known.report != 1 or (rest and known.config is None):
        parser.error("expected one of --config FILE, --all and --report; only --config takes further options")
    if known.budget is not None and (not known.all or known.dry_run):
        parser.error("expected --budget with --all, and without --dry-run")
    if known.budget is not None and not 0 < known.budget < math.inf:
        parser.error(f"--budget: expected a positive number of seconds, got {known.budget}")
    try:
        if known.report:
            check_out(known.out)
            report(experiment_files(known.configs, known.size), known.size, known.out)
        elif known.dry_run:
            for path in experiment_files(known.configs, known.size) if known.all else [known.config]:
                show(path, known.size, known.out, rest)
        elif known.all:
            if status := run_all(known.configs, known.size, known.out, known.budget):
                raise SystemExit(status)
        else:
            run_one(known.config, known.size, known.out, [*rest, *(["--help"] if known.help else [])])
    except (ConfigError, results.OtherConfigError, FileNotFoundError) as error:
        print(f"metainfluence reproduce: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from error
