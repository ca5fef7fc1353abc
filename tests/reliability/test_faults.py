"""Numerical faults: each is told, by an error or a status, and what it does not touch stays right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence.minimizers import gradient_norm
from metainfluence.solvers import SolveStatus
from reliability import cases
from reliability.cases import ravel

STRUCTURE = cases.STRUCTURES[0]
RNG = np.random.default_rng(21)
DRAWN = cases.Drawn(
    data=RNG.normal(size=(cases.T, cases.SUPPORT + cases.QUERY, 3)),
    test=RNG.normal(size=(1, cases.SUPPORT + cases.QUERY, 3)),
    lam=RNG.normal(size=6),
    vectors=RNG.normal(size=(2, 6)),
    weights=RNG.uniform(0.5, 1.5, size=(cases.T, 1 + cases.SUPPORT + cases.QUERY)),
    counts=np.asarray([[3, 2], [2, 1], [3, 2]]),
    damping=1.0,
    order=(0, 1, 2),
)
INPUTS = cases.inputs_of(STRUCTURE, DRAWN)


def spoilt(side, leaf, bad, k=1):
    """The tasks with one bad number in task k."""
    batch = dict(getattr(INPUTS.tasks, side))
    batch[leaf] = batch[leaf].at[k, 0].set(bad)
    return INPUTS.tasks._replace(**{side: batch})


@functools.cache
def default_scores():
    """By the default solver, whatever it chooses."""

    def run(inputs):
        maker = mi.influence_scores(cases.problem(STRUCTURE.adapt, inputs.delta), cases.target, damping=inputs.damping)
        return maker(inputs.meta_params, inputs.tasks, inputs.test_tasks, inputs.factor, weights=inputs.weights)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("side", "leaf", "bad"),
    # Infinity elsewhere is an input at which tanh, or the slope of log cosh, is a number.
    [("support", "x", np.nan), ("support", "y", np.nan), ("support", "y", np.inf), ("query", "y", np.nan)],
)
@pytest.mark.parametrize("solver", ["default", "dense"])
def test_a_bad_number_in_one_tasks_data_is_told(solver, side, leaf, bad):
    """All tasks share one Hessian, so that no score is right; none may look as if it were."""
    run = default_scores() if solver == "default" else cases.scores_of(STRUCTURE)
    found = run(INPUTS._replace(tasks=spoilt(side, leaf, bad)))
    assert int(found.info.status) == SolveStatus.NONFINITE
    with pytest.raises(mi.SolveError, match=r"NONFINITE.*look for it in the data"):
        mi.check(found)
    real = np.asarray(INPUTS.tasks.query_mask)
    assert not np.any(np.isfinite(np.asarray(found.query)[real]))


def test_a_weight_of_0_does_not_take_a_bad_number_away_and_says_so():
    weights = INPUTS.weights._replace(task=INPUTS.weights.task.at[1].set(0))
    found = cases.scores_of(STRUCTURE)(INPUTS._replace(tasks=spoilt("query", "y", np.nan), weights=weights))
    with pytest.raises(mi.SolveError, match="NONFINITE"):
        mi.check(found)


def test_padding_takes_a_bad_number_away():
    tasks = spoilt("support", "y", np.nan)
    mask = tasks.support_mask.at[1, 0].set(False)
    clean = INPUTS.tasks._replace(support_mask=mask)
    found = cases.scores_of(STRUCTURE)(INPUTS._replace(tasks=tasks._replace(support_mask=mask)))
    expected = cases.scores_of(STRUCTURE)(INPUTS._replace(tasks=clean))
    assert int(found.info.status) == SolveStatus.CONVERGED
    jax.tree.map(np.testing.assert_array_equal, cases.values(found), cases.values(expected))


def test_a_bad_number_in_one_tasks_data_leaves_the_others_gradients_as_they_are():
    gradients = jax.jit(jax.vmap(mi.total_gradient(cases.problem("closed_form", 0.5)), in_axes=(None, 0, 0)))
    clean = gradients(INPUTS.meta_params, INPUTS.tasks, INPUTS.weights)
    dirty = gradients(INPUTS.meta_params, spoilt("query", "y", np.nan), INPUTS.weights)
    for before, after in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(np.asarray(after)[[0, 2]], np.asarray(before)[[0, 2]])
        assert np.all(np.isnan(np.asarray(after)[1]))


def test_a_bad_held_out_task_leaves_the_scores_for_the_others_as_they_are():
    shared = cases.Inputs(None, None, None, None, 0, None, None)
    lanes = jax.jit(jax.vmap(cases.scores_of(STRUCTURE), in_axes=(shared,)))
    test = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), INPUTS.test_tasks)
    clean = lanes(INPUTS._replace(test_tasks=test))
    bad = test._replace(query={**test.query, "y": test.query["y"].at[1, 0, 0].set(np.nan)})
    dirty = lanes(INPUTS._replace(test_tasks=bad))
    assert dirty.info.status.tolist() == [SolveStatus.CONVERGED, SolveStatus.NONFINITE, SolveStatus.CONVERGED]
    with pytest.raises(mi.SolveError, match=r"1 of 3 solves ended NONFINITE .right-hand sides 1;"):
        mi.check(dirty)
    for before, after in zip(cases.values(clean), cases.values(dirty), strict=True):
        np.testing.assert_array_equal(np.asarray(after)[[0, 2]], np.asarray(before)[[0, 2]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["task", "support", "query", "meta_params"])
def test_a_bad_weight_or_meta_parameter_is_refused_or_told(where, bad):
    if where == "meta_params":
        scale = INPUTS.meta_params["scale"].at[0].set(bad)
        inputs = INPUTS._replace(meta_params={**INPUTS.meta_params, "scale": scale})
        expected = r"meta_params\['scale'\]: expected finite"
    else:
        values = getattr(INPUTS.weights, where)
        values = values.at[(1,) + (0,) * (values.ndim - 1)].set(bad)
        inputs = INPUTS._replace(weights=INPUTS.weights._replace(**{where: values}))
        expected = rf"weights\.{where}: expected finite"
    maker = mi.influence_scores(cases.problem("closed_form", 0.5), cases.target, damping=1.0)
    with pytest.raises(ValueError, match=expected):
        maker(inputs.meta_params, inputs.tasks, inputs.test_tasks, inputs.factor, weights=inputs.weights)
    if (where, bad) != ("meta_params", np.inf):  # tanh of infinity is a number
        assert int(cases.scores_of(STRUCTURE)(inputs).info.status) == SolveStatus.NONFINITE


ROOM = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1)))


def _inner(name):
    return {
        "without a minimum": lambda p, m, b: p * m + 0 * b[:, 0],
        "with a maximum": lambda p, m, b: -((p - m) ** 2) + 0 * b[:, 0],
        "with two minima": lambda p, m, b: (p**2 - m) ** 2 + 0 * b[:, 0],
        "flat": lambda p, m, b: 0 * p * m + 0 * b[:, 0],
    }[name]


@functools.cache
def _from_a_start(name):
    def run(first):
        adapt = mi.adaptation.implicit(_inner(name), lambda m, s: first)
        problem = mi.bilevel(lambda p, m, b: (p * b[:, 0] - m) ** 2, adapt, meta_regularizer=mi.l2(0.5))
        scores = mi.influence_scores(problem, jnp.square, solver=mi.solvers.dense())
        return scores(jnp.asarray(1.5), mi.Task(ROOM, ROOM))

    return jax.jit(run)


def _inner_scores(name, first):
    return _from_a_start(name)(jnp.asarray(first))


@pytest.mark.parametrize("name", ["without a minimum", "with a maximum"])
def test_an_inner_problem_without_a_minimum_is_told(name):
    found = _inner_scores(name, 0.3)
    assert not np.isfinite(float(found.info.inner_gradient_norm))
    with pytest.raises(mi.SolveError, match=r"no minimum|NONFINITE.*inner solve"):
        mi.check(found)


@pytest.mark.parametrize("sign", [1, -1])
def test_of_two_inner_minima_the_one_that_the_start_leads_to_is_taken(sign):
    """θ = ±√λ by λ alone, so that the answer is known."""
    found = _inner_scores("with two minima", 0.3 * sign)
    assert float(found.info.inner_gradient_norm) < 1e-9
    mi.check(found)

    def objective(meta_params, weight):
        losses = jnp.mean((sign * jnp.sqrt(meta_params) * ROOM[..., 0] - meta_params) ** 2, axis=1)
        return jnp.mean(weight * losses) + 0.25 * meta_params**2

    at, ones = jnp.asarray(1.5), jnp.ones(3)
    hessian = jax.hessian(objective)(at, ones)
    mixed = jax.jacfwd(jax.grad(objective), argnums=1)(at, ones)
    np.testing.assert_allclose(found.task, 2 * at * mixed / hessian, rtol=1e-7)


def test_a_flat_inner_problem_leaves_its_parameters_where_they_are():
    """Where the inner loss does not see λ, θ does not move with it, and only the direct term is left."""
    found = _inner_scores("flat", 0.3)
    with pytest.warns(mi.CouplingWarning, match="support example"):
        mi.check(found)
    at, ones = jnp.asarray(1.5), jnp.ones(3)

    def objective(meta_params, weight):
        losses = jnp.mean((0.3 * ROOM[..., 0] - meta_params) ** 2, axis=1)
        return jnp.mean(weight * losses) + 0.25 * meta_params**2

    mixed = jax.jacfwd(jax.grad(objective), argnums=1)(at, ones)
    np.testing.assert_allclose(found.task, 2 * at * mixed / jax.hessian(objective)(at, ones), rtol=1e-9)
    assert np.all(np.asarray(found.support) == 0)


def test_an_inner_start_at_a_stationary_point_that_is_no_minimum_is_told():
    """(θ² − λ)² at θ = 0: a maximum, at which Newton's method stands still."""
    found = _inner_scores("with two minima", 0.0)
    assert int(found.info.status) == SolveStatus.CONVERGED
    assert float(found.info.inner_gradient_norm) == np.inf
    budget = mi.error_budget(found)
    assert (budget.dominant, budget.inner_residual) == ("inner_residual", np.inf)
    with pytest.raises(mi.SolveError, match=r"no minimum.*negative eigenvalue.*regularise the inner objective"):
        mi.check(found)


@functools.cache
def _norms_on_quadratics():
    """(matrices, gradients, points) -> the norms that are reported, a lane each."""

    def one(matrix, slope, point):
        gradient = jax.grad(lambda p: 0.5 * (p - point) @ matrix @ (p - point) + slope @ p)
        return gradient_norm(*jax.linearize(gradient, point), point)

    return jax.jit(jax.vmap(one))


SPECTRA = {
    "well conditioned": (np.linspace(0.5, 4, 5), True),
    "of another unit": (1e-12 * np.linspace(0.5, 4, 5), True),
    "badly conditioned": (np.geomspace(1e-9, 1, 5), True),
    "singular": (np.asarray([0, 0, 1, 2, 3.0]), True),
    "zero": (np.zeros(5), True),
    "zero but for rounding": (np.asarray([-1e-12, 0.5, 1, 2, 3]), True),
    "with a negative eigenvalue": (np.asarray([-1, 0.5, 1, 2, 3]), False),
    "with a small negative eigenvalue": (np.asarray([-1e-6, 0.5, 1, 2, 3]), False),
    "with a negative eigenvalue of another unit": (1e-12 * np.asarray([-1, 0.5, 1, 2, 3]), False),
    "negative": (-np.linspace(0.5, 4, 5), False),
}


def test_a_negative_inner_eigenvalue_is_seen_wherever_it_points():
    """Of 40 random bases each; a gradient of 0 hides none of them."""
    rng = np.random.default_rng(5)
    for label, (spectrum, is_minimum) in SPECTRA.items():
        bases = np.linalg.qr(rng.normal(size=(40, 5, 5)))[0]
        bases[0] = np.eye(5)
        found = _norms_on_quadratics()(
            bases @ (spectrum[:, None] * bases.transpose(0, 2, 1)), np.zeros((40, 5)), rng.normal(size=(40, 5))
        )
        assert np.all(np.asarray(found) == (0 if is_minimum else np.inf)), label


def test_an_inner_gradient_that_no_curvature_ends_is_told_and_another_is_not():
    """At a point of length 1 and along eigenvalue 2 the minimum is half the gradient's length away."""
    bases = np.broadcast_to(np.diag([0, 0.5, 1, 2, 3.0]), (6, 5, 5))
    points = np.broadcast_to(np.eye(5)[0], (6, 5))
    along = np.eye(5)[[3, 3, 3, 0, 0, 0]]
    lengths = np.asarray([1e-13, 1e-2, 1.9, 1e-13, 1e-2, np.nan])
    found = np.asarray(_norms_on_quadratics()(bases, lengths[:, None] * along, points))
    np.testing.assert_allclose(found[:4], lengths[:4], rtol=1e-12)
    assert found[4] == np.inf
    assert np.isnan(found[5])
    beyond = _norms_on_quadratics()(bases, np.full((6, 1), 2.1) * along[:1], points)
    assert np.all(np.asarray(beyond) == np.inf)


@functools.cache
def _cut_short():
    """(number of inner gradient steps) -> scores and the inner residual."""

    def run(num_steps):
        minimizer = mi.adaptation.optax_minimizer(optax.sgd(0.1), num_steps)
        problem = cases.problem("implicit", INPUTS.delta, minimizer=minimizer)
        maker = mi.influence_scores(problem, cases.target, solver=mi.solvers.dense(), damping=INPUTS.damping)
        return maker(INPUTS.meta_params, INPUTS.tasks, INPUTS.test_tasks, INPUTS.factor, weights=INPUTS.weights)

    return jax.jit(run)


def test_the_error_of_an_inner_solve_cut_short_goes_with_its_residual():
    """To first order it is the residual over the inner curvature, times how fast scores change with θ: one ratio."""
    exact = ravel(cases.values(cases.scores_of(STRUCTURE)(INPUTS)))
    errors, residuals = [], []
    for num_steps in (40, 80, 120, 160):
        found = _cut_short()(jnp.int32(num_steps))
        errors.append(np.linalg.norm(ravel(cases.values(found)) - exact))
        residuals.append(float(found.info.inner_gradient_norm))
        assert mi.error_budget(found).inner_residual == pytest.approx(residuals[-1])
    ratios = np.asarray(errors) / np.asarray(residuals)
    assert np.all(np.diff(np.log(residuals)) < -1)
    assert np.max(ratios) <= 3 * np.min(ratios)
    assert np.max(ratios) < 10


def test_a_target_that_does_not_depend_on_the_meta_parameters_has_scores_of_0():
    maker = mi.influence_scores(
        cases.problem("closed_form", 0.5), lambda m, x: jnp.sum(x), damping=1.0, solver=mi.solvers.cg()
    )
    found = jax.jit(maker)(INPUTS.meta_params, INPUTS.tasks, jnp.ones(3))
    assert all(np.all(np.asarray(part) == 0) for part in cases.values(found))
    assert int(found.info.status) == SolveStatus.CONVERGED
    assert float(found.info.relative_residual) == 0
    with pytest.warns(mi.SlopeWarning, match="gradient is exactly 0"):
        mi.check(found)


def test_a_task_of_zero_gradient_has_no_influence():
    """Its losses are flat at the labels that it predicts, and its lane of the solves is told as solved."""
    zero = INPUTS.tasks._replace(
        **{
            side: jax.tree.map(lambda leaf: leaf.at[1].set(0), getattr(INPUTS.tasks, side))
            for side in mi.Task._fields[:2]
        }
    )
    meta_params = {"scale": jnp.asarray([0.5, -0.3]), "head": (jnp.zeros(()), (jnp.zeros(()), jnp.zeros(2)))}
    maker = mi.task_if(cases.problem("closed_form", 0.5), damping=1.0)
    found = jax.jit(maker)(meta_params, zero)
    assert all(np.all(np.asarray(leaf)[1] == 0) for leaf in jax.tree.leaves(found.delta))
    assert np.all(np.asarray(found.info.status) == SolveStatus.CONVERGED)
    assert np.any(ravel(jax.tree.map(lambda leaf: leaf[0], found.delta)))


def test_one_task_of_one_example_and_one_meta_parameter():
    """θ = λ x y / (1 + λ² x²) by hand, and everything else by scalar derivatives."""
    x, y, queried, label, at = 0.7, 1.3, -0.4, 0.9, 0.8

    def theta(meta_params, u):
        return u * meta_params * x * y / (1 + u * (meta_params * x) ** 2)

    def objective(meta_params, weights):
        task, u, v = weights
        return task * v * (theta(meta_params, u) * meta_params * queried - label) ** 2 + 0.25 * meta_params**2

    def adapt(meta_params, support, c):
        inputs = meta_params * support["x"]
        return jnp.sum(c * inputs * support["y"]) / (1 + jnp.sum(c * inputs**2))

    def loss(params, meta_params, batch):
        return (params * meta_params * batch["x"] - batch["y"]) ** 2

    problem = mi.bilevel(loss, mi.adaptation.closed_form(adapt), meta_regularizer=mi.l2(0.5))
    task = mi.Task(*({"x": jnp.asarray([[a]]), "y": jnp.asarray([[b]])} for a, b in ((x, y), (queried, label))))
    found = jax.jit(mi.influence_scores(problem, jnp.sin))(jnp.asarray(at), task)
    hessian = jax.hessian(objective)(at, (1.0, 1.0, 1.0))
    mixed = jax.jacfwd(jax.grad(objective), argnums=1)(at, (1.0, 1.0, 1.0))
    # Removal lowers the weight, and dλ*/dw = −mixed / H.
    expected = [np.cos(at) * float(part) / abs(float(hessian)) for part in mixed]
    np.testing.assert_allclose(ravel(cases.values(found)), expected, rtol=1e-10)
