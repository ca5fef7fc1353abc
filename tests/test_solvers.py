"""Solvers on operators with a known spectrum, each run eagerly, under jit and under vmap over right-hand sides."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

import metainfluence as mi
from oracles.reference import ravel, relative_error, row, rows
from spectra import LIKE, SIZE, SOLVERS, build, residual, solve, unravel

SPECTRUM = np.linspace(0.5, 4.0, SIZE)
MODES = ("eager", "jit", "vmap")


def run(solver, operator, rhs, mode):
    """Solves in one of the modes; under vmap between two other right-hand sides."""
    if mode == "eager":
        return solve(solver, operator, rhs)
    if mode == "jit":
        return jax.jit(lambda operator, rhs: solve(solver, operator, rhs))(operator, rhs)
    three = jax.tree.map(lambda leaf: jnp.stack([leaf + 1.0, leaf, 0.01 * leaf]), rhs)
    found = jax.jit(jax.vmap(lambda operator, rhs: solve(solver, operator, rhs), in_axes=(None, 0)))(operator, three)
    return row(found, 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SOLVERS)
def test_solution_residual_and_status_on_a_positive_definite_operator(kind, mode, rng):
    make, tol = SOLVERS[kind]
    built, rhs = build(SPECTRUM), unravel(rng.normal(size=SIZE))
    solution, info = run(make(), built.operator, rhs, mode)

    assert jax.tree.structure(solution) == jax.tree.structure(LIKE)
    assert residual(built.matrix, rhs, solution) <= tol
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, rhs, solution), rtol=1e-6, atol=1e-15)
    assert info.status == mi.SolveStatus.CONVERGED
    assert relative_error(ravel(solution), np.linalg.solve(built.matrix, ravel(rhs))) <= 8 * tol * 4.0
    assert SPECTRUM[0] - 1e-9 <= info.min_curvature <= SPECTRUM[-1] + 1e-9
    assert info.num_matvecs >= 1


@pytest.mark.parametrize("kind", SOLVERS)
def test_modes_agree(kind, rng):
    built, rhs = build(SPECTRUM), unravel(rng.normal(size=SIZE))
    found = [run(SOLVERS[kind][0](), built.operator, rhs, mode) for mode in MODES]
    for solution, info in found[1:]:
        assert relative_error(ravel(solution), ravel(found[0][0])) <= 1e-12
        assert info.status == found[0][1].status
        assert info.num_matvecs == found[0][1].num_matvecs


def test_cg_solves_as_lineax_does(rng):
    built, rhs = build(SPECTRUM), rng.normal(size=SIZE)
    peer = lineax.linear_solve(
        lineax.MatrixLinearOperator(jnp.asarray(built.matrix), lineax.positive_semidefinite_tag),
        jnp.asarray(rhs),
        lineax.CG(rtol=1e-12, atol=0.0),
    )
    solution, _ = solve(mi.solvers.cg(tol=1e-12), built.operator, unravel(rhs))
    assert relative_error(ravel(solution), peer.value) <= 1e-10


@pytest.mark.parametrize("kind", ["minres", "dense"])
def test_indefinite_systems_are_solved_and_their_curvature_reported(kind, rng):
    spectrum = np.concatenate([[-2.0, -0.7], np.linspace(0.5, 4.0, SIZE - 2)])
    built, rhs = build(spectrum), unravel(rng.normal(size=SIZE))
    solution, info = jax.jit(lambda rhs: solve(SOLVERS[kind][0](), built.operator, rhs))(rhs)
    assert residual(built.matrix, rhs, solution) <= SOLVERS[kind][1]
    assert info.status == mi.SolveStatus.CONVERGED
    assert -2.0 - 1e-9 <= info.min_curvature < 0


def test_cg_ends_in_as_many_steps_as_there_are_distinct_eigenvalues(rng):
    built, rhs = build(np.repeat([0.5, 1.0, 3.0], SIZE // 3)), unravel(rng.normal(size=SIZE))
    _, info = solve(mi.solvers.cg(tol=1e-10), built.operator, rhs)
    assert info.status == mi.SolveStatus.CONVERGED
    assert info.num_matvecs == 3 + 1


def test_a_good_preconditioner_saves_products(rng):
    built, rhs = build(np.geomspace(1e-3, 1e3, SIZE)), unravel(rng.normal(size=SIZE))
    inverse = jnp.asarray(np.linalg.inv(built.matrix))
    exact = mi.solvers.identity()._replace(
        solve=lambda operator, state, rhs, x0=None: (
            unravel(inverse @ ravel_traced(rhs)),
            mi.solvers.identity().solve(operator, state, rhs)[1],
        )
    )
    _, plain = solve(mi.solvers.cg(tol=1e-8), built.operator, rhs)
    _, helped = solve(mi.solvers.cg(tol=1e-8, preconditioner=exact), built.operator, rhs)
    assert helped.status == mi.SolveStatus.CONVERGED
    assert helped.num_matvecs <= 4 < plain.num_matvecs


def ravel_traced(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_is_the_truncated_series(terms, rng):
    built, rhs = build(SPECTRUM), rng.normal(size=SIZE)
    solution, info = solve(mi.solvers.neumann(terms, scale=0.3), built.operator, unravel(rhs))
    power, expected = rhs, np.zeros(SIZE)
    for _ in range(terms):
        expected, power = expected + 0.3 * power, power - 0.3 * built.matrix @ power
    assert relative_error(ravel(solution), expected) <= 1e-14
    assert info.status == mi.SolveStatus.MAX_STEPS


def test_neumann_finds_its_scale_where_the_plain_series_diverges(rng):
    built, rhs = build(100.0 * SPECTRUM), unravel(rng.normal(size=SIZE))
    solution, info = solve(mi.solvers.neumann(400, tol=1e-10), built.operator, rhs)
    assert info.status == mi.SolveStatus.CONVERGED
    assert residual(built.matrix, rhs, solution) <= 1e-10


def test_identity_returns_the_right_hand_side_and_says_how_wrong_that_is(rng):
    built, rhs = build(SPECTRUM), unravel(rng.normal(size=SIZE))
    solution, info = solve(mi.solvers.identity(), built.operator, rhs)
    np.testing.assert_array_equal(ravel(solution), ravel(rhs))
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, rhs, rhs), rtol=1e-13)
    assert info.status != mi.SolveStatus.CONVERGED
    _, exact = solve(mi.solvers.identity(), build(np.ones(SIZE)).operator, rhs)
    assert exact.status == mi.SolveStatus.CONVERGED


@pytest.mark.parametrize("kind", SOLVERS)
def test_damping_belongs_to_the_operator(kind, rng):
    built, rhs = build(SPECTRUM - 0.4), unravel(rng.normal(size=SIZE))
    solution, info = solve(SOLVERS[kind][0](), built.operator.damped(0.3).damped(0.1), rhs)
    assert info.status == mi.SolveStatus.CONVERGED
    assert residual(built.matrix + 0.4 * np.eye(SIZE), rhs, solution) <= SOLVERS[kind][1]


@pytest.mark.parametrize("kind", ["cg", "minres", "neumann"])
def test_a_first_guess_is_used(kind, rng):
    built, truth = build(SPECTRUM), rng.normal(size=SIZE)
    rhs = unravel(built.matrix @ truth)
    _, cold = solve(SOLVERS[kind][0](), built.operator, rhs)
    solution, warm = solve(SOLVERS[kind][0](), built.operator, rhs, unravel(truth + 1e-8 * rng.normal(size=SIZE)))
    assert warm.status == mi.SolveStatus.CONVERGED
    assert residual(built.matrix, rhs, solution) <= 1e-10
    if kind != "neumann":
        assert warm.num_matvecs < cold.num_matvecs


def test_one_init_serves_many_right_hand_sides(rng):
    built, solver = build(SPECTRUM), mi.solvers.dense()
    state = solver.init(built.operator)
    rhs = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(5, *leaf.shape))), LIKE)
    solutions, info = jax.vmap(lambda rhs: solver.solve(built.operator, state, rhs))(rhs)
    assert relative_error(rows(solutions).T, np.linalg.solve(built.matrix, rows(rhs).T)) <= 1e-12
    assert info.status.shape == (5,)


def test_operator_is_its_matrix(rng):
    built, vector = build(SPECTRUM), rng.normal(size=SIZE)
    operator = built.operator.damped(0.25)
    expected = built.matrix + 0.25 * np.eye(SIZE)
    assert operator.size == SIZE
    assert relative_error(ravel(operator.matvec(unravel(vector))), expected @ vector) <= 1e-14
    assert relative_error(operator.dense(), expected) <= 1e-14
    assert relative_error(operator.dense(batch_size=5), expected) <= 1e-14


@pytest.fixture(scope="module")
def wide():
    """An operator with a wide spectrum of both signs, as a network's away from a minimum; b, and |H|."""
    rng = np.random.default_rng(0)
    values = np.concatenate([np.geomspace(100, 1, 30), np.geomspace(1, 1e-5, 200), -np.geomspace(4, 1e-5, 170)])
    basis = np.linalg.qr(rng.normal(size=(400, 400)))[0]
    rhs = basis @ (np.sqrt(np.abs(values)) * rng.normal(size=400))
    matrix = jnp.asarray((basis * values) @ basis.T, jnp.float32)
    operator = mi.operators.from_matvec(lambda v: matrix @ v, jnp.zeros(400, jnp.float32))
    absolute = (basis * np.abs(values)) @ basis.T
    return operator, jnp.asarray(rhs, jnp.float32), lambda x: residual(absolute, rhs, np.asarray(x, float))


@pytest.mark.parametrize("max_size", [70, 145])
def test_more_steps_do_not_lose_a_better_answer(wide, max_size):
    """Residuals of |H| rise and fall as the subspace grows: at 70 products by a factor of 30."""
    operator, rhs, off = wide
    solution, info = jax.jit(lambda b: solve(mi.solvers.auto(max_size=max_size), operator, b))(rhs)
    assert off(solution) < {70: 0.05, 145: 0.012}[max_size]
    assert info.choice == mi.solvers.Choice.KRYLOV_ABSOLUTE
    assert info.status == mi.SolveStatus.MAX_STEPS
    # Ritz values that cross zero on their way are no flat directions.
    assert info.flat_directions == 0


def test_a_lucky_residual_is_not_taken_for_a_solution(wide):
    """Of |H| the subspace knows a part: what solves with that part may be off with all of it."""
    operator, rhs, off = wide
    solution, info = jax.jit(lambda b: solve(mi.solvers.auto(tol=0.015), operator, b))(rhs)
    assert info.status == mi.SolveStatus.CONVERGED
    assert off(solution) < 1.5 * 0.015
