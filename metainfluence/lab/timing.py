"""Run times with the compile time kept apart."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Compiled:
    """A function that is compiled ahead of time, once for each combination of shapes that it sees.

    Args:
      function: of pytrees of arrays.
      few_runs: compile without the slower of XLA's emitters on CPU, which pays off where compiling takes longer than
        all runs together.

    Attributes:
      compile_seconds: tracing and compiling, over all calls so far.
      run_seconds: the last call, until its results were there.
    """

    def __init__(self, function: Callable[..., Any], *, few_runs: bool = False):
        self._function = function
        self._options: dict[str, str | bool] | None = {"xla_cpu_use_fusion_emitters": False} if few_runs else None
        self._executables: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.run_seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple(jax.typeof(leaf) for leaf in leaves))
        if key not in self._executables:
            start = time.perf_counter()
            self._executables[key] = jax.jit(self._function).lower(*args).compile(self._options)
            self.compile_seconds += time.perf_counter() - start
        start = time.perf_counter()
        result = jax.block_until_ready(self._executables[key](*args))
        self.run_seconds = time.perf_counter() - start
        return result
