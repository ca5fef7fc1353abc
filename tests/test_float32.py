"""The float32 lane: every result within the dtype's precision, times the conditioning, of the float64 one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles import problems
from oracles.parts import apply_net, squared_error
from oracles.reference import relative_error, rows, solved

EPS = float(np.finfo(np.float32).eps)


def single(tree):
    """Floating-point leaves in float32, as numpy arrays, which have no JAX dtype rules of their own."""
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype), tree
    )


@pytest.mark.parametrize("problem_name", ["implicit_head", pytest.param("maml_sgd", marks=pytest.mark.slow)])
def test_float32_is_as_close_to_float64_as_its_precision_allows(problem_name):
    point = solved(problem_name)
    expected_losses, expected_gradients, _ = runs.gradient_fn(problem_name)(
        point.meta_params, problems.spec(problem_name).tasks, point.weights
    )
    expected_scores = runs.influences(problem_name)["scores"]
    hessian = point.derivatives.hessian
    arguments = single(
        (
            point.meta_params,
            problems.spec(problem_name).tasks,
            point.weights,
            runs.target_coefficients(problem_name),
        )
    )

    with jax.enable_x64(False):
        # Built anew, so that no float64 array hides in a closure.
        problem = getattr(problems, problem_name)().problem()

        def run(meta_params, tasks, weights, coefficients):
            scores = mi.influence_scores(problem, runs.target, solver=mi.solvers.dense())
            return (
                jax.vmap(mi.task_loss(problem), in_axes=(None, 0, 0))(meta_params, tasks, weights),
                jax.vmap(mi.total_gradient(problem), in_axes=(None, 0, 0))(meta_params, tasks, weights),
                mi.total_hessian(problem)(meta_params, tasks, weights).dense(),
                scores(meta_params, tasks, coefficients, weights=weights),
            )

        losses, gradients, matrix, scores = jax.jit(run)(*arguments)
        assert {leaf.dtype for leaf in jax.tree.leaves((losses, gradients, matrix, scores[:3]))} == {
            np.dtype("float32")
        }

    # An inner problem is solved to eps^(3/4), which enters values times ∂_θ L, of order 1. Sums of some tens of terms
    # and second derivatives cost a factor of some tens.
    inner = EPS**0.75 if problems.spec(problem_name).inner else EPS
    assert relative_error(losses, expected_losses) <= 10 * inner
    assert relative_error(rows(gradients), rows(expected_gradients)) <= 50 * inner
    assert relative_error(matrix, hessian) <= 100 * inner
    condition = np.linalg.cond(hessian)
    for kind in mi.Weights._fields:
        assert relative_error(getattr(scores, kind), getattr(expected_scores, kind)) <= 10 * condition * inner
    assert scores.info.status == mi.SolveStatus.CONVERGED


def test_float32_data_stay_float32_where_float64_is_enabled():
    """A user of float64 elsewhere must not find a float32 model computed in mixed precision."""
    s = problems.spec("maml_sgd")
    meta_params, tasks = jax.tree.map(jnp.asarray, single((s.meta_params, s.tasks)))

    def outer_loss(params, meta_params, batch):
        return squared_error(apply_net(params, batch["x"]), batch)

    adapt = mi.adaptation.closed_form(
        lambda meta_params, support, coefficients: jax.tree.map(
            lambda leaf: leaf * jnp.sum(coefficients).astype(leaf.dtype), meta_params
        )
    )
    problem = mi.bilevel(outer_loss, adapt, meta_regularizer=mi.l2(1.0))
    assert jax.jit(mi.total_objective(problem))(meta_params, tasks).dtype == jnp.float32
    influence = jax.jit(mi.task_if(problem, damping=10.0))(meta_params, tasks)
    assert {leaf.dtype for leaf in jax.tree.leaves(influence.delta)} == {jnp.dtype("float32")}


MIXED = {
    "one of λ": (("scale",), ()),
    "the other leaf": (("first",), ()),
    "data": ((), ("x",)),
    "λ and data": (("scale",), ("x", "y")),
}


@pytest.fixture(scope="module")
def in_double():
    """A problem whose losses are computed in double precision whatever their arguments are held in, and its scores."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(6, 8, 6)) * np.geomspace(10, 0.3, 6), "y": rng.normal(size=(6, 8))}
    x, y = data["x"].reshape(-1, 6), data["y"].reshape(-1)
    minimum = np.linalg.solve(2 * x.T @ x / len(y) + 0.05 * np.eye(6), 2 * x.T @ y / len(y))
    at = {"first": minimum[:3], "scale": minimum[3:]}

    def loss(meta_params, task, weights):
        m, query = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (meta_params, task.query))
        found = query["x"] @ jnp.concatenate([m["first"], m["scale"]])
        return jnp.mean(weights.query * (found - query["y"]) ** 2)

    problem = mi.from_task_loss(
        loss, meta_regularizer=lambda m: mi.l2(0.05)(jax.tree.map(lambda x: x.astype(float), m))
    )

    def scores(solver, single, single_data):
        m = {name: jnp.asarray(value, jnp.float32 if name in single else float) for name, value in at.items()}
        query = {name: jnp.asarray(v, jnp.float32 if name in single_data else float) for name, v in data.items()}
        target = lambda m: sum(jnp.sum(leaf.astype(float) ** 2) for leaf in jax.tree.leaves(m))  # noqa: E731
        # Under strict promotion λ of two dtypes is refused.
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(mi.influence_scores(problem, target, solver=solver))(m, mi.Task((), query))

    return scores, scores(mi.solvers.cg(tol=1e-12), (), ())


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("solver", [None, mi.solvers.cg(), mi.solvers.auto(dense_size=0, tol=1e-10)], ids=repr)
def test_one_leaf_in_single_precision_is_no_fault(in_double, solver, kind):
    scores, expected = in_double
    found = mi.check(scores(solver, *MIXED[kind]))
    assert found.info.status == mi.SolveStatus.CONVERGED
    np.testing.assert_allclose(found.task, expected.task, rtol=2e-5, atol=2e-6 * np.abs(expected.task).max())
