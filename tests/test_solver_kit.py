"""A user's own solvers, by a map or by steps, and the report, the status and `solve_many` that come with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from oracles.reference import ravel, relative_error, rows
from spectra import LIKE, SIZE, build, residual, solve, unravel

SPECTRUM = np.linspace(0.5, 4.0, SIZE)


def jacobi_init(operator):
    return jnp.diagonal(operator.dense())


def jacobi(operator, state, rhs):
    return rhs / state


def richardson(rate, num_steps, tol=1e-6):
    return mi.solvers.from_steps(
        None,
        mi.solvers.Iteration(
            start=lambda operator, state, residual, scale: (jnp.zeros_like(residual), residual, jnp.int32(0)),
            aim=lambda operator, state, carry: (carry, carry[1]),
            take=lambda operator, state, carry, product: (
                carry[0] + rate * carry[1],
                carry[1] - rate * product,
                carry[2] + 1,
            ),
            running=lambda carry: carry[2] < num_steps,
            finish=lambda carry: mi.solvers.Outcome(carry[0], carry[2], jnp.inf),
        ),
        tol=tol,
        name=f"richardson({rate}, {num_steps})",
    )


def test_a_map_becomes_a_solver_that_says_how_wrong_it_is(rng):
    built, rhs = build(SPECTRUM), unravel(rng.normal(size=SIZE))
    solver = mi.solvers.from_map(jacobi_init, jacobi, init_matvecs=SIZE)
    solution, info = solve(solver, built.operator, rhs)
    np.testing.assert_allclose(ravel(solution), ravel(rhs) / np.diagonal(built.matrix), rtol=1e-14)
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, rhs, solution), rtol=1e-12)
    assert info.status == mi.SolveStatus.MAX_STEPS
    assert info.num_matvecs == SIZE + 1
    diagonal = build(np.full(SIZE, 2.0))
    assert solve(solver, diagonal.operator, rhs)[1].status == mi.SolveStatus.CONVERGED


def test_a_map_may_tell_of_its_failure_and_is_not_asked_what_is_not_finite(rng):
    built, rhs = build(SPECTRUM), unravel(rng.normal(size=SIZE))
    for outcome, status in (
        (lambda b: mi.solvers.Outcome(b, 7, -1.0, mi.SolveStatus.INDEFINITE), mi.SolveStatus.INDEFINITE),
        (lambda b: b * jnp.nan, mi.SolveStatus.NONFINITE),
    ):
        solver = mi.solvers.from_map(None, lambda operator, state, b, outcome=outcome: outcome(b))
        assert solve(solver, built.operator, rhs)[1].status == status


@pytest.mark.parametrize("guess", [False, True])
def test_steps_become_a_solver_with_guesses_and_a_recomputed_residual(guess, rng):
    built, rhs = build(SPECTRUM), rng.normal(size=SIZE)
    x0 = rng.normal(size=SIZE) if guess else None
    solution, info = solve(richardson(0.4, 5), built.operator, unravel(rhs), None if x0 is None else unravel(x0))
    expected = np.zeros(SIZE) if x0 is None else x0
    for _ in range(5):
        expected = expected + 0.4 * (rhs - built.matrix @ expected)
    assert relative_error(ravel(solution), expected) <= 1e-13
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, unravel(rhs), solution), rtol=1e-10)
    assert info.num_matvecs == 5 + guess + 1
    assert info.status == mi.SolveStatus.MAX_STEPS


def test_many_right_hand_sides_are_solved_as_each_alone(rng):
    built, solver = build(SPECTRUM), richardson(0.4, 200, tol=1e-9)
    rhs = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape))), LIKE)
    solutions, info = jax.jit(lambda rhs: solver.solve_many(built.operator, None, rhs))(rhs)
    assert relative_error(rows(solutions).T, np.linalg.solve(built.matrix, rows(rhs).T)) <= 1e-8
    assert info.status.tolist() == [mi.SolveStatus.CONVERGED] * 3
    assert not solver.shares
    assert mi.solvers.auto().shares


def test_a_solver_of_the_kit_preconditions(rng):
    built = build(np.ones(SIZE))
    scale = jnp.asarray(np.geomspace(1.0, 1e4, SIZE))
    operator = mi.operators.from_matvec(lambda v: unravel(scale * jax.flatten_util.ravel_pytree(v)[0]), LIKE)
    solver = mi.solvers.cg(tol=1e-9, preconditioner=mi.solvers.from_map(jacobi_init, jacobi, init_matvecs=SIZE))
    _, info = jax.jit(lambda b: solve(solver, operator, b))(unravel(rng.normal(size=SIZE)))
    assert info.status == mi.SolveStatus.CONVERGED
    assert info.num_matvecs == SIZE + 1 + 1
    assert built.operator.size == SIZE


def test_a_solution_alone_takes_no_product_for_a_report(rng):
    """Each product of a map that has a callback is counted as it runs."""
    counted = []

    def matvec(v):
        jax.debug.callback(lambda: counted.append(1))
        return jax.tree.map(lambda leaf: 2.0 * leaf, v)

    operator, rhs = mi.operators.from_matvec(matvec, LIKE), unravel(rng.normal(size=SIZE))
    for solver, products in ((mi.solvers.cg(), 1), (richardson(0.4, 3), 3), (mi.solvers.identity(), 0)):
        counted.clear()
        jax.block_until_ready(mi.solvers.solution_of(solver, operator, None, rhs))
        jax.effects_barrier()
        assert len(counted) == products
        counted.clear()
        jax.block_until_ready(solver.solve(operator, None, rhs))
        jax.effects_barrier()
        assert len(counted) == products + 1


def test_solvers_read_like_the_call_that_made_them():
    s = mi.solvers
    assert repr(s.cg(tol=1e-3)) == "cg(tol=0.001)"
    assert repr(s.cg(tol=1e-6)) == repr(s.cg()) == "cg()"
    assert repr(s.cg(preconditioner=s.sampled(64, rank=50))) == "cg(preconditioner=sampled(64, rank=50))"
    assert repr(s.dense(method="cholesky")) == "dense(method='cholesky')"
    assert repr(s.lanczos(rank=5, absolute=True)) == "lanczos(5, absolute=True)"
    assert repr(s.from_map(jacobi_init, jacobi)) == "from_map(jacobi_init, jacobi)"
    assert repr(s.from_map(None, jacobi, name="mine")) == "mine()"
    assert repr(s.cg(preconditioner=richardson(0.4, 3))) == "cg(preconditioner=richardson(0.4, 3))"
    assert repr(s.identity()._replace(solve=jacobi)) == "identity()._replace(solve=jacobi)"
    assert repr(s.Solver(jacobi_init, jacobi)) == "Solver(init=jacobi_init, solve=jacobi)"
    assert "0x" not in repr(jax.jit(lambda tol: repr(s.cg(tol=tol)) and tol)(0.1)) + repr(s.auto())


def test_equal_calls_make_equal_solvers():
    s = mi.solvers
    assert s.cg(tol=1e-3) == s.cg(tol=1e-3) != s.cg(tol=1e-4)
    assert hash(s.cg(preconditioner=s.nystrom(5))) == hash(s.cg(preconditioner=s.nystrom(5)))
    assert s.dense(absolute=True) != s.dense(absolute=False)
    with pytest.raises(ValueError, match="rank: expected a positive integer"):
        s.lanczos(True)
    traced = []
    jax.jit(lambda tol: traced.append(s.cg(tol=tol)) or tol)(0.1)
    assert repr(traced[0]) == "cg(tol=<traced>)"
