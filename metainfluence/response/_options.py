"""The options that all makers share, as one value that is checked once."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

from jax.sharding import Mesh
from jaxtyping import PyTree

from metainfluence import solvers
from metainfluence._checks import check_batch_size, check_damping, check_mesh, check_precision, traced_at
from metainfluence._chunks import Chunks
from metainfluence._outline import refuse_differentiated
from metainfluence._spoilt import without_spoilt
from metainfluence.curvature import Curvature, check_curvature, exact
from metainfluence.data import Task, Weights
from metainfluence.operators import flat_norm
from metainfluence.problem import Bilevel, with_hvp
from metainfluence.response._choice import fitting_chunks
from metainfluence.response._sums import Expansion, Sums
from metainfluence.solvers import Solver


class Options(NamedTuple):
    """How a response is computed.

    Attributes:
      problem: the problem, with the derivatives that were asked for.
      solver: one of `metainfluence.solvers`.
      curvature: one of `metainfluence.curvature`.
      damping: a non-negative number, or "auto".
      batch_size: tasks per chunk; None for a choice by shapes.
      mesh: devices over which tasks are sharded; None for where they are.
      precision: of matrix products; None for JAX's own.
    """

    problem: Bilevel
    solver: Solver
    curvature: Curvature
    damping: Any
    batch_size: int | None
    mesh: Mesh | None
    precision: str | None

    @staticmethod
    def of(
        problem: Bilevel,
        *,
        solver: Solver | None = None,
        curvature: Curvature | None = None,
        damping: Any = 0.0,
        batch_size: int | None = None,
        mesh: Mesh | None = None,
        hvp: str | None = None,
        precision: str | None = "highest",
    ) -> Options:
        """Checks the options, and fills in the defaults.

        Raises:
          TypeError: no problem, solver, curvature or mesh where one is expected.
          ValueError: a curvature that needs what the problem lacks, a damping that is neither a non-negative number nor
            "auto", or an unknown `hvp` or `precision`.
        """
        problem = with_hvp(problem, hvp)
        curvature = exact() if curvature is None else curvature
        solver = solvers.auto() if solver is None else solver
        if not isinstance(solver, Solver):
            raise TypeError(f"solver: expected one of metainfluence.solvers, as cg(), got {solver!r}")
        refuse_differentiated("solver", solver)
        check_curvature(problem, curvature)
        if isinstance(damping, str) and damping != "auto":
            raise ValueError(f'damping: expected a non-negative number or "auto", got {damping!r}')
        if not isinstance(damping, str):
            check_damping(damping)
        check_batch_size(batch_size)
        check_mesh(mesh)
        check_precision(precision)
        return Options(problem, solver, curvature, damping, batch_size, mesh, precision)

    def traced(self) -> contextlib.AbstractContextManager[Any]:
        """The setting in which everything is traced, the user's functions included."""
        return traced_at(self.precision)

    def chunks(self, meta_params: PyTree, tasks: Task, vectors: int = 1) -> Chunks:
        """What is worked on at once, by shapes alone."""
        return fitting_chunks(self.problem, self.curvature, meta_params, tasks, vectors, self.mesh, self.batch_size)

    def expanded(self, meta_params: PyTree, tasks: Task, weights: Weights, chunks: Chunks) -> Expansion:
        """The gradient map to first order; the caller checks the arguments.

        Warns:
          SpoiltTaskWarning: outside jit, a gradient that is not finite because of tasks whose data are finite.

        Raises:
          ValueError: outside jit, a gradient that is not finite because of data that are not.
        """
        expand = Sums(self.problem, self.curvature, chunks, self.mesh, self.precision).expand
        found = expand(meta_params, tasks, weights)
        rest = without_spoilt(self.problem, flat_norm(found.gradient), meta_params, tasks, weights)
        if rest is None:
            return found
        found = expand(meta_params, rest.tasks, rest.weights(weights))
        return dataclasses.replace(found, spoilt=rest.left_out(weights))
