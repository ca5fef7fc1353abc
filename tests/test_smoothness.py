"""Smoothness: 1 for what is linear, little for what is rough, and each part's own where only that part bends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence.trust._smoothness import signs, sizes_of
from oracles.parts import lenient, regression_tasks

TASKS = regression_tasks(np.random.default_rng(3), [5] * 10, [5] * 10, inputs=3)
SLOPE = jnp.asarray(np.random.default_rng(6).normal(size=3))
SGD = optax.sgd(0.1, momentum=0.9)


def linear_loss(meta_params, task, weights):
    """Linear in λ; with the meta-regulariser F is a quadratic, and λ_N(w) of gradient descent is affine."""
    return weights.query @ (task.query["y"][:, 0] * (task.query["x"] @ meta_params)) / weights.query.size


QUADRATIC = mi.from_task_loss(linear_loss, meta_regularizer=mi.l2(0.5))


def bent_inside(bend, head):
    """θ = bend(λ), one step further, judged by head(x θ − y)."""

    def adapt(meta_params, support, coefficients):
        residual = support["x"] @ meta_params - support["y"][:, 0]
        return bend(meta_params - 0.2 * ((coefficients * residual) @ support["x"]))

    def losses(params, meta_params, query):
        del meta_params
        return head(query["x"] @ params - query["y"][:, 0])

    return mi.bilevel(losses, mi.adaptation.closed_form(adapt))


def test_a_quadratic_under_gradient_descent_is_linear_in_every_number():
    found = mi.smoothness(mi.training(QUADRATIC, SGD, 12))(SLOPE, TASKS)
    for name in ("score", "sign", "size", "derivative", "optimizer", "outer"):
        np.testing.assert_allclose(getattr(found, name), 1.0, atol=1e-9, err_msg=name)
    assert found.inner is None
    assert found.verdict == "smooth"
    assert "trajectory" in found.advice


def test_a_smooth_run_scores_near_one_and_a_rough_one_much_less():
    smooth = mi.training(bent_inside(jnp.tanh, jnp.square), lenient(optax.adam(0.01, eps_root=1e-5)), 20)
    rough = mi.training(bent_inside(jax.nn.leaky_relu, jnp.abs), lenient(optax.adam(0.5, eps_root=1e-16)), 30)
    found, other = (mi.smoothness(run, step_sizes=(0.25, 1.0))(SLOPE, TASKS) for run in (smooth, rough))
    assert found.verdict == "smooth"
    assert found.score >= 0.97
    assert np.all(found.sign >= 0.9)
    assert np.all(found.size >= 0.9)
    assert min(found.optimizer, found.inner, found.outer) >= 0.97
    assert other.verdict == "rough"
    assert other.score <= 0.5
    assert np.mean(other.sign) <= 0.6
    assert np.mean(other.size) <= 0.6
    assert "segments" in other.advice
    for each in (found, other):
        numbers = np.concatenate([np.ravel(value) for value in each[2:8]])
        assert np.all(np.abs(numbers) <= 1 + 1e-12)


def test_what_a_small_eps_root_makes_rough_is_laid_to_the_optimizer():
    """The signs of a gradient, nearly: nothing is left of a quadratic's smoothness."""
    run = mi.training(QUADRATIC, lenient(optax.adam(0.3, b1=0.0, b2=0.0, eps_root=1e-16)), 20)
    found = mi.smoothness(run, step_sizes=(1.0,))(SLOPE, TASKS)
    assert found.outer == pytest.approx(1.0, abs=1e-9)
    assert found.optimizer <= 0.5
    assert found.score <= 0.5
    assert "eps_root" in found.advice


@pytest.mark.parametrize(
    ("bend", "head", "bent"),
    [
        (jnp.tanh, jnp.square, "inner"),
        (lambda params: params, lambda residual: jnp.tanh(residual) ** 2, "outer"),
    ],
)
def test_each_level_is_told_from_the_other(bend, head, bent):
    """Gradient descent is linear in its gradient, and so is one of the levels in its arguments."""
    run = mi.training(bent_inside(bend, head), optax.sgd(0.5), 20)
    found = mi.smoothness(run, step_sizes=(1.0,), share=0.5, num_directions=2)(SLOPE, TASKS)
    levels = {"inner": found.inner, "outer": found.outer}
    assert levels.pop(bent) < 0.999
    assert levels.popitem()[1] == pytest.approx(1.0, abs=1e-6)
    assert found.optimizer == pytest.approx(1.0, abs=1e-9)


def test_the_numbers_are_those_of_runs_at_other_weights():
    run = mi.training(bent_inside(jnp.tanh, jnp.square), optax.sgd(0.5), 10, tasks_per_step=4, seed=3)

    def target(meta_params, factor):
        return factor * jnp.sin(meta_params)

    factor = jnp.asarray([1.0, 2.0, 3.0])
    weights = mi.unit_weights(TASKS)
    # A group of all tasks, so that there is but one.
    measure = mi.smoothness(run, target, step_sizes=(0.3,), num_directions=1, share=1.0, parts=False)
    found = measure(SLOPE, TASKS, factor, weights=weights)

    def end(task_weight):
        moved = weights._replace(task=jnp.full(10, task_weight))
        return np.asarray(target(jax.jit(run)(SLOPE, TASKS, moved), factor))

    here, down, up = end(1.0), end(0.7), end(1.3)
    slope = (end(1.0 + 1e-5) - end(1.0 - 1e-5)) / 2e-5
    a, b = down - here, here - up
    assert found.sign[0] == pytest.approx(
        np.sum((abs(a) + abs(b)) * np.sign(a * b)) / np.sum(abs(a) + abs(b)), abs=1e-9
    )
    assert found.size[0] == pytest.approx(2 * a @ b / (a @ a + b @ b), abs=1e-9)
    predicted = -0.3 * slope
    assert found.derivative[0] == pytest.approx(2 * a @ predicted / (a @ a + predicted @ predicted), abs=1e-7)
    assert (found.optimizer, found.inner, found.outer) == (None, None, None)


def test_a_loop_of_the_users_own_is_judged_by_its_end():
    def step(state, tasks, weights, key):
        del key
        return jax.tree.map(
            lambda m, g: m - 0.1 * g, state, jax.grad(mi.total_objective(QUADRATIC))(state, tasks, weights)
        )

    run = mi.training_loop(step, 5, meta_params=lambda state: state, batch=None)
    found = mi.smoothness(run, step_sizes=(0.5,), num_directions=2)(SLOPE, TASKS)
    assert found.score == pytest.approx(1.0, abs=1e-9)
    assert found.optimizer is None
    assert found.verdict == "smooth"


def test_the_seed_decides_and_nothing_else():
    run = mi.training(bent_inside(jnp.tanh, jnp.square), optax.sgd(0.5), 5)
    first, again, chunked, other = (
        mi.smoothness(run, step_sizes=(1.0,), num_directions=3, parts=False, **options)(SLOPE, TASKS)
        for options in ({}, {}, {"runs_at_once": 2}, {"seed": 1})
    )
    assert first.score == again.score
    assert chunked.score == pytest.approx(first.score, abs=1e-12)
    assert other.score != first.score


def test_a_run_that_answers_nothing_is_not_smooth_but_silent():
    """All units of a ReLU dead from the start: every difference is 0, and equal to its derivative."""

    def loss(meta_params, task, weights):
        hidden = jax.nn.relu(task.query["x"] @ meta_params - 1e3)
        return weights.query @ (hidden - task.query["y"][:, 0]) ** 2 / weights.query.size

    found = mi.smoothness(mi.training(mi.from_task_loss(loss), SGD, 3), num_directions=2)(SLOPE, TASKS)
    assert found.verdict == "silent"
    assert found.score == 0.0
    assert "does not answer the weights" in found.advice
    assert "ReLU" in found.advice
    chosen = mi.choose(smoothness=found, run=True)
    assert chosen.estimator == "optimum"
    assert "neither the run nor its checkpoints tell of any datum" in chosen.reason


def test_agreement_is_one_for_equals_minus_one_for_opposites_and_none_for_what_is_not_finite():
    left = np.array([1.0, -2.0, 3.0])
    assert sizes_of(left, left) == signs(left, 5 * left) == 1.0
    assert sizes_of(left, -left) == signs(left, -5 * left) == -1.0
    assert sizes_of(left, 3 * left) == pytest.approx(0.6)
    assert sizes_of(left, left * np.nan) == sizes_of(left, left * np.inf) == signs(left, left * np.nan) == 0.0
    assert sizes_of(left, 1e200 * left) == 0.0
    assert sizes_of(0 * left, 0 * left) == signs(0 * left, 0 * left) == 1.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_sizes": ()}, ValueError, "step_sizes: expected positive numbers"),
        ({"step_sizes": (1.0, -1.0)}, ValueError, "step_sizes: expected positive numbers"),
        ({"num_directions": 0}, ValueError, "num_directions: expected a positive integer, got 0"),
        ({"share": 0.0}, ValueError, "share: expected a number above 0"),
        ({"runs_at_once": 0}, ValueError, "runs_at_once: expected None or a positive integer"),
        ({"target": 3}, TypeError, "target: expected a function"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        mi.smoothness(mi.training(QUADRATIC, SGD, 2), **options)


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match=r"run: expected one made by metainfluence.training"):
        mi.smoothness(QUADRATIC)


@pytest.mark.parametrize(
    ("known", "estimator", "reason"),
    [
        ({"gradient_norm": 1e-5, "run": True, "smoothness": 0.99}, "optimum", "stationary"),
        ({"gradient_norm": 0.1}, "optimum", "only λ is at hand"),
        ({"gradient_norm": 0.1, "run": True, "smoothness": 0.99}, "trajectory", "smooth"),
        ({"gradient_norm": 0.1, "run": True, "smoothness": 0.3}, "segments", "not smooth"),
        ({"gradient_norm": 0.1, "run": True, "smoothness": 0.99, "share_removed": 0.5}, "segments", "50% of the tasks"),
        ({"run": True, "smoothness": 0.99, "share_removed": 0.05}, "trajectory", "smooth"),
        ({"checkpoints": True, "smoothness": 0.99}, "segments", "checkpoints are left"),
        ({"run": True}, "trajectory", "not measured"),
    ],
)
def test_the_rule(known, estimator, reason):
    chosen = mi.choose(**known)
    assert chosen.estimator == estimator
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"smoothness": 2.0}, "smoothness: expected a Smoothness"),
        ({"gradient_norm": -1.0}, "gradient_norm: expected a number from 0 on"),
        ({"gradient_norm": float("nan")}, "gradient_norm: expected a number from 0 on"),
        ({"share_removed": 1.5}, "share_removed: expected a number from 0 to 1"),
    ],
)
def test_a_rule_of_bad_numbers_is_refused(known, message):
    with pytest.raises(ValueError, match=message):
        mi.choose(**known)


def test_tasks_without_a_support_set_have_a_smoothness():
    problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
    tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
    run = mi.training(problem, optax.sgd(0.5), 3)
    found = mi.smoothness(run, num_directions=1, parts=False)(jnp.asarray(1.0), tasks)
    np.testing.assert_allclose(found.sign, 1.0)
