"""What all solvers share: their shape, the report on a solve, and the one place where its status is decided."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from metainfluence.operators import Operator
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
      num_matvecs: products with H that the solution rests on, those of the solver's `init`, which all right-hand sides
        share, and that of the recomputed residual included.
      relative_residual: ‖b − Hx‖ / ‖b‖, recomputed from the returned x; 0 for b = 0.
      min_curvature: smallest Rayleigh quotient or eigenvalue of H that was seen; not positive: H is not positive
        definite.
      outer_gradient_norm: ‖D_λF‖, how far λ is from the stationary point that the formula presumes; None from a solver
        alone, which knows no λ.
      inner_gradient_norm: max over tasks of ‖∂_θ L_in‖ for implicit adaptation, infinite where a task's parameters are
        seen to be near no minimum of L_in; 0 for other adaptations, None from a solver alone.
      effective_curvature: ‖b‖ / ‖x‖, the curvature that the solution met; with the residual and the smallest curvature
        it bounds the solution's error.
      choice: what `auto` chose, see `Choice`; None from other solvers.
      damping: what was added to every eigenvalue of H; None from a solver alone.
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

    def __repr__(self) -> str:
        """The fields, with the names of codes."""
        codes: dict[str, type[enum.IntEnum]] = {"status": SolveStatus, "choice": Choice}
        fields = (
            f"{name}={_names(value, codes[name]) if name in codes else repr(value)}"
            for name, value in zip(self._fields, self, strict=True)
        )
        return f"SolveInfo({', '.join(fields)})"


def _names(value: Any, codes: type[enum.IntEnum]) -> str:
    """Codes by their names, with how many there are of each; what has no value now, as it is."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)) or isinstance(value, jax.core.Tracer):
        return repr(value)
    found, counts = np.unique(np.asarray(value), return_counts=True)
    known = {int(code): code.name for code in codes}
    names = [known.get(int(code), str(code)) for code in found]
    if np.ndim(value) == 0:
        return names[0]
    return f"[{', '.join(f'{name} × {count}' for name, count in zip(names, counts, strict=True))}]"


class Outcome(NamedTuple):
    """What a solver says of its own run; the residual is judged by `report`.

    Attributes:
      solution: flat vector.
      num_matvecs: products used so far.
      min_curvature: smallest Rayleigh quotient or eigenvalue seen.
      failure: the status if the solve did not converge.
    """

    solution: Float[Array, " size"]
    num_matvecs: Any
    min_curvature: Any
    failure: Any = SolveStatus.MAX_STEPS


class Iteration(NamedTuple):
    """An iterative solver as pure functions, so that the same turn runs in `lax.while_loop` and in a Python loop.

    Each turn multiplies one vector: `aim` says which, `take` uses the product. They know nothing of first guesses, nor
    of the residual that is recomputed in the end: see `from_steps`.

    Attributes:
      start: (operator, state, residual, scale) -> carry at x = 0, all vectors flat: what is to be solved for, and the
        norm ‖b‖ that tolerances are relative to; None for that of `residual`.
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
        """One turn, its product included."""
        carry, vector = self.aim(operator, state, carry)
        return self.take(operator, state, carry, operator.flat_matvec(vector))


class Solver(NamedTuple):
    """A strategy for H x = b with the operator's work split from the right-hand side's.

    Attributes:
      init: (operator) -> state: factorise, estimate a scale, build a basis; once.
      solve: (operator, state, rhs, x0=None) -> (solution, SolveInfo); rhs and solution are pytrees of the operator's
        domain. `vmap` it over rhs.
      iteration: for iterative solvers, the pure step behind `solve`; else None.
      solve_many: (operator, state, rhs) -> (solutions, SolveInfo) for right-hand sides on a leading axis, where they
        gain from each other; None for `solve` under vmap.
      init_matvecs: (state) -> products that `init` took.
      report: for iterative solvers, (operator, flat rhs, Outcome of `iteration.finish`) -> SolveInfo; else None.
      solve_matvecs: (state) -> products that one solve takes besides, that of the recomputed residual not counted,
        where that is known beforehand: what it costs as a preconditioner.
      explore: (operator, rank) -> (state, RitzValues): `rank` Lanczos vectors, from which a damping can be chosen, and
        a state that holds them, for solves with the operator damped thereafter; None where they would be of no use.
      explore_and_solve: (operator, rank, choose, rhs) -> (solution, SolveInfo, damping): both as turns of one loop,
        with the damping `choose` makes of the RitzValues.
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


class Preconditioner(NamedTuple):
    """A solver put to work as a linear map on flat vectors.

    Attributes:
      apply: (vector) -> vector.
      init_matvecs: products that its `init` took.
      matvecs: products that each application takes.
    """

    apply: Callable[[Float[Array, " size"]], Float[Array, " size"]]
    init_matvecs: Any
    matvecs: Any


def preconditioner_of(solver: Solver | None, operator: Operator, state: Any) -> Preconditioner:
    """The solver's map for one operator; the identity for None."""
    if solver is None:
        return Preconditioner(lambda vector: vector, 0, 0)
    init_matvecs = jnp.asarray(solver.init_matvecs(state), jnp.int32)

    def apply(vector: Array) -> Array:
        return _unreported(solver, operator, state, vector)

    return Preconditioner(apply, init_matvecs, solver.solve_matvecs(state))


def solution_of(solver: Solver, operator: Operator, state: Any, rhs: PyTree) -> PyTree:
    """The solution alone, without the product that a report on it takes."""
    operator.domain.check("rhs", rhs)
    return operator.domain.unravel(_unreported(solver, operator, state, operator.domain.ravel(rhs)))


def _unreported(solver: Solver, operator: Operator, state: Any, rhs: Array) -> Array:
    # Kept at `solve` itself, so that a solver whose `solve` was replaced is not asked for what it did before.
    outcome = getattr(solver.solve, "outcome", None)
    if outcome is None:
        return operator.domain.ravel(solver.solve(operator, state, operator.domain.unravel(rhs))[0])
    solution: Array = outcome(operator, state, rhs).solution
    return solution


def reachable(tol: Any, dtype: Any) -> Any:
    """`tol`, but no less than what rounding lets a recomputed residual reach: 100 eps, 1.2e-5 in float32."""
    return jnp.maximum(jnp.asarray(tol, dtype), 100 * jnp.finfo(dtype).eps)


def report(operator: Operator, rhs: Array, outcome: Outcome, tol: Any) -> SolveInfo:
    """Recomputes the residual (one product) and decides the status from it."""
    return judge(rhs, outcome, operator.flat_matvec(outcome.solution), tol)


def judge(rhs: Array, outcome: Outcome, product: Array, tol: Any) -> SolveInfo:
    """Decides the status from the product with the solution."""
    residual = norm(rhs - product)
    square = dot(outcome.solution, outcome.solution)
    quotient = jnp.where(square > 0, dot(outcome.solution, product) / jnp.where(square > 0, square, 1), jnp.inf)
    scale = norm(rhs)
    relative = jnp.where(scale > 0, residual / jnp.where(scale > 0, scale, 1), residual)
    finite = jnp.isfinite(relative) & jnp.all(jnp.isfinite(outcome.solution))
    failure = jnp.asarray(outcome.failure, jnp.int32)
    status = jnp.where(relative <= reachable(tol, relative.dtype), jnp.int32(SolveStatus.CONVERGED), failure)
    # A solver that has seen why there is no finite answer knows more than the answer tells.
    unexplained = ~finite & (failure != jnp.int32(SolveStatus.INDEFINITE))
    return SolveInfo(
        status=jnp.where(unexplained, jnp.int32(SolveStatus.NONFINITE), status),
        num_matvecs=jnp.asarray(outcome.num_matvecs, jnp.int32) + jnp.int32(1),
        relative_residual=relative,
        min_curvature=jnp.minimum(jnp.asarray(outcome.min_curvature, relative.dtype), quotient),
        effective_curvature=scale / jnp.where(square > 0, jnp.sqrt(square), 1),
    )


def direct(
    init: Callable[[Operator], Any],
    apply: Callable[..., Outcome],
    tol: Callable[[Any], Any],
    init_matvecs: Callable[[Any], Any] = lambda state: 0,
    multiply: Callable[[Operator, Any, Array], Array] = lambda operator, state, vector: operator.flat_matvec(vector),
) -> Solver:
    """A solver of a flat `apply(operator, state, rhs) -> Outcome`.

    `tol` maps the dtype to a relative residual, and `multiply` is the flat product of the system that is solved.
    """

    def solve(operator: Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        del x0  # No use for a first guess; accepted so that solvers can be exchanged.
        operator.domain.check("rhs", rhs)
        vector = operator.domain.ravel(rhs)
        outcome = apply(operator, state, vector)
        info = judge(vector, outcome, multiply(operator, state, outcome.solution), tol(vector.dtype))
        return operator.domain.unravel(outcome.solution), info

    solve.outcome = apply  # type: ignore[attr-defined]
    return Solver(init, solve, init_matvecs=init_matvecs)


class _Turn(NamedTuple):
    """The carry of an iterative solve; `product` is that of the vector multiplied last."""

    carry: Any
    outcome: Outcome
    product: Array
    guessing: Array
    closing: Array
    closed: Array


def iterative(
    init: Callable[[Operator], Any],
    iteration: Iteration,
    tol: Any,
    init_matvecs: Callable[[Any], Any] = lambda state: 0,
    solve_matvecs: Callable[[Any], Any] = lambda state: 0,
) -> Solver:
    """A solver that runs `iteration` in `lax.while_loop`."""

    def unreported(operator: Operator, state: Any, rhs: Array) -> Outcome:
        start = iteration.start(operator, state, rhs, None)
        last = jax.lax.while_loop(iteration.running, lambda carry: iteration.step(operator, state, carry), start)
        return iteration.finish(last)

    def run(operator: Operator, state: Any, rhs: Array, x0: Array | None) -> tuple[Outcome, Array]:
        """The outcome, and the product with its solution."""

        def reached(carry: Any) -> Outcome:
            outcome = iteration.finish(carry)
            return Outcome(
                outcome.solution if x0 is None else x0 + outcome.solution,
                jnp.asarray(outcome.num_matvecs, jnp.int32) + jnp.int32(x0 is not None),
                jnp.asarray(outcome.min_curvature, rhs.dtype),
                jnp.asarray(outcome.failure, jnp.int32),
            )

        # A program is as long as the copies of the product in it: the guess, the directions and the solution are
        # multiplied at one place.
        def turn(last: _Turn) -> _Turn:
            carry, vector = iteration.aim(operator, state, last.carry)
            product = operator.flat_matvec(jnp.where(last.guessing | last.closing, last.outcome.solution, vector))
            carry = iteration.take(operator, state, carry, product)
            if x0 is not None:
                begun = iteration.start(operator, state, rhs - product, norm(rhs))
                carry = jax.tree.map(lambda new, old: jnp.where(last.guessing, new, old), begun, carry)
            outcome = jax.tree.map(lambda old, new: jnp.where(last.closing, old, new), last.outcome, reached(carry))
            return _Turn(carry, outcome, product, jnp.bool_(False), ~iteration.running(carry), last.closing)

        start = iteration.start(operator, state, rhs, None)
        guessing = jnp.bool_(x0 is not None)
        closing = ~guessing & ~iteration.running(start)
        first = _Turn(start, reached(start), jnp.zeros_like(rhs), guessing, closing, jnp.bool_(False))
        last = jax.lax.while_loop(lambda turn: ~turn.closed, turn, first)
        return last.outcome, last.product

    def solve(operator: Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        operator.domain.check("rhs", rhs)
        vector = operator.domain.ravel(rhs)
        if x0 is not None:
            operator.domain.check("x0", x0)
            x0 = operator.domain.ravel(x0)
        outcome, product = run(operator, state, vector, x0)
        return operator.domain.unravel(outcome.solution), judge(vector, outcome, product, tol)

    def told(operator: Operator, rhs: Array, outcome: Outcome) -> SolveInfo:
        return report(operator, rhs, outcome, tol)

    solve.outcome = unreported  # type: ignore[attr-defined]
    return Solver(init, solve, iteration, init_matvecs=init_matvecs, report=told, solve_matvecs=solve_matvecs)


def norm(vector: Array) -> Array:
    """Euclidean norm of a flat vector."""
    return jnp.sqrt(dot(vector, vector))


def dot(left: Array, right: Array) -> Array:
    """Inner product of flat vectors at full precision."""
    return jnp.vdot(left, right, precision=jax.lax.Precision.HIGHEST)


def default_max_steps(size: int, max_steps: int | None) -> int:
    """Steps allowed where the user names none: twice the steps of exact arithmetic, at most 1000."""
    return max_steps if max_steps is not None else min(2 * size + 10, 1000)
