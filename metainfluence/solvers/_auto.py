"""The default solver, which looks at the operator and says what it chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from metainfluence import krylov, subspace
from metainfluence._checks import check_positive
from metainfluence.operators import Operator
from metainfluence.solvers._base import Choice, SolveInfo, Solver, SolveStatus
from metainfluence.solvers._block_cg import default_max_size, grown, of_block
from metainfluence.solvers._called import called
from metainfluence.solvers._cg import cg
from metainfluence.solvers._dense import by_eigenvalues
from metainfluence.solvers._kit import Preconditioner, preconditioner_of
from metainfluence.solvers._minres import minres
from metainfluence.solvers._sampled import sampled

# With fewer tasks than this, no sample represents all of them.
_LEAST_TASKS = 64

# If a basis takes more bytes, reading it in every step costs more than the products that it saves.
_QUICK = 1e8


class _State(NamedTuple):
    """What the chosen parts prepared, the products that this took, and a subspace to grow from, if there is one."""

    parts: Any
    matvecs: Array
    known: subspace.Subspace | None


@called
def auto(
    *, tol: Any = 1e-6, max_size: int | None = None, dense_size: int = 200, absolute: bool = True, memory: float = 2e9
) -> Solver:
    """Chooses a solver by the operator's size and spectrum; `SolveInfo.choice` says which.

    Up to `dense_size` meta-parameters, the matrix is formed and diagonalised. Above that, `block_cg` is used, from 64
    tasks on preconditioned by `sampled()`. If the damped operator turns out not to be positive definite, the solve
    continues with |H| + δI in the same basis (`absolute`), or with MINRES. If the basis would take more than 100 MB,
    reading it would cost more than the products that it saves, so `cg` comes first. If `cg` meets negative curvature,
    all is solved as above, or with MINRES if the basis would take more than `memory`.

    Args:
      tol: relative residual ‖b − Hx‖/‖b‖ at which the solve counts as converged.
      max_size: vectors in `block_cg`'s basis; None for its default.
      dense_size: largest number of meta-parameters for which the matrix is formed; 0 for none.
      absolute: what to do where the operator is indefinite: solve with |H| + δI, as saddle-free Newton does, or, if
        False, with H itself.
      memory: bytes that the basis may take.

    Raises:
      ValueError: `tol`, `max_size` or `memory` not positive, or `dense_size` negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([1.0, 2.0, 4.0]) * v, jnp.zeros(3))
      >>> solver = mi.solvers.auto()
      >>> x, info = solver.solve(operator, solver.init(operator), jnp.ones(3))
      >>> x.round(3).tolist(), mi.solvers.Choice(int(info.choice)).name
      ([1.0, 0.5, 0.25], 'DENSE')
    """
    check_positive("tol", tol)
    check_positive("memory", memory)
    if max_size is not None:
        check_positive("max_size", max_size, integer=True)
    if isinstance(dense_size, bool) or not isinstance(dense_size, int) or dense_size < 0:
        raise ValueError(f"dense_size: expected a non-negative integer, got {dense_size!r}")
    exact = by_eigenvalues(lambda smallest: (smallest <= 0) & absolute)

    def rule(operator: Operator) -> str:
        if operator.size <= dense_size:
            return "dense"
        if bytes_of_basis(operator) > _QUICK:
            return "large"
        return "sampled" if operator.sample is not None and operator.num_groups >= _LEAST_TASKS else "plain"

    def bytes_of_basis(operator: Operator) -> int:
        vectors = 2 * (default_max_size(operator, 1) if max_size is None else max_size)
        return vectors * operator.size * jnp.dtype(operator.domain.dtype).itemsize

    def parts(operator: Operator) -> Solver | None:
        return {"dense": exact, "sampled": sampled()}.get(rule(operator))

    def init(operator: Operator) -> _State:
        solver = parts(operator)
        # The number of products is kept with the state, since `init_matvecs` sees no operator to choose by.
        state = None if solver is None else solver.init(operator)
        return _State(state, jnp.int32(0 if solver is None else solver.init_matvecs(state)), None)

    def explore(operator: Operator, rank: int) -> tuple[_State, subspace.RitzValues]:
        if rule(operator) == "dense":
            assert exact.explore is not None
            pairs, values = exact.explore(operator, rank)
            return _State(pairs, jnp.int32(exact.init_matvecs(pairs)), None), values
        # The sample's basis does not depend on the damping.
        state = init(operator)
        known, values = krylov.explore(operator, rank)
        return state._replace(matvecs=state.matvecs + len(known.basis), known=known), values

    def run(
        operator: Operator,
        state: Any,
        rhs: Array,
        guesses: Array | None,
        exploration: krylov.Exploration | None = None,
    ) -> tuple[Array, SolveInfo, Array]:
        chosen, solver = rule(operator), parts(operator)
        if exploration is not None and chosen in ("dense", "large"):
            state, values = explore(operator, exploration.rank)
            damping = jnp.asarray(exploration.choose(values), operator.shift.dtype)
            return *run(operator.damped(damping), state, rhs, guesses)[:2], damping
        undamped = jnp.zeros_like(operator.shift)
        if chosen == "dense":
            solutions, info = each(lambda b: flat(exact, operator, state.parts, b), rhs)
            turned = absolute & (info.min_curvature <= 0)
            info = info._replace(choice=choice(Choice.DENSE, Choice.DENSE_ABSOLUTE, turned))
            return solutions, info, undamped
        if chosen == "large":
            return *large(operator, state, rhs, guesses), undamped
        return in_basis(operator, state, rhs, guesses, preconditioner_of(solver, operator, state.parts), 0, exploration)

    def in_basis(
        operator: Operator,
        state: _State,
        rhs: Array,
        guesses: Array | None,
        linear: Preconditioner,
        before: Any = 0,
        exploration: krylov.Exploration | None = None,
    ) -> tuple[Array, SolveInfo, Array]:
        solutions, info, growth = grown(
            operator,
            rhs,
            tol=tol,
            max_size=max_size,
            block_size=16,
            absolute=False,
            turn=absolute,
            guesses=guesses,
            linear=linear,
            known=state.known,
            exploration=exploration,
        )
        # A curvature that is zero up to rounding is not flipped.
        turned = growth.turned & (info.min_curvature < 0)
        info = info._replace(
            num_matvecs=info.num_matvecs + before, choice=choice(Choice.KRYLOV, Choice.KRYLOV_ABSOLUTE, turned)
        )
        if not absolute:
            damped = operator.damped(growth.damping)
            solutions, info = jax.lax.cond(
                growth.indefinite, lambda: by_minres(damped, rhs, info.num_matvecs[0]), lambda: (solutions, info)
            )
        return solutions, info, growth.damping

    def by_minres(operator: Operator, rhs: Array, before: Any) -> tuple[Array, SolveInfo]:
        return each(lambda b: flat(minres(tol=tol), operator, None, b, before, Choice.MINRES), rhs)

    def large(operator: Operator, state: _State, rhs: Array, guesses: Array | None) -> tuple[Array, SolveInfo]:
        explored = 0 if state.known is None else len(state.known.basis)
        solutions, info = each(lambda b: flat(cg(tol=tol), operator, None, b, explored, Choice.CG), rhs)
        spent = jnp.max(info.num_matvecs)

        def otherwise() -> tuple[Array, SolveInfo]:
            if not absolute or bytes_of_basis(operator) > memory:
                return by_minres(operator, rhs, spent)
            linear = preconditioner_of(None, operator, None)
            return in_basis(operator, state, rhs, guesses, linear, spent - explored)[:2]

        indefinite = jnp.any(info.status == SolveStatus.INDEFINITE)
        return jax.lax.cond(indefinite, otherwise, lambda: (solutions, info))

    return of_block(init, run, lambda state: state.matvecs, explore, False)


def each(solve: Callable[[Array], tuple[Array, SolveInfo]], rhs: Array) -> tuple[Array, SolveInfo]:
    """Solves for right-hand sides under vmap; for a single one without, with the same product as elsewhere."""
    if len(rhs) == 1:
        return jax.tree.map(lambda leaf: leaf[None], solve(rhs[0]))
    return jax.vmap(solve)(rhs)


def choice(plain: Choice, absolute: Choice, turned: Array) -> Array:
    """Codes of what was chosen, one for each right-hand side."""
    return jnp.where(turned, jnp.int32(absolute), jnp.int32(plain))


def flat(
    solver: Solver, operator: Operator, state: Any, rhs: Array, before: Any = 0, chosen: Choice | None = None
) -> tuple[Array, SolveInfo]:
    """Solves for a flat right-hand side, after `before` products already spent."""
    solution, info = solver.solve(operator, state, operator.domain.unravel(rhs))
    code = None if chosen is None else jnp.int32(chosen)
    # MINRES looks for no flat directions, but all branches of a program must report the same fields.
    zeros = jnp.int32(0) if info.flat_directions is None else info.flat_directions
    info = info._replace(num_matvecs=info.num_matvecs + before, choice=code, flat_directions=zeros)
    return operator.domain.ravel(solution), info
