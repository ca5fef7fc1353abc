"""The total Hessian and its surrogates against differences, independent programs and the paper's terms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles import paper
from oracles.problems import KINDS, NAMES, spec
from oracles.reference import derivatives, difference, offsets, ravel, relative_error, rows, solved


@pytest.mark.parametrize("problem_name", NAMES)
def test_exact_product_against_central_differences_of_the_total_gradient(problem_name, rng):
    point, tasks = solved(problem_name), spec(problem_name).tasks
    direction = rng.normal(size=point.lam.shape)
    share = np.asarray(point.weights.task) / len(point.weights.task)

    def gradient(lam):
        _, per_task, _ = runs.gradient_fn(problem_name)(point.flat.unravel(lam), tasks, point.weights)
        return share @ rows(per_task) + jax.grad(point.flat.regularizer)(lam)

    expected = difference([gradient(point.lam + step * direction) for step in offsets()])
    assert relative_error(runs.hessians(problem_name)["exact"] @ direction, expected) <= 1e-6


@pytest.mark.parametrize("problem_name", NAMES)
def test_exact_is_the_second_derivative_of_an_independent_program(problem_name):
    assert relative_error(runs.hessians(problem_name)["exact"], solved(problem_name).derivatives.hessian) <= 1e-9


@pytest.mark.parametrize("problem_name", KINDS)
@pytest.mark.parametrize("kind", runs.CURVATURES)
def test_curvature_is_what_its_terms_say(problem_name, kind):
    """For `exact` this is Theorem 4.5, with the tensor d²θ/dλ² formed."""
    assert relative_error(runs.hessians(problem_name)[kind], paper.curvatures(problem_name)[kind]) <= 1e-9


@pytest.mark.parametrize("problem_name", KINDS)
@pytest.mark.parametrize("kind", runs.CURVATURES)
def test_curvature_is_symmetric(problem_name, kind, rng):
    matrix = runs.hessians(problem_name)[kind]
    left, right = rng.normal(size=(2, len(matrix)))
    scale = np.linalg.norm(matrix, 2) * np.linalg.norm(left) * np.linalg.norm(right)
    assert abs(left @ matrix @ right - right @ matrix @ left) <= 1e-10 * scale


@pytest.mark.parametrize("problem_name", KINDS)
def test_curvatures_differ_where_they_drop_something(problem_name):
    """Otherwise agreement with their definitions would show little."""
    matrices = runs.hessians(problem_name)
    for kind in ("linearized", "gamma", "gauss_newton", "direct"):
        assert relative_error(matrices[kind], matrices["exact"]) >= 1e-3


@pytest.mark.parametrize("problem_name", KINDS)
def test_gauss_newton_is_positive_definite_with_a_convex_head(problem_name):
    assert np.linalg.eigvalsh(runs.hessians(problem_name)["gauss_newton"])[0] > 0


def test_away_from_the_optimum_the_exact_hessian_is_still_exact():
    s = spec("ridge_head")
    weights = mi.unit_weights(s.tasks)
    matrix = jax.jit(lambda *arguments: mi.total_hessian(s.problem())(*arguments).dense())(s.meta_params, s.tasks)
    found = derivatives("ridge_head", ravel(s.meta_params), weights)
    assert relative_error(matrix, found.hessian) <= 1e-9


def test_damping_adds_to_every_eigenvalue_whatever_the_number_of_tasks():
    s = spec("convex")

    def matrix(damping):
        return mi.total_hessian(s.problem(), mi.curvature.direct(), damping=damping)(s.meta_params, s.tasks).dense()

    matrices = [jax.jit(matrix)(damping) for damping in (0.0, 0.3)]
    np.testing.assert_allclose(matrices[1] - matrices[0], 0.3 * np.eye(len(matrices[0])), atol=1e-14)


def test_operator_crosses_jit_as_an_argument_and_can_be_mapped(rng):
    s = spec("prototypes")
    operator = jax.jit(mi.total_hessian(s.problem(), damping=0.1))(s.meta_params, s.tasks)
    vectors = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(3, *leaf.shape))), s.meta_params)
    product = jax.jit(lambda operator, vectors: jax.vmap(operator.matvec)(vectors))(operator, vectors)
    matrix = derivatives("prototypes", ravel(s.meta_params), mi.unit_weights(s.tasks)).hessian
    assert relative_error(rows(product), rows(vectors) @ (matrix + 0.1 * np.eye(len(matrix)))) <= 1e-9
