"""How solvers fail: each says so, with finite numbers where there are any, and one lane never touches another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from oracles.reference import ravel, row, rows
from spectra import LIKE, SIZE, SOLVERS, build, product, residual, solve, unravel

POSITIVE = np.linspace(0.5, 4.0, SIZE)
INDEFINITE = np.concatenate([[-1.0], np.linspace(0.5, 4.0, SIZE - 1)])
SINGULAR = np.concatenate([[0.0], np.linspace(0.5, 4.0, SIZE - 1)])
ITERATIVE = ("cg", "cg_preconditioned", "minres", "neumann", "neumann_scaled", "neumann_preconditioned", "block_cg")


@pytest.mark.parametrize("mode", ["eager", "vmap"])
def test_cg_says_indefinite_and_keeps_a_finite_iterate(mode, rng):
    built, rhs = build(INDEFINITE), unravel(rng.normal(size=SIZE))
    solver = mi.solvers.cg(tol=1e-10)
    if mode == "eager":
        solution, info = solve(solver, built.operator, rhs)
    else:
        two = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), rhs)
        solution, info = row(jax.vmap(lambda rhs: solve(solver, built.operator, rhs))(two), 0)
    assert info.status == mi.SolveStatus.INDEFINITE
    assert info.min_curvature <= 0
    assert np.all(np.isfinite(ravel(solution)))
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, rhs, solution), rtol=1e-10)


def test_cg_does_not_step_along_a_first_direction_of_negative_curvature():
    built = build(INDEFINITE)
    rhs = unravel(built.vectors[:, 0])
    solution, info = solve(mi.solvers.cg(), built.operator, rhs)
    assert info.status == mi.SolveStatus.INDEFINITE
    assert np.all(ravel(solution) == 0)
    assert info.min_curvature == pytest.approx(-1.0)


def test_cg_that_never_meets_the_negative_direction_converges(rng):
    built = build(INDEFINITE)
    rhs = unravel(built.vectors[:, 1:] @ rng.normal(size=SIZE - 1))
    _, info = solve(mi.solvers.cg(tol=1e-8), built.operator, rhs)
    assert info.status == mi.SolveStatus.CONVERGED


def test_cholesky_of_an_indefinite_operator_is_reported():
    _, info = solve(mi.solvers.dense(method="cholesky"), build(INDEFINITE).operator, unravel(np.ones(SIZE)))
    assert info.status in (mi.SolveStatus.NONFINITE, mi.SolveStatus.INDEFINITE)


@pytest.mark.parametrize("kind", SOLVERS)
def test_singular_operator_with_an_inconsistent_right_hand_side_is_never_converged(kind, rng):
    built = build(SINGULAR)
    rhs = unravel(built.vectors @ (1.0 + rng.uniform(size=SIZE)))
    solution, info = solve(SOLVERS[kind][0](), built.operator, rhs)
    assert info.status != mi.SolveStatus.CONVERGED
    if kind != "cholesky":
        assert np.all(np.isfinite(ravel(solution)))
        assert info.relative_residual > 1e-3


@pytest.mark.parametrize("kind", ["cg", "minres", "neumann", "dense"])
def test_singular_operator_with_a_consistent_right_hand_side_is_solved(kind, rng):
    built = build(SINGULAR)
    rhs = unravel(built.vectors[:, 1:] @ rng.normal(size=SIZE - 1))
    solution, info = solve(SOLVERS[kind][0](), built.operator, rhs)
    assert info.status == mi.SolveStatus.CONVERGED
    assert residual(built.matrix, rhs, solution) <= 1e-10


@pytest.mark.parametrize("kind", [*SOLVERS, "identity"])
def test_zero_right_hand_side_has_the_zero_solution(kind):
    solver = mi.solvers.identity() if kind == "identity" else SOLVERS[kind][0]()
    solution, info = jax.jit(lambda rhs: solve(solver, build(POSITIVE).operator, rhs))(LIKE)
    assert np.all(ravel(solution) == 0)
    assert info.status == mi.SolveStatus.CONVERGED
    assert info.relative_residual == 0
    assert not np.isnan(info.min_curvature)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", SOLVERS)
def test_a_lane_that_is_not_finite_leaves_the_others_bitwise_untouched(kind, bad, rng):
    built, solver = build(POSITIVE), SOLVERS[kind][0]()
    rhs = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(4, *leaf.shape))), LIKE)
    spoilt = {**rhs, "a": rhs["a"].at[2, 1, 1].set(bad)}
    lanes = jax.jit(jax.vmap(lambda rhs: solve(solver, built.operator, rhs)))
    clean, clean_info = lanes(rhs)
    dirty, dirty_info = lanes(spoilt)

    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(rows(dirty)[others], rows(clean)[others])
    for before, after in zip(jax.tree.leaves(clean_info), jax.tree.leaves(dirty_info), strict=True):
        np.testing.assert_array_equal(np.asarray(after)[others], np.asarray(before)[others])
    assert dirty_info.status[2] == mi.SolveStatus.NONFINITE
    assert np.all(np.asarray(dirty_info.status)[others] == mi.SolveStatus.CONVERGED)


@pytest.mark.parametrize("kind", SOLVERS)
def test_an_operator_that_is_not_finite_is_reported(kind):
    matrix = build(POSITIVE).matrix
    matrix[0, 0] = np.nan
    operator = mi.operators.from_matvec(jax.tree_util.Partial(product, jnp.asarray(matrix)), LIKE)
    _, info = solve(SOLVERS[kind][0](), operator, unravel(np.ones(SIZE)))
    assert info.status == mi.SolveStatus.NONFINITE


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("cg", lambda: mi.solvers.cg(tol=1e-12, max_steps=3)),
        ("minres", lambda: mi.solvers.minres(tol=1e-12, max_steps=3)),
        ("neumann", lambda: mi.solvers.neumann(3, scale=0.3, tol=1e-12)),
    ],
)
def test_an_exhausted_budget_is_reported_with_the_true_residual(kind, make, rng):
    built, rhs = build(POSITIVE), unravel(rng.normal(size=SIZE))
    solution, info = solve(make(), built.operator, rhs)
    assert info.status == mi.SolveStatus.MAX_STEPS, kind
    assert info.num_matvecs == 3 + 1
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, rhs, solution), rtol=1e-10)
    assert info.relative_residual > 1e-6


@pytest.mark.parametrize("kind", ["cg", "minres"])
def test_convergence_on_the_last_step_allowed_counts(kind, rng):
    built, rhs = build(np.repeat([0.5, 1.0, 3.0], SIZE // 3)), unravel(rng.normal(size=SIZE))
    _, info = solve(getattr(mi.solvers, kind)(tol=1e-10, max_steps=3), built.operator, rhs)
    assert info.status == mi.SolveStatus.CONVERGED


@pytest.mark.parametrize("mode", ["eager", "vmap"])
def test_neumann_beyond_its_radius_of_convergence_says_diverged(mode, rng):
    """An eigenvalue above 2/scale."""
    built, rhs = build(POSITIVE), unravel(rng.normal(size=SIZE))
    solver = mi.solvers.neumann(10_000, scale=2 / 3.9)
    if mode == "eager":
        solution, info = solve(solver, built.operator, rhs)
    else:
        two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), rhs)
        solution, info = row(jax.vmap(lambda rhs: solve(solver, built.operator, rhs))(two), 0)
    assert info.status == mi.SolveStatus.DIVERGED
    assert np.all(np.isfinite(ravel(solution)))
    assert info.num_matvecs < 10_000


def test_neumann_on_an_indefinite_operator_says_diverged(rng):
    _, info = solve(mi.solvers.neumann(10_000), build(INDEFINITE).operator, unravel(rng.normal(size=SIZE)))
    assert info.status == mi.SolveStatus.DIVERGED


@pytest.mark.parametrize("kind", ITERATIVE)
@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE, SINGULAR, np.geomspace(1e-12, 1.0, SIZE)])
def test_the_relative_residual_is_always_the_recomputed_one(kind, spectrum, rng):
    built, rhs = build(spectrum), unravel(rng.normal(size=SIZE))
    solution, info = solve(SOLVERS[kind][0](), built.operator, rhs)
    # What a product with a large solution is rounded by.
    rounding = 100 * np.finfo(float).eps * (1 + np.linalg.norm(ravel(solution)) / np.linalg.norm(ravel(rhs)))
    np.testing.assert_allclose(info.relative_residual, residual(built.matrix, rhs, solution), rtol=1e-5, atol=rounding)
    assert (info.status == mi.SolveStatus.CONVERGED) == (info.relative_residual <= SOLVERS[kind][1])


def test_check_names_the_failed_right_hand_sides_and_the_remedy(rng):
    built = build(INDEFINITE)
    rhs = jnp.stack([jnp.asarray(built.vectors[:, 5]), jnp.asarray(rng.normal(size=SIZE))])
    lanes = jax.vmap(lambda rhs: solve(mi.solvers.cg(), built.operator, unravel(rhs)))
    _, info = lanes(rhs)
    with pytest.raises(mi.SolveError, match=r"1 of 2 .*INDEFINITE.*right-hand sides 1.*damping"):
        mi.check(info)
    good = jax.tree.map(lambda leaf: leaf[:1], info)
    assert mi.check(good) is good


def test_check_refuses_traced_results(rng):
    built, rhs = build(POSITIVE), unravel(rng.normal(size=SIZE))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda rhs: mi.check(solve(mi.solvers.cg(), built.operator, rhs)[1]))(rhs)


def report(status, dtype=np.float32, **fields):
    """A report of the numbers that a badly conditioned Hessian left in float32."""
    known = {
        "num_matvecs": 84,
        "relative_residual": 1.8e-3,
        "min_curvature": 2e-2,
        "outer_gradient_norm": 0,
        "inner_gradient_norm": 0,
        "effective_curvature": 0.3,
    }
    values = {name: dtype(value) for name, value in (known | fields).items()}
    return mi.SolveInfo(status=np.int32(status), **values)


def test_rounding_is_not_taken_for_negative_curvature():
    info = report(mi.SolveStatus.INDEFINITE)
    with pytest.raises(mi.SolveError, match=r"INDEFINITE.*most likely rounding.*float64.*rounding dominates") as told:
        mi.check(info)
    assert "not positive along" not in str(told.value)
    budget = mi.error_budget(info)
    assert budget.dominant == "precision"
    assert budget.precision == pytest.approx(1.8e-3 * 0.3 / 2e-2, rel=1e-6)
    with pytest.raises(mi.SolveError, match="not positive along a direction"):
        mi.check(report(mi.SolveStatus.INDEFINITE, min_curvature=-1e-2))


def test_the_call_that_may_do_in_float32_is_named():
    choice = np.int32(mi.solvers.Choice.KRYLOV)
    with pytest.raises(
        mi.SolveError, match=r"solver=metainfluence\.solvers\.auto\(tol=1e-3\) with damping=\"auto\" first"
    ):
        mi.check(report(mi.SolveStatus.MAX_STEPS, choice=choice))
    with pytest.raises(mi.SolveError) as told:
        mi.check(report(mi.SolveStatus.MAX_STEPS))
    assert "tol=1e-3" not in str(told.value)


def test_numbers_that_are_not_finite_are_not_laid_to_the_curvature():
    with pytest.raises(mi.SolveError, match="no number here holds") as told:
        mi.check(report(mi.SolveStatus.NONFINITE, relative_residual=np.nan, min_curvature=np.nan))
    assert "raise the damping" not in str(told.value)


def test_the_budget_of_an_edit_is_that_of_the_point_it_keeps():
    info = report(mi.SolveStatus.CONVERGED)
    steps = jax.tree.map(lambda leaf: np.stack([leaf, leaf, leaf]), info)
    norms = np.asarray([0.3, 0.01, 0.9])
    edited = mi.Edit(jnp.ones(3), steps._replace(outer_gradient_norm=norms))
    kept = mi.error_budget(info._replace(outer_gradient_norm=np.asarray(0.01)))
    assert mi.error_budget(edited).outer_stationarity == pytest.approx(kept.outer_stationarity)


def test_scores_that_are_exactly_0_are_told():
    info, ones = report(mi.SolveStatus.CONVERGED), np.ones((3, 2))
    flat = mi.Scores(np.zeros(3), 0 * ones, 0 * ones, info._replace(effective_curvature=np.float32(0)))
    assert "accuracy" in mi.error_budget(flat).advice
    with pytest.raises(mi.SolveError, match=r"gradient is exactly 0.*accuracy"):
        mi.check(flat, tol=1.0)
    with pytest.warns(mi.SlopeWarning, match=r"gradient is exactly 0.*accuracy"):
        assert mi.check(flat) is flat
    streamed = mi.scoring.Result(*flat, ids=np.arange(3), skipped={})
    with pytest.warns(mi.SlopeWarning, match="gradient is exactly 0"):
        mi.check(streamed)
    unweighed = mi.Scores(np.ones(3), 0 * ones, ones, info)
    assert "weights.support" in mi.error_budget(unweighed).advice
    with pytest.warns(mi.CouplingWarning, match="every score of a support example is exactly 0"):
        assert mi.check(unweighed) is unweighed


def test_reports_name_their_codes():
    info = report(mi.SolveStatus.INDEFINITE)
    assert repr(info).startswith("SolveInfo(status=INDEFINITE, num_matvecs=")
    assert "status=[CONVERGED × 2, NONFINITE × 1]" in repr(info._replace(status=np.array([0, 4, 0])))
    jax.jit(lambda status: repr(info._replace(status=status)) and status)(0)
