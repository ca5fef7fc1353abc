"""Float64 and strict promotion for every test: a value that JAX had to guess about fails here, not at a user's."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# Compiling takes far longer here than running. Older versions compile in a quarter of the time without XLA's newer
# emitters, newer ones in half of it with less of LLVM. XLA aborts on a flag that it does not know.
if version("jaxlib").startswith(("0.8", "0.9", "0.10")):
    _FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
else:
    _PASSES = "xla_cpu_disable_loop_unrolling,xla_cpu_disable_slp_vectorizer,xla_cpu_optimize_for_size"
    _FLAGS = f"--xla_backend_extra_options={_PASSES} --xla_backend_optimization_level=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
# What one worker has compiled, the other and the commands that tests call need not compile again; what another run has
# compiled would hide what this one does.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="metainfluence-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# LAPACK's own threads, beside those of XLA and of the other test process, only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run and in every order of tests."""
    return np.random.default_rng(20240607)


@pytest.fixture(autouse=True)
def _few_memory_maps() -> Iterator[None]:
    """Forgets compiled programs before a worker has as many memory maps as Linux allows a process, 65,530.

    One test compiles up to a thousand of them, and XLA aborts where it gets no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of one problem next to each other, so that not every worker compiles every problem."""

    def problem(item: pytest.Item) -> tuple[bool, str]:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return "problem_name" not in parameters, str(parameters.get("problem_name", ""))

    items.sort(key=problem)
