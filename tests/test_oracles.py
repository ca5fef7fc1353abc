"""The references against each other: central differences, autodiff of a re-solving program, the paper's formulas."""

import numpy as np
import pytest

from oracles import paper
from oracles.problems import NAMES, spec
from oracles.reference import (
    STEP,
    derivatives,
    difference,
    moved,
    offsets,
    relative_error,
    resolve,
    solved,
    task_losses,
)


@pytest.mark.parametrize("problem_name", NAMES)
def test_problem_is_solved_to_stationarity_at_a_strict_minimum(problem_name):
    point = solved(problem_name)
    assert np.linalg.norm(point.derivatives.gradient) <= 1e-12
    assert np.linalg.eigvalsh(point.derivatives.hessian)[0] >= 1e-3


@pytest.mark.parametrize("problem_name", NAMES)
def test_formulas_of_the_paper_agree_with_autodiff_of_the_re_solving_program(problem_name):
    point, terms = solved(problem_name), paper.terms(problem_name)
    share = np.asarray(point.weights.task)[:, None] / len(point.weights.task)
    found = point.derivatives
    assert relative_error(terms.total_gradient / len(share), found.mixed.task) <= 1e-12
    assert relative_error(share[:, :, None] * terms.query_gradients, found.mixed.query) <= 1e-12
    assert relative_error(paper.curvatures(problem_name)["exact"], found.hessian) <= 1e-12
    if terms.support_gradients is not None:
        assert relative_error(share[:, :, None] * terms.support_gradients, found.mixed.support) <= 1e-12


@pytest.mark.parametrize("problem_name", NAMES)
def test_autodiff_agrees_with_central_differences_of_re_solved_values(problem_name, rng):
    point = solved(problem_name)
    lam, weights = point.lam, point.weights
    direction = rng.normal(size=lam.shape)
    share = np.asarray(weights.task) / len(weights.task)
    # Adam within makes fifth derivatives so large that STEP, which suits functions like exp, leaves an error of 1e-8.
    step = STEP / 8

    losses = np.asarray(task_losses(problem_name)(lam[None] + offsets(step)[:, None] * direction[None], weights))
    expected = len(share) * point.derivatives.mixed.task @ direction
    assert relative_error(difference(losses, step), expected) <= 1e-8

    shifted = [derivatives(problem_name, lam + each * direction, weights).gradient for each in offsets(step)]
    assert relative_error(difference(shifted, step), point.derivatives.hessian @ direction) <= 1e-8

    for field in ("task", "query", "support") if spec(problem_name).reweighs_support else ("task", "query"):
        change = rng.normal(size=getattr(weights, field).shape)
        shifted = [
            derivatives(problem_name, lam, moved(weights, step, **{field: change})).gradient for step in offsets()
        ]
        expected = np.tensordot(change, getattr(point.derivatives.mixed, field), axes=change.ndim)
        assert relative_error(difference(shifted), expected) <= 1e-8


def test_extrapolated_difference_is_of_fourth_order():
    errors = [abs(difference(np.exp(1 + offsets(step)), step) - np.e) for step in (0.2, 0.1)]
    assert 12 <= errors[0] / errors[1] <= 20
    assert abs(difference(np.exp(1 + offsets()), STEP) - np.e) <= 1e-11


def test_resolve_finds_the_optimum_again():
    point = solved("prototypes")
    again = resolve("prototypes", point.lam * 1.01, point.weights)
    assert relative_error(again, point.lam) <= 1e-12
