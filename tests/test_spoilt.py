"""Programs that have no derivative at one task: which task, which step, which example, and what to do."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi

RNG = np.random.default_rng(0)
X, Y = jnp.asarray(RNG.normal(size=(4, 3, 2))), jnp.asarray(RNG.normal(size=(4, 3)))
LAMBDA = jnp.asarray([0.3, -0.2])


def squares(params, meta_params, batch):
    return (batch["x"] @ params - batch["y"]) ** 2


def clipped():
    """Inner gradients that are clipped, and a task without a weight on its support set: its gradient is 0."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    tasks = mi.Task({"x": X, "y": Y}, {"x": X + 0.1, "y": Y})
    weights = mi.drop(mi.unit_weights(tasks), support=[(2, 0), (2, 1), (2, 2)])
    return mi.bilevel(squares, mi.adaptation.unrolled(squares, lambda m, s: m, optimizer, 3)), tasks, weights


def prototypes():
    """A class that has lost its last example, 0/0."""

    def adapt(meta_params, support, coefficients):
        member = coefficients[:, None] * jax.nn.one_hot(support["y"], 2)
        return member.T @ (support["x"] * meta_params[None]) / member.sum(0)[:, None]

    def loss(centres, meta_params, query):
        distances = jnp.sum(((query["x"] * meta_params[None])[:, None] - centres[None]) ** 2, axis=-1)
        return optax.softmax_cross_entropy_with_integer_labels(-distances, query["y"])

    labels = jnp.asarray([[0, 1, 1]] * 4, jnp.int32)
    tasks = mi.Task({"x": X, "y": labels}, {"x": X + 0.1, "y": labels})
    return mi.bilevel(loss, mi.adaptation.closed_form(adapt)), tasks, mi.drop(mi.unit_weights(tasks), support=[(1, 0)])


def coinciding():
    """A distance between two embeddings that coincide, of one query example."""

    def loss(params, meta_params, query):
        return jnp.linalg.norm((query["x"] - query["y"]) * params[None], axis=-1)

    query = {"x": X.at[2, 1].set(0.5), "y": (X + 0.3).at[2, 1].set(0.5)}
    adapt = mi.adaptation.closed_form(lambda m, s, c: m * (1 + c @ s))
    tasks = mi.Task(Y, query)
    return mi.bilevel(loss, adapt), tasks, mi.unit_weights(tasks)


CASES = {
    clipped: (2, r"its inner gradient is exactly 0 at step 0, where a norm, as in clipping"),
    prototypes: (1, r"its adapted parameters are NaN, as the mean \(0/0\) of a class without examples"),
    coinciding: (2, r"at 0 that goes with query example 1"),
}


def score(problem, tasks, weights):
    problem = problem._replace(meta_regularizer=mi.l2(1.0))
    options = {"solver": mi.solvers.cg(), "damping": 5.0}
    return mi.influence_scores(problem, lambda m: jnp.sum(m**2), **options)(LAMBDA, tasks, weights=weights)


@pytest.fixture(scope="module")
def options():
    return {"solver": mi.solvers.cg(), "damping": 5.0}


def spared(data, lost):
    """The same with another task's data in the place of one that is absent."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[jnp.asarray([k if k != lost else 0 for k in range(4)])], data)


def with_norm(make):
    problem, tasks, weights = make()
    return problem._replace(meta_regularizer=mi.l2(1.0)), tasks, weights


@pytest.mark.parametrize("make", CASES)
def test_the_others_keep_their_scores_and_the_task_and_the_place_are_named(make, options):
    problem, tasks, weights = with_norm(make)
    spoilt, place = CASES[make]
    remedy = r"query=\[\(2, 1\)\]" if make is coinciding else rf"tasks=\[{spoilt}\]"
    told = rf"program of task {spoilt}, whose data are finite: .*{place}.* absent.*mi\.drop\(weights, {remedy}\)\)"
    with pytest.warns(mi.SpoiltTaskWarning, match=told):
        found = mi.influence_scores(problem, lambda m: jnp.sum(m**2), **options)(LAMBDA, tasks, weights=weights)
    others = np.asarray([k for k in range(4) if k != spoilt])
    absent = mi.drop(spared(weights, spoilt), tasks=[spoilt])
    expected = by_linear_algebra(problem, spared(tasks, spoilt), absent)
    for side in ("task", "support", "query"):
        ours, theirs = np.asarray(getattr(found, side)), np.asarray(getattr(expected, side))
        np.testing.assert_allclose(ours[others], theirs[others], rtol=1e-6, atol=1e-12)
        weighed = np.asarray(getattr(weights, side)[spoilt]) != 0
        np.testing.assert_array_equal(np.isnan(ours[spoilt]), weighed)
    assert np.all(np.asarray(found.task)[others] != 0)
    assert mi.check(found) is found


def by_linear_algebra(problem, tasks, weights):
    """Scores from the dense Hessian of F and its mixed derivatives, of tasks that all have one."""

    def objective(m, w):
        return mi.total_objective(problem)(m, tasks, w)

    @jax.jit
    def scores(weights):
        hessian = jax.hessian(objective)(LAMBDA, weights) + 5.0 * jnp.eye(2)
        solution = jnp.linalg.solve(hessian, 2 * LAMBDA)
        return jax.grad(lambda w: jnp.vdot(jax.grad(objective)(LAMBDA, w), solution))(weights)

    return jax.tree.map(jnp.multiply, weights, scores(weights))


def test_at_weight_0_a_task_is_absent_without_a_word(options):
    problem, tasks, weights = with_norm(clipped)
    weights = mi.drop(weights, tasks=[2])
    found = score(problem, tasks, weights)
    expected = by_linear_algebra(problem, spared(tasks, 2), mi.drop(spared(weights, 2), tasks=[2]))
    np.testing.assert_allclose(found.task, expected.task, rtol=1e-6)
    assert found.task[2] == 0
    assert np.all(found.support[2] == 0)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_no_answer_is_given_for_what_has_no_derivative(weight, options):
    """Neither for the spoilt task itself nor for a direction that brings it back, while all others have theirs."""
    problem, tasks, given = with_norm(coinciding)
    given = given._replace(task=given.task.at[2].set(weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mi.SpoiltTaskWarning)
        at = mi.optimum(problem, **options)(LAMBDA, tasks, given)
        every = mi.task_if(problem, **options)(LAMBDA, tasks, given)
        examples = mi.instance_if(problem, "query", **options)(LAMBDA, tasks, 2, given)
        own = mi.self_influence(problem, **options)(LAMBDA, tasks, given)
        edited = mi.edit(problem, **options)(LAMBDA, tasks, mi.drop(given, tasks=[0]), given)
    np.testing.assert_array_equal(at.weights.task, given.task)
    spoilt = np.asarray([False, False, True, False])
    sensitivity, _ = at.vjp(2 * LAMBDA)
    np.testing.assert_array_equal(np.isnan(sensitivity.task), spoilt)
    np.testing.assert_array_equal(np.isnan(every.delta).any(-1), spoilt)
    np.testing.assert_array_equal(every.info.status == mi.SolveStatus.NONFINITE, spoilt)
    for leaf in (own.task, own.query.T):
        np.testing.assert_array_equal(np.isnan(leaf), np.broadcast_to(spoilt & (weight == 1), leaf.shape))
    assert np.all(np.isnan(examples.delta) == (weight == 1))
    assert np.all(np.isfinite(edited.meta_params))
    step = jax.tree.map(jnp.zeros_like, given)
    first, third = (step._replace(task=step.task.at[k].set(1.0)) for k in (0, 2))
    np.testing.assert_allclose(at.jvp(first).delta, every.delta[0], rtol=1e-6)
    assert np.all(np.isnan(at.jvp(third).delta))


def test_an_example_of_weight_0_is_absent_whatever_its_program_gives():
    problem, tasks, weights = coinciding()
    found = score(problem, tasks, mi.drop(weights, query=[(2, 1)]))
    # With a difference in its place that has a derivative, and that nobody sees.
    moved = tasks._replace(query=tasks.query | {"x": tasks.query["x"].at[2, 1].set(0.7)})
    expected = jax.jit(lambda *data: score(problem, *data))(moved, mi.drop(weights, query=[(2, 1)]))
    np.testing.assert_allclose(found.query, expected.query, rtol=1e-9)
    assert found.query[2, 1] == 0
    assert np.all(np.isfinite(found.support))


def test_an_edit_does_not_take_other_data_for_what_it_brings_back():
    problem, tasks, weights = coinciding()
    problem = problem._replace(meta_regularizer=mi.l2(1.0))
    edit = mi.edit(problem, solver=mi.solvers.cg(), damping=5.0, num_newton_steps=0)
    without = mi.drop(weights, query=[(2, 1)])
    with pytest.warns(mi.SpoiltTaskWarning, match="query example 1"):
        found = edit(LAMBDA, tasks, weights, without)
    np.testing.assert_allclose(found.meta_params, LAMBDA, rtol=1e-12)


RUN_STEPS = 3


def responses(problem, tmp_path):
    """Makers of (tasks, weights) -> response for a run and for what is left of one."""
    run = mi.training(problem, optax.sgd(0.05, momentum=0.9), RUN_STEPS)
    quiet = {"progress": False}
    points = [mi.Checkpoint(LAMBDA + 0.1, 0.5), mi.Checkpoint(LAMBDA, 1.0)]
    return {
        "device": lambda *data: mi.trajectory(run)(LAMBDA, *data),
        "folder": lambda *data: mi.trajectory(run, store=tmp_path / "states", **quiet)(LAMBDA, *data),
        "the folder again": lambda *data: mi.trajectory(run, store=tmp_path / "states", **quiet)(LAMBDA, *data),
        "segments": lambda *data: mi.segments(problem)(points, *data),
    }


@pytest.mark.parametrize(
    ("weight", "names"), [(1.0, ("device", "segments")), (0.0, ("device", "folder", "the folder again"))]
)
def test_a_run_goes_on_without_a_task_that_has_no_derivative(weight, names, tmp_path):
    problem, tasks, given = with_norm(coinciding)
    given = given._replace(task=given.task.at[2].set(weight))
    others, absent = spared(tasks, 2), mi.drop(spared(given, 2), tasks=[2])
    one = jax.tree.map(jnp.zeros_like, given)
    first, third = (one._replace(task=one.task.at[k].set(1.0)) for k in (0, 2))
    for name in names:
        told = pytest.warns(mi.SpoiltTaskWarning, match="program of task 2, .* query example 1")
        with told if weight else warnings.catch_warnings():
            if not weight:
                warnings.simplefilter("error")
            at = responses(problem, tmp_path)[name](tasks, given)
        expected = responses(problem, tmp_path / "others")[name](others, absent)
        np.testing.assert_allclose(at.meta_params, expected.meta_params, rtol=1e-12)
        np.testing.assert_array_equal(at.weights.task, given.task)
        slopes = jnp.stack([2 * LAMBDA, jnp.ones(2)])
        ours, theirs = (response.vjp(slopes)[0] for response in (at, expected))
        np.testing.assert_array_equal(np.isnan(ours.task), [[False, False, True, False]] * 2)
        rest = np.asarray([0, 1, 3])
        for side in ("task", "support", "query"):
            mine, wanted = (np.asarray(getattr(each, side))[:, rest] for each in (ours, theirs))
            np.testing.assert_allclose(mine, wanted, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(at.jvp(first).delta, expected.jvp(first).delta, rtol=1e-9)
        both = at.jvp(jax.tree.map(lambda *leaves: jnp.stack(leaves), first, third)).delta
        np.testing.assert_array_equal(np.isnan(both).any(-1), [False, True])
        found = mi.scores(at, lambda m: jnp.sum(m**2))()
        assert np.isnan(found.task[2]) if weight else found.task[2] == 0
        assert np.all(np.asarray(found.task)[rest] != 0)


def test_training_itself_goes_on_without_it():
    problem, tasks, given = with_norm(coinciding)
    run = mi.training(problem, optax.sgd(0.1), RUN_STEPS)
    expected = run(LAMBDA, spared(tasks, 2), mi.drop(given, tasks=[2]))
    np.testing.assert_allclose(run(LAMBDA, tasks, mi.drop(given, tasks=[2])), expected, rtol=1e-12)
    with pytest.warns(mi.SpoiltTaskWarning, match="program of task 2"):
        np.testing.assert_allclose(run(LAMBDA, tasks), expected, rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mi.SpoiltTaskWarning)
        assert mi.smoothness(run, parts=False, num_directions=2)(LAMBDA, tasks).verdict == "smooth"


def test_a_stream_names_the_task_and_the_place(tmp_path):
    problem, tasks, _ = with_norm(coinciding)
    source = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), tasks) for k in range(4)]
    told = r"from tasks 2: the data of 2 are finite; a norm, .* query example 1; .* leave these tasks out"
    run = mi.training(problem, optax.sgd(0.1), RUN_STEPS, tasks_per_step=2)
    with pytest.raises(ValueError, match=told):
        mi.trajectory(run, progress=False)(LAMBDA, source)
    broken = mi.Task(np.full(3, np.nan), source[3].query)
    spoiled = [*source[:3], broken]
    options = {"solver": mi.solvers.cg(), "damping": 5.0, "progress": False}
    with pytest.raises(ValueError, match=told):
        mi.scoring.score(problem, jnp.sum, LAMBDA, source, out=tmp_path / "s.parquet", **options)
    with pytest.raises(ValueError, match=r"from tasks 2, 3: the data of 2 are finite"):
        mi.scoring.score(problem, jnp.sum, LAMBDA, spoiled, out=tmp_path / "t.parquet", **options)
    alone = [*source[:2], broken, source[2]]
    with pytest.raises(ValueError, match=r"from tasks 2, 3: source\[2\].support: expected finite numbers"):
        mi.scoring.score(problem, jnp.sum, LAMBDA, alone, out=tmp_path / "u.parquet", **options)


def test_a_run_that_diverges_says_so_and_not_that_the_target_is_wrong():
    problem, tasks, _ = with_norm(clipped)
    at = mi.trajectory(mi.training(problem, optax.sgd(1e200), RUN_STEPS))(LAMBDA, tasks)
    with pytest.raises(ValueError, match=r"slope: .* λ is not finite after step \d of 3: lower the learning rate"):
        mi.scores(at, lambda m: jnp.sum(m**2))()
