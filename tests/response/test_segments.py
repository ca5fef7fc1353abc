"""Segments against the dense formula, against the two limits that they have, and in what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

import convex
import metainfluence as mi
from metainfluence.response._decay import decay
from metainfluence.response._segments import problems_of_segments
from oracles.parts import lenient, regression_tasks
from oracles.reference import difference, offsets, ravel, relative_error, row, rows

NUM_STEPS, RATE, SIZE = 40, 0.05, 20


def adapted(meta_params, support, coefficients):
    """One step of gradient descent on a linear regression, written out, since it compiles fast."""
    residual = support["x"] @ meta_params["slope"] - support["y"][:, 0]
    return meta_params["slope"] - 0.5 * ((coefficients * residual) @ support["x"])


def outer_loss(params, meta_params, query):
    """Not convex, so that the Hessian has negative eigenvalues on the way."""
    return (jnp.tanh(query["x"] @ params) * meta_params["scale"] - query["y"][:, 0]) ** 2


PROBLEM = mi.bilevel(outer_loss, mi.adaptation.closed_form(adapted), meta_regularizer=mi.l2(1e-3))
TASKS = regression_tasks(np.random.default_rng(3), [4] * 8 + [3] * 8, [5] * 16, inputs=SIZE)
WEIGHTS = jax.tree.map(
    lambda leaf: leaf + 0.3 * np.sin(7.0 * np.arange(leaf.size)).reshape(leaf.shape), mi.unit_weights(TASKS)
)
START = {"scale": jnp.asarray(1.0), "slope": jnp.asarray(np.random.default_rng(5).normal(size=SIZE)) / SIZE**0.5}


@functools.cache
def trained(name, num_steps=NUM_STEPS):
    """(λ, optimiser state) after every step of a run, stacked."""
    optimizer = {"sgd": optax.sgd(RATE), "adam": lenient(optax.adamw(RATE, eps_root=1e-5, weight_decay=0.1))}[name]
    gradient = jax.grad(mi.total_objective(PROBLEM))

    def step(carry, _):
        meta_params, state = carry
        updates, state = optimizer.update(gradient(meta_params, TASKS, WEIGHTS), state, meta_params)
        carry = (optax.apply_updates(meta_params, updates), state)
        return carry, carry

    run = jax.jit(lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=num_steps)[1])
    return run(START)


def known(name, count=5):
    kept = [row(trained(name), NUM_STEPS // count * (k + 1) - 1) for k in range(count)]
    if name == "sgd":
        return mi.checkpoints(kept, num_steps=NUM_STEPS, learning_rate=RATE)
    return mi.checkpoints(kept, learning_rate=RATE, second_moments=True, eps_root=1e-5, weight_decay=0.1)


@functools.cache
def jets(name, count=5):
    """The dense Hessian and ∂_w D_λF `[p, all weights]` at all checkpoints, by derivatives that are JAX's alone."""
    unravel = ravel_pytree(START)[1]
    flat_weights, unravel_weights = ravel_pytree(WEIGHTS)

    def objective(lam, flat):
        return mi.total_objective(PROBLEM)(unravel(lam), TASKS, unravel_weights(flat))

    @jax.jit
    def jet(lam):
        hessian = jax.hessian(objective)(lam, flat_weights)
        return hessian, jax.jacfwd(jax.grad(objective), argnums=1)(lam, flat_weights)

    return [jax.tree.map(np.asarray, jet(ravel(each.meta_params))) for each in known(name, count)]


def dense_response(name, count=5):
    """dλ/dw `[p, all weights]` by the formula, with full eigendecompositions."""
    change = 0.0
    for each, (hessian, mixed) in zip(known(name, count), jets(name, count), strict=True):
        root = np.sqrt(ravel(each.preconditioner)) if each.preconditioner is not None else np.ones(len(hessian))
        scaled = hessian / root[:, None] / root[None] + each.weight_decay * np.eye(len(hessian))
        values, vectors = np.linalg.eigh(scaled)
        values = np.maximum(values, 0)
        decayed = np.exp(-each.time * values)
        integrated = np.where(values > 0, (1 - decayed) / np.where(values > 0, values, 1), each.time)
        inside = vectors.T @ (root[:, None] * change) if np.ndim(change) else 0.0
        inside = np.reshape(decayed, (-1, 1)) * inside - integrated[:, None] * (vectors.T @ (mixed / root[:, None]))
        change = (vectors @ inside) / root[:, None]
    return change


@functools.cache
def answered(name, **options):
    """A response at full rank, and what it says along a few slopes and directions; made and asked in two programs."""
    rank = options.get("rank", 1000)
    make = mi.segments(PROBLEM, rank=rank, tol=options.get("tol", 0.0), batch_size=options.get("batch_size"))
    at = jax.jit(make)(known(name), TASKS, WEIGHTS)
    return at, jax.jit(lambda at, slopes: at.vjp(slopes)), jax.jit(lambda at, directions: at.jvp(directions))


def random_like(tree, seed, count=None):
    rng = np.random.default_rng(seed)
    shape = () if count is None else (count,)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=shape + np.shape(leaf))), tree)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_scores_of_several_targets_against_the_dense_formula(name):
    at, vjp, _ = answered(name)
    slopes = random_like(START, 1, 3)
    found, info = vjp(at, slopes)
    assert relative_error(rows(found), rows(slopes) @ dense_response(name)) <= 1e-9
    assert info.status.tolist() == [mi.SolveStatus.CONVERGED] * 3


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_changes_along_several_directions_against_the_dense_formula(name):
    at, _, jvp = answered(name)
    directions = random_like(WEIGHTS, 2, 3)
    found = jvp(at, directions)
    assert relative_error(rows(found.delta), rows(directions) @ dense_response(name).T) <= 1e-9


def test_one_question_is_one_row_of_many_and_forward_is_reverse_transposed():
    at, vjp, jvp = answered("adam")
    slopes, directions = random_like(START, 1, 3), random_like(WEIGHTS, 2, 3)
    backward, forward = vjp(at, row(slopes, 1))[0], jvp(at, row(directions, 2)).delta
    assert relative_error(ravel(backward), rows(vjp(at, slopes)[0])[1]) <= 1e-12
    assert relative_error(ravel(forward), rows(jvp(at, directions).delta)[2]) <= 1e-12
    left, right = ravel(backward) @ ravel(row(directions, 2)), ravel(forward) @ ravel(row(slopes, 1))
    assert abs(left - right) <= 1e-10 * abs(left)


def test_default_products_rank_the_scores_as_the_dense_formula_does():
    for name in ("sgd", "adam"):
        at, vjp, _ = answered(name, rank=12, tol=1e-2)
        slope = random_like(START, 7)
        found, info = vjp(at, slope)
        expected = mi.Weights(*jax.tree.map(np.asarray, unraveled(ravel(slope) @ dense_response(name))))
        assert int(info.num_matvecs) <= 60
        for part, dense in zip(found, expected, strict=True):
            assert scipy.stats.spearmanr(np.ravel(part), np.ravel(dense)).statistic >= 0.99
        error = relative_error(ravel(found), ravel(expected))
        assert error <= 0.03
        # Below 0 the estimate is no bound.
        assert error <= 10 * np.sum(info.relative_error)
        assert info.relative_error.shape == info.min_curvature.shape == info.outer_gradient_norm.shape == (5,)


def unraveled(flat):
    return ravel_pytree(WEIGHTS)[1](jnp.asarray(flat))


def functions_of(values, time, rank, tol):
    """What the module makes of a diagonal operator, and the truth."""
    operator = mi.operators.from_matvec(jax.tree_util.Partial(jnp.multiply, jnp.asarray(values)), jnp.asarray(values))
    vector = np.random.default_rng(8).normal(size=len(values))
    found = jax.jit(lambda: decay(operator, jnp.asarray(vector), jnp.asarray(time), rank, tol))()
    decayed = np.exp(-time * np.maximum(values, 0))
    integrated = np.where(values > 0, (1 - decayed) / np.where(values > 0, values, 1), time)
    return found, decayed * vector, integrated * vector


@pytest.mark.parametrize("time", [0.1, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("rank", [3, 8, 20])
def test_the_error_estimate_bounds_the_error_of_positive_operators(time, rank):
    found, decayed, integrated = functions_of(np.linspace(0.0, 1.0, 60) ** 2, time, rank, 1e-13)
    error = np.linalg.norm(found.integrated - integrated) / np.linalg.norm(found.integrated)
    assert error <= found.error + 1e-12
    assert np.linalg.norm(found.decayed - decayed) * time / np.linalg.norm(found.integrated) <= found.error + 1e-12
    # And it is no idle bound.
    assert found.error <= 100 * error + 1e-12
    assert found.num_matvecs == rank or found.error <= 1e-13


def test_products_end_where_the_error_is_small_enough():
    values = np.linspace(0.0, 1.0, 60)
    taken = []
    for tol in (1e-1, 1e-3, 1e-6):
        found, _, integrated = functions_of(values, 10.0, 60, tol)
        assert np.linalg.norm(found.integrated - integrated) <= tol * np.linalg.norm(integrated)
        taken.append(int(found.num_matvecs))
    assert taken[0] < taken[1] < taken[2] < 30


def test_a_space_that_closes_is_exact():
    values = np.repeat([0.5, 2.0, -1.0], 7)
    found, decayed, integrated = functions_of(values, 1.5, 21, 1e-13)
    assert found.num_matvecs == 3
    assert relative_error(found.decayed, decayed) <= 1e-12
    assert relative_error(found.integrated, integrated) <= 1e-12
    assert found.smallest == pytest.approx(-1.0)


@functools.cache
def optimum():
    tasks, weights = convex.tasks(), mi.unit_weights(convex.tasks())
    return tasks, weights, jax.jit(convex.train)(weights, tasks, convex.START)


def test_one_endless_segment_is_the_response_of_the_optimum():
    tasks, weights, meta_params = optimum()
    slope, direction = random_like(meta_params, 9), random_like(weights, 10)
    at = mi.segments(convex.PROBLEM)([mi.Checkpoint(meta_params, 1e9)], tasks, weights)
    dense = mi.solvers.dense()
    scores = mi.influence_scores(convex.PROBLEM, jnp.vdot, solver=dense)(meta_params, tasks, slope, weights=weights)
    group = mi.group_influence(convex.PROBLEM, solver=dense)(meta_params, tasks, direction, weights)
    found = jax.tree.map(lambda w, d: -w * d, weights, at.vjp(slope)[0])
    assert relative_error(ravel(found), ravel(scores[:3])) <= 1e-9
    assert relative_error(at.jvp(direction).delta, group.delta) <= 1e-9


@functools.cache
def flow(num_steps=320, time=4.0):
    """λ along the gradient flow at weights moved up and down along a direction, `[4, steps + 1, p]`, by Runge–Kutta."""
    tasks, weights = convex.tasks(), mi.unit_weights(convex.tasks())
    direction = random_like(weights, 11)
    slope = jax.grad(mi.total_objective(convex.PROBLEM))
    width = time / num_steps

    def run(offset):
        moved = jax.tree.map(lambda w, d: w + offset * d, weights, direction)

        def step(at, _):
            first = -slope(at, tasks, moved)
            second = -slope(at + width / 2 * first, tasks, moved)
            third = -slope(at + width / 2 * second, tasks, moved)
            fourth = -slope(at + width * third, tasks, moved)
            at = at + width / 6 * (first + 2 * second + 2 * third + fourth)
            return at, at

        return jnp.concatenate([convex.START[None], jax.lax.scan(step, convex.START, length=num_steps)[1]])

    return direction, width, jax.jit(jax.vmap(run))(jnp.asarray([*offsets(), 0.0]))


@pytest.mark.parametrize(("place", "order"), [("end", 1), ("middle", 2)])
def test_many_short_segments_are_the_trajectory_of_the_gradient_flow(place, order):
    direction, width, paths = flow()
    expected = difference(paths[:4, -1])
    num_steps = paths.shape[1] - 1
    make = jax.jit(lambda known, tasks: mi.segments(convex.PROBLEM, tol=0.0)(known, tasks).jvp(direction).delta)
    errors, found = [], None
    for count in (10, 20, 40):
        steps = [num_steps // count * k for k in range(place == "end", count + 1)]
        states = [(paths[4, step], None) for step in steps]
        known = mi.checkpoints(states, steps=steps, learning_rate=width, place=place)
        assert sum(each.time for each in known) == pytest.approx(width * num_steps)
        found = make(known, convex.tasks())
        errors.append(relative_error(found, expected))
    rates = np.log2(np.asarray(errors[:-1]) / errors[1:])
    assert np.all(np.abs(rates - order) <= 0.2), (errors, rates)
    # The error that is allowed is that of all segments together, however many there are.
    assert relative_error(mi.segments(convex.PROBLEM)(known, convex.tasks()).jvp(direction).delta, found) <= 1e-2


def test_gradient_descent_of_small_steps_is_the_flow():
    direction, width, paths = flow()
    del direction
    gradient = jax.grad(mi.total_objective(convex.PROBLEM))
    end = jax.lax.fori_loop(0, 320, lambda _, at: at - width * gradient(at, convex.tasks()), convex.START)
    assert relative_error(end, paths[4, -1]) <= 5e-3


def test_chunks_of_tasks_answer_as_all_at_once():
    at, vjp, _ = answered("adam")
    chunked, _, _ = answered("adam", batch_size=5)
    slopes = random_like(START, 1, 3)
    assert relative_error(rows(vjp(chunked, slopes)[0]), rows(vjp(at, slopes)[0])) <= 1e-9


def test_a_response_knows_its_end_and_its_gradients():
    at = answered("sgd")[0]
    gradient = jax.grad(mi.total_objective(PROBLEM))
    for each, norm in zip(known("sgd"), at.info.outer_gradient_norm, strict=True):
        assert norm == pytest.approx(float(optax.tree.norm(gradient(each.meta_params, TASKS, WEIGHTS))))
    assert relative_error(ravel(at.meta_params), ravel(known("sgd")[-1].meta_params)) == 0


def test_too_few_products_are_told():
    at, vjp, _ = answered("adam", rank=2, tol=1e-2)
    info = vjp(at, random_like(START, 1))[1]
    assert info.status == mi.SolveStatus.MAX_STEPS
    assert "raise rank" in problems_of_segments(info)[0]
    assert not problems_of_segments(answered("adam")[0].info)


def test_a_spoilt_slope_is_told():
    at, vjp, _ = answered("adam", rank=2, tol=1e-2)
    spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, START)
    info = vjp(at, spoilt)[1]
    assert info.status == mi.SolveStatus.NONFINITE
    assert "NaN or infinity" in problems_of_segments(info)[0]


@pytest.mark.parametrize("restored", [False, True])
def test_moments_are_what_the_optimizer_divides_by(restored):
    """From the state of a chain, and from what orbax makes of it where it is not told the types."""
    adam = lenient(optax.scale_by_adam(eps_root=1e-5))
    state = adam.init(START)
    for seed in range(7):
        update, state = adam.update(random_like(START, seed), state)
    chain: object = (optax.EmptyState(), state, optax.ScaleByScheduleState(state.count))
    if restored:
        chain = {"0": None, "1": {"count": np.asarray(7), "mu": state.mu, "nu": state.nu}, "2": {"count": 7}}
    found = mi.checkpoints([(START, chain)], learning_rate=RATE, second_moments=True, eps_root=1e-5)[0]
    first_moment = jax.tree.map(lambda mu: mu / (1 - 0.9**7), state.mu)
    expected = jax.tree.map(jnp.divide, first_moment, update)
    assert relative_error(ravel(found.preconditioner), ravel(expected)) <= 1e-12
    assert found.step == 7
    assert found.time == pytest.approx(7 * RATE)


def test_times_add_up_rates_over_one_less_momentum():
    states = [(START, None)] * 4
    schedule = optax.linear_schedule(0.1, 0.0, 20)
    rates = 0.1 * (1 - np.arange(20) / 20)
    found = mi.checkpoints(states, num_steps=20, learning_rate=schedule, momentum=0.9)
    np.testing.assert_allclose([each.time for each in found], rates.reshape(4, 5).sum(axis=1) * 10)
    uneven = mi.checkpoints(states, steps=[2, 4, 10, 20], learning_rate=rates, place="middle")
    expected = [rates[:3].sum(), rates[3:7].sum(), rates[7:15].sum(), rates[15:].sum()]
    np.testing.assert_allclose([each.time for each in uneven], expected)


ADAM = optax.scale_by_adam().init(START)
GOOD = mi.Checkpoint(START, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [1, 3, 2]}, r"steps: expected steps that rise"),
        ({"steps": [0, 1, 2]}, r"steps: expected steps that rise from 1"),
        ({"steps": [1, 2]}, r"steps: expected one for each of the 3 states, got 2"),
        ({"steps": [1, 2, 3], "num_steps": 4}, r"steps: expected the last to be num_steps = 4, got 3"),
        ({"num_steps": 10}, r"num_steps: expected a multiple of the 3 states, got 10"),
        ({}, r"states\[0\]: expected an optimizer state with a count"),
        ({"num_steps": 3, "second_moments": True}, r"states\[0\]: .* one `nu` like meta_params.* got none"),
        ({"num_steps": 3, "learning_rate": [0.1, 0.1]}, r"learning_rate: expected a number, a schedule or 3 rates"),
        ({"num_steps": 3, "learning_rate": float("nan")}, r"learning_rate: expected finite numbers"),
        ({"num_steps": 3, "momentum": 1.0}, r"momentum: expected a number from 0 to below 1, got 1.0"),
        ({"num_steps": 3, "place": "start"}, r"place: expected one of \('end', 'middle'\), got 'start'"),
    ],
)
def test_states_that_make_no_checkpoints_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mi.checkpoints([(START, None)] * 3, **{"learning_rate": 0.1, **options})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ((ADAM, ADAM), r"states\[0\]: .* got 2"),
        (ADAM, r"states\[0\]: expected moments after at least one step, got a count of 0"),
        ({"nu": ADAM.nu}, r"states\[0\]: expected a count beside `nu`"),
        (optax.trace(0.9).init(START), r"states\[0\]: .* got none"),
    ],
)
def test_optimizer_states_without_the_moments_asked_for_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        mi.checkpoints([(START, state)], num_steps=1, learning_rate=0.1, second_moments=True)


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        (GOOD, TypeError, r"checkpoints: expected a sequence of Checkpoint, got Checkpoint"),
        ([], ValueError, r"checkpoints: expected at least one"),
        ([GOOD, START], TypeError, r"checkpoints\[1\]: expected a metainfluence.Checkpoint, got dict"),
        ([GOOD, GOOD._replace(time=0.0)], ValueError, r"checkpoints\[1\].time: expected a positive number, got 0.0"),
        ([GOOD._replace(time=[1.0])], ValueError, r"checkpoints\[0\].time: expected a positive number, got list"),
        ([GOOD._replace(weight_decay=-1.0)], ValueError, r"checkpoints\[0\].weight_decay: expected a number from 0"),
        ([GOOD._replace(step=5), GOOD, GOOD._replace(step=4)], ValueError, r"checkpoints\[2\].step: expected more"),
        ([GOOD, GOOD._replace(preconditioner=START)], ValueError, r"checkpoints\[1\].preconditioner: expected one in"),
        ([GOOD._replace(preconditioner=START)], ValueError, r"checkpoints\[0\].preconditioner: expected positive"),
        (
            [GOOD, GOOD._replace(meta_params={**START, "slope": jnp.ones(3)})],
            ValueError,
            r"checkpoints\[1\].meta_params\['slope'\]: expected shape \(20,\), got \(3,\)",
        ),
        ([GOOD, GOOD._replace(meta_params=[1.0])], ValueError, r"checkpoints\[1\].meta_params: expected a pytree"),
        (
            [GOOD._replace(meta_params={**START, "scale": jnp.asarray(jnp.nan)})],
            ValueError,
            r"checkpoints\[0\].meta_params\['scale'\]: expected finite numbers",
        ),
    ],
)
def test_checkpoints_that_make_no_run_are_refused(known, error, message):
    with pytest.raises(error, match=message):
        mi.segments(PROBLEM)(known, TASKS)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank: expected a positive integer"), ({"tol": -1.0}, "tol: expected a number from 0 on, got -1.0")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mi.segments(PROBLEM, **options)


def test_questions_of_another_shape_are_refused():
    at = answered("sgd")[0]
    with pytest.raises(ValueError, match=r"slope\['slope'\]: expected shape \(20,\), got \(3,\)"):
        at.vjp({"scale": jnp.asarray(1.0), "slope": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"slope: expected a pytree of structure"):
        at.vjp([1.0])
    with pytest.raises(ValueError, match=r"direction.task: expected shape \(16,\), got \(3,\)"):
        at.jvp(WEIGHTS._replace(task=jnp.ones(3)))
    with pytest.raises(TypeError, match=r"direction: expected metainfluence.Weights, got list"):
        at.jvp([1.0])


def test_tasks_that_are_not_finite_are_named():
    spoilt = TASKS._replace(query={**TASKS.query, "x": TASKS.query["x"].at[3].set(jnp.nan)})
    with pytest.raises(ValueError, match=r"tasks.query\['x'\]: expected finite numbers, got NaN or infinity in task 3"):
        mi.segments(PROBLEM)([GOOD], spoilt)
