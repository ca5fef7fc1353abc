"""The command line: one subcommand per module, its options the fields of the module's configuration."""

import importlib
import sys
from collections.abc import Sequence

import tyro

# subcommand -> (module, configuration dataclass); the module's `run` takes the configuration.
COMMANDS = {
    "demo": ("metainfluence.lab.demo", "DemoConfig"),
    "bench": ("metainfluence.lab.bench", "BenchConfig"),
}


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
    names = args[:1] if args and args[0] in COMMANDS else list(COMMANDS)
    runs, configs = {}, {}
    for name in names:
        module = importlib.import_module(COMMANDS[name][0])
        config = getattr(module, COMMANDS[name][1])
        runs[config], configs[name] = module.run, config
    if len(names) == 1:
        config = tyro.cli(configs[names[0]], prog=f"metainfluence {names[0]}", args=args[1:])
    else:
        config = tyro.extras.subcommand_cli_from_dict(configs, prog="metainfluence", args=args)
    runs[type(config)](config)


if __name__ == "__main__":
    main()
