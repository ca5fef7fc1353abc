"""Influence against re-optimised meta-parameters, forward against reverse, and Proposition 4.8."""

import jax
import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles import paper
from oracles.problems import IMPLICIT, KINDS, spec
from oracles.reference import (
    derivatives,
    optimum_differences,
    random_weights,
    ravel,
    relative_error,
    rows,
    solved,
)


def solve(problem_name, rhs):
    """H⁻¹ applied to right-hand sides on leading axes, H that of the reference."""
    hessian = solved(problem_name).derivatives.hessian
    return np.linalg.solve(hessian, rhs.reshape(-1, len(hessian)).T).T.reshape(rhs.shape)


def matrix(delta, axes):
    """A λ-shaped pytree with `axes` leading axes as an array [..., p]."""
    leaves = jax.tree.leaves(delta)
    lead = leaves[0].shape[:axes]
    return np.concatenate([leaf.reshape(*lead, -1) for leaf in leaves], axis=-1)


# Those that take longest to solve again and again; their like is among the others.
LONG = {"given", "maml_adam"}


def marked(names, long):
    return [pytest.param(name, marks=[pytest.mark.slow] if name in long else []) for name in names]


RESOLVED = marked(KINDS, {*LONG, "imaml"})
EVERY = marked(KINDS, LONG)


@pytest.mark.parametrize("problem_name", RESOLVED)
@pytest.mark.parametrize("kind", ["task", "support", "query"])
def test_one_datum_against_central_differences_of_the_re_optimised_meta_params(problem_name, kind):
    direction, expected = optimum_differences(problem_name)[kind]
    delta = matrix(runs.influences(problem_name)[kind].delta, 1 if kind == "task" else 2)
    where = np.unravel_index(np.argmax(direction[kind]), direction[kind].shape)
    assert relative_error(delta[where], expected) <= 1e-5


@pytest.mark.parametrize("problem_name", RESOLVED)
def test_a_random_direction_against_central_differences_of_the_re_optimised_meta_params(problem_name):
    direction, expected = optimum_differences(problem_name)["random"]
    total = sum(
        np.tensordot(direction[kind], matrix(runs.influences(problem_name)[kind].delta, direction[kind].ndim), axes)
        for kind, axes in (("task", 1), ("support", 2), ("query", 2))
    )
    assert relative_error(total, expected) <= 1e-5


@pytest.mark.parametrize("problem_name", EVERY)
def test_all_data_against_the_mixed_derivative_of_the_independent_program(problem_name):
    found, mixed = runs.influences(problem_name), solved(problem_name).derivatives.mixed
    for kind, axes in (("task", 1), ("support", 2), ("query", 2)):
        assert relative_error(matrix(found[kind].delta, axes), -solve(problem_name, getattr(mixed, kind))) <= 1e-9


@pytest.mark.parametrize("problem_name", EVERY)
def test_group_influence_is_the_sum_over_its_direction(problem_name):
    found, direction = runs.influences(problem_name), runs.random_direction(problem_name)
    total = sum(
        np.tensordot(getattr(direction, kind), matrix(found[kind].delta, axes), axes)
        for kind, axes in (("task", 1), ("support", 2), ("query", 2))
    )
    assert relative_error(matrix(found["group"].delta, 0), total) <= 1e-9


@pytest.mark.parametrize("problem_name", EVERY)
def test_reverse_mode_equals_forward_mode(problem_name):
    """score = −w ⟨∇φ, dλ*/dw⟩, the predicted change on removal."""
    found, point = runs.influences(problem_name), solved(problem_name)
    slope = matrix(runs.target_coefficients(problem_name), 0) * np.cos(point.lam)
    for kind, axes in (("task", 1), ("support", 2), ("query", 2)):
        forward = -getattr(point.weights, kind) * (matrix(found[kind].delta, axes) @ slope)
        assert relative_error(getattr(found["scores"], kind), forward) <= 1e-9
        assert relative_error(getattr(found["scores_cg"], kind), forward) <= 1e-6


@pytest.mark.parametrize("problem_name", IMPLICIT)
def test_training_examples_are_those_of_proposition_4_8(problem_name):
    weights, gradients = solved(problem_name).weights, paper.terms(problem_name).support_gradients
    share = np.asarray(weights.task)[:, None, None] / len(weights.task)
    delta = matrix(runs.influences(problem_name)["support"].delta, 2)
    assert relative_error(delta, -solve(problem_name, share * gradients)) <= 1e-9


@pytest.mark.parametrize("problem_name", EVERY)
def test_validation_examples_are_those_of_theorem_4_1(problem_name):
    weights, gradients = solved(problem_name).weights, paper.terms(problem_name).query_gradients
    share = np.asarray(weights.task)[:, None, None] / len(weights.task)
    delta = matrix(runs.influences(problem_name)["query"].delta, 2)
    assert relative_error(delta, -solve(problem_name, share * gradients)) <= 1e-9


UNKNOWN = ("ridge_head", "prototypes")


@pytest.mark.parametrize("problem_name", EVERY)
def test_info_reports_the_solve_and_the_stationarity_of_both_levels(problem_name):
    found = runs.influences(problem_name)
    smallest = np.linalg.eigvalsh(solved(problem_name).derivatives.hessian)[0]
    for name, info in ((name, result.info) for name, result in found.items()):
        assert np.all(info.status == mi.SolveStatus.CONVERGED), name
        assert np.all(info.relative_residual <= 1e-9), name
        assert np.all(info.outer_gradient_norm <= 1e-10), name
        # Nobody has said what a closed form, or a loss of one piece, solves.
        known = info.inner_gradient_norm is not None
        assert known == (problem_name not in UNKNOWN), name
        assert not known or np.all(info.inner_gradient_norm <= 1e-10), name
        assert np.all(info.min_curvature >= smallest * (1 - 1e-6)), name
    np.testing.assert_allclose(found["scores"].info.min_curvature, smallest, rtol=1e-6)
    if spec(problem_name).inner is None and problem_name not in UNKNOWN:
        assert found["scores"].info.inner_gradient_norm == 0
    mi.check(found["scores"])
    mi.check(found["task"])


@pytest.mark.parametrize("problem_name", ["implicit_head", "maml_sgd", "ridge_head"])
def test_self_influence_is_the_weighted_inverse_hessian_norm_of_each_datum(problem_name):
    point, mixed = solved(problem_name), solved(problem_name).derivatives.mixed
    self_influence = mi.self_influence(runs.problem(problem_name), solver=mi.solvers.dense())
    found = jax.jit(self_influence)(point.meta_params, spec(problem_name).tasks, point.weights)
    for kind in mi.Weights._fields:
        g = getattr(mixed, kind)
        expected = getattr(point.weights, kind) * np.sum(g * solve(problem_name, g), axis=-1)
        assert relative_error(getattr(found, kind), expected) <= 1e-9
        assert np.all(getattr(found, kind) >= 0)


@pytest.mark.parametrize("problem_name", ["implicit_head", "maml_sgd", "prototypes"])
def test_padding_has_no_influence(problem_name):
    tasks, found = spec(problem_name).tasks, runs.influences(problem_name)
    for kind, mask in (("support", tasks.support_mask), ("query", tasks.query_mask)):
        padding = ~np.asarray(mask)
        assert np.any(padding)
        assert np.all(getattr(found["scores"], kind)[padding] == 0)
        assert np.all(rows(found[kind].delta[0][padding]) == 0)


@pytest.mark.parametrize("kind", ["linearized", "gamma", "gauss_newton"])
def test_scores_use_the_curvature_and_the_damping_they_are_told(kind):
    """In a solve other than the oracle's own, since what is damped must not depend on the solver."""
    point, damping = solved("ridge_head"), 0.3
    options = {"solver": mi.solvers.minres(tol=1e-12), "curvature": getattr(mi.curvature, kind)(), "damping": damping}
    make = mi.influence_scores(runs.problem("ridge_head"), runs.target, **options)
    coefficients = runs.target_coefficients("ridge_head")

    def run(meta_params, tasks, weights):
        return make(meta_params, tasks, coefficients, weights=weights)

    scores = jax.jit(run)(point.meta_params, spec("ridge_head").tasks, point.weights)
    matrix_of_kind = paper.curvatures("ridge_head")[kind] + damping * np.eye(len(point.lam))
    direction = np.linalg.solve(matrix_of_kind, matrix(coefficients, 0) * np.cos(point.lam))
    for field in mi.Weights._fields:
        expected = getattr(point.weights, field) * (getattr(point.derivatives.mixed, field) @ direction)
        assert relative_error(getattr(scores, field), expected) <= 1e-9


def test_info_tells_how_far_from_stationary_a_point_is():
    s = spec("convex")
    weights = random_weights("convex")
    info = jax.jit(mi.task_if(runs.problem("convex")))(s.meta_params, s.tasks, weights).info
    expected = np.linalg.norm(derivatives("convex", ravel(s.meta_params), weights).gradient)
    assert expected > 1e-2
    np.testing.assert_allclose(info.outer_gradient_norm, np.full(20, expected), rtol=1e-9)
