"""Block conjugate gradients: one growing basis for all right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from metainfluence import krylov, subspace
from metainfluence._checks import check_positive
from metainfluence.krylov import Exploration
from metainfluence.operators import Operator
from metainfluence.solvers._base import SolveInfo, Solver, SolveStatus
from metainfluence.solvers._called import called
from metainfluence.solvers._kit import Preconditioner, preconditioner_of, reachable


@called
def block_cg(
    *,
    tol: Any = 1e-6,
    max_size: int | None = None,
    block_size: int = 16,
    preconditioner: Solver | None = None,
    absolute: bool = False,
) -> Solver:
    """Conjugate gradients with full orthogonalisation, in a basis that all right-hand sides share.

    Right-hand sides that are solved together, such as those of `task_if`, `instance_if` and `self_influence`, share one
    subspace. Each step multiplies, in one batch, the `block_size` directions that carry most of the residuals that are
    still too large. Every right-hand side then gets the Galerkin solution in the subspace multiplied so far (block CG,
    O'Leary, Linear Algebra Appl. 29, 1980, without directions that add nothing). For a single right-hand side this is
    plain CG without its loss of orthogonality. The basis and its products, 2 · max_size vectors, are kept in memory.

    Args:
      tol: relative residual ‖b − Hx‖/‖b‖ at which a solve counts as converged; values below 100 eps are raised to that.
      max_size: vectors in the basis, and so products; None for 200 plus four for each right-hand side, at most the
        operator's size.
      block_size: products in one batch, at most the number of right-hand sides.
      preconditioner: any solver whose `solve` is a positive definite linear map close to H⁻¹.
      absolute: solve with |H| + δI instead, see `lanczos`; the signs of the subspace's negative Ritz values are
        flipped. Otherwise negative curvature ends all solves, with status INDEFINITE, at the solutions reached before
        it was met.

    Raises:
      ValueError: `tol`, `max_size` or `block_size` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.block_cg()
      >>> x, info = solver.solve_many(operator, solver.init(operator), jnp.eye(3)[:2])
      >>> x.round(3).tolist(), info.num_matvecs.tolist()
      ([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]], [2, 2])
    """
    check_positive("tol", tol)
    check_positive("block_size", block_size, integer=True)
    if max_size is not None:
        check_positive("max_size", max_size, integer=True)

    def init(operator: Operator) -> Any:
        return None if preconditioner is None else preconditioner.init(operator)

    def init_matvecs(state: Any) -> Any:
        return 0 if preconditioner is None else preconditioner.init_matvecs(state)

    def run(
        operator: Operator, state: Any, rhs: Array, guesses: Array | None, exploration: Exploration | None = None
    ) -> tuple[Array, SolveInfo, Array]:
        known = state if isinstance(state, subspace.Subspace) else None
        solutions, info, growth = grown(
            operator,
            rhs,
            tol=tol,
            max_size=max_size,
            block_size=block_size,
            absolute=absolute,
            guesses=guesses,
            linear=preconditioner_of(preconditioner, operator, state),
            known=known,
            exploration=exploration,
        )
        return solutions, info, growth.damping

    def counted(state: Any) -> Any:
        return len(state.basis) if isinstance(state, subspace.Subspace) else init_matvecs(state)

    # A preconditioner's state may depend on the damping.
    return of_block(init, run, counted, None if preconditioner is not None else krylov.explore, absolute)


def default_max_size(operator: Operator, count: int) -> int:
    """Vectors in the basis for `count` right-hand sides: 200 plus four for each, at most the operator's size."""
    return min(operator.size, 200 + 4 * count)


def of_block(init: Any, run: Any, init_matvecs: Any, explore: Any, apart: bool) -> Solver:
    """A solver of a flat `run(operator, state, rhs [k, n], guesses, exploration) -> (solutions, SolveInfo, damping)`.

    `apart` says that it explores in a separate loop.
    """

    def solve_many(operator: Operator, state: Any, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
        solutions, info, _ = run(operator, state, jax.vmap(operator.domain.ravel)(rhs), None)
        return jax.vmap(operator.domain.unravel)(solutions), info

    def solve(operator: Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, SolveInfo]:
        operator.domain.check("rhs", rhs)
        if x0 is not None:
            operator.domain.check("x0", x0)
            x0 = operator.domain.ravel(x0)[None]
        solutions, info, _ = run(operator, state, operator.domain.ravel(rhs)[None], x0)
        return operator.domain.unravel(solutions[0]), jax.tree.map(lambda leaf: leaf[0], info)

    def explore_and_solve(
        operator: Operator, rank: int, choose: Callable[[subspace.RitzValues], Array], rhs: PyTree
    ) -> tuple[PyTree, SolveInfo, Array]:
        operator.domain.check("rhs", rhs)
        exploration = Exploration(min(rank, operator.size), choose)
        solutions, info, damping = run(operator, init(operator), operator.domain.ravel(rhs)[None], None, exploration)
        return operator.domain.unravel(solutions[0]), jax.tree.map(lambda leaf: leaf[0], info), damping

    found = Solver(init, solve, solve_many=solve_many, init_matvecs=init_matvecs, explore=explore)
    if explore is None:
        return found
    return found._replace(explore_and_solve=in_turn(found) if apart else explore_and_solve)


def in_turn(solver: Solver) -> Callable[..., tuple[PyTree, SolveInfo, Array]]:
    """`explore_and_solve` of a solver that does one after the other."""

    def explore_and_solve(
        operator: Operator, rank: int, choose: Callable[[subspace.RitzValues], Array], rhs: PyTree
    ) -> tuple[PyTree, SolveInfo, Array]:
        assert solver.explore is not None
        state, values = solver.explore(operator, rank)
        damping = jnp.asarray(choose(values), operator.shift.dtype)
        return *solver.solve(operator.damped(damping), state, rhs), damping

    return explore_and_solve


def grown(
    operator: Operator,
    rhs: Array,
    *,
    tol: Any,
    max_size: int | None,
    block_size: int,
    absolute: bool,
    linear: Preconditioner,
    guesses: Array | None = None,
    turn: bool = False,
    known: subspace.Subspace | None = None,
    exploration: Exploration | None = None,
) -> tuple[Array, SolveInfo, krylov.Growth]:
    """Solutions for flat right-hand sides, the report on them, and the subspace in which they lie."""
    count = len(rhs)
    finite = jnp.all(jnp.isfinite(rhs), axis=1)
    # One right-hand side that is not finite would spoil the basis of all.
    usable = jnp.where(finite[:, None], rhs, 0)
    capacity = default_max_size(operator, count) if max_size is None else max_size
    goal = reachable(tol, usable.dtype, operator.domain.coarsest)
    growth = krylov.grow(
        operator,
        usable,
        # Convergence is judged by the same residuals, so only rounding needs a margin.
        tol=0.99 * goal,
        capacity=capacity,
        block_size=block_size,
        absolute=absolute,
        turn=turn,
        guesses=guesses,
        precondition=linear.apply,
        known=known,
        exploration=exploration,
    )
    explored = 0 if exploration is None else exploration.rank
    shared: Any = explored if known is None else jnp.sum(known.filled, dtype=jnp.int32)
    scale = jnp.linalg.norm(usable, axis=1)
    residual = growth.sizes
    failure = jnp.where(growth.indefinite, jnp.int32(SolveStatus.INDEFINITE), jnp.int32(SolveStatus.MAX_STEPS))
    status = jnp.where(residual <= goal, jnp.int32(SolveStatus.CONVERGED), failure)
    broken = ~finite | ~jnp.isfinite(residual) | ~growth.finite
    smallest, zeros = subspace.smallest_value(growth.subspace, operator.shift + growth.damping)
    # Ritz values that pass through zero while they converge are not flat directions: along a flat one, part of the
    # residual stays within the basis.
    inside = jnp.linalg.norm(subspace.matmul(growth.residuals, growth.subspace.basis.T), axis=1)
    unsolvable = (residual <= goal) | (inside > 0.5 * jnp.linalg.norm(growth.residuals, axis=1))
    products = linear.init_matvecs + shared + (growth.num_products - shared) * (1 + linear.matvecs)
    info = SolveInfo(
        status=jnp.where(broken, jnp.int32(SolveStatus.NONFINITE), status),
        num_matvecs=jnp.full(count, products, jnp.int32),
        relative_residual=jnp.where(finite, residual, jnp.nan),
        min_curvature=jnp.full(count, smallest),
        flat_directions=jnp.where(unsolvable, zeros, jnp.int32(0)),
    )
    solutions = subspace.combine(growth.subspace, growth.coordinates)
    length = jnp.linalg.norm(solutions, axis=1)
    info = info._replace(
        effective_curvature=scale / jnp.where(length > 0, length, 1),
        asymmetry=subspace.asymmetry(growth.subspace, growth.coordinates, solutions, operator.shift + growth.damping),
    )
    return jnp.where(broken[:, None], jnp.nan, solutions), info, growth
