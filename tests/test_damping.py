"""The damping rule, the sweep over dampings, and the error budget."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
import tiny
from metainfluence.damping import rule
from oracles.problems import spec
from oracles.reference import ravel, relative_error, solved
from runs import hessians, problem, target, target_coefficients
from spectra import flat, solve

NAME = "prototypes"
SIZE = 60
INDEFINITE = np.concatenate([[-0.3], np.geomspace(1e-3, 10.0, SIZE - 1)])


def arguments():
    point = solved(NAME)
    return point.meta_params, spec(NAME).tasks, point.weights, target_coefficients(NAME)


def test_the_rule_takes_the_largest_of_its_three_needs():
    operator, zero = flat(INDEFINITE).operator, jnp.zeros(SIZE)
    found = rule(operator, zero, jnp.ones(SIZE), rank=SIZE)
    assert found.smallest == pytest.approx(-0.3)
    assert found.value == found.by_curvature == pytest.approx(0.6, abs=1e-9)
    assert found.by_stationarity == 0
    # ‖g‖ / (0.1 ‖λ‖) = 3 / (0.1 · √60)
    steep = rule(operator, zero.at[0].set(3.0), jnp.ones(SIZE), rank=SIZE)
    assert steep.value == steep.by_stationarity == pytest.approx(30 / np.sqrt(SIZE))
    convex = rule(flat(np.geomspace(1e-3, 10.0, SIZE)).operator, zero, jnp.ones(SIZE), rank=SIZE)
    assert convex.value == convex.by_precision == pytest.approx(100 * np.finfo(float).eps * 10.0)


@pytest.mark.parametrize("rank", [5, 10, 20])
def test_the_rule_does_not_trust_a_ritz_value_beyond_its_residual(rank):
    operator, zero = flat(INDEFINITE).operator, jnp.zeros(SIZE)
    found = rule(operator, zero, jnp.ones(SIZE), rank=rank)
    assert found.by_curvature == pytest.approx(2 * max(float(found.residual - found.smallest), 0.0))
    assert found.smallest >= -0.3 - 1e-12


def test_damping_auto_works_in_every_maker_and_is_reported():
    """λ is one number, at which the gradient asks for damping."""
    of, tasks, weights = tiny.PROBLEM, tiny.TASKS, tiny.WEIGHTS
    value = jax.jit(mi.damping.auto(of))(tiny.LAMBDA, tasks, weights).value
    direction = jax.tree.map(lambda w: -0.1 * w, weights)
    makers = {
        "task_if": lambda d: mi.task_if(of, damping=d)(tiny.LAMBDA, tasks),
        "instance_if": lambda d: mi.instance_if(of, "query", damping=d)(tiny.LAMBDA, tasks, 0),
        "group_influence": lambda d: mi.group_influence(of, damping=d)(tiny.LAMBDA, tasks, direction),
        "influence_scores": lambda d: mi.influence_scores(of, tiny.target, damping=d)(tiny.LAMBDA, tasks),
        "self_influence": lambda d: mi.self_influence(of, damping=d)(tiny.LAMBDA, tasks),
    }
    assert value > 0.01
    for name, make in makers.items():
        auto = jax.jit(functools.partial(make, "auto"))()
        fixed = jax.jit(functools.partial(make, float(value)))()
        np.testing.assert_allclose(auto.info.damping, np.full(auto.info.status.shape, value), err_msg=name)
        for found, expected in zip(jax.tree.leaves(auto[0]), jax.tree.leaves(fixed[0]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-8)
    edited = jax.jit(mi.edit(of, damping="auto"))(tiny.LAMBDA, tasks, weights)
    assert edited.info.damping.shape == (2,)
    assert edited.info.damping[0] == pytest.approx(float(value))


@pytest.mark.parametrize("damping", ["Auto", -1.0, np.ones(2)])
def test_other_dampings_are_refused(damping):
    with pytest.raises(ValueError, match="damping: expected"):
        mi.task_if(problem(NAME), damping=damping)


def test_a_sweep_is_the_same_as_one_solve_for_each_damping():
    meta_params, tasks, weights, coefficients = arguments()
    dampings = np.geomspace(1e-3, 1.0, 5)
    found = jax.jit(mi.damping.sweep(problem(NAME), target, dampings, tol=1e-10))(
        meta_params, tasks, coefficients, weights=weights
    )
    one = jax.jit(
        lambda damping: mi.influence_scores(problem(NAME), target, solver=mi.solvers.dense(), damping=damping)(
            meta_params, tasks, coefficients, weights=weights
        )
    )
    for index, damping in enumerate(dampings):
        scores = one(damping)
        for field in ("task", "support", "query"):
            assert relative_error(getattr(found, field)[index], getattr(scores, field)) <= 1e-7
    assert np.all(np.asarray(found.info.status) == mi.SolveStatus.CONVERGED)
    alone = jax.jit(
        mi.influence_scores(problem(NAME), target, solver=mi.solvers.block_cg(tol=1e-10), damping=dampings[0])
    )(meta_params, tasks, coefficients, weights=weights)
    assert int(found.info.num_matvecs[0]) <= 1.5 * int(alone.info.num_matvecs)
    assert found.rank_correlation.shape == (4,)
    ranks = np.argsort(np.argsort(np.asarray(found.task), axis=1), axis=1)
    np.testing.assert_allclose(found.rank_correlation[0], np.corrcoef(ranks[0], ranks[1])[0, 1], rtol=1e-10)


def test_a_sweep_says_where_the_operator_is_indefinite_or_turns_it():
    meta_params, tasks, _, coefficients = arguments()
    smallest = np.linalg.eigvalsh(hessians(NAME)["exact"])[0]
    # At twice the curvature of the outer loss turned round, the Hessian of −F is negative.
    negative = problem(NAME)._replace(outer=lambda *args: -problem(NAME).outer(*args))
    dampings = [1e-3, 1e-2]
    plain = mi.damping.sweep(negative, target, dampings, absolute=False)(meta_params, tasks, coefficients)
    assert smallest > 0
    assert np.all(np.asarray(plain.info.status) == mi.SolveStatus.INDEFINITE)
    turned = mi.damping.sweep(negative, target, dampings, tol=1e-8)(meta_params, tasks, coefficients)
    matrix = hessians_of(negative, meta_params, tasks)
    values, vectors = np.linalg.eigh(matrix)
    slope = ravel(jax.grad(target)(meta_params, coefficients))
    for index, damping in enumerate(dampings):
        direction = vectors @ ((vectors.T @ slope) / (np.abs(values) + damping))
        # The basis was grown at the first one, and |H| is known no better than its negative Ritz values.
        assert turned.info.relative_residual[index] <= 1e-6
        np.testing.assert_allclose(
            turned.info.effective_curvature[index], np.linalg.norm(slope) / np.linalg.norm(direction), rtol=1e-5
        )


def hessians_of(of, meta_params, tasks):
    return np.asarray(jax.jit(lambda m, t: mi.total_hessian(of)(m, t).dense())(meta_params, tasks))


@pytest.mark.parametrize("dampings", [[], [0.1, 0.01], [-1.0, 1.0], 0.1])
def test_a_bad_grid_is_refused(dampings):
    with pytest.raises(ValueError, match="dampings: expected"):
        mi.damping.sweep(problem(NAME), target, dampings)


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_the_budget_of_the_outer_residual_bounds_the_error_of_the_solution(tol, rng):
    built = flat(np.geomspace(1e-2, 10.0, SIZE))
    rhs = jnp.asarray(rng.normal(size=SIZE))
    solution, info = solve(mi.solvers.minres(tol=tol), built.operator, rhs)
    info = info._replace(min_curvature=jnp.asarray(1e-2))
    error = np.linalg.norm(solution - np.linalg.solve(built.matrix, rhs)) / np.linalg.norm(solution)
    budget = mi.error_budget(info)
    assert error <= budget.outer_residual
    assert budget.dominant == "outer_residual"
    assert "tol" in budget.advice


def info(**fields):
    zero, one = np.float64(0), np.float64(1)
    known = {
        "status": np.int32(0),
        "num_matvecs": np.int32(7),
        "relative_residual": 1e-9 * one,
        "min_curvature": one,
        "outer_gradient_norm": zero,
        "inner_gradient_norm": zero,
        "effective_curvature": one,
    }
    return mi.SolveInfo(**(known | fields))


def test_the_budget_names_what_dominates_and_what_to_do():
    assert mi.error_budget(info(inner_gradient_norm=np.float64(1e-3))).dominant == "inner_residual"
    far = mi.error_budget(info(outer_gradient_norm=np.float64(0.5)))
    assert far.dominant == "outer_stationarity"
    assert "proximal problem" in far.advice
    assert "Newton-corrected" in far.advice
    assert far.outer_stationarity == 0.5
    relative = mi.error_budget(info(outer_gradient_norm=np.float64(0.5)), {"a": jnp.full(4, 5.0)})
    assert relative.outer_stationarity == pytest.approx(0.05)
    assert mi.error_budget(info(relative_residual=np.float64(1e-17))).dominant == "precision"
    indefinite = mi.error_budget(info(min_curvature=np.float64(-0.1)))
    assert indefinite.outer_residual == np.inf
    assert "no minimum" in indefinite.advice


def test_a_good_solve_is_not_told_to_do_better():
    good = mi.error_budget(info(relative_residual=np.float64(3e-7)))
    assert (good.dominant, good.outer_residual) == ("outer_residual", 3e-7)
    assert good.advice == (
        "all is well: no error is large, and a lower tol or more training would bring little; the largest is this "
        "(outer_residual 3.0e-07)"
    )
    single = mi.error_budget(info(relative_residual=np.float32(3e-6), min_curvature=np.float32(1)))
    assert "no error is large" in single.advice
    assert "float64" not in single.advice
    assert "the unfinished solve dominates" in mi.error_budget(info(relative_residual=np.float64(3e-4))).advice
    with pytest.raises(mi.SolveError, match=r"at most 1\.0e-08: the unfinished solve dominates"):
        mi.check(info(relative_residual=np.float64(3e-7)), tol=1e-8)
    # What is known to be wrong is told however small the rest is.
    assert "no minimum" in mi.error_budget(info(min_curvature=np.float64(-0.1))).advice
    assert "no minimum" in mi.error_budget(info(inner_gradient_norm=np.float64(np.inf))).advice


def test_check_can_be_given_a_tolerance_for_the_whole_budget():
    good = info()
    assert mi.check(good, tol=1e-6) is good
    assert mi.check(info(inner_gradient_norm=np.float64(1e-3)))
    with pytest.raises(mi.SolveError, match=r"at most 1\.0e-06.*inner minimisers"):
        mi.check(info(inner_gradient_norm=np.float64(1e-3)), tol=1e-6)
    with pytest.raises(mi.SolveError, match=r"MAX_STEPS.*Error budget"):
        mi.check(info(status=np.int32(1), relative_residual=np.float64(0.1)))


def test_a_newton_corrected_meta_params_is_stationary():
    """What the budget advises where λ is not stationary."""
    meta_params, tasks, weights, _ = arguments()
    off = jax.tree.map(lambda leaf: leaf + 0.01, meta_params)
    edited = jax.jit(mi.edit(problem(NAME), solver=mi.solvers.dense(), num_newton_steps=3))(
        off, tasks, weights, weights
    )
    assert edited.info.outer_gradient_norm[-1] < 1e-7 < 1e-3 < edited.info.outer_gradient_norm[0]
    assert relative_error(ravel(edited.meta_params), ravel(meta_params)) < 1e-5
