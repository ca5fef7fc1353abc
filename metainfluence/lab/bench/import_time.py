"""How long `import metainfluence` takes, compared with the imports that it cannot do without."""

import statistics
import subprocess
import sys
import time

OURS = "import metainfluence"
DEPENDENCIES = "import jax, optax"


def _seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(repeats: int = 7) -> dict[str, float]:
    """Time `import metainfluence` against `import jax, optax`, each run in a new interpreter.

    The two take turns, so that a change of the machine's load affects both equally. An untimed run of each comes first,
    since it may have to compile bytecode and to read from a cold disk.

    Args:
      repeats: timed runs of each.

    Returns:
      `metainfluence` and `dependencies`, medians in seconds, and `ratio`, the first over the second.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    _seconds(OURS)
    _seconds(DEPENDENCIES)
    runs = [(_seconds(OURS), _seconds(DEPENDENCIES)) for _ in range(repeats)]
    ours, dependencies = (statistics.median(times) for times in zip(*runs, strict=True))
    return {"metainfluence": ours, "dependencies": dependencies, "ratio": ours / dependencies}
