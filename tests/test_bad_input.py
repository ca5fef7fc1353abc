"""Bad data and losses are refused with an error that names the argument, what was expected and what came."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import metainfluence as mi
from tiny import LAMBDA, PROBLEM, TASK, TASKS, WEIGHTS, outer_loss, predict, ridge, square, target

# Every function that takes tasks and weights.
TAKERS = {
    "total_objective": mi.total_objective(PROBLEM),
    "total_hessian": mi.total_hessian(PROBLEM),
    "task_if": mi.task_if(PROBLEM),
    "instance_if": lambda m, t, weights=None: mi.instance_if(PROBLEM, "query")(m, t, 0, weights),
    "group_influence": lambda m, t, weights=None: mi.group_influence(PROBLEM)(m, t, WEIGHTS, weights),
    "influence_scores": lambda m, t, weights=None: mi.influence_scores(PROBLEM, target)(m, t, weights=weights),
    "self_influence": mi.self_influence(PROBLEM),
    "edit": lambda m, t, weights=None: mi.edit(PROBLEM)(m, t, WEIGHTS, weights),
    "direct_if": lambda m, t, weights=None: mi.baselines.direct_if(PROBLEM, target)(m, t, weights=weights),
}
taker = pytest.mark.parametrize("taker", TAKERS)


def with_support(**leaves):
    return TASKS._replace(support={**TASKS.support, **leaves})


BAD_TASKS = {
    "leaves of one side": (with_support(y=jnp.ones((3, 3))), r"tasks\.support.*expected.*\(3, 4\).*got.*\(3, 3\)"),
    "numbers of tasks": (
        TASKS._replace(support=jax.tree.map(lambda leaf: leaf[:2], TASKS.support)),
        r"tasks\.(support|query).*expected.*got",
    ),
    "one task for stacked ones": (with_support(y=jnp.ones(3)), r"tasks\.support.*expected.*got.*\(3,\)"),
    "mask of another shape": (
        TASKS._replace(support_mask=jnp.ones((3, 5), bool)),
        r"support_mask.*expected.*\(3, 4\).*got.*\(3, 5\)",
    ),
    "mask of numbers": (TASKS._replace(query_mask=jnp.ones((3, 5))), r"query_mask.*expected.*bool.*got.*float"),
    "empty support after masking": (
        TASKS._replace(support_mask=jnp.ones((3, 4), bool).at[1].set(False)),
        r"support_mask.*expected.*real example.*got none.*1",
    ),
    "empty query after masking": (
        TASKS._replace(query_mask=jnp.ones((3, 5), bool).at[2].set(False)),
        r"query_mask.*expected.*real example.*got none.*2",
    ),
    "no tasks": (jax.tree.map(lambda leaf: leaf[:0], TASKS), r"tasks.*expected.*got.*0"),
    "no examples": (
        TASKS._replace(query=jax.tree.map(lambda leaf: leaf[:, :0], TASKS.query)),
        r"tasks\.query.*expected.*got.*0",
    ),
    "a tuple": (tuple(TASKS), r"tasks.*expected.*Task.*got.*tuple"),
}


@pytest.mark.parametrize("kind", BAD_TASKS)
@taker
def test_tasks(taker, kind):
    tasks, message = BAD_TASKS[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        TAKERS[taker](LAMBDA, tasks)


BAD_WEIGHTS = {
    "task shape": (WEIGHTS._replace(task=jnp.ones(4)), r"weights\.task.*expected.*\(3,\).*got.*\(4,\)"),
    "support shape": (
        WEIGHTS._replace(support=jnp.ones((3, 5))),
        r"weights\.support.*expected.*\(3, 4\).*got.*\(3, 5\)",
    ),
    "query shape": (WEIGHTS._replace(query=jnp.ones(5)), r"weights\.query.*expected.*\(3, 5\).*got.*\(5,\)"),
    "NaN": (
        WEIGHTS._replace(query=WEIGHTS.query.at[1, 2].set(jnp.nan)),
        r"weights\.query.*expected finite.*got.*(NaN|nan)",
    ),
    "infinity": (WEIGHTS._replace(task=WEIGHTS.task.at[1].set(jnp.inf)), r"weights\.task.*expected finite.*got.*inf"),
    "integers": (WEIGHTS._replace(task=jnp.ones(3, int)), r"weights\.task.*expected.*float.*got.*int"),
    "an array": (jnp.ones(3), r"weights.*expected.*Weights.*got"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@taker
def test_weights(taker, kind):
    weights, message = BAD_WEIGHTS[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        TAKERS[taker](LAMBDA, TASKS, weights=weights)


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_direction_and_new_weights(kind):
    weights, message = BAD_WEIGHTS[kind]
    with pytest.raises((ValueError, TypeError), match=message.replace("weights", "direction", 1)):
        mi.group_influence(PROBLEM)(LAMBDA, TASKS, weights)
    with pytest.raises((ValueError, TypeError), match=message.replace("weights", "new_weights", 1)):
        mi.edit(PROBLEM)(LAMBDA, TASKS, weights)


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(ValueError, match=r"weights\.task.*expected.*\(3,\).*got.*\(4,\)"):
        jax.jit(mi.total_objective(PROBLEM))(LAMBDA, TASKS, WEIGHTS._replace(task=jnp.ones(4)))


BAD_LAMBDAS = {
    "integers": ({"scale": jnp.asarray(1)}, r"meta_params\['scale'\].*expected.*float.*got.*int"),
    "booleans": ({"scale": jnp.asarray(True)}, r"meta_params\['scale'\].*expected.*float.*got.*bool"),
    "complex numbers": ({"scale": jnp.asarray(1j)}, r"meta_params\['scale'\].*expected.*float.*got.*complex"),
    "NaN": ({"scale": jnp.asarray(jnp.nan)}, r"meta_params\['scale'\].*expected finite.*got.*(NaN|nan)"),
    "infinity": ({"scale": jnp.asarray(jnp.inf)}, r"meta_params\['scale'\].*expected finite.*got.*inf"),
    "nothing": ({}, r"meta_params.*expected.*got.*without leaves"),
}


@pytest.mark.parametrize("kind", BAD_LAMBDAS)
@taker
def test_meta_params(taker, kind):
    meta_params, message = BAD_LAMBDAS[kind]
    with pytest.raises((ValueError, TypeError), match=message):
        TAKERS[taker](meta_params, TASKS)


@pytest.mark.parametrize("make", [mi.task_loss, mi.total_gradient])
def test_single_task_functions_check_the_same(make):
    run = make(PROBLEM)
    with pytest.raises(ValueError, match=r"meta_params\['scale'\].*expected finite"):
        run({"scale": jnp.asarray(jnp.nan)}, TASK)
    with pytest.raises(TypeError, match=r"meta_params\['scale'\].*expected.*float.*got.*int"):
        run({"scale": jnp.asarray(1)}, TASK)
    with pytest.raises(ValueError, match=r"weights\.support.*expected.*\(4,\).*got.*\(3,\)"):
        run(LAMBDA, TASK, mi.Weights(jnp.ones(()), jnp.ones(3), jnp.ones(5)))
    with pytest.raises(ValueError, match=r"support_mask.*expected.*real example.*got none"):
        run(LAMBDA, TASK._replace(support_mask=jnp.zeros(4, bool)))


SHAPES = {
    "scalar": (lambda losses: jnp.mean(losses), r"\(\)"),
    "too few": (lambda losses: losses[1:], r"\((3|4),\)"),
    "a column": (lambda losses: losses[:, None], r"\((4|5), 1\)"),
}


def test_losses_that_are_no_array():
    """A loss that returns its auxiliary outputs too."""
    problem = mi.bilevel(lambda *a: (outer_loss(*a), {}), mi.adaptation.closed_form(ridge))
    with pytest.raises((ValueError, TypeError), match=r"outer_loss.*expected.*\(5,\).*got.*tuple"):
        mi.task_loss(problem)(LAMBDA, TASK)


@pytest.mark.parametrize("kind", SHAPES)
def test_outer_losses_that_are_not_one_per_example(kind):
    reduce, shape = SHAPES[kind]
    problem = mi.bilevel(lambda *a: reduce(outer_loss(*a)), mi.adaptation.closed_form(ridge))
    with pytest.raises(ValueError, match=rf"outer_loss.*expected.*\(5,\).*got.*{shape}.*per_example"):
        mi.task_loss(problem)(LAMBDA, TASK)


@pytest.mark.parametrize("kind", SHAPES)
def test_head_losses_that_are_not_one_per_example(kind):
    reduce, shape = SHAPES[kind]
    head = mi.bilevel(predict, mi.adaptation.closed_form(ridge), outer_head=lambda *a: reduce(square(*a)))
    with pytest.raises(ValueError, match=rf"outer_head.*expected.*\(5,\).*got.*{shape}"):
        mi.total_hessian(head, mi.curvature.gauss_newton())(LAMBDA, TASKS)


@pytest.mark.parametrize("adaptation", ["implicit", "unrolled"])
@pytest.mark.parametrize("kind", SHAPES)
def test_inner_losses_that_are_not_one_per_example(kind, adaptation):
    reduce, shape = SHAPES[kind]

    def inner_loss(*arguments):
        return reduce(outer_loss(*arguments))

    def zeros(meta_params, support):
        return jnp.zeros(2)

    adapt = {
        "implicit": lambda: mi.adaptation.implicit(inner_loss, zeros, regularizer=lambda p, m: jnp.sum(p**2)),
        "unrolled": lambda: mi.adaptation.unrolled(inner_loss, zeros, optax.sgd(0.1), 1),
    }[adaptation]()
    with pytest.raises(ValueError, match=rf"inner_loss.*expected.*\(4,\).*got.*{shape}.*per_example"):
        mi.task_loss(mi.bilevel(outer_loss, adapt))(LAMBDA, TASK)


def test_the_task_and_the_leaf_that_are_not_finite_are_named():
    bad = with_support(y=TASKS.support["y"].at[1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"tasks\.support\['y'\]: expected finite numbers, got NaN .* in task 1$"):
        mi.task_if(PROBLEM)(LAMBDA, bad)
    with pytest.raises(ValueError, match=r"target_args\[0\]\.support\['y'\]: expected finite"):
        mi.influence_scores(PROBLEM, mi.query_loss(PROBLEM))(LAMBDA, TASKS, bad)


def test_a_sweep_says_what_is_wrong_with_tasks_and_target():
    sweep = mi.damping.sweep(PROBLEM, mi.query_loss(PROBLEM), [0.1, 1.0])
    bad = with_support(y=TASKS.support["y"].at[1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"tasks\.support\['y'\]: expected finite numbers.* in task 1$"):
        sweep(LAMBDA, bad, TASKS)
    with pytest.raises(ValueError, match=r"target_args\[0\]\.support\['y'\]: expected finite.* in task 1$"):
        sweep(LAMBDA, TASKS, bad)
    with pytest.raises(TypeError, match=r"target: expected.*scores\(meta_params, tasks, .*'test_tasks'"):
        sweep(LAMBDA, TASKS)


def test_arguments_that_are_mixed_up():
    scores = mi.influence_scores(PROBLEM, mi.query_loss(PROBLEM))
    with pytest.raises(TypeError, match=r"meta_params: expected.*got a Task; meta_params come first"):
        scores(TASKS, LAMBDA, TASKS)
    with pytest.raises(TypeError, match=r"tasks: expected.*got list; stack them with metainfluence\.stack_tasks"):
        scores(LAMBDA, [TASK, TASK], TASKS)
    with pytest.raises(ValueError, match=r"test_tasks\.support.*expected at least 2.*stack_tasks"):
        scores(LAMBDA, TASKS, TASK)
    with pytest.raises(TypeError, match=r"target: expected.*scores\(meta_params, tasks, .*'test_tasks'"):
        scores(LAMBDA, TASKS)


def test_what_is_no_source_no_problem_or_no_array_is_told_with_what_to_do():
    stream = (jax.tree.map(lambda leaf: leaf[0], TASKS) for _ in range(3))
    with pytest.raises(TypeError, match=r"tasks: expected stacked tasks, or a source .* got generator; .*islice"):
        mi.preflight(PROBLEM)(LAMBDA, stream)
    with pytest.raises(TypeError, match=r"tasks: expected a sequence of tasks, got generator, .* never end; .*islice"):
        mi.stack_tasks(stream)
    with pytest.raises(TypeError, match=r"tasks: expected a metainfluence\.Task, got generator; .*islice"):
        mi.influence_scores(PROBLEM, mi.query_loss(PROBLEM))(LAMBDA, stream, TASKS)
    with pytest.raises(
        TypeError, match=r"tasks\[1\]: .*, got tuple; make it one: metainfluence\.Task\(support, query\)"
    ):
        mi.stack_tasks([TASK, (TASK.support, TASK.query)])
    operator = mi.operators.from_matvec(lambda v: v, LAMBDA)
    with pytest.raises(TypeError, match=r"got Operator; of an operator, metainfluence\.spectra\.of_operator"):
        mi.spectrum(operator)
    problem = mi.from_task_loss(lambda m, task, w: jnp.sum(w.query) * m["a"] ** 2)
    with pytest.raises(TypeError) as raised:
        mi.total_objective(problem)({"a": [1.0, 2.0]}, TASKS)
    assert any("make it one by jnp.asarray" in note for note in raised.value.__notes__)


def _steps(state, tasks, weights, key):
    return state


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "meta_params": lambda m: mi.influence_scores(PROBLEM, target)(m, TASKS),
        "checkpoints[0].meta_params": lambda m: mi.segments(PROBLEM)([mi.Checkpoint(m, 1.0)], TASKS),
        "start": lambda m: mi.trajectory(mi.training(PROBLEM, optax.sgd(0.1), 2))(m, TASKS),
        "start of a loop": lambda m: mi.training_loop(_steps, 2, meta_params=lambda m: m, batch=None)(m, TASKS),
        "meta_params of a regularizer": mi.l2(0.1),
        "meta_params of a probe": lambda m: mi.mixed.probe(PROBLEM, PROBLEM, target)(m, TASKS),
        "meta_params of a stream": lambda m: mi.scoring.score(PROBLEM, target, m, [TASK], out="unwritten.parquet"),
    }.items(),
)
def test_a_module_with_functions_is_no_meta_params_and_its_part_is_named(name, call):
    module = {**LAMBDA, "activation": jax.nn.relu}
    place = re.escape(name.partition(" of ")[0])
    with pytest.raises(TypeError, match=rf"^{place}\['activation'\]: expected an array, got .* equinox\.partition"):
        call(module)
