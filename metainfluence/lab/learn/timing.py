"""Run times without compile times."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


class Compiled:
    """A function that is compiled ahead of time, once for each combination of shapes that it sees.

    XLA's CPU backend occasionally compiles the same program to an executable that returns NaN (jaxlib 0.10.2: 2 of 108
    compilations of the demo's `vmap(task_loss)`, with identical object code; openxla/xla issue 8471 reports something
    similar). A program whose first results hold NaN is therefore compiled once more.

    Args:
      function: a function of pytrees of arrays.

    Attributes:
      compile_seconds: tracing and compiling, summed over all calls so far.
      run_seconds: the last call, until its results were ready.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._executables: dict[Any, Any] = {}
        self.compile_seconds = 0.0
        self.run_seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple(jax.typeof(leaf) for leaf in leaves))
        if key not in self._executables:
            self._compile(key, args)
            result = self._run(key, args)
            if not holds_nan(result):
                return result
            # Otherwise JAX's cache would answer the next compilation.
            jax.clear_caches()
            self._compile(key, args)
        return self._run(key, args)

    def _compile(self, key: Any, args: tuple[Any, ...]) -> None:
        start = time.perf_counter()
        self._executables[key] = jax.jit(self._function).lower(*args).compile()
        self.compile_seconds += time.perf_counter() - start

    def _run(self, key: Any, args: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(self._executables[key](*args))
        self.run_seconds = time.perf_counter() - start
        return result


def holds_nan(tree: Any) -> bool:
    """Whether a floating-point leaf holds NaN."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return any(bool(jnp.any(jnp.isnan(leaf))) for leaf in floats)
