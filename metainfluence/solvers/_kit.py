"""The kit for building solvers, a user's or the library's own: from a flat map, or from steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from metainfluence.operators import Operator
from metainfluence.solvers._base import Iteration, Outcome, SolveInfo, Solver, SolveStatus, dot, norm
from metainfluence.solvers._called import call_of
from metainfluence.subspace import asymmetry_between, select

Apply = Callable[[Operator, Any, Array], Array | Outcome]
Multiply = Callable[[Operator, Any, Array], Array]


def from_map(
    init: Callable[[Operator], Any] | None,
    apply: Apply,
    *,
    tol: Any = 1e-6,
    init_matvecs: Any = 0,
    solve_matvecs: Any = 0,
    multiply: Multiply | None = None,
    name: str | None = None,
) -> Solver:
    """Makes a solver from a map on flat vectors, b ↦ x.

    The solver recomputes the residual ‖b − Hx‖ with one product and decides the status from it. It takes and returns
    pytrees, and has `solve_many`. A map that is linear and positive definite also makes a preconditioner.

    Args:
      init: (operator) -> state, once for all right-hand sides; None for no state.
      apply: (operator, state, b) -> x, both flat, in the coordinates of `operator.domain.ravel`; or -> `Outcome`, if it
        has more to report.
      tol: relative residual ‖b − Hx‖/‖b‖ at which a solve counts as converged; or (dtype) -> that, called with the
        coarsest dtype of λ's leaves.
      init_matvecs: products that `init` takes; or (state) -> that.
      solve_matvecs: products that `apply` takes; or (state) -> that.
      multiply: (operator, state, x) -> product with the matrix of the system to be solved, where that is not H.
      name: how the solver is displayed, such as "jacobi(sweeps=3)". Resumed runs are recognised by it, so include
        everything that decides the answer. None for the names of `init` and `apply`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> jacobi = mi.solvers.from_map(
      ...     lambda operator: jnp.diagonal(operator.dense()), lambda operator, state, b: b / state, name="jacobi"
      ... )
      >>> operator = mi.operators.from_matvec(lambda v: 2.0 * v, jnp.zeros(3))
      >>> x, info = jacobi.solve(operator, jacobi.init(operator), jnp.ones(3))
      >>> jacobi, x.tolist(), info.status == mi.SolveStatus.CONVERGED
      (jacobi(), [0.5, 0.5, 0.5], Array(True, dtype=bool))
    """
    prepare = _no_state if init is None else init
    taken, own = _of_state(init_matvecs), _of_state(solve_matvecs)

    def reached(operator: Operator, state: Any, rhs: Array) -> Outcome:
        found = apply(operator, state, rhs)
        return found if isinstance(found, Outcome) else Outcome(found, taken(state) + own(state), jnp.inf)

    def solve(operator: Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        del x0  # No use for a first guess; accepted so that solvers can be exchanged.
        operator.domain.check("rhs", rhs)
        vector = operator.domain.ravel(rhs)
        outcome = reached(operator, state, vector)
        solution = outcome.solution
        product = operator.flat_matvec(solution) if multiply is None else multiply(operator, state, solution)
        coarsest = operator.domain.coarsest
        goal = tol(coarsest) if callable(tol) else tol
        return operator.domain.unravel(solution), judge(vector, outcome, product, goal, coarsest)

    solve.outcome = reached  # type: ignore[attr-defined]
    solver = Solver(prepare, solve, solve_many=_mapped(solve), init_matvecs=taken, solve_matvecs=own)
    return solver._replace(called=call_of(solver, name, "from_map", init, apply))


class _Turn(NamedTuple):
    """The carry of an iterative solve.

    Attributes:
      carry: the iteration's.
      before: the carry that the last turn began with.
      vector: the vector multiplied last.
      product: the product of that vector.
      asymmetry: as `SolveInfo.asymmetry`, the largest between one turn and the next.
      guessing: whether the guess is multiplied next.
      closed: whether the solution was multiplied last.
    """

    carry: Any
    before: Any
    vector: Array
    product: Array
    asymmetry: Array
    guessing: Array
    closed: Array


def from_steps(
    init: Callable[[Operator], Any] | None,
    iteration: Iteration,
    *,
    tol: Any = 1e-6,
    init_matvecs: Any = 0,
    solve_matvecs: Any = 0,
    name: str | None = None,
) -> Solver:
    """Makes a solver from steps, each of which multiplies one vector.

    The solver runs them in one `lax.while_loop`. Its last turn multiplies the solution: the residual ‖b − Hx‖ is
    recomputed and decides the status, and the program contains the operator's product only once. First guesses, pytrees
    and `solve_many` are included, and `scoring.score` saves the state after every step.

    Args:
      init: (operator) -> state, once for all right-hand sides; None for no state.
      iteration: the steps, see `Iteration`.
      tol: relative residual ‖b − Hx‖/‖b‖ at which a solve counts as converged; the steps decide for themselves when to
        end.
      init_matvecs: products that `init` takes; or (state) -> that.
      solve_matvecs: products that a solve takes, for use as a preconditioner; or (state) -> that.
      name: how the solver is displayed, see `from_map`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> def richardson(rate, num_steps):
      ...     return mi.solvers.from_steps(
      ...         None,
      ...         mi.solvers.Iteration(
      ...             start=lambda operator, state, b, scale: (jnp.zeros_like(b), b, 0),
      ...             aim=lambda operator, state, carry: (carry, carry[1]),
      ...             take=lambda operator, state, carry, product: (
      ...                 carry[0] + rate * carry[1], carry[1] - rate * product, carry[2] + 1
      ...             ),
      ...             running=lambda carry: carry[2] < num_steps,
      ...             finish=lambda carry: mi.solvers.Outcome(carry[0], carry[2], jnp.inf),
      ...         ),
      ...         name=f"richardson({rate}, {num_steps})",
      ...     )
      >>> operator = mi.operators.from_matvec(lambda v: 2.0 * v, jnp.zeros(3))
      >>> solver = richardson(0.4, 9)
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> solver, info.status == mi.SolveStatus.CONVERGED, int(info.num_matvecs)
      (richardson(0.4, 9), Array(True, dtype=bool), 10)
    """
    prepare = _no_state if init is None else init

    def unreported(operator: Operator, state: Any, rhs: Array) -> Outcome:
        start = iteration.start(operator, state, rhs, None)
        last = jax.lax.while_loop(iteration.running, lambda carry: iteration.step(operator, state, carry), start)
        return iteration.finish(last)

    def run(operator: Operator, state: Any, rhs: Array, x0: Array | None) -> tuple[Outcome, Array]:
        """The outcome, and the product with its solution."""

        def reached(carry: Any) -> Outcome:
            outcome = iteration.finish(carry)
            if x0 is None:
                return outcome
            return outcome._replace(solution=x0 + outcome.solution, num_matvecs=outcome.num_matvecs + 1)

        # Every copy of the product makes the program longer: the guess, the directions and the solution are multiplied
        # in one place.
        def turn(last: _Turn) -> _Turn:
            closing = jnp.logical_not(iteration.running(last.carry))
            carry, vector = iteration.aim(operator, state, last.carry)
            # At the guess the solution is the guess.
            whole = closing if x0 is None else closing | last.guessing
            vector = jax.lax.select(whole, reached(last.carry).solution, vector)
            product = operator.flat_matvec(vector)
            asymmetry = jnp.maximum(last.asymmetry, asymmetry_between(last.vector, last.product, vector, product))
            carry = iteration.take(operator, state, carry, product)
            if x0 is not None:
                closing = closing & ~last.guessing
                begun = iteration.start(operator, state, rhs - product, norm(rhs))
                carry = jax.tree.map(lambda new, old: jnp.where(last.guessing, new, old), begun, carry)
            return _Turn(carry, last.carry, vector, product, asymmetry, jnp.bool_(False), closing)

        start, zero = iteration.start(operator, state, rhs, None), jnp.zeros_like(rhs)
        guessing, no = jnp.bool_(x0 is not None), jnp.bool_(False)
        first = _Turn(start, start, zero, zero, jnp.zeros((), rhs.dtype), guessing, no)
        last = jax.lax.while_loop(lambda turn: ~turn.closed, turn, first)
        outcome = reached(last.before)
        return outcome._replace(asymmetry=last.asymmetry), last.product

    def solve(operator: Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        operator.domain.check("rhs", rhs)
        vector = operator.domain.ravel(rhs)
        if x0 is not None:
            operator.domain.check("x0", x0)
            x0 = operator.domain.ravel(x0)
        outcome, product = run(operator, state, vector, x0)
        return operator.domain.unravel(outcome.solution), judge(vector, outcome, product, tol, operator.domain.coarsest)

    def told(operator: Operator, rhs: Array, outcome: Outcome) -> SolveInfo:
        return report(operator, rhs, outcome, tol)

    solve.outcome = unreported  # type: ignore[attr-defined]
    solver = Solver(
        prepare,
        solve,
        iteration,
        _mapped(solve),
        init_matvecs=_of_state(init_matvecs),
        report=told,
        solve_matvecs=_of_state(solve_matvecs),
    )
    return solver._replace(called=call_of(solver, name, "from_steps", init, iteration))


class Preconditioner(NamedTuple):
    """A solver used as a linear map on flat vectors.

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
    """The solution alone, without the product that a report needs.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> mi.solvers.solution_of(mi.solvers.cg(), operator, None, jnp.ones(3)).round(3).tolist()
      [1.0, 0.5, 0.25]
    """
    operator.domain.check("rhs", rhs)
    return operator.domain.unravel(_unreported(solver, operator, state, operator.domain.ravel(rhs)))


def _unreported(solver: Solver, operator: Operator, state: Any, rhs: Array) -> Array:
    # Stored on `solve` itself, so that a solver whose `solve` was replaced does not use the old one's outcome.
    outcome = getattr(solver.solve, "outcome", None)
    if outcome is None:
        return operator.domain.ravel(solver.solve(operator, state, operator.domain.unravel(rhs))[0])
    solution: Array = outcome(operator, state, rhs).solution
    return solution


def reachable(tol: Any, dtype: Any, coarsest: Any = None) -> Any:
    """`tol`, but no less than what rounding lets a recomputed residual reach: 100 eps, 1.2e-5 in float32.

    `coarsest` is the dtype of products, where that is not the residual's.
    """
    least = 100 * float(jnp.finfo(dtype if coarsest is None else coarsest).eps)
    if isinstance(tol, (int, float)):
        return jnp.asarray(max(tol, least), dtype)
    return jnp.maximum(jnp.asarray(tol, dtype), least)


def report(operator: Operator, rhs: Array, outcome: Outcome, tol: Any) -> SolveInfo:
    """Recomputes the residual (one product) and decides the status from it."""
    return judge(rhs, outcome, operator.flat_matvec(outcome.solution), tol, operator.domain.coarsest)


def judge(rhs: Array, outcome: Outcome, product: Array, tol: Any, coarsest: Any) -> SolveInfo:
    """Decides the status from the product with the solution."""
    residual, scale = norm(rhs - product), norm(rhs)
    square = dot(outcome.solution, outcome.solution)
    moved = square > 0
    divisor = select(moved, square, 1)
    quotient = select(moved, dot(outcome.solution, product) / divisor, jnp.inf)
    relative = residual / select(scale > 0, scale, 1)
    finite = jnp.isfinite(relative + square)
    failure = jnp.asarray(outcome.failure, jnp.int32)
    status = select(relative <= reachable(tol, relative.dtype, coarsest), jnp.int32(SolveStatus.CONVERGED), failure)
    # A solver that knows why there is no finite answer keeps its own status.
    unexplained = ~finite & (failure != jnp.int32(SolveStatus.INDEFINITE))
    return SolveInfo(
        status=select(unexplained, jnp.int32(SolveStatus.NONFINITE), status),
        num_matvecs=jnp.asarray(outcome.num_matvecs, jnp.int32) + jnp.int32(1),
        relative_residual=relative,
        min_curvature=jnp.minimum(jnp.asarray(outcome.min_curvature, relative.dtype), quotient),
        flat_directions=outcome.flat_directions,
        asymmetry=outcome.asymmetry,
        effective_curvature=scale / jnp.sqrt(divisor),
    )


def _no_state(operator: Operator) -> None:
    del operator


def _of_state(count: Any) -> Callable[[Any], Any]:
    return count if callable(count) else lambda state: count


def _mapped(solve: Callable[..., tuple[PyTree, SolveInfo]]) -> Callable[..., tuple[PyTree, SolveInfo]]:
    def solve_many(operator: Operator, state: Any, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
        return jax.vmap(lambda rhs: solve(operator, state, rhs))(rhs)

    # Right-hand sides gain nothing from each other: how many are stepped at once is the caller's choice.
    solve_many.mapped = True  # type: ignore[attr-defined]
    return solve_many
