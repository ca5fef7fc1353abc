"""Bad options are refused with an error that names the argument, what was expected and what came."""

import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from tiny import BLACK_BOX, LAMBDA, PROBLEM, TASK, TASKS, WEIGHTS, outer_loss, ridge, target


@pytest.mark.parametrize("index", [-1, 3, 100])
@pytest.mark.parametrize("side", ["support", "query"])
def test_task_index_out_of_range(side, index):
    with pytest.raises(ValueError, match=rf"index.*expected.*0.*2.*got {index}"):
        mi.instance_if(PROBLEM, side)(LAMBDA, TASKS, index)


@pytest.mark.parametrize("index", [1.0, "1", np.array([0, 1]), None])
def test_task_index_that_is_no_integer(index):
    with pytest.raises((ValueError, TypeError), match=r"index.*expected.*integer.*got"):
        mi.instance_if(PROBLEM, "query")(LAMBDA, TASKS, index)


@pytest.mark.parametrize("side", ["train", "Support", None, 0])
def test_unknown_side(side):
    with pytest.raises((ValueError, TypeError), match=r"side.*expected 'support' or 'query'.*got"):
        mi.instance_if(PROBLEM, side)


MAKERS = {
    "total_hessian": mi.total_hessian,
    "task_if": mi.task_if,
    "instance_if": lambda problem, **options: mi.instance_if(problem, "query", **options),
    "group_influence": mi.group_influence,
    "influence_scores": lambda problem, **options: mi.influence_scores(problem, target, **options),
    "self_influence": mi.self_influence,
    "edit": mi.edit,
    "direct_if": lambda problem, **options: mi.baselines.direct_if(problem, target, **options),
}
maker = pytest.mark.parametrize("maker", MAKERS)
maker_with_curvature = pytest.mark.parametrize("maker", [name for name in MAKERS if name != "direct_if"])
maker_with_solver = pytest.mark.parametrize("maker", [name for name in MAKERS if name != "total_hessian"])


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), jnp.asarray([0.1, 0.2])])
@maker
def test_damping(maker, damping):
    with pytest.raises((ValueError, TypeError), match=r"damping.*expected.*got"):
        MAKERS[maker](PROBLEM, damping=damping)


@pytest.mark.parametrize("batch_size", [0, -2, 1.5])
@maker
def test_batch_size(maker, batch_size):
    with pytest.raises((ValueError, TypeError), match=r"batch_size.*expected.*positive.*got"):
        MAKERS[maker](PROBLEM, batch_size=batch_size)


@maker_with_curvature
def test_gauss_newton_without_a_head(maker):
    with pytest.raises(ValueError, match=r"curvature.*gauss_newton.*expected.*outer_head.*got"):
        MAKERS[maker](PROBLEM, curvature=mi.curvature.gauss_newton())


@pytest.mark.parametrize("kind", ["linearized", "gamma", "gauss_newton", "direct"])
@maker_with_curvature
def test_surrogates_of_a_task_loss_whose_levels_cannot_be_told_apart(maker, kind):
    with pytest.raises(ValueError, match=rf"curvature.*{kind}.*expected.*bilevel.*got"):
        MAKERS[maker](BLACK_BOX, curvature=getattr(mi.curvature, kind)())


def test_direct_if_of_a_task_loss_whose_levels_cannot_be_told_apart():
    with pytest.raises(ValueError, match=r"problem.*expected.*bilevel.*got.*from_task_loss"):
        mi.baselines.direct_if(BLACK_BOX, target)


@pytest.mark.parametrize("curvature", ["exact", mi.curvature.exact])
@maker_with_curvature
def test_curvature_that_is_none(maker, curvature):
    with pytest.raises(TypeError, match=r"curvature.*expected.*got"):
        MAKERS[maker](PROBLEM, curvature=curvature)


@pytest.mark.parametrize("solver", ["cg", mi.solvers.cg])
@maker_with_solver
def test_solver_that_is_none(maker, solver):
    with pytest.raises(TypeError, match=r"solver.*expected.*got"):
        MAKERS[maker](PROBLEM, solver=solver)


@pytest.mark.parametrize("make", [mi.influence_scores, mi.baselines.direct_if])
@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (lambda m: m["scale"] * jnp.ones(2), r"\(2,\)"),
        (lambda m: jnp.asarray(1), "int"),
        (lambda m: (jnp.sum(m["scale"]), {"accuracy": 0.5}), "tuple"),
    ],
)
def test_target_that_returns_no_scalar(make, bad, got):
    with pytest.raises((ValueError, TypeError), match=rf"target.*expected.*scalar.*got.*({got})"):
        make(PROBLEM, bad)(LAMBDA, TASKS)


def test_target_that_is_no_function():
    with pytest.raises(TypeError, match=r"target.*expected.*function.*got"):
        mi.influence_scores(PROBLEM, 3.0)


def test_task_loss_that_returns_no_scalar():
    problem = mi.from_task_loss(lambda meta_params, task, weights: jnp.ones(5) * meta_params["scale"])
    with pytest.raises(ValueError, match=r"task_loss.*expected.*scalar.*got.*\(5,\)"):
        mi.total_objective(problem)(LAMBDA, TASKS)


def test_regularisers_that_return_no_scalar():
    meta = mi.bilevel(outer_loss, mi.adaptation.closed_form(ridge), meta_regularizer=lambda m: jnp.ones(2) * m["scale"])
    with pytest.raises(ValueError, match=r"meta_regularizer.*expected.*scalar.*got.*\(2,\)"):
        mi.total_objective(meta)(LAMBDA, TASKS)
    inner = mi.adaptation.implicit(outer_loss, lambda m, s: jnp.zeros(2), regularizer=lambda p, m: p**2)
    with pytest.raises(ValueError, match=r"regularizer.*expected.*scalar.*got.*\(2,\)"):
        mi.total_objective(mi.bilevel(outer_loss, inner))(LAMBDA, TASKS)


@pytest.mark.parametrize("num_terms", [0, -1, 2.5])
def test_num_terms(num_terms):
    with pytest.raises((ValueError, TypeError), match=r"num_terms.*expected.*positive.*got"):
        mi.solvers.neumann(num_terms)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: mi.solvers.cg(tol=0.0), "tol"),
        (lambda: mi.solvers.cg(max_steps=0), "max_steps"),
        (lambda: mi.solvers.minres(tol=-1.0), "tol"),
        (lambda: mi.solvers.minres(max_steps=-3), "max_steps"),
        (lambda: mi.solvers.neumann(3, scale=-1.0), "scale"),
        (lambda: mi.solvers.neumann(3, tol=0.0), "tol"),
        (lambda: mi.solvers.dense(method="lu"), "method"),
        (lambda: mi.adaptation.unrolled(outer_loss, lambda m, s: m, None, -1), "num_steps"),
        (lambda: mi.adaptation.newton_cg(tol=-1.0), "tol"),
        (lambda: mi.adaptation.newton_cg(max_steps=0), "max_steps"),
        (lambda: mi.adaptation.optax_minimizer(None, 0), "num_steps"),
        (lambda: mi.adaptation.closed_form(3), "fn"),
        (lambda: mi.l2(-1.0), "delta"),
        (lambda: mi.l2(float("nan")), "delta"),
        (lambda: mi.bilevel(None, mi.adaptation.closed_form(ridge)), "outer_loss"),
        (lambda: mi.bilevel(outer_loss, None), "adapt"),
        (lambda: mi.from_task_loss("loss"), "task_loss"),
        (lambda: mi.edit(PROBLEM, num_newton_steps=-1), "num_newton_steps"),
        (lambda: mi.edit(PROBLEM, num_newton_steps=1.5), "num_newton_steps"),
        (lambda: mi.check(3), "result"),
        (lambda: mi.bilevel(mi.adaptation.closed_form(ridge), outer_loss), "outer_loss"),
        (lambda: mi.bilevel(lambda params, batch: batch, ridge), "outer_loss"),
        (lambda: mi.bilevel(outer_loss, ridge, meta_regularizer=1e-3), "meta_regularizer"),
        (lambda: mi.adaptation.unrolled(outer_loss, jnp.zeros(2), None, 1), "init"),
        (lambda: mi.adaptation.implicit(outer_loss, jnp.zeros(2)), "init"),
        (lambda: mi.task_if(outer_loss), "problem"),
    ],
)
def test_options(make, name):
    with pytest.raises((ValueError, TypeError), match=rf"^{name}: expected.*got"):
        make()


def test_operator_refuses_vectors_of_another_domain():
    operator = mi.total_hessian(PROBLEM)(LAMBDA, TASKS)
    with pytest.raises(ValueError, match=r"vector.*expected.*got"):
        operator.matvec({"other": jnp.ones(())})
    with pytest.raises(ValueError, match=r"vector\['scale'\].*expected shape \(\).*got \(2,\)"):
        operator.matvec({"scale": jnp.ones(2)})
    solver = mi.solvers.cg()
    with pytest.raises(ValueError, match=r"rhs.*expected.*got"):
        solver.solve(operator, solver.init(operator), jnp.ones(()))


DROPS = [
    ({"tasks": [3]}, r"tasks.*expected.*0.*2.*got.*3"),
    ({"tasks": [-1]}, r"tasks.*expected.*got.*-1"),
    ({"tasks": [0.5]}, r"tasks.*expected integer.*got float"),
    ({"support": [(0, 4)]}, r"support.*expected.*0.*3.*got.*4"),
    ({"support": [0, 1]}, r"support.*expected.*pairs.*got"),
    ({"query": [(3, 0)]}, r"query.*expected.*0.*2.*got.*3"),
    ({"query": [(0, 1, 2)]}, r"query.*expected.*pairs.*got"),
]


@pytest.mark.parametrize(("removed", "message"), DROPS)
def test_drop(removed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mi.drop(WEIGHTS, **removed)


STACKS = [
    ([], r"tasks.*expected at least one.*got"),
    ([TASK, TASK._replace(support={"x": TASK.support["x"]})], r"tasks\[1\]\.support.*expected.*got"),
    (
        [TASK, TASK._replace(query={**TASK.query, "x": jnp.ones((5, 3))})],
        r"tasks\[1\]\.query\['x'\].*expected.*got.*\(3,\)",
    ),
    (
        [TASK, TASK._replace(query={**TASK.query, "y": jnp.ones(5, jnp.int32)})],
        r"tasks\[1\]\.query\['y'\].*expected.*float64.*got.*int32",
    ),
    ([TASK, TASK._replace(support={**TASK.support, "y": jnp.ones(3)})], r"tasks\[1\]\.support.*expected.*got"),
    ([TASK, tuple(TASK)], r"tasks\[1\].*expected.*Task.*got tuple"),
]


@pytest.mark.parametrize(("tasks", "message"), STACKS)
def test_stack_tasks(tasks, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mi.stack_tasks(tasks)


def test_how_it_is_called_is_told():
    with pytest.raises(
        TypeError, match=r"makes a function.*influence_scores\(problem, target, …\)\(meta_params, tasks"
    ):
        mi.influence_scores(PROBLEM, LAMBDA, TASKS)
    with pytest.raises(ValueError, match="\"auto\", got 'automatic'"):
        mi.task_if(PROBLEM, damping="automatic")
    of_sides = mi.from_task_loss(lambda params, support, query: jnp.sum(support["x"]))
    with pytest.raises(TypeError) as told:
        mi.total_objective(of_sides)(LAMBDA, TASKS)
    assert told.value.__notes__[:1] == ["task_loss is called as task_loss(meta_params, task, weights)"]
