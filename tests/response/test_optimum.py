"""The response of an optimum as an object: made once, asked many times, by programs of their own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence.lab.bench import programs


@pytest.fixture(scope="module")
def case():
    return programs.cases()["implicit head"]


@pytest.fixture(scope="module")
def at(case):
    make = jax.jit(mi.optimum(case.problem, damping=2.0))
    return make(case.meta_params, case.tasks)


def slopes(case, count):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(count, *leaf.shape))), case.meta_params)


def direction(case, seed=3, lead=()):
    rng = np.random.default_rng(seed)
    unit = mi.unit_weights(case.tasks)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(*lead, *leaf.shape))), unit)


def vdot(left, right):
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.mark.parametrize(
    ("solver", "damping"),
    [
        (None, "auto"),
        pytest.param(None, 0.5, marks=pytest.mark.slow),
        (mi.solvers.cg(tol=1e-10), "auto"),
        (mi.solvers.cg(tol=1e-10), 0.5),
        pytest.param(mi.solvers.block_cg(tol=1e-10), "auto", marks=pytest.mark.slow),
        (mi.solvers.block_cg(tol=1e-10), 0.5),
    ],
    ids=repr,
)
def test_scores_are_those_of_influence_scores(case, solver, damping):
    target = mi.query_loss(case.problem)
    options = {"solver": solver, "damping": damping}

    @jax.jit
    def both(meta_params, tasks, held_out):
        at = mi.optimum(case.problem, **options)(meta_params, tasks)
        direct = mi.influence_scores(case.problem, target, **options)(meta_params, tasks, held_out)
        return mi.scores(at, target)(held_out), direct

    found, expected = both(case.meta_params, case.tasks, case.held_out)
    # Of a basis that chose the damping, one program goes on in the same loop and the other in a second one.
    chex.assert_trees_all_close(found[:3], expected[:3], rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(found.info.damping, expected.info.damping, rtol=1e-9)
    assert found.info.status == expected.info.status


def test_it_crosses_from_one_compiled_function_to_another(case, at):
    ask = jax.jit(lambda at, slope: at.vjp(slope))
    slope = jax.tree.map(lambda leaf: leaf[0], slopes(case, 1))
    found, info = ask(at, slope)
    expected, _ = mi.optimum(case.problem, damping=2.0)(case.meta_params, case.tasks).vjp(slope)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-9)
    assert info.status == mi.SolveStatus.CONVERGED
    chex.assert_trees_all_equal(at.meta_params, case.meta_params)


def test_a_second_question_traces_nothing_of_the_problem():
    calls = []
    case = programs.cases(lambda: calls.append(1))["implicit head"]
    at = jax.jit(mi.optimum(case.problem, damping=2.0))(case.meta_params, case.tasks)
    made = len(calls)
    assert made > 0
    jax.jit(lambda at, slope: at.vjp(slope)).lower(at, case.meta_params)
    jax.jit(lambda at, direction: at.jvp(direction)).lower(at, direction(case))
    assert len(calls) == made


def test_a_question_is_a_solve_and_no_more(case, at):
    making = jax.jit(mi.optimum(case.problem, damping=2.0)).lower(case.meta_params, case.tasks).as_text()
    asking = jax.jit(lambda at, slope: at.vjp(slope)).lower(at, case.meta_params).as_text()
    # The network runs where the response is made, and only its linear part where it is asked.
    assert "stablehlo.tanh" in making
    assert "stablehlo.tanh" not in asking
    first = at.vjp(jax.tree.map(lambda leaf: leaf[0], slopes(case, 2)))[1]
    second = at.vjp(jax.tree.map(lambda leaf: leaf[1], slopes(case, 2)))[1]
    # Of this solver each solve's products are its own.
    assert at.info.num_matvecs == 0
    assert 0 < int(first.num_matvecs) < 200
    assert 0 < int(second.num_matvecs) < 200


def test_many_targets_are_stepped_together(case, at):
    many = slopes(case, 16)
    together, info = jax.jit(lambda at, many: at.vjp(many))(at, many)
    assert info.status.tolist() == [mi.SolveStatus.CONVERGED] * 16
    one = jax.jit(lambda at, slope: at.vjp(slope))
    for k in (0, 15):
        alone, single = one(at, jax.tree.map(lambda leaf, k=k: leaf[k], many))
        row = jax.tree.map(lambda leaf, k=k: leaf[k], together)
        chex.assert_trees_all_close(row, alone, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(alone.task))))
        # Products are counted for the basis that all share.
        assert int(info.num_matvecs[k]) < 16 * int(single.num_matvecs)
    # One batched product a step: the program for sixteen is hardly longer than that for one.
    lines = [programs.lines(lambda at, slope: at.vjp(slope), (at, slope)) for slope in (case.meta_params, many)]
    assert lines[1] < 1.5 * lines[0]


def test_forward_and_reverse_are_transposes(case):
    at = mi.optimum(case.problem, solver=mi.solvers.cg(tol=1e-12), damping=2.0)(case.meta_params, case.tasks)
    toward, slope = direction(case), jax.tree.map(lambda leaf: leaf[0], slopes(case, 1))
    forward = vdot(slope, at.jvp(toward).delta)
    np.testing.assert_allclose(vdot(at.vjp(slope)[0], toward), forward, rtol=1e-8)


def test_several_directions(case, at):
    two = direction(case, lead=(2,))
    found = at.jvp(two)
    alone = at.jvp(jax.tree.map(lambda leaf: leaf[1], two))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], found.delta), alone.delta, rtol=1e-4, atol=1e-6)
    assert found.info.status.shape == (2,)


def test_a_slope_of_another_structure_is_refused(case, at):
    with pytest.raises(ValueError, match=r"slope: expected a pytree of structure .*, got PyTreeDef\(\*\)"):
        at.vjp(jnp.ones(3))
    wrong = {**case.meta_params, "first": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"slope\['first'\]: expected shape \(6, 16\), got \(2, 2\)"):
        at.vjp(wrong)


def test_a_slope_of_another_dtype_is_refused(case, at):
    wrong = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), case.meta_params)
    with pytest.raises(TypeError, match=r"slope\['bias'\]: expected float64 as λ has, got float32; make the response"):
        at.vjp(wrong)


def test_a_direction_that_is_not_the_weights_is_refused(case, at):
    with pytest.raises(TypeError, match=r"direction: expected metainfluence.Weights, got dict"):
        at.jvp({"task": jnp.ones(30)})
    good = direction(case)
    with pytest.raises(ValueError, match=r"direction.support: expected shape \(30, 5\), got \(30, 4\)"):
        at.jvp(good._replace(support=jnp.ones((30, 4))))
    with pytest.raises(ValueError, match=r"direction.task: expected finite numbers, got NaN or infinity"):
        at.jvp(good._replace(task=jnp.full(30, jnp.nan)))


def test_scores_of_what_is_no_response_are_refused(case):
    with pytest.raises(TypeError, match=r"at: expected a response, as made by metainfluence.optimum, got Bilevel"):
        mi.scores(case.problem, mi.query_loss(case.problem))
    at = mi.optimum(case.problem, damping=2.0)(case.meta_params, case.tasks)
    with pytest.raises(TypeError, match=r"target: expected a function"):
        mi.scores(at, 3)


def test_mixed_up_calls_name_both(case):
    with pytest.raises(TypeError, match=r"optimum\(problem, …\)\(meta_params, tasks\)"):
        mi.optimum(case.problem, case.meta_params, case.tasks)


def test_scores_of_every_response_are_checked():
    """A run's answers are told apart from a solve's, and good ones pass."""
    problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
    tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
    start = jnp.asarray(1.0)
    run = mi.training(problem, optax.sgd(0.5), 8)
    for at in (
        mi.optimum(problem)(start, tasks),
        mi.trajectory(run)(start, tasks),
        mi.segments(problem)([mi.Checkpoint(start, 1.0), mi.Checkpoint(start, 2.0)], tasks),
    ):
        assert isinstance(at, mi.Response)
        assert mi.check(at) is at
        found = mi.scores(at, lambda m: m**2)()
        assert found.task.shape == (3,)
        assert np.ptp(np.asarray(found.task)) > 0
        assert mi.check(found) is found
        assert mi.error_budget(found).precision < 1e-9


def test_a_run_that_has_no_digits_left_is_told_of_scores():
    problem = mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * jnp.cos(30.0 * (m - task.query))))
    tasks = mi.Task((), jnp.asarray([[0.0], [1.0]]))
    at = mi.trajectory(mi.training(problem, optax.sgd(1.0), 10))(jnp.asarray(0.3), tasks)
    with pytest.raises(mi.SolveError, match=r"cotangents grow by"):
        mi.check(mi.scores(at, lambda m: m)())


def test_how_far_from_stationary_is_told_in_units_of_the_meta_parameters():
    """The same problem in other units has the same budget."""

    def scores(scale):
        problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.mean(w.query * (m - task.query) ** 2))
        tasks = mi.Task((), scale * jnp.asarray([[1.0], [2.0], [6.0]]))
        return mi.influence_scores(problem, lambda m: m / scale)(jnp.asarray(2.0 * scale), tasks)

    for scale in (1e-4, 1.0, 1e4):
        budget = mi.error_budget(scores(scale))
        np.testing.assert_allclose(budget.outer_stationarity, 0.5, rtol=1e-9)
        with pytest.raises(mi.SolveError, match=r"outer_stationarity 5.0e-01"):
            mi.check(scores(scale), tol=0.1)


def test_a_leaf_that_nothing_reads_is_a_flat_direction():
    """H is exactly singular; the answer is the one without the leaf."""

    def loss(meta_params, task, w):
        return 0.5 * jnp.mean(w.query * jnp.sum((meta_params["used"][None] - task.query) ** 2, axis=-1))

    problem = mi.from_task_loss(loss)
    queries = jnp.asarray([[[0.0, 1.0]], [[1.0, 3.0]], [[5.0, 2.0]]])
    tasks, used = mi.Task((), queries), jnp.mean(queries, axis=(0, 1))
    for unused in ({}, {"unused": jnp.ones(3)}):
        for solver in (None, mi.solvers.dense(), mi.solvers.cg()):
            found = mi.influence_scores(problem, lambda m: m["used"][0] ** 2, solver=solver)(
                {"used": used, **unused}, tasks
            )
            np.testing.assert_allclose(found.task, [4.0 * 2 / 3, 4.0 / 3, -12.0 / 3], rtol=1e-9)
            mi.check(found, tol=0.1)
            if solver is None:
                assert int(found.info.flat_directions) == 3 * bool(unused)
                assert ("flat directions: 3" in mi.error_budget(found).advice) == bool(unused)


@pytest.mark.parametrize("leaf", ["relu", jnp.tanh, None, [1.0, "a"]])
def test_a_leaf_that_is_no_array_is_named(leaf, tmp_path):
    problem, tasks = spoilt_problem()
    if leaf is None:
        leaf = jax.nn.relu
    meta_params = {"w": jnp.ones(2), "act": leaf}
    for call in (
        lambda: mi.influence_scores(problem, lambda m: m["w"][0])(meta_params, tasks),
        lambda: mi.task_if(problem)(meta_params, tasks),
        lambda: mi.edit(problem)(meta_params, tasks, mi.unit_weights(tasks)),
        lambda: mi.total_objective(problem)(meta_params, tasks),
        lambda: mi.spectrum(problem)(meta_params, tasks),
        lambda: mi.damping.auto(problem)(meta_params, tasks),
        lambda: mi.scoring.score(problem, lambda m: 0.0, meta_params, [tasks], out=tmp_path / "s.parquet"),
    ):
        with pytest.raises(TypeError, match=r"meta_params\['act'\].*: expected an array, got "):
            call()


def test_a_traced_index_takes_numpy_tasks():
    problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.mean(w.query * (m - task.query) ** 2))
    tasks = mi.Task((), np.asarray([[1.0, 2.0], [4.0, 5.0]]))
    find = mi.instance_if(problem, "query", damping=2.0)
    traced = jax.jit(lambda index: find(jnp.asarray(3.0), tasks, index).delta)(1)
    # F is a mean over two tasks of two examples, and its curvature with the damping 1 + 2.
    np.testing.assert_allclose(traced, (tasks.query[1] - 3.0) / 4 / 3, rtol=1e-9)


def spoilt_problem():
    """The norm of a zero vector has no derivative, and the data are finite."""
    problem = mi.from_task_loss(
        lambda m, task, w: jnp.sum(w.query * (m[0] - task.query[:, 0]) ** 2) + jnp.linalg.norm(m * task.query[0, 1])
    )
    query = jnp.stack([jnp.arange(7.0), jnp.ones(7)], axis=1)[:, None]
    return problem, mi.Task((), query.at[4, 0, 1].set(0.0))


def test_a_task_whose_program_gives_nan_is_named():
    problem, tasks = spoilt_problem()
    for call in (
        lambda: mi.influence_scores(problem, lambda m: m[0])(jnp.ones(2), tasks),
        lambda: mi.optimum(problem)(jnp.ones(2), tasks),
        lambda: mi.task_if(problem)(jnp.ones(2), tasks),
        lambda: mi.edit(problem)(jnp.ones(2), tasks, mi.unit_weights(tasks)),
        lambda: mi.edit(problem)(jnp.ones(2), tasks, mi.drop(mi.unit_weights(tasks), tasks=[4])),
        lambda: mi.damping.sweep(problem, lambda m: m[0], [0.1])(jnp.ones(2), tasks),
    ):
        with pytest.warns(mi.SpoiltTaskWarning, match=r"from the program of task 4, whose data are finite"):
            call()


def test_a_task_of_weight_zero_is_absent_whatever_its_program_gives():
    problem, tasks = spoilt_problem()
    weights = mi.drop(mi.unit_weights(tasks), tasks=[4])
    found = mi.influence_scores(problem, lambda m: m[0], damping=0.1)(jnp.ones(2), tasks, weights=weights)
    rest = [0, 1, 2, 3, 5, 6]
    others = jax.tree.map(lambda leaf: leaf[np.asarray(rest)], tasks)
    # F is a mean over all tasks, the absent one among them.
    alone = mi.from_task_loss(lambda m, task, w: 6 / 7 * problem.outer(None, m, task, w))
    expected = mi.influence_scores(alone, lambda m: m[0], damping=0.1)(jnp.ones(2), others)
    np.testing.assert_allclose(found.task[np.asarray(rest)], expected.task, rtol=1e-9)
    assert found.task[4] == 0
    fewer = mi.drop(weights, tasks=[0])
    moved = mi.edit(problem, damping=0.1)(jnp.ones(2), tasks, fewer, weights)
    wanted = mi.edit(alone, damping=0.1)(jnp.ones(2), others, mi.drop(mi.unit_weights(others), tasks=[0]))
    np.testing.assert_allclose(moved.meta_params, wanted.meta_params, rtol=1e-9)
