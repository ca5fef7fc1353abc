"""Every function eagerly, under jit and under vmap gives the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from oracles.reference import relative_error, row

# Which data the target sees is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:the target adapts to support data")


def model(params, meta_params, batch):
    return (batch["x"] * params[None]) @ meta_params["w"]


def head(outputs, batch):
    return 0.5 * (outputs - batch["y"]) ** 2


def inner_loss(params, meta_params, batch):
    return head(model(params, meta_params, batch), batch)


def init(meta_params, support):
    del support
    return meta_params["start"]


def proximal(params, meta_params):
    return 0.5 * jnp.sum((params - meta_params["start"]) ** 2)


def two_steps(meta_params, support, coefficients):
    """Gradient descent on the inner loss, in few primitives: eagerly each is compiled for itself."""
    params = meta_params["start"]
    for _ in range(2):
        weighted = coefficients * (model(params, meta_params, support) - support["y"])
        params = params - 0.1 * (weighted @ support["x"]) * meta_params["w"]
    return params


ADAPTATIONS = {
    "closed_form": lambda: mi.adaptation.closed_form(two_steps),
    "unrolled": lambda: mi.adaptation.unrolled(inner_loss, init, optax.sgd(0.1), 2),
    "implicit": lambda: mi.adaptation.implicit(inner_loss, init, regularizer=proximal),
}


def problem(adaptation):
    return mi.bilevel(model, ADAPTATIONS[adaptation](), meta_regularizer=mi.l2(0.5), outer_head=head)


def target(meta_params, tasks):
    return jnp.sum(jnp.sin(meta_params["w"])) + jnp.mean(tasks.query["y"]) * jnp.sum(meta_params["start"])


@pytest.fixture(scope="module")
def data():
    """Two λ on a leading axis, three tasks, and weights."""
    rng = np.random.default_rng(11)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape))

    tasks = mi.Task(
        {"x": draw(3, 4, 2), "y": draw(3, 4)},
        {"x": draw(3, 3, 2), "y": draw(3, 3)},
        jnp.asarray([[True] * 4, [True, True, False, False], [True] * 3 + [False]]),
    )
    weights = mi.Weights(*(1 + 0.2 * draw(*shape) for shape in ((3,), (3, 4), (3, 3))))
    return {"start": draw(2, 2), "w": draw(2, 2)}, tasks, weights


# A damping above the negative eigenvalues of every λ: each solver then has a definite system.
OPTIONS = {"solver": mi.solvers.dense(), "damping": 20.0}
CG = {"solver": mi.solvers.cg(tol=1e-13), "damping": 20.0}
FUNCTIONS = {
    "task_loss": lambda p, m, t, w: mi.task_loss(p)(m, row(t, 1), row(w, 1)),
    "total_objective": lambda p, m, t, w: mi.total_objective(p)(m, t, w),
    "total_gradient": lambda p, m, t, w: mi.total_gradient(p)(m, row(t, 1), row(w, 1)),
    "total_hessian": lambda p, m, t, w: mi.total_hessian(p)(m, t, w).matvec(m),
    "gamma": lambda p, m, t, w: mi.total_hessian(p, mi.curvature.gamma())(m, t, w).matvec(m),
    "gauss_newton": lambda p, m, t, w: mi.total_hessian(p, mi.curvature.gauss_newton())(m, t, w).matvec(m),
    "direct": lambda p, m, t, w: mi.total_hessian(p, mi.curvature.direct())(m, t, w).matvec(m),
    "task_if": lambda p, m, t, w: mi.task_if(p, **CG)(m, t, w).delta,
    "support_if": lambda p, m, t, w: mi.instance_if(p, "support", **OPTIONS)(m, t, 2, w).delta,
    "query_if": lambda p, m, t, w: mi.instance_if(p, "query", **OPTIONS)(m, t, 0, w).delta,
    "group": lambda p, m, t, w: mi.group_influence(p, **OPTIONS)(m, t, w, w).delta,
    "scores": lambda p, m, t, w: mi.influence_scores(p, target, **OPTIONS)(m, t, t, weights=w)[:3],
    "self": lambda p, m, t, w: mi.self_influence(p, **OPTIONS)(m, t, w)[:3],
    "edit": lambda p, m, t, w: mi.edit(p, **OPTIONS)(m, t, mi.drop(w, tasks=[1], query=[(0, 2)]), w).meta_params,
    "direct_if": lambda p, m, t, w: mi.baselines.direct_if(p, target, **OPTIONS)(m, t, t, weights=w)[:3],
}


def agree(found, expected):
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(got, wanted) <= 1e-12


@pytest.mark.parametrize(
    ("adaptation", "kind"),
    [("closed_form", kind) for kind in FUNCTIONS]
    + [(adaptation, kind) for adaptation in ("unrolled", "implicit") for kind in ("total_gradient", "total_hessian")],
)
def test_eager_jit_and_vmap_over_lambda_give_the_same(adaptation, kind, data):
    both, tasks, weights = data
    of = problem(adaptation)

    def run(meta_params):
        return FUNCTIONS[kind](of, meta_params, tasks, weights)

    compiled, mapped = jax.jit(lambda both: (run(row(both, 0)), jax.vmap(run)(both)))(both)
    eager = run(row(both, 0))
    agree(compiled, eager)
    agree(row(mapped, 0), eager)


def test_the_hand_written_steps_are_those_of_the_unrolled_optimizer(data):
    both, tasks, weights = data
    losses = [mi.total_objective(problem(kind))(row(both, 1), tasks, weights) for kind in ("closed_form", "unrolled")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-13)


def test_scores_are_differentiable(data):
    """The gradient of a score in λ, against differences: nothing between the problem and the scores stops it."""
    both, tasks, weights = data
    meta_params = row(both, 0)
    make = mi.influence_scores(problem("closed_form"), target, **OPTIONS)

    def score(step):
        moved = jax.tree.map(lambda leaf: leaf * (1 + step), meta_params)
        return make(moved, tasks, tasks, weights=weights).query[0, 1]

    value = jax.jit(jax.vmap(score))(jnp.asarray([1e-4, -1e-4]))
    slope = jax.jit(jax.grad(score))(jnp.zeros(()))
    np.testing.assert_allclose(slope, (value[0] - value[1]) / 2e-4, rtol=1e-6)


def test_constants_of_a_compiled_function_are_checked_like_arguments(data):
    """λ, tasks and weights that a compiled function closes over are values, not tracers."""
    both, tasks, weights = data
    meta_params = row(both, 0)

    def objective(scale):
        return scale * mi.total_objective(problem("closed_form"))(meta_params, tasks, weights)

    np.testing.assert_allclose(jax.jit(objective)(2.0), 2 * objective(1.0), rtol=1e-13)
    spoilt = weights._replace(task=weights.task.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match=r"weights\.task.*expected finite"):
        jax.jit(lambda m: mi.total_objective(problem("closed_form"))(m, tasks, spoilt))(meta_params)
    infinite = {**meta_params, "w": meta_params["w"] / 0}
    with pytest.raises(ValueError, match=r"meta_params\['w'\].*expected finite"):
        jax.jit(lambda w: mi.total_objective(problem("closed_form"))(infinite, tasks, w))(weights)
    with pytest.raises(ValueError, match=r"index.*expected"):
        jax.jit(lambda m: mi.instance_if(problem("closed_form"), "query")(m, tasks, 3))(meta_params)
    with pytest.raises(ValueError, match=r"tasks.*expected.*got.*7"):
        jax.jit(lambda w: mi.drop(w, tasks=[7]))(weights)


def test_data_are_arguments_and_not_constants_of_the_compiled_function(data):
    both, tasks, weights = data
    make = mi.influence_scores(problem("closed_form"), target, **OPTIONS)

    def run(meta_params, tasks, weights):
        return make(meta_params, tasks, tasks, weights=weights)

    closed = jax.make_jaxpr(run)(row(both, 0), tasks, weights)
    # Keys of a hash are whole numbers without a sign, as no data here are.
    data = [constant for constant in closed.consts if constant.dtype != np.uint32]
    assert max(map(np.size, data), default=0) <= 1
