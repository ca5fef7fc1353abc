"""How good the learners are, as measured by `metainfluence bench`, for the results page."""

import json
from pathlib import Path
from typing import Any

from metainfluence.lab.experiments.code import changed, code_of

RESULT, FOLDERS, DEPENDS_ON = "accuracy", "learner_*", "setting"


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> record, for the learners whose measurements are in the folders of that name in `out`."""
    paths = sorted(out.glob(f"{FOLDERS}/{RESULT}.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def sections(out: Path) -> list[str]:
    """What was printed for each learner, including its learning curve, with the command that made it."""
    found = []
    for name, record in records(out).items():
        heading, _, text = (out / name / f"{RESULT}.md").read_text(encoding="utf-8").partition("\n")
        ran = record["machine"]
        where = f"{ran['cores']} cores, {ran['device']}, jax {ran['jax']}, {ran['date']}"
        made = f"`metainfluence bench --config configs/{name}.toml`: {where}."
        found.append(f"## Learner: {heading.removeprefix('# ')}\n\n{made}\n{text}")
    return found


def outdated(out: Path) -> dict[str, list[str]]:
    """Name -> modules that changed since a learner was measured; learners without a change are left out."""
    code = code_of(DEPENDS_ON)
    found = {name: changed(record.get("code"), code) for name, record in records(out).items()}
    return {name: modules for name, modules in found.items() if modules}
