"""The solver benchmark's tools: programs with their time and memory, errors, and the solvers by name."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence.lab.bench.solvers.options import SolverBenchConfig
from metainfluence.lab.learn.timing import holds_nan

NO_LIMIT = 1000
ENOUGH_SECONDS = 1.0

# name -> (configuration, tol, steps) -> solver; tol and steps may be traced, so one program serves many values of them.
SOLVERS: dict[str, Callable[[SolverBenchConfig, Any, Any], mi.solvers.Solver]] = {
    "identity": lambda config, tol, steps: mi.solvers.identity(),
    "ekfac": lambda config, tol, steps: mi.solvers.ekfac(tol=tol),
    "nystrom": lambda config, tol, steps: mi.solvers.nystrom(config.solve.rank, tol=tol),
    "lanczos": lambda config, tol, steps: mi.solvers.lanczos(config.solve.rank, tol=tol),
    "neumann": lambda config, tol, steps: mi.solvers.neumann(steps, tol=tol),
    "cg": lambda config, tol, steps: mi.solvers.cg(tol=tol, max_steps=steps),
    "cg + ekfac": lambda config, tol, steps: _preconditioned(tol, steps, mi.solvers.ekfac()),
    "cg + nystrom": lambda config, tol, steps: _preconditioned(tol, steps, mi.solvers.nystrom(config.solve.rank)),
    "cg + sampled": lambda config, tol, steps: _preconditioned(tol, steps, mi.solvers.sampled()),
    "minres": lambda config, tol, steps: mi.solvers.minres(tol=tol, max_steps=steps),
    "block_cg": lambda config, tol, steps: mi.solvers.block_cg(tol=tol),
    "auto": lambda config, tol, steps: mi.solvers.auto(tol=tol),
    "dense": lambda config, tol, steps: mi.solvers.dense(),
}

CURVATURES: dict[str, Callable[[], mi.curvature.Curvature]] = {
    "exact": mi.curvature.exact,
    "linearized": mi.curvature.linearized,
    "gamma": mi.curvature.gamma,
    "gauss_newton": mi.curvature.gauss_newton,
    "direct": mi.curvature.direct,
}


def _preconditioned(tol: Any, steps: Any, preconditioner: mi.solvers.Solver) -> mi.solvers.Solver:
    return mi.solvers.cg(tol=tol, max_steps=steps, preconditioner=preconditioner)


class Program:
    """A function compiled ahead of time for the shapes of its arguments, with the time and memory of running it.

    If its first results hold NaN, it is compiled once more, for the reason that `timing.Compiled` gives.

    Attributes:
      megabytes: arguments, results and temporaries, as XLA analyses the program; None without an analysis.
      seconds: the median of the last `measure`, or the last call.
    """

    def __init__(self, function: Callable[..., Any], *args: Any):
        self._function, self._args = function, args
        self._trusted = False
        self._compile()
        self.seconds = float("nan")

    def _compile(self) -> None:
        self._executable = jax.jit(self._function).lower(*self._args).compile()
        memory = self._executable.memory_analysis()
        parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        self.megabytes = None if memory is None else sum(getattr(memory, part) for part in parts) / 1e6

    def __call__(self, *args: Any) -> Any:
        result = self._run(args)
        if not self._trusted and holds_nan(result):
            jax.clear_caches()  # Otherwise JAX's cache would answer the compilation.
            self._compile()
            result = self._run(args)
        self._trusted = True
        return result

    def _run(self, args: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(self._executable(*args))
        self.seconds = time.perf_counter() - start
        return result

    def measure(self, *args: Any, repeats: int) -> Any:
        """Runs once, then `repeats` times more for the median, unless that would take long."""
        result = self(*args)
        seconds: list[float] = []
        while len(seconds) < repeats and sum(seconds, self.seconds if not seconds else 0.0) < ENOUGH_SECONDS:
            self(*args)
            seconds.append(self.seconds)
        self.seconds = statistics.median(seconds or [self.seconds])
        return result


def solver_program(config: SolverBenchConfig, name: str, operator: mi.Operator, rhs: Any) -> Program:
    """(operator, rhs, tol, steps) -> (solution, info), including the work on the operator.

    Raises:
      ValueError: the solver cannot treat the operator.
    """

    def run(operator, rhs, tol, steps):
        solver = SOLVERS[name](config, tol, steps)
        return solver.solve(operator, solver.init(operator), rhs)

    return Program(run, operator, rhs, jnp.asarray(config.solve.tol), jnp.int32(NO_LIMIT))


def status_name(info: mi.SolveInfo) -> str:
    """Status of one solve, or the worst status of several."""
    return mi.SolveStatus(int(np.max(np.asarray(info.status)))).name
