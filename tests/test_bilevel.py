"""The outer objective and its total gradient against re-solved values and Theorem 4.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles import paper
from oracles.problems import NAMES, spec
from oracles.reference import difference, offsets, relative_error, row, rows, solved, task_losses


@pytest.mark.parametrize("problem_name", NAMES)
def test_task_losses_and_objective_equal_the_re_solved_ones(problem_name):
    point = solved(problem_name)
    losses, _, value = runs.gradient_fn(problem_name)(point.meta_params, spec(problem_name).tasks, point.weights)
    assert relative_error(losses, task_losses(problem_name)(point.lam[None], point.weights)[0]) <= 1e-10
    assert relative_error(value, point.derivatives.value) <= 1e-10


@pytest.mark.parametrize("problem_name", NAMES)
def test_total_gradient_against_central_differences_of_the_re_solved_loss(problem_name):
    point = solved(problem_name)
    _, gradients, _ = runs.gradient_fn(problem_name)(point.meta_params, spec(problem_name).tasks, point.weights)
    basis = np.eye(len(point.lam))
    points = point.lam[None, None] + offsets()[:, None, None] * basis[None]
    losses = np.asarray(task_losses(problem_name)(points.reshape(-1, len(basis)), point.weights))
    expected = difference(losses.reshape(4, len(basis), -1)).T
    for k, gradient in enumerate(rows(gradients)):
        assert relative_error(gradient, expected[k]) <= 1e-7


@pytest.mark.parametrize("problem_name", NAMES)
def test_total_gradient_is_that_of_theorem_4_1(problem_name):
    point = solved(problem_name)
    _, gradients, _ = runs.gradient_fn(problem_name)(point.meta_params, spec(problem_name).tasks, point.weights)
    for gradient, expected in zip(rows(gradients), paper.terms(problem_name).total_gradient, strict=True):
        assert relative_error(gradient, expected) <= 1e-9


def test_weights_of_none_are_ones():
    s = spec("prototypes")
    problem, task = s.problem(), row(s.tasks, 0)
    ones = mi.unit_weights(s.tasks)
    value = jax.jit(mi.total_objective(problem))
    np.testing.assert_allclose(value(s.meta_params, s.tasks), value(s.meta_params, s.tasks, ones), rtol=1e-14)
    loss = jax.jit(mi.task_loss(problem))
    np.testing.assert_allclose(loss(s.meta_params, task), loss(s.meta_params, task, row(ones, 0)), rtol=1e-14)


def test_the_weight_of_a_task_enters_the_objective_only():
    s = spec("prototypes")
    problem, weights = s.problem(), row(mi.unit_weights(s.tasks), 0)
    loss = jax.jit(mi.task_loss(problem))
    doubled = weights._replace(task=2 * weights.task)
    assert loss(s.meta_params, row(s.tasks, 0), doubled) == loss(s.meta_params, row(s.tasks, 0), weights)

    everywhere = mi.unit_weights(s.tasks)
    objective = jax.jit(mi.total_objective(problem))
    rise = objective(s.meta_params, s.tasks, everywhere._replace(task=everywhere.task.at[0].set(2.0)))
    per_task = loss(s.meta_params, row(s.tasks, 0)) / len(everywhere.task)
    np.testing.assert_allclose(rise - objective(s.meta_params, s.tasks), per_task, rtol=1e-12)


def test_query_loss_is_the_unweighted_mean_without_the_meta_regulariser():
    s = spec("ridge_head")
    loss = jax.jit(mi.task_loss(s.problem()))
    losses = [loss(s.meta_params, row(s.tasks, k)) for k in range(4)]
    target = jax.jit(mi.query_loss(s.problem()))
    np.testing.assert_allclose(target(s.meta_params, s.tasks), np.mean(losses), rtol=1e-13)


def test_l2_is_half_delta_times_the_squared_norm():
    tree = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray(3.0)}
    assert mi.l2(0.5)(tree) == pytest.approx(0.25 * 14, rel=1e-15)


def test_per_example_turns_a_mean_reduced_loss_into_one_per_example():
    s = spec("implicit_head")
    params, batch = jnp.linspace(-1, 1, 12).reshape(4, 3), row(s.tasks, 0).query

    def mean_loss(params, meta_params, batch):
        return jnp.mean(s.outer_loss(params, meta_params, batch))

    got = mi.per_example(mean_loss)(params, s.meta_params, batch)
    np.testing.assert_allclose(got, s.outer_loss(params, s.meta_params, batch), rtol=1e-13)


def task_loss_by_hand(meta_params, task, weights):
    """MAML as existing code would have it, with the padding's weights already 0."""
    s = spec("maml_sgd")
    coefficients = weights.support / jnp.sum(task.support_mask, dtype=jnp.float64)
    params = s.program(meta_params, task.support, coefficients)
    losses = s.outer_loss(params, meta_params, task.query)
    return jnp.sum(weights.query * losses) / jnp.sum(task.query_mask, dtype=jnp.float64)


def test_from_task_loss_is_the_same_problem():
    s, point = spec("maml_sgd"), solved("maml_sgd")
    by_hand = mi.from_task_loss(task_loss_by_hand, meta_regularizer=s.meta_regularizer)
    solver, arguments = mi.solvers.dense(), (point.meta_params, s.tasks, runs.target_coefficients("maml_sgd"))

    def scores(meta_params, tasks, coefficients, weights):
        make = mi.influence_scores(by_hand, runs.target, solver=solver)
        return make(meta_params, tasks, coefficients, weights=weights)

    got = jax.jit(scores)(*arguments, point.weights)
    expected = runs.influences("maml_sgd")["scores"]
    for field in mi.Weights._fields:
        assert relative_error(getattr(got, field), getattr(expected, field)) <= 1e-10
