"""Baselines against their own dense definitions, by loops over the gradients of single data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
import runs
import tiny
from metainfluence import baselines
from oracles import paper
from oracles.problems import spec
from oracles.reference import bases, derivatives, flat, ravel, relative_error, row, solved

DAMPING = 0.2
RATES = np.array([0.3, -0.1])


@pytest.mark.parametrize("problem_name", [pytest.param("implicit_head", marks=pytest.mark.slow), "ridge_head"])
def test_direct_if_takes_the_adapted_parameters_for_constants_of_lambda(problem_name):
    point = solved(problem_name)
    coefficients = runs.target_coefficients(problem_name)
    direct = baselines.direct_if(runs.problem(problem_name), runs.target, solver=mi.solvers.dense(), damping=DAMPING)

    def run(meta_params, tasks, weights):
        return direct(meta_params, tasks, coefficients, weights=weights)

    scores = jax.jit(run)(point.meta_params, spec(problem_name).tasks, point.weights)
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
    direct = baselines.direct_if(runs.problem("imaml"), runs.target, solver=mi.solvers.dense(), damping=DAMPING)
    scores = jax.jit(direct)(point.meta_params, spec("imaml").tasks, coefficients)
    for kind in mi.Weights._fields:
        assert np.all(getattr(scores, kind) == 0)


def test_identity_is_the_inner_product_of_gradients():
    point = solved("maml_sgd")
    coefficients = runs.target_coefficients("maml_sgd")
    tracin = mi.influence_scores(runs.problem("maml_sgd"), runs.target, solver=mi.solvers.identity())

    def run(meta_params, tasks, weights):
        return tracin(meta_params, tasks, coefficients, weights=weights)

    scores = jax.jit(run)(point.meta_params, spec("maml_sgd").tasks, point.weights)
    slope = ravel(coefficients) * np.cos(point.lam)
    for kind in mi.Weights._fields:
        expected = getattr(point.weights, kind) * (getattr(point.derivatives.mixed, kind) @ slope)
        assert relative_error(getattr(scores, kind), expected) <= 1e-9


NAME = "ridge_head"
OPTIONS = {"dim": 7, "damping": 0.4, "seed": 5}
EDITED = {"tasks": [1], "query": [(0, 2)], "support": [(2, 1)]}
METHODS = {
    "trak": lambda p, t: baselines.trak(p, t, **OPTIONS),
    "tlxml": lambda p, t: baselines.tlxml(p, t, threshold=0.12),
    "tlxml by Lanczos": lambda p, t: baselines.tlxml(p, t, threshold=0.12, rank=100),
    "gradient_similarity": baselines.gradient_similarity,
    "plain_loss": baselines.plain_loss,
    "plain_loss in chunks": lambda p, t: baselines.plain_loss(p, t, batch_size=3),
    "random_scores": lambda p, t: baselines.random_scores(p, t, seed=3),
}
STACKED = {
    "tracin": lambda p, t: baselines.tracin(p, t, RATES),
    "trak ensemble in chunks": lambda p, t: baselines.trak(p, t, **OPTIONS, ensemble=True, batch_size=3),
}
EDITS = {
    "gradient_ascent": lambda p: baselines.gradient_ascent(p, 0.3, 3),
    "fine_tune": lambda p: baselines.fine_tune(p, optax.sgd(0.2, momentum=0.5), 3),
}


def moved(lam):
    """Two checkpoints on the way: away from the optimum, where the gradient is not 0."""
    return np.stack([lam, lam + 0.1 * np.random.default_rng(8).normal(size=lam.shape)])


def new_weights(weights):
    return mi.drop(weights, **EDITED)


@pytest.fixture(scope="module")
def found():
    """Everything for one problem, in one compiled function."""
    point, problem, coefficients = solved(NAME), runs.problem(NAME), runs.target_coefficients(NAME)

    def run(meta_params, stacked, tasks, weights, coefficients):
        here = {
            name: make(problem, runs.target)(meta_params, tasks, coefficients, weights=weights)
            for name, make in METHODS.items()
        }
        there = {
            name: make(problem, runs.target)(stacked, tasks, coefficients, weights=weights)
            for name, make in STACKED.items()
        }
        edits = {name: make(problem)(meta_params, tasks, new_weights(weights), weights) for name, make in EDITS.items()}
        return here | there | edits

    stacked = jax.vmap(point.flat.unravel)(jnp.asarray(moved(point.lam)))
    results = jax.jit(run)(point.meta_params, stacked, spec(NAME).tasks, point.weights, coefficients)
    return jax.tree.map(np.asarray, results)


def slope_at(lam):
    return ravel(runs.target_coefficients(NAME)) * np.cos(lam)


def agree(scores, expected, tolerance=1e-9):
    for kind in mi.Weights._fields:
        assert relative_error(getattr(scores, kind), getattr(expected, kind)) <= tolerance


def by_datum(mixed, weights, score):
    """w · score(gradient) of every single datum, one after the other; gradients as ∂_w D_λF."""

    def field(kind):
        values, gradients = np.asarray(getattr(weights, kind)), getattr(mixed, kind)
        return np.array([values[at] * score(gradients[at]) for at in np.ndindex(values.shape)]).reshape(values.shape)

    return mi.Weights(*map(field, mi.Weights._fields))


def projection(key, size):
    """P as its docstring has it: row d of random signs from the key folded with d."""
    return np.stack([jax.random.rademacher(jax.random.fold_in(key, d), (size,), float) for d in range(7)])


def trak_direction(lam, key, mixed, weights):
    """Pᵀ (Φ + μI)⁻¹ P ∇φ, and μ."""
    signs, count = projection(key, len(lam)), len(weights.task)
    features = [signs @ (count * gradient) for gradient in mixed.task]
    covariance = sum(w * np.outer(f, f) for w, f in zip(np.asarray(weights.task), features, strict=True)) / count
    shift = 0.4 * np.trace(covariance) / 7
    return signs.T @ np.linalg.solve(covariance + shift * np.eye(7), signs @ slope_at(lam)), shift


def test_trak_against_its_definition(found):
    point = solved(NAME)
    direction, shift = trak_direction(point.lam, jax.random.key(5), point.derivatives.mixed, point.weights)
    expected = by_datum(point.derivatives.mixed, point.weights, lambda gradient: gradient @ direction)
    agree(found["trak"], expected)
    info, slope = found["trak"].info, slope_at(point.lam)
    residual = np.linalg.norm(slope - point.derivatives.hessian @ direction) / np.linalg.norm(slope)
    assert info.relative_residual == pytest.approx(residual, rel=1e-9)
    assert info.damping == pytest.approx(shift, rel=1e-9)


def test_trak_of_an_ensemble_is_the_mean_of_its_members(found):
    weights, parts = solved(NAME).weights, []
    for lam, key in zip(moved(solved(NAME).lam), jax.random.split(jax.random.key(5), 2), strict=True):
        mixed = derivatives(NAME, lam, weights).mixed
        direction, _ = trak_direction(lam, key, mixed, weights)
        parts.append(by_datum(mixed, weights, lambda gradient, direction=direction: gradient @ direction))
    agree(found["trak ensemble in chunks"], jax.tree.map(lambda a, b: (a + b) / 2, *parts))
    assert found["trak ensemble in chunks"].info.status.shape == (2,)


def test_tracin_sums_inner_products_over_checkpoints(found):
    weights, parts = solved(NAME).weights, []
    for lam, rate in zip(moved(solved(NAME).lam), RATES, strict=True):
        mixed, slope = derivatives(NAME, lam, weights).mixed, slope_at(lam)
        parts.append(by_datum(mixed, weights, lambda gradient, slope=slope, rate=rate: rate * gradient @ slope))
    agree(found["tracin"], jax.tree.map(np.add, *parts))
    info = found["tracin"].info
    assert info.outer_gradient_norm.shape == (2,)
    assert info.outer_gradient_norm[0] <= 1e-9 < info.outer_gradient_norm[1]


def test_tlxml_inverts_the_leading_eigenvalues_of_gauss_newton(found):
    point = solved(NAME)
    values, vectors = np.linalg.eigh(paper.curvatures(NAME)["gauss_newton"])
    kept = values > 0.12 * values[-1]
    assert 0 < np.sum(kept) < len(values)
    slope = slope_at(point.lam)
    direction = sum(v * (v @ slope) / value for value, v in zip(values[kept], vectors.T[kept], strict=True))
    expected = by_datum(point.derivatives.mixed, point.weights, lambda gradient: gradient @ direction)
    agree(found["tlxml"], expected)
    agree(found["tlxml by Lanczos"], expected)


def test_gradient_similarity_is_the_cosine(found):
    point = solved(NAME)
    slope = slope_at(point.lam)

    def cosine(gradient):
        size = np.linalg.norm(gradient) * np.linalg.norm(slope)
        return gradient @ slope / size if size > 0 else 0.0

    ones = jax.tree.map(np.ones_like, point.weights)
    agree(found["gradient_similarity"], by_datum(point.derivatives.mixed, ones, cosine))


def test_plain_loss_is_minus_the_loss_of_every_datum(found):
    point, problem, s = solved(NAME), flat(NAME), spec(NAME)
    thetas = bases(NAME)(point.lam, point.weights).theta
    expected = jax.tree.map(lambda w: np.zeros(w.shape), point.weights)
    for k, theta in enumerate(thetas):
        task, w = row(s.tasks, k), row(point.weights, k)
        for side, values in (("support", expected.support), ("query", expected.query)):
            batch, mask = getattr(task, side), np.asarray(getattr(task, f"{side}_mask"))
            losses = np.asarray(problem.losses(theta, point.lam, task._replace(query=batch)))
            values[k] = np.where(mask, -getattr(w, side) * losses, 0)
        expected.task[k] = np.asarray(w.task) * np.sum(expected.query[k]) / np.sum(np.asarray(task.query_mask))
    agree(found["plain_loss"], expected)
    agree(found["plain_loss in chunks"], expected)


def test_random_scores_know_nothing_but_the_padding(found):
    tasks, scores = spec(NAME).tasks, found["random_scores"]
    for kind, mask in (("support", tasks.support_mask), ("query", tasks.query_mask)):
        np.testing.assert_array_equal(getattr(scores, kind) != 0, mask)
    assert len(np.unique(scores.task)) == len(scores.task)
    weights = mi.drop(mi.unit_weights(tasks), tasks=[2])
    again, other = (
        baselines.random_scores(seed=seed)(spec(NAME).meta_params, tasks, weights=weights) for seed in (3, 4)
    )
    np.testing.assert_array_equal(np.asarray(again.task) == scores.task, [True, True, False, True])
    assert again.task[2] == 0
    assert not np.any(np.asarray(other.task)[:2] == scores.task[:2])
    many = baselines.random_scores()(jnp.ones(1), mi.Task((), jnp.ones((4000, 1))))
    assert abs(np.mean(many.task)) <= 4 / 4000**0.5


@pytest.mark.parametrize("name", [*METHODS, *STACKED])
def test_no_baseline_claims_to_have_solved(name, found):
    info = found[name].info
    assert np.all(info.status == mi.SolveStatus.MAX_STEPS)
    unsolved = name.startswith(("plain_loss", "random"))
    assert np.all(np.isnan(info.relative_residual) if unsolved else info.relative_residual > 1e-3)
    with pytest.raises(mi.SolveError, match="MAX_STEPS"):
        mi.check(found[name])


def gradient_of(lam, weights):
    return derivatives(NAME, lam, weights).gradient


def test_gradient_ascent_climbs_the_loss_of_what_is_removed(found):
    old, lam = solved(NAME).weights, np.asarray(solved(NAME).lam)
    new, norms = new_weights(old), []
    for _ in range(3):
        lam = lam + 0.3 * (gradient_of(lam, old) - gradient_of(lam, new))
        norms.append(np.linalg.norm(gradient_of(lam, new)))
    edited = found["gradient_ascent"]
    assert relative_error(ravel(edited.meta_params), lam) <= 1e-9
    np.testing.assert_allclose(edited.info.outer_gradient_norm, norms, rtol=1e-8)


def test_fine_tuning_descends_on_what_is_left(found):
    lam = np.asarray(solved(NAME).lam)
    new, trace, norms = new_weights(solved(NAME).weights), np.zeros_like(lam), []
    for _ in range(3):
        trace = 0.5 * trace + gradient_of(lam, new)
        lam = lam - 0.2 * trace
        norms.append(np.linalg.norm(gradient_of(lam, new)))
    edited = found["fine_tune"]
    assert relative_error(ravel(edited.meta_params), lam) <= 1e-9
    np.testing.assert_allclose(edited.info.outer_gradient_norm, norms, rtol=1e-8)
    assert np.all(np.isnan(edited.info.relative_residual))
    assert np.all(edited.info.num_matvecs == 0)


def pull(meta_params, task, weights):
    """A task loss whose levels cannot be told apart, the mean over its examples."""
    pulls = jnp.mean(weights.support * task.support)
    return jnp.mean(weights.query * (meta_params - pulls - task.query) ** 2)


def test_plain_loss_of_a_task_loss_has_no_losses_of_support_examples():
    rng = np.random.default_rng(1)
    tasks = mi.Task(jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=(3, 2))))
    scores = baselines.plain_loss(mi.from_task_loss(pull))(jnp.asarray(0.3), tasks)
    errors = (0.3 - np.mean(tasks.support, axis=1)[:, None] - tasks.query) ** 2
    np.testing.assert_allclose(scores.query, -errors, rtol=1e-12)
    np.testing.assert_allclose(scores.task, -np.mean(errors, axis=1), rtol=1e-12)
    assert np.all(np.isnan(scores.support))


def test_plain_loss_where_support_examples_look_otherwise():
    tasks = tiny.TASKS._replace(query={**tiny.TASKS.query, "id": jnp.zeros((3, 5), jnp.int32)})
    scores = baselines.plain_loss(tiny.PROBLEM)(tiny.LAMBDA, tasks)
    assert np.all(np.isnan(scores.support))
    assert np.all(np.isfinite(scores.query))


# Each is called with the tiny problem, and has to refuse what is bad before it computes anything.
SCORERS = {
    "trak": functools.partial(baselines.trak, dim=2),
    "gradient_similarity": baselines.gradient_similarity,
    "plain_loss": baselines.plain_loss,
    "random_scores": baselines.random_scores,
}
scorer = pytest.mark.parametrize("scorer", SCORERS)


@scorer
def test_bad_data(scorer):
    run = SCORERS[scorer](tiny.PROBLEM, tiny.target)
    with pytest.raises(ValueError, match=r"weights\.task.*expected.*\(3,\).*got.*\(4,\)"):
        run(tiny.LAMBDA, tiny.TASKS, weights=tiny.WEIGHTS._replace(task=jnp.ones(4)))
    with pytest.raises(ValueError, match=r"meta_params\['scale'\].*expected finite"):
        run({"scale": jnp.asarray(jnp.nan)}, tiny.TASKS)
    with pytest.raises(TypeError, match=r"tasks.*expected.*Task.*got tuple"):
        run(tiny.LAMBDA, tuple(tiny.TASKS))


@pytest.mark.parametrize("name", EDITS)
def test_bad_data_of_edits(name):
    run = EDITS[name](tiny.PROBLEM)
    with pytest.raises(ValueError, match=r"new_weights\.task.*expected.*\(3,\).*got.*\(4,\)"):
        run(tiny.LAMBDA, tiny.TASKS, tiny.WEIGHTS._replace(task=jnp.ones(4)))
    with pytest.raises(ValueError, match=r"^weights\.task.*expected.*\(3,\).*got.*\(4,\)"):
        run(tiny.LAMBDA, tiny.TASKS, tiny.WEIGHTS, tiny.WEIGHTS._replace(task=jnp.ones(4)))


def stacked(*lengths):
    return {str(k): jnp.ones((length, 2)) for k, length in enumerate(lengths)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, t: baselines.trak(p, t, dim=0), r"^dim: expected a positive integer, got 0"),
        (lambda p, t: baselines.trak(p, t, damping=-1.0), r"^damping: expected a non-negative number, got -1"),
        (lambda p, t: baselines.trak(p, t, batch_size=0), r"^batch_size: expected.*got 0"),
        (lambda p, t: baselines.trak(p, 3)(tiny.LAMBDA, tiny.TASKS), r"^target: expected a function.*got 3"),
        (
            lambda p, t: baselines.trak(p, t, ensemble=True)(stacked(2, 3), tiny.TASKS),
            r"^meta_params\['1'\]: expected a leading axis for the members.*got shape \(3, 2\)",
        ),
        (
            lambda p, t: baselines.trak(p, t, ensemble=True)(tiny.LAMBDA, tiny.TASKS),
            r"^meta_params\['scale'\]: expected a leading axis.*got shape \(\)",
        ),
        (lambda p, t: baselines.tlxml(p, t), r"^curvature: gauss_newton expected.*outer_head"),
        (lambda p, t: baselines.tlxml(p, t, threshold=1.0), r"^threshold: expected.*got 1.0"),
        (lambda p, t: baselines.tlxml(p, t, threshold=-0.1), r"^threshold: expected.*got -0.1"),
        (lambda p, t: baselines.tlxml(p, t, rank=0), r"^rank: expected a positive integer, got 0"),
        (lambda p, t: baselines.tracin(p, t, "0.1"), r"^learning_rates: expected numbers.*got '0.1'"),
        (lambda p, t: baselines.tracin(p, t, 0.1), r"^learning_rates: expected shape \[C\].*got \(\)"),
        (lambda p, t: baselines.tracin(p, t, []), r"^learning_rates: expected shape \[C\].*got \(0,\)"),
        (lambda p, t: baselines.tracin(p, t, [0.1, np.nan]), r"^learning_rates: expected finite"),
        (
            lambda p, t: baselines.tracin(p, t, [0.1])(stacked(2), tiny.TASKS),
            r"^meta_params: expected the 1 checkpoints of learning_rates, got 2",
        ),
        (
            lambda p, t: baselines.tracin(p, t, [0.1])(stacked(0), tiny.TASKS),
            r"^meta_params\['0'\]: expected a leading axis for the checkpoints.*got shape \(0, 2\)",
        ),
        (lambda p, t: baselines.gradient_similarity(p, 3), r"^target: expected a function.*got 3"),
        (lambda p, t: baselines.plain_loss(p, batch_size=-1), r"^batch_size: expected.*got -1"),
        (lambda p, t: baselines.gradient_ascent(p, 0.0, 3), r"^learning_rate: expected a positive number, got 0.0"),
        (lambda p, t: baselines.gradient_ascent(p, 0.1, 0), r"^num_steps: expected a positive integer, got 0"),
        (lambda p, t: baselines.fine_tune(p, optax.sgd(0.1), 1.5), r"^num_steps: expected a positive integer, got 1.5"),
        (lambda p, t: baselines.fine_tune(p, "sgd", 3), r"^optimizer: expected one of optax.*got 'sgd'"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(tiny.PROBLEM, tiny.target)
