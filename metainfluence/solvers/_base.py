"""What all solvers share: their shape, and the report on a solve with its status."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from metainfluence.operators import Operator
from metainfluence.solvers._called import Called, shown
from metainfluence.subspace import RitzValues


class SolveStatus(enum.IntEnum):
    """How a solve of H x = b ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    INDEFINITE = 2
    DIVERGED = 3
    NONFINITE = 4


class Choice(enum.IntEnum):
    """What `auto` solved with."""

    DENSE = 0
    KRYLOV = 1
    DENSE_ABSOLUTE = 2
    KRYLOV_ABSOLUTE = 3
    CG = 4
    MINRES = 5


REMEDIES = {
    SolveStatus.MAX_STEPS: "the residual is above the tolerance after all steps: allow more steps, raise the damping, "
    "loosen tol, precondition, or compute in float64",
    SolveStatus.INDEFINITE: "the curvature is not positive along a direction that was met: raise the damping, train "
    "closer to a minimum, or use a solver for indefinite operators (minres, dense); an unrolled Adam needs "
    "eps_root > 0",
    SolveStatus.DIVERGED: "the series diverges: an eigenvalue lies outside (0, 2/scale); raise the damping, or let "
    "the solver find the scale (scale=None)",
    SolveStatus.NONFINITE: "NaN or infinity: look for it in the data, the weights, meta_params or the inner solve (an "
    "unrolled Adam needs eps_root > 0); called outside jit, the functions name the task and the leaf",
}


class SolveInfo(NamedTuple):
    """Report on solves of H x = b, one entry per right-hand side.

    Attributes:
      status: integers, see `SolveStatus`.
      num_matvecs: products with H behind the solution, including those of the solver's `init`, which all right-hand
        sides share, and the one for the recomputed residual.
      relative_residual: ‖b − Hx‖ / ‖b‖, recomputed from the returned x; 0 for b = 0.
      min_curvature: smallest Rayleigh quotient or eigenvalue of H that was seen; if it is not positive, H is not
        positive definite.
      outer_gradient_norm: ‖D_λF‖, a measure of how far λ is from the stationary point that the formula assumes; None
        from a solver used alone, which knows no λ.
      inner_gradient_norm: max over tasks of ‖∂_θ L_in‖ for implicit adaptation, infinite where a task's parameters are
        found not to be near a minimum of L_in; 0 for unrolled steps, which need no minimum. None where it is unknown:
        for a `closed_form` without `inner_loss`, for a `from_task_loss`, and from a solver used alone.
      effective_curvature: ‖b‖ / ‖x‖, the curvature of H along the solution; with the residual and the smallest
        curvature it bounds the solution's error.
      choice: what `auto` chose, see `Choice`; None from other solvers.
      damping: what was added to every eigenvalue of H; None from a solver used alone.
      meta_params_norm: ‖λ‖, the scale for distances in λ; None from a solver used alone.
      flat_directions: number of dimensions along which H is zero to working precision. The solution is the one of least
        norm, and a right-hand side with a part along them leaves a residual. A Krylov solver counts only those that it
        has met; None from a solver that does not look for them.
      asymmetry: how far the products are from those of a symmetric operator, ‖Hx − Hᵀx‖ / ‖Hx‖, as far as the solver's
        own products show it. It comes from rounding, or from an inexact derivative in the problem. None where a solver
        keeps no second product to compare with.
      working_eps: machine epsilon of the lowest precision in which the losses are computed: 0.0078 for a network in
        bfloat16, whatever the dtype of λ; None from a solver used alone.
      support_shared: whether the target's tasks share support data with training while the direct effect is left out;
        None where the target has no tasks that could.
    """

    status: Int[Array, "..."]
    num_matvecs: Int[Array, "..."]
    relative_residual: Float[Array, "..."]
    min_curvature: Float[Array, "..."]
    outer_gradient_norm: Float[Array, "..."] | None = None
    inner_gradient_norm: Float[Array, "..."] | None = None
    effective_curvature: Float[Array, "..."] | None = None
    choice: Int[Array, "..."] | None = None
    damping: Float[Array, "..."] | None = None
    meta_params_norm: Float[Array, "..."] | None = None
    flat_directions: Int[Array, "..."] | None = None
    support_shared: Bool[Array, "..."] | None = None
    asymmetry: Float[Array, "..."] | None = None
    working_eps: Float[Array, "..."] | None = None

    def __repr__(self) -> str:
        """The fields, with the names of codes."""
        codes: dict[str, type[enum.IntEnum]] = {"status": SolveStatus, "choice": Choice}
        fields = (
            f"{name}={_names(value, codes[name]) if name in codes else repr(value)}"
            for name, value in zip(self._fields, self, strict=True)
        )
        return f"SolveInfo({', '.join(fields)})"


def _names(value: Any, codes: type[enum.IntEnum]) -> str:
    """The names of codes, with how many there are of each; what has no value now is shown as it is."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)) or isinstance(value, jax.core.Tracer):
        return repr(value)
    found, counts = np.unique(np.asarray(value), return_counts=True)
    known = {int(code): code.name for code in codes}
    names = [known.get(int(code), str(code)) for code in found]
    if np.ndim(value) == 0:
        return names[0]
    return f"[{', '.join(f'{name} × {count}' for name, count in zip(names, counts, strict=True))}]"


class Outcome(NamedTuple):
    """What a solver reports of its own run; `report` judges the residual.

    Attributes:
      solution: flat vector.
      num_matvecs: products used so far.
      min_curvature: smallest Rayleigh quotient or eigenvalue seen.
      failure: the status if the solve did not converge.
      flat_directions: dimensions along which H is zero to working precision and the solution therefore 0; None where
        the solver does not look for them.
      asymmetry: as `SolveInfo.asymmetry`; None where it is not known.
    """

    solution: Float[Array, " size"]
    num_matvecs: Any
    min_curvature: Any
    failure: Any = SolveStatus.MAX_STEPS
    flat_directions: Any = None
    asymmetry: Any = None


class Iteration(NamedTuple):
    """An iterative solver as pure functions, so that the same step runs in `lax.while_loop` and in a Python loop.

    Each step multiplies one vector by the operator: `aim` says which, `take` uses the product. These functions know
    nothing of first guesses, nor of the residual recomputed at the end: `from_steps` adds both.

    Attributes:
      start: (operator, state, residual, scale) -> carry at x = 0, all vectors flat. `residual` is the right-hand side
        to solve for, `scale` the norm ‖b‖ that tolerances are relative to, None for the norm of `residual`.
      aim: (operator, state, carry) -> (carry, vector to be multiplied).
      take: (operator, state, carry, product) -> carry.
      running: (carry) -> boolean scalar.
      finish: (carry) -> Outcome.
    """

    start: Callable[..., Any]
    aim: Callable[..., tuple[Any, Array]]
    take: Callable[..., Any]
    running: Callable[..., Any]
    finish: Callable[..., Outcome]

    def step(self, operator: Operator, state: Any, carry: Any) -> Any:
        """One step, including its product."""
        carry, vector = self.aim(operator, state, carry)
        return self.take(operator, state, carry, operator.flat_matvec(vector))


class Solver(NamedTuple):
    """A strategy for H x = b that separates work on the operator from work on a right-hand side.

    Attributes:
      init: (operator) -> state: factorises, estimates a scale or builds a basis, once.
      solve: (operator, state, rhs, x0=None) -> (solution, SolveInfo); rhs and solution are pytrees of the operator's
        domain. `vmap` it over rhs.
      iteration: for iterative solvers, the pure step behind `solve`; else None.
      solve_many: (operator, state, rhs) -> (solutions, SolveInfo) for right-hand sides on a leading axis; None for
        `solve` under vmap. See `shares`.
      init_matvecs: (state) -> products that `init` took.
      report: for iterative solvers, (operator, flat rhs, Outcome of `iteration.finish`) -> SolveInfo; else None.
      solve_matvecs: (state) -> products that one solve takes in addition, without the one for the recomputed residual,
        where the number is known beforehand: its cost as a preconditioner.
      explore: (operator, rank) -> (state, RitzValues): makes `rank` Lanczos vectors, from whose Ritz values a damping
        can be chosen. The state holds them for later solves with the damped operator. None where they would be of no
        use.
      explore_and_solve: (operator, rank, choose, rhs) -> (solution, SolveInfo, damping): both in one loop, with the
        damping that `choose` computes from the RitzValues.
      called: the call that made it, used to display it and to tell it from others.
    """

    init: Callable[[Operator], Any]
    solve: Callable[..., tuple[PyTree, SolveInfo]]
    iteration: Iteration | None = None
    solve_many: Callable[..., tuple[PyTree, SolveInfo]] | None = None
    init_matvecs: Callable[[Any], Any] = lambda state: 0
    report: Callable[[Operator, Array, Outcome], SolveInfo] | None = None
    solve_matvecs: Callable[[Any], Any] = lambda state: 0
    explore: Callable[[Operator, int], tuple[Any, RitzValues]] | None = None
    explore_and_solve: Callable[..., tuple[PyTree, SolveInfo, Array]] | None = None
    called: Called | None = None

    @property
    def shares(self) -> bool:
        """Whether right-hand sides that are solved together gain from each other in `solve_many`."""
        return self.solve_many is not None and not getattr(self.solve_many, "mapped", False)

    def __repr__(self) -> str:
        """The call that made it, such as `cg(tol=0.001)`."""
        return shown(self, "Solver", self.called)


def norm(vector: Array) -> Array:
    """Euclidean norm of a flat vector."""
    return jnp.sqrt(dot(vector, vector))


def dot(left: Array, right: Array) -> Array:
    """Inner product of flat vectors at full precision."""
    return jnp.vdot(left, right, precision=jax.lax.Precision.HIGHEST)


def default_max_steps(size: int, max_steps: int | None) -> int:
    """Steps allowed where the user names none: twice the steps of exact arithmetic, at most 1000."""
    return max_steps if max_steps is not None else min(2 * size + 10, 1000)


def check_positive(name: str, value: Any, *, integer: bool = False) -> None:
    """Raises ValueError unless `value` is positive (and an integer); traced values cannot be checked."""
    if isinstance(value, jax.core.Tracer):
        return
    kind = "a positive integer" if integer else "a positive number"
    valid = not isinstance(value, (str, bool)) and jnp.ndim(value) == 0 and (not integer or isinstance(value, int))
    if not valid or not float(value) > 0:
        raise ValueError(f"{name}: expected {kind}, got {value!r}")
