"""The command line: one subcommand per module; its options are the fields of the module's configuration.

`--config FILE` reads options from a TOML file; those on the command line come after it and override it.
"""

import difflib
import functools
import importlib
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from metainfluence.__main__ import LAB_MODULES
from metainfluence.lab.commands._compiling import compile_quickly, keep_programs
from metainfluence.lab.commands.config_files import as_arguments, as_toml, check_ranges, options_of, read_config
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.show.streams import lenient


class Command(NamedTuple):
    """A subcommand.

    Attributes:
      about: what it does, for the list of subcommands.
      example: an example call.
      suites: suite -> (module, configuration dataclass). The module's `run` takes the configuration; its `plan`, if
        there is one, tells what the run would cost. A configuration file that names no suite means the first one.
      positional: the field that an argument before all options sets; None for none.
      resumes: whether the same command continues where it was stopped.
    """

    about: str
    example: str
    suites: dict[str, tuple[str, str]]
    positional: str | None = None
    resumes: bool = False


def _own(name: str) -> dict[str, tuple[str, str]]:
    return {name: (f"metainfluence.lab.commands.{name}", f"{name.capitalize()}Config")}


# In the order in which a user needs them.
COMMANDS = {
    "demo": Command(
        "the whole job on 200 real few-shot tasks, 40 of them harmful, in about a minute",
        "metainfluence demo --num-tasks 100",
        {"demo": ("metainfluence.lab.experiments.demo", "DemoConfig")},
    ),
    "train": Command(
        "meta-train a learner on few-shot tasks, some damaged on purpose",
        "metainfluence train --harm.flipped 0.1 --harm.shortcut 0.1 --out train-output",
        _own("train"),
        resumes=True,
    ),
    "score": Command(
        "score all its tasks and examples: what would the target be without each?",
        "metainfluence score train-output\n  metainfluence score --problem mymodule:make_problem",
        _own("score"),
        positional="run",
        resumes=True,
    ),
    "edit": Command(
        "take the harmful ones out of the meta-parameters, without retraining",
        "metainfluence edit train-output/scores.parquet --most-harmful 20",
        _own("edit"),
        positional="scores",
    ),
    "evaluate": Command(
        "accuracy before and after on held-out tasks, with 95 % intervals",
        "metainfluence evaluate train-output",
        _own("evaluate"),
        positional="run",
    ),
    "reproduce": Command(
        "run the experiments of configs/, the paper's among them",
        "metainfluence reproduce --config configs/table_omniglot.toml",
        {},
        resumes=True,
    ),
    "bench": Command(
        "measure costs, solvers, scoring, growth, accuracy, and other libraries beside it",
        "metainfluence bench --config configs/solvers.toml",
        {
            "costs": ("metainfluence.lab.bench.costs", "BenchConfig"),
            "solvers": ("metainfluence.lab.bench.solvers.suite", "SolverBenchConfig"),
            "scoring": ("metainfluence.lab.bench.scoring", "ScoringBenchConfig"),
            "peers": ("metainfluence.lab.bench.peers.suite", "PeersBenchConfig"),
            "growth": ("metainfluence.lab.bench.growth", "GrowthBenchConfig"),
            "runs": ("metainfluence.lab.bench.runs", "RunsBenchConfig"),
            "accuracy": ("metainfluence.lab.bench.accuracy", "AccuracyConfig"),
            "bank": ("metainfluence.lab.bench.bank", "BankBenchConfig"),
            "accelerator": ("metainfluence.lab.bench.accelerator", "AcceleratorBenchConfig"),
        },
    ),
    "report": Command(
        "a score file as one HTML page: ranking, pictures, diagnostics",
        "metainfluence report train-output/scores.parquet",
        _own("report"),
        positional="scores",
    ),
}

HELP = f"""usage: metainfluence COMMAND [options]

Which meta-training tasks and examples made a meta-learned model what it is, and what it becomes without them.

{chr(10).join(f"  {name:<10} {command.about}" for name, command in COMMANDS.items())}

One after the other, from data to a page with pictures:

  metainfluence train --harm.flipped 0.1 --harm.shortcut 0.1
  metainfluence score train-output
  metainfluence edit train-output/scores.parquet --most-harmful 20
  metainfluence evaluate train-output
  metainfluence report train-output/scores.parquet

  metainfluence COMMAND --help      its options, with their defaults
  --config FILE                     reads them from a TOML file; the command line overrides it
  --dry-run                         shows them all, and what the run would take, and runs nothing
  --traceback                       shows where in the code an error comes from
  --no-cache                        compiles all anew; else programs are kept in ~/.cache/metainfluence, or where
                                    JAX_COMPILATION_CACHE_DIR says

Exit status: 0 done, 1 failed, 2 arguments or files that make no sense, 130 stopped by Ctrl-C; train, score and
reproduce then go on where they were when they are called again.
"""


def split_config(args: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Takes `--config FILE` or `--config=FILE` out of the arguments.

    Raises:
      ConfigError: the file is missing, or given twice.
    """
    found, rest, pending = [], [], False
    for arg in args:
        if pending or arg.startswith("--config="):
            found.append(arg.removeprefix("--config=") if not pending else arg)
            pending = False
        elif arg == "--config":
            pending = True
        else:
            rest.append(arg)
    if pending or len(found) > 1 or found == [""]:
        raise ConfigError(f"--config: expected one file, got {len(found) - found.count('')}")
    return (Path(found[0]) if found else None), rest


@lenient()
def entry(args: Sequence[str] | None = None) -> None:
    """The command line as a process: `main`, with one-line errors and standard streams that cannot fail.

    Args:
      args: as `main`.

    Raises:
      SystemExit: as `main`; 1 for failures, 130 for Ctrl-C.
      ModuleNotFoundError: as `main`.
    """
    args = list(sys.argv[1:] if args is None else args)
    traceback = "--traceback" in args
    cached = "--no-cache" not in args
    args = [arg for arg in args if arg not in ("--traceback", "--no-cache")]
    compile_quickly()
    if cached:
        keep_programs()
    name = args[0] if args else ""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_warn, name, set(), warnings.showwarning)
            main(args)
    except KeyboardInterrupt:
        _complain(stopped(args))
        raise SystemExit(130) from None
    except Exception as error:
        # `metainfluence.__main__` reports which of the lab's packages is missing.
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in LAB_MODULES
        if traceback or missing:
            raise
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        message = _worded(name, naming_options(name, told)) or type(error).__name__
        _complain(f"metainfluence {name}: {message} (--traceback shows where)")
        raise SystemExit(1) from error


def stopped(args: Sequence[str]) -> str:
    """The message after Ctrl-C."""
    if not args or args[0] not in COMMANDS or not COMMANDS[args[0]].resumes:
        return "metainfluence: stopped"
    again = [arg for arg in args if arg != "--no-resume"]
    return f"metainfluence {args[0]}: stopped; go on with: {shlex.join(['metainfluence', *again])}"


def main(args: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the subcommand.

    Args:
      args: the arguments; None for the process's.

    Raises:
      SystemExit: 0 after --help, 2 for arguments that make no sense.
      ModuleNotFoundError: a package of the extra `lab` is missing; `metainfluence.__main__` explains that to the user.
    """
    args = list(sys.argv[1:] if args is None else args)
    name = args[0] if args else None
    if name in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        raise SystemExit(0)
    if name is None or name not in COMMANDS:
        if name is None:
            sys.stderr.write(HELP)
        else:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
            _complain(f"metainfluence: expected one of {', '.join(COMMANDS)}; got {name!r}; nearest is {near!r}")
        raise SystemExit(2)
    # Only the requested subcommand is imported, since each brings its own dependencies.
    if name == "reproduce":
        importlib.import_module("metainfluence.lab.commands.reproduce").main(args[1:])
        return
    try:
        dry = "--dry-run" in args
        module, config = parse(name, [arg for arg in args[1:] if arg != "--dry-run"])
        if dry:
            show(module, config)
        else:
            module.run(config)
    except ConfigError as error:
        _complain(f"metainfluence {name}: {error}")
        raise SystemExit(2) from error


def parse(name: str, args: Sequence[str]) -> tuple[Any, Any]:
    """The module of a subcommand, and its configuration.

    Raises:
      ConfigError: a configuration file that makes no sense, or a number out of its option's range.
      SystemExit: as `main`.
    """
    command = COMMANDS[name]
    path, rest = split_config(args)
    suite, values = (next(iter(command.suites)), {}) if path is None else read_config(path, list(command.suites))
    where, kind = command.suites[suite]
    module = importlib.import_module(where)
    config = getattr(module, kind)
    given = [] if path is None else as_arguments(values, config, path)
    if command.positional is not None and rest and not rest[0].startswith("-"):
        rest = [f"--{command.positional}", *rest]
    about = f"{config.__doc__}\n\nExample:\n  {command.example}\n\n"
    if command.positional is not None:
        about += f"What comes first, without an option's name, is --{command.positional}. "
    about += "--config FILE reads options from a TOML file"
    if len(command.suites) > 1:
        about += f", whose key suite is one of {', '.join(command.suites)}"
    about += "; --dry-run shows them all and runs nothing."
    parsed = tyro.cli(config, prog=f"metainfluence {name}", description=about, args=[*given, *rest])
    check_ranges(parsed)
    return module, parsed


def show(module: Any, config: Any) -> None:
    """Prints a configuration, and what its run would cost if that is known."""
    sys.stdout.write(as_toml(config))
    plan = getattr(module, "plan", None)
    if plan is not None:
        sys.stdout.write(f"\n{plan(config)}\n")


def naming_options(command: str, message: str) -> str:
    """Rewords an error about a library argument, "tasks_per_step: expected …", to name the option that sets it."""
    argument, colon, told = message.partition(": ")
    suites = COMMANDS[command].suites if command in COMMANDS else {}
    if not colon or len(suites) != 1:
        return message
    ((where, kind),) = suites.values()
    field = "dataset" if argument == "name" else argument
    options = [option for name, option in options_of(getattr(importlib.import_module(where), kind)) if name == field]
    return f"{options[0]}: {told}" if len(options) == 1 else message


def _worded(name: str, text: str) -> str:
    # Imported here because it imports JAX.
    printing = importlib.import_module("metainfluence.lab.show.printing")
    worded: str = printing.in_options_of(name, text)
    return worded


def _warn(
    name: str,
    told: set[str],
    otherwise: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *where: Any,
    **more: Any,
) -> None:
    """Shows a warning of the library once, on one line and in the command's options; others as Python does."""
    if category.__module__.partition(".")[0] != "metainfluence":
        otherwise(message, category, *where, **more)
    elif str(message) not in told:
        told.add(str(message))
        _complain(f"WARNING: {_worded(name, str(message))}")


def _complain(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    entry()
