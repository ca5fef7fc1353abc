"""Baselines against their own dense definitions."""

import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles.problems import spec
from oracles.reference import derivatives, light_jit, ravel, relative_error, solved

DAMPING = 0.2


@pytest.mark.parametrize("problem_name", ["implicit_head", "ridge_head"])
def test_direct_if_takes_the_adapted_parameters_for_constants_of_lambda(problem_name):
    point = solved(problem_name)
    coefficients = runs.target_coefficients(problem_name)
    direct = mi.baselines.direct_if(runs.problem(problem_name), runs.target, solver=mi.solvers.dense(), damping=DAMPING)

    def run(meta_params, tasks, weights):
        return direct(meta_params, tasks, coefficients, weights=weights)

    scores = light_jit(run)(point.meta_params, spec(problem_name).tasks, point.weights)
    cut = derivatives(problem_name, point.lam, point.weights, cut=True)
    slope = ravel(coefficients) * np.cos(point.lam)
    direction = np.linalg.solve(cut.hessian + DAMPING * np.eye(len(slope)), slope)
    for kind in mi.Weights._fields:
        expected = getattr(point.weights, kind) * (getattr(cut.mixed, kind) @ direction)
        assert relative_error(getattr(scores, kind), expected) <= 1e-9
    assert relative_error(scores.task, runs.influences(problem_name)["scores"].task) >= 0.1


def test_direct_if_is_zero_where_the_outer_loss_sees_lambda_through_theta_only():
    point = solved("imaml")
    coefficients = runs.target_coefficients("imaml")
    direct = mi.baselines.direct_if(runs.problem("imaml"), runs.target, solver=mi.solvers.dense(), damping=DAMPING)
    scores = light_jit(direct)(point.meta_params, spec("imaml").tasks, coefficients)
    for kind in mi.Weights._fields:
        assert np.all(getattr(scores, kind) == 0)


def test_identity_is_the_inner_product_of_gradients():
    point = solved("maml_sgd")
    coefficients = runs.target_coefficients("maml_sgd")
    tracin = mi.influence_scores(runs.problem("maml_sgd"), runs.target, solver=mi.solvers.identity())

    def run(meta_params, tasks, weights):
        return tracin(meta_params, tasks, coefficients, weights=weights)

    scores = light_jit(run)(point.meta_params, spec("maml_sgd").tasks, point.weights)
    slope = ravel(coefficients) * np.cos(point.lam)
    for kind in mi.Weights._fields:
        expected = getattr(point.weights, kind) * (getattr(point.derivatives.mixed, kind) @ slope)
        assert relative_error(getattr(scores, kind), expected) <= 1e-9
