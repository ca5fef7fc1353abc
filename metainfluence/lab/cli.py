"""The command line: one subcommand per module, its options the fields of the module's configuration.

`--config FILE` reads options from a TOML file; those on the command line come after it and override it.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from metainfluence.lab.config_files import ConfigError, as_arguments, read_config

# subcommand -> suite -> (module, configuration dataclass); the module's `run` takes the configuration. The first suite
# is meant where a configuration file names none.
COMMANDS = {
    "demo": {"demo": ("metainfluence.lab.demo", "DemoConfig")},
    "bench": {
        "costs": ("metainfluence.lab.bench", "BenchConfig"),
        "solvers": ("metainfluence.lab.solver_bench", "SolverBenchConfig"),
        "scoring": ("metainfluence.lab.bench_scoring", "ScoringBenchConfig"),
        "accuracy": ("metainfluence.lab.omniglot_accuracy", "OmniglotAccuracyConfig"),
    },
}


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


def main(args: Sequence[str] | None = None) -> None:
    """Parse the arguments and run the subcommand.

    Args:
      args: the arguments; None takes the process's.

    Raises:
      SystemExit: as command lines do: 0 after --help, 2 for arguments that make no sense.
      ModuleNotFoundError: a package of the extra `lab` is missing; `metainfluence.__main__` words that for the user.
    """
    args = list(sys.argv[1:] if args is None else args)
    # Only the subcommand that is meant is imported, since each brings its own dependencies.
    if args and args[0] == "reproduce":
        importlib.import_module("metainfluence.lab.reproduce").main(args[1:])
        return
    if args and args[0] in COMMANDS:
        run, config = parse(args[0], args[1:])
    else:
        modules = {name: next(iter(suites.values())) for name, suites in COMMANDS.items()}
        configs = {name: getattr(importlib.import_module(module), kind) for name, (module, kind) in modules.items()}
        config = tyro.extras.subcommand_cli_from_dict(configs, prog="metainfluence", args=args)
        run = importlib.import_module(type(config).__module__).run
    run(config)


def parse(command: str, args: Sequence[str]) -> tuple[Any, Any]:
    """The function that runs a subcommand, and its configuration."""
    suites = COMMANDS[command]
    try:
        path, rest = split_config(args)
        suite, values = (next(iter(suites)), {}) if path is None else read_config(path, list(suites))
        name, kind = suites[suite]
        module = importlib.import_module(name)
        config = getattr(module, kind)
        given = [] if path is None else as_arguments(values, config, path)
    except ConfigError as error:
        print(f"metainfluence {command}: {error}", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from error
    about = f"{config.__doc__} --config FILE reads options from a TOML file"
    if len(suites) > 1:
        about += f", whose key suite is one of {', '.join(suites)}"
    parsed = tyro.cli(config, prog=f"metainfluence {command}", description=f"{about}.", args=[*given, *rest])
    return module.run, parsed


if __name__ == "__main__":
    main()
