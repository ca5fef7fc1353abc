"""The command line's entry point. A core-only install has it too; there it names the missing extra."""

import sys

from metainfluence.lab.show.waiting import waiting

LAB_MODULES = frozenset(
    {
        "array_record",
        "flax",
        "matplotlib",
        "orbax",
        "PIL",
        "pyarrow",
        "rich",
        "sklearn",
        "tensorflow_datasets",
        "tyro",
    }
)


def main() -> None:
    """Run the command line.

    Raises:
      SystemExit: when the command line ends, and where a package of the lab extra is not installed.
    """
    try:
        with waiting(" ".join(["metainfluence", *sys.argv[1:2]])) as line:
            from metainfluence.lab.commands import cli

            if line is not None:
                line.phase("preparing")
            cli.entry()
    except KeyboardInterrupt:
        # Interrupted while the packages were imported.
        raise SystemExit(130) from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in LAB_MODULES:
            raise
        raise SystemExit(
            f"metainfluence: no module named {error.name!r}: the command line needs the lab extra: "
            "pip install 'metainfluence[lab]'"
        ) from error


if __name__ == "__main__":
    main()
