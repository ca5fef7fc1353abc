"""Removal: edited meta-parameters and predicted changes against really retraining, on a convex problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles.problems import spec
from oracles.reference import flat, minimise, ravel, relative_error, resolve, rows

REMOVALS = {
    "a task of twenty": {"tasks": [3]},
    "the support set of a task": {"support": [(7, j) for j in range(5)]},
    "six query examples of 120": {"query": [(0, 1), (2, 2), (5, 0), (9, 4), (9, 5), (17, 3)]},
}


@pytest.fixture(scope="module")
def trained():
    """The convex problem at its optimum under unit weights."""
    tasks = spec("convex").tasks
    weights = mi.unit_weights(tasks)
    lam = minimise("convex", weights)
    return flat("convex").unravel(jnp.asarray(lam)), tasks, weights


@pytest.fixture(scope="module")
def editors():
    """Compiled editors by number of Newton steps."""
    make = {n: mi.edit(runs.problem("convex"), solver=mi.solvers.dense(), num_newton_steps=n) for n in (0, 3)}
    return {n: jax.jit(edit) for n, edit in make.items()}


@pytest.mark.parametrize("removal", REMOVALS)
def test_three_newton_steps_land_on_the_retrained_meta_params(removal, trained, editors):
    meta_params, tasks, weights = trained
    new_weights = mi.drop(weights, **REMOVALS[removal])
    retrained = minimise("convex", new_weights)
    assert relative_error(ravel(meta_params), retrained) >= 1e-3

    edit = editors[3](meta_params, tasks, new_weights)
    assert relative_error(ravel(edit.meta_params), retrained) <= 1e-6
    assert edit.info.status.shape == (4,)
    assert np.all(edit.info.status == mi.SolveStatus.CONVERGED)
    gradient_norms = np.asarray(edit.info.outer_gradient_norm)
    assert np.all(np.diff(gradient_norms) < 0)
    assert gradient_norms[-1] <= 1e-10


def test_the_first_order_edit_is_the_group_influence(trained, editors):
    meta_params, tasks, weights = trained
    new_weights = mi.drop(weights, tasks=[3], query=[(4, 0)])
    edit = editors[0](meta_params, tasks, new_weights)
    direction = jax.tree.map(jnp.subtract, new_weights, weights)
    group = mi.group_influence(runs.problem("convex"), solver=mi.solvers.dense())
    delta = jax.jit(group)(meta_params, tasks, direction).delta
    assert relative_error(ravel(edit.meta_params) - ravel(meta_params), ravel(delta)) <= 1e-12
    assert edit.info.status.shape == (1,)


def test_edit_starts_from_the_weights_it_is_told(trained, editors):
    """From the optimum without task 3 back to that with all tasks."""
    meta_params, tasks, weights = trained
    without = mi.drop(weights, tasks=[3])
    start = flat("convex").unravel(jnp.asarray(resolve("convex", ravel(meta_params), without)))
    back = editors[0](start, tasks, weights, without).meta_params
    before, after = (np.linalg.norm(ravel(point) - ravel(meta_params)) for point in (start, back))
    assert after <= 0.2 * before


def test_removal_moves_lambda_by_minus_the_influence_and_the_target_by_the_score(trained):
    """Sign and scale of the whole library, against twenty real retrainings."""
    meta_params, tasks, weights = trained
    coefficients = jnp.asarray([[1.0], [-2.0], [0.5], [1.5]])
    retrained = np.stack([resolve("convex", ravel(meta_params), mi.drop(weights, tasks=[k])) for k in range(20)])
    moves = retrained - ravel(meta_params)

    dense = mi.solvers.dense()
    influence = jax.jit(mi.task_if(runs.problem("convex"), solver=dense))(meta_params, tasks)
    # A twentieth of the weight is a large step: what remains is of second order.
    assert relative_error(-rows(influence.delta), moves) <= 0.25

    scores = jax.jit(mi.influence_scores(runs.problem("convex"), runs.target, solver=dense))(
        meta_params, tasks, coefficients
    )
    targets = np.array([runs.target(jnp.asarray(lam)[:, None], coefficients) for lam in retrained])
    changes = targets - np.asarray(runs.target(meta_params, coefficients))
    assert relative_error(scores.task, changes) <= 0.25
    assert np.corrcoef(scores.task, changes)[0, 1] >= 0.99


@pytest.mark.parametrize(("start", "leads_away"), [(1.5, True), (0.5, False)])
def test_newton_steps_that_lead_away_are_not_taken(start, leads_away):
    """On log cosh, from whose minimum Newton's method flees where |λ| > 1.09."""
    problem = mi.from_task_loss(lambda m, task, weights: jnp.log(jnp.cosh(m)) * jnp.mean(weights.query))
    tasks = mi.Task(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    edit = jax.jit(mi.edit(problem, solver=mi.solvers.dense(), num_newton_steps=2))
    found = edit(jnp.asarray(start), tasks, mi.unit_weights(tasks))
    norms = found.info.outer_gradient_norm
    assert norms.shape == (3,)
    np.testing.assert_allclose(jnp.abs(jnp.tanh(found.meta_params)), jnp.min(norms), rtol=1e-9)
    assert (float(found.meta_params) == start) == leads_away
    assert (norms[1] > norms[0]) == leads_away
