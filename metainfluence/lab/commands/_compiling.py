"""How the command line has its programs compiled: quickly, and once for all runs."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# Two of LLVM's passes and its higher level take two fifths of the compile time. For these programs, which compile
# longer than they run, no gain from them was measured. Only the CPU backend reads the passes' names.
_QUICK = (
    "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer "
    "--xla_backend_optimization_level=1"
)


def compile_quickly() -> None:
    """Asks XLA for less optimisation on a CPU, unless the user has set any such option."""
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_e" not in given and "xla_backend_optimization" not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_QUICK}".strip()


def keep_programs() -> None:
    """Lets JAX keep compiled programs in the user's cache, unless the user has set a folder or turned this off.

    If the folder cannot be made, nothing is kept.
    """
    if _VARIABLE in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metainfluence" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    # Also for the processes that a command starts.
    os.environ[_VARIABLE] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
