"""The command line's entry point, which also a core-only install has: it names the extra that the rest needs."""

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
      SystemExit: a package of the lab extra is not installed. Any other missing module is a bug and stays one.
    """
    try:
        from metainfluence.lab import cli

        cli.main()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in LAB_MODULES:
            raise
        raise SystemExit(
            f"metainfluence: no module named {error.name!r}: the command line needs the lab extra: "
            "pip install 'metainfluence[lab]'"
        ) from error


if __name__ == "__main__":
    main()
