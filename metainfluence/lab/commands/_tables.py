"""Score files that commands read, and whether one is about the meta-parameters at hand."""

from pathlib import Path
from typing import Any

import metainfluence as mi
from metainfluence._disk import of_arrays


def read(path: Path) -> mi.scoring.ScoreTable:
    """Reads a score file.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is not a score file.
    """
    if not path.exists():
        raise FileNotFoundError(f"scores: expected a file that `metainfluence score` wrote, got none at {path}")
    return mi.read_scores(path)


def is_about(table: mi.scoring.ScoreTable, meta_params: Any) -> bool:
    """Whether the file is about these meta-parameters, or does not say which it is about."""
    origin = table.metadata.get("run", {})
    told = origin.get("meta_params") if isinstance(origin, dict) else None
    return told is None or told == of_arrays(meta_params)


def refuse_others(table: mi.scoring.ScoreTable, path: Path, meta_params: Any) -> None:
    """Raises ValueError if the file is about other meta-parameters."""
    if not is_about(table, meta_params):
        raise ValueError(
            f"scores: expected a file about these meta-parameters, got {path}, which is about others; name those "
            "by --run or --problem, or score these anew"
        )
