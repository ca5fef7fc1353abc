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


def log_cosh(m):
    """From whose minimum Newton's method flees where |λ| > 1.09."""
    return jnp.log(jnp.cosh(m))


def two_wells(m):
    """With a maximum at 0, to which Newton's method goes where |λ| < 0.58."""
    return (m**2 - 1) ** 2 / 4


def cliff(m):
    """Whose tangent promises what it does not hold, on either side and however short the step."""
    return jnp.abs(m) + m**2 / 2


@pytest.fixture(scope="module")
def searching():
    """Edits of scalar objectives with five Newton steps, compiled together."""

    def of(function):
        problem = mi.from_task_loss(lambda m, task, weights: function(m) * jnp.mean(weights.query))
        return mi.edit(problem, solver=mi.solvers.dense(), num_newton_steps=5)

    functions = {each.__name__: each for each in (log_cosh, two_wells, cliff)}
    tasks = mi.Task(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    run = jax.jit(lambda starts: {k: of(functions[k])(m, tasks, mi.unit_weights(tasks)) for k, m in starts.items()})
    starts = {"log_cosh": 1.5, "two_wells": 0.3, "cliff": 1e-9}
    return functions, starts, run({name: jnp.asarray(start) for name, start in starts.items()})


@pytest.mark.parametrize(("name", "end", "lengths"), [("log_cosh", 0.0, [1, 0.5, 1]), ("two_wells", 1.0, [1, 1, 0.5])])
def test_steps_that_lead_away_are_shortened_or_turned(searching, name, end, lengths):
    functions, starts, found = searching
    edit, start = found[name], starts[name]
    np.testing.assert_allclose(edit.meta_params, end, atol=2e-4)
    np.testing.assert_allclose(edit.step_lengths[:3], lengths)
    assert np.all(np.diff(edit.objective) <= 1e-15)
    np.testing.assert_allclose(edit.objective[0], functions[name](start), rtol=1e-14)
    np.testing.assert_allclose(edit.objective[-1], functions[name](edit.meta_params), rtol=1e-12, atol=1e-15)
    # Newton's method itself goes up.
    slope, curvature = (float(d(functions[name])(start)) for d in (jax.grad, lambda f: jax.grad(jax.grad(f))))
    assert functions[name](start - slope / curvature) > functions[name](start)
    np.testing.assert_allclose(edit.info.outer_gradient_norm[-1], 0, atol=2e-4)
    assert edit.info.outer_gradient_norm[0] == pytest.approx(abs(slope))


def test_a_step_along_which_the_objective_rises_is_not_taken(searching):
    """And what is told says so: no length, the same F, the gradient of the start."""
    functions, starts, found = searching
    edit, start = found["cliff"], starts["cliff"]
    assert float(edit.meta_params) == start
    np.testing.assert_array_equal(edit.step_lengths, [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(edit.objective, functions["cliff"](start), rtol=1e-12)
    np.testing.assert_allclose(edit.info.outer_gradient_norm, 1 + start)


def test_a_first_order_step_that_leads_away_is_shortened_and_newton_steps_go_on():
    """On a quartic, whose curvature at λ says little of that at the new weights; alone it is taken whole."""
    problem = mi.from_task_loss(lambda m, task, w: jnp.mean(w.query * task.query * m) + m**4 + 0.01 * m**2)
    tasks = mi.Task(jnp.zeros((2, 1)), jnp.asarray([[8.0], [-8.0]]))
    new = mi.drop(mi.unit_weights(tasks), tasks=[1])
    edits = {n: mi.edit(problem, solver=mi.solvers.dense(), num_newton_steps=n) for n in (0, 8)}
    found = jax.jit(lambda m: {n: edit(m, tasks, new) for n, edit in edits.items()})(jnp.asarray(0.0))
    # F = ½ (8 λ + λ⁴ + 0.01 λ²) with the second task gone, at weight ½ of the mean.
    root = np.roots([4, 0, 0.02, 8]).real[np.isreal(np.roots([4, 0, 0.02, 8]))][0]
    assert float(found[0].meta_params) < -100
    assert found[0].step_lengths.tolist() == [1]
    assert found[0].objective[1] > found[0].objective[0]
    assert 0 < found[8].step_lengths[0] < 0.1
    np.testing.assert_allclose(found[8].meta_params, root, rtol=1e-8)
