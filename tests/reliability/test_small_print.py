"""Details that the documentation states and that other tests would not miss: defaults, counts, where a loop stops."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.minimizers import accurate_tol
from metainfluence.operators import from_matvec
from metainfluence.solvers import Choice, SolveStatus
from metainfluence.solvers._base import default_max_steps
from metainfluence.solvers._block_cg import default_max_size
from metainfluence.solvers._neumann import largest_eigenvalue
from reliability import cases, golden
from reliability import test_no_silent_approximation as walk


class Asked(Exception):
    """For how much."""


def diagonal(*values):
    values = jnp.asarray(values)
    return from_matvec(jax.tree_util.Partial(jnp.multiply, values), values)


def solved(solver, operator, rhs):
    return jax.jit(lambda b: solver.solve(operator, solver.init(operator), b))(jnp.asarray(rhs))


def test_statuses_and_choices_are_numbers_of_their_own():
    """Arrays and files hold them."""
    statuses = {"CONVERGED": 0, "MAX_STEPS": 1, "INDEFINITE": 2, "DIVERGED": 3, "NONFINITE": 4}
    choices = ["DENSE", "KRYLOV", "DENSE_ABSOLUTE", "KRYLOV_ABSOLUTE", "CG", "MINRES"]
    assert {name: int(value) for name, value in SolveStatus.__members__.items()} == statuses
    assert {name: int(value) for name, value in Choice.__members__.items()} == {n: k for k, n in enumerate(choices)}


def test_every_solver_with_a_tolerance_has_the_same_one_if_none_is_given():
    defaults = {
        name: inspect.signature(getattr(mi.solvers, name)).parameters["tol"].default
        for name in walk.SOLVERS
        if "tol" in inspect.signature(getattr(mi.solvers, name)).parameters
    }
    assert len(defaults) >= 8
    assert set(defaults.values()) == {1e-6}


def test_defaults_are_the_documented_ones():
    found = {
        (name, option): parameter.default
        for name in walk.SOLVERS
        for option, parameter in inspect.signature(getattr(mi.solvers, name)).parameters.items()
        if isinstance(parameter.default, int | float) and option != "tol"
    }
    assert found == {
        ("auto", "dense_size"): 200,
        ("auto", "absolute"): True,
        ("auto", "memory"): 2e9,
        ("block_cg", "block_size"): 16,
        ("block_cg", "absolute"): False,
        ("dense", "absolute"): False,
        ("ekfac", "reestimate"): True,
        ("lanczos", "absolute"): False,
        ("lanczos", "seed"): 0,
        ("nystrom", "seed"): 0,
        ("sampled", "rank"): 100,
        ("sampled", "seed"): 0,
    }
    assert diagonal(1.0).num_groups == 1


@pytest.mark.parametrize(("num_tasks", "asked"), [(64, 4), (63, None), (1600, 100)])
def test_auto_samples_a_sixteenth_of_the_tasks_from_64_on(num_tasks, asked):
    def sample(number):
        raise Asked(number)

    operator = dataclasses.replace(diagonal(1.0, 2.0), sample=sample, num_groups=num_tasks)
    if asked is None:
        assert mi.solvers.auto(dense_size=0).init(operator)[0] is None
        return
    with pytest.raises(Asked, match=rf"^{asked}$"):
        mi.solvers.auto(dense_size=0).init(operator)


@pytest.mark.parametrize("name", ["auto", "block_cg", "cg", "dense", "identity", "minres", "neumann"])
def test_what_a_preparation_took_is_counted(name):
    options = {"auto": {"dense_size": 0}, "neumann": {"num_terms": 3}}.get(name, {})
    solver, operator = getattr(mi.solvers, name)(**options), diagonal(1.0, 2.0, 3.0)
    expected = {"dense": 3, "neumann": 20}.get(name, 0)
    assert int(solver.init_matvecs(solver.init(operator))) == expected


def test_steps_and_bases_that_are_allowed_if_none_are_named():
    assert default_max_steps(5, None) == 20
    assert default_max_steps(10_000, None) == 1000
    assert default_max_steps(5, 7) == 7
    large = from_matvec(lambda v: v, jax.ShapeDtypeStruct((10_000,), jnp.float64))
    assert default_max_size(large, 100) == 600
    assert default_max_size(diagonal(1.0, 2.0), 100) == 2


@pytest.mark.parametrize("dense_size", [64, 0])
def test_auto_counts_what_it_took_and_no_more(dense_size):
    """All products, and one for the residual; a basis of two eigenvalues has two, and its residual none of its own."""
    found = solved(mi.solvers.auto(dense_size=dense_size), diagonal(1.0, 1.0, 3.0), np.ones(3))[1]
    assert int(found.num_matvecs) == (3 + 1 if dense_size else 2)


def test_auto_counts_no_product_that_a_large_problem_did_not_take(monkeypatch):
    """Conjugate gradients need two, too, and one for the residual; those that met -1 and a basis count together."""
    monkeypatch.setattr("metainfluence.solvers._auto._QUICK", 0)
    solver = mi.solvers.auto(dense_size=0)
    found = solved(solver, diagonal(1.0, 1.0, 3.0), np.ones(3))[1]
    assert (int(found.num_matvecs), int(found.choice)) == (2 + 1, Choice.CG)
    found = solved(solver, diagonal(-1.0, 0.5), np.ones(2))[1]
    assert (int(found.num_matvecs), int(found.choice)) == (1 + 1 + 2, Choice.KRYLOV_ABSOLUTE)


def test_auto_turns_no_eigenvalue_that_the_damping_has_made_positive():
    solution, info = solved(mi.solvers.auto(), diagonal(-0.5, 1.0).damped(1.0), np.ones(2))
    np.testing.assert_allclose(solution, [2, 0.5], rtol=1e-12)
    assert int(info.choice) == Choice.DENSE


def test_the_smallest_curvature_is_at_most_that_of_the_solution():
    """Of a solver that sees no eigenvalue it is all that is seen; a solution of 0 has none."""
    operator = diagonal(2.0, 4.0)
    info = solved(mi.solvers.identity(), operator, np.ones(2))[1]
    assert (float(info.min_curvature), int(info.num_matvecs)) == (3, 1)
    assert float(solved(mi.solvers.identity(), operator, np.zeros(2))[1].min_curvature) == np.inf


def test_the_default_tolerance_of_inner_solves_is_that_of_the_lowest_precision():
    double, single = np.zeros(1), np.zeros(1, np.float32)
    assert accurate_tol({"a": double}) == pytest.approx(1.8e-12, rel=0.02)
    assert accurate_tol({"a": double, "b": single}) == pytest.approx(6.4e-6, rel=0.02)


@pytest.mark.parametrize(("name", "expected"), [("task_if", 3), ("instance_if", 2), ("self_influence", 6), ("edit", 1)])
def test_memory_is_asked_for_as_many_right_hand_sides_as_there_are(monkeypatch, name, expected):
    inputs = cases.inputs_of(cases.STRUCTURES[0], golden.drawn(golden.stored()["inputs"]))
    options = {"side": "query"} if name == "instance_if" else {}
    rest = {"instance_if": (0,), "edit": (inputs.weights,)}.get(name, ())

    def asked(problem, curvature, meta_params, tasks, vectors, mesh, batch_size):
        raise Asked(vectors)

    monkeypatch.setattr("metainfluence.response._options.fitting_chunks", asked)
    influence = getattr(mi, name)(cases.problem("closed_form"), **options)
    with pytest.raises(Asked, match=rf"^{expected}\b"):
        influence(inputs.meta_params, inputs.tasks, *rest)


@pytest.mark.parametrize("make", [mi.solvers.cg, mi.solvers.minres])
def test_krylov_solvers_take_as_many_steps_as_allowed_and_no_more_than_needed(make):
    """One product a step, and one for the residual; with k different eigenvalues k steps are enough."""
    operator, rhs = diagonal(1.0, 2.0, 4.0, 8.0), np.ones(4)
    for max_steps in (1, 3):
        _, info = solved(make(tol=1e-12, max_steps=max_steps), operator, rhs)
        assert (int(info.status), int(info.num_matvecs)) == (SolveStatus.MAX_STEPS, max_steps + 1)
    solution, info = solved(make(tol=1e-12, max_steps=50), operator, rhs)
    assert (int(info.status), int(info.num_matvecs)) == (SolveStatus.CONVERGED, 4 + 1)
    np.testing.assert_allclose(solution, [1, 0.5, 0.25, 0.125], rtol=1e-12)
    np.testing.assert_allclose(info.effective_curvature, 2 / np.linalg.norm(solution), rtol=1e-12)
    small, info = solved(make(tol=1e-12), operator, 0.1 * rhs)
    np.testing.assert_allclose(info.effective_curvature, 0.2 / np.linalg.norm(small), rtol=1e-12)


def test_cg_keeps_what_it_had_before_it_met_a_negative_curvature():
    solution, info = solved(mi.solvers.cg(), diagonal(-1.0, 0.5), [1.0, 1.0])
    assert int(info.status) == SolveStatus.INDEFINITE
    assert np.all(np.asarray(solution) == 0)
    assert float(info.min_curvature) == -0.25


def test_a_series_counts_the_products_of_its_preconditioner():
    """Of one of two terms: one application to start with, and a product and one application for each term."""
    inner = mi.solvers.neumann(2, scale=0.25)
    solver = mi.solvers.neumann(3, scale=0.5, preconditioner=inner, tol=1e-14)
    assert int(solved(solver, diagonal(1.0, 2.0, 3.0), np.ones(3))[1].num_matvecs) == 2 + 3 * (1 + 2) + 1


def test_a_right_hand_side_that_is_not_finite_takes_no_products_of_the_others():
    solver, operator = mi.solvers.block_cg(), diagonal(1.0, 2.0, 3.0)
    rhs = jnp.stack([jnp.asarray([0.0, 1.0, 0.0]), jnp.full(3, jnp.nan)])
    solutions, info = jax.jit(lambda b: solver.solve_many(operator, solver.init(operator), b))(rhs)
    np.testing.assert_allclose(solutions[0], [0, 0.5, 0], rtol=1e-12)
    assert info.status.tolist() == [SolveStatus.CONVERGED, SolveStatus.NONFINITE]
    assert int(info.num_matvecs[0]) == 1


def test_an_ekfac_of_nothing_is_finite_and_indefinite():
    solution, info = walk.solving("ekfac", 0)(np.eye(walk.SIZE), np.zeros(walk.SIZE), np.ones(walk.SIZE))
    assert int(info.status) == SolveStatus.INDEFINITE
    assert int(info.num_matvecs) == 1
    assert np.all(np.isfinite(solution))


def test_a_scale_of_a_zero_operator_is_no_nan():
    """Its largest eigenvalue is 0, and every term of the series is the right-hand side."""
    estimate = jax.jit(lambda: largest_eigenvalue(diagonal(0.0, 0.0)))()
    assert float(estimate) == 0


def test_a_scale_is_that_of_all_power_steps():
    """After 20 of them an eigenvalue of 3/4 of the largest has (3/4)⁴⁰ of its share."""
    estimate = jax.jit(lambda: largest_eigenvalue(diagonal(1.0, 2.0, 3.0, 4.0)))()
    assert float(estimate) == pytest.approx(4, rel=1e-3)


def minimized(objective, start, **options):
    return float(jax.jit(lambda p: mi.adaptation.newton_cg(**options)(objective, p))(jnp.asarray(start)))


def test_newtons_steps_are_as_many_as_allowed():
    """On θ⁴ a step takes a third off."""
    assert minimized(lambda p: p**4, 1.0, max_steps=1) == pytest.approx(2 / 3, rel=1e-12)
    assert minimized(lambda p: p**4, 1.0, max_steps=3) == pytest.approx(8 / 27, rel=1e-12)


def test_newton_stops_relative_to_the_gradient_at_the_start_or_to_1():
    """On 100 θ⁴ from 1 the gradient is 400, and at 2/3 and 4/9 it is 118.5 and 35.1; on θ⁴/100 0.04, 0.0119, 0.0035."""
    assert minimized(lambda p: 100 * p**4, 1.0, tol=0.1) == pytest.approx(4 / 9, rel=1e-12)
    assert minimized(lambda p: 0.01 * p**4, 1.0, tol=0.005) == pytest.approx(4 / 9, rel=1e-12)


def test_newtons_steps_are_the_same_in_any_unit():
    """Where the gradient at the start is at least 1, so that it is what all is relative to."""
    spread = jnp.geomspace(1.0, 100.0, 12)

    def reached(unit):
        minimize = mi.adaptation.newton_cg(max_steps=6)
        return jax.jit(lambda p: minimize(lambda p: unit * jnp.sum(spread * jnp.log(jnp.cosh(p))), p))(jnp.ones(12))

    one = 1.001 / float(jnp.linalg.norm(spread * jnp.tanh(1.0)))
    assert np.max(np.abs(reached(one))) > 1e-6
    np.testing.assert_allclose(reached(1e6 * one), reached(one), rtol=1e-6, atol=1e-9)


def test_newton_halves_a_step_that_is_too_long():
    """On √(1 + θ²) whole steps lead from θ to −θ³, out to infinity from beyond 1."""
    assert abs(minimized(lambda p: jnp.sqrt(1 + p**2), 2.0)) < 1e-10


@pytest.mark.parametrize(
    "objective",
    [lambda p: (p - 1) ** 2 + jax.lax.stop_gradient(jnp.nan * p), lambda p: jnp.sqrt(p**2)],
    ids=["value", "gradient"],
)
def test_newton_finds_no_minimum_where_value_or_gradient_is_nan(objective):
    assert np.isnan(minimized(objective, 0.0))


def test_an_index_that_no_task_has_is_answered_with_those_that_there_are():
    inputs = cases.inputs_of(cases.STRUCTURES[0], golden.drawn(golden.stored()["inputs"]))
    influence = mi.instance_if(cases.problem("closed_form"), "query")
    for index in (-1, 3):
        with pytest.raises(ValueError, match=rf"^index: expected a task from 0 to 2, got {index}$"):
            influence(inputs.meta_params, inputs.tasks, index)


def test_products_are_counted_by_scores_as_by_the_solver():
    inputs = cases.inputs_of(cases.STRUCTURES[0], golden.drawn(golden.stored()["inputs"]))
    info = cases.scores_of(cases.STRUCTURES[0])(inputs).info
    assert int(info.num_matvecs) == 6 + 1


COUNTS = [
    (name, option)
    for name in walk.SOLVERS
    for option in inspect.signature(getattr(mi.solvers, name)).parameters
    if option in ("max_steps", "max_size", "block_size", "rank", "num_terms", "number", "batch_size")
]


@pytest.mark.parametrize(("name", "option"), COUNTS)
def test_a_count_is_a_positive_integer(name, option):
    others = {"rank": 2} if name in ("lanczos", "nystrom") else {}
    for wrong in (2.5, 0):
        with pytest.raises(ValueError, match=rf"^{option}: expected (None or )?a positive integer, got {wrong}$"):
            getattr(mi.solvers, name)(**{**others, option: wrong})
