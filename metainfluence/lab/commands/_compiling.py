"""How the command line has its programs compiled: quickly, and once for all runs."""

from __future__ import annotations

import os
from pathlib import Path

import jax

_VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# Two passes of LLVM and the higher of its levels, which take two fifths of the time and gain these programs, which
# compile longer than they run, nothing that was seen. Only the CPU's backend reads the passes' names.
_QUICK = (
    "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer "
    "--xla_backend_optimization_level=1"
)


def compile_quickly() -> None:
    """Asks XLA for less optimisation on a CPU, unless the user asks XLA for anything of that kind."""
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_e" not in given and "xla_backend_optimization" not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_QUICK}".strip()


def keep_programs() -> None:
    """Has JAX keep compiled programs in the user's cache, unless the user has said where, or that it should not.

    A folder that cannot be made is done without.
    """
    if _VARIABLE in os.environ or jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metainfluence" / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    # For the processes that a command starts, too.
    os.environ[_VARIABLE] = str(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
