"""`linear_solve`: the answers and derivatives of `jnp.linalg.solve`, without its batches of LAPACK calls."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from oracles.reference import relative_error

linear_solve = mi.adaptation.linear_solve


@pytest.fixture(params=[(), (2,)], ids=["vector", "matrix"])
def systems(request, rng):
    """Five systems that are not symmetric."""
    return jnp.asarray(rng.normal(size=(5, 3, 3))), jnp.asarray(rng.normal(size=(5, 3, *request.param)))


def of(solve, derive):
    """A derivative of a function of five solutions, as one flat array."""
    function = derive(lambda matrices, rhs: jnp.sum(jnp.sin(jax.vmap(solve)(matrices, rhs))))
    return jax.jit(lambda *systems: jax.flatten_util.ravel_pytree(function(*systems))[0])


DERIVATIVES = {
    "value": lambda function: function,
    "gradient": lambda function: jax.grad(function, (0, 1)),
    "forward over reverse": lambda function: (
        lambda *systems: jax.jvp(jax.grad(function, (0, 1)), systems, jax.tree.map(jnp.cos, systems))[1]
    ),
    "reverse over reverse": lambda function: jax.grad(
        lambda *systems: sum(jnp.sum(part**2) for part in jax.grad(function, (0, 1))(*systems)), (0, 1)
    ),
    "linearized": lambda function: (
        lambda *systems: jax.linearize(jax.grad(function, (0, 1)), *systems)[1](*jax.tree.map(jnp.cos, systems))
    ),
}


@pytest.mark.parametrize("derive", DERIVATIVES.values(), ids=DERIVATIVES)
def test_is_that_of_jax(systems, derive):
    assert relative_error(of(linear_solve, derive)(*systems), of(jnp.linalg.solve, derive)(*systems)) <= 1e-12


def test_solves_one_matrix_after_the_other_under_vmap(systems):
    """A batch of LAPACK calls has the batch in its operands' shapes."""

    def called(solve):
        """Shapes of the first operands of the calls of LAPACK."""
        text = of(solve, DERIVATIVES["gradient"]).lower(*systems).as_text()
        return re.findall(r"custom_call @lapack_\w+\(.*: \(tensor<([0-9x]+)xf64>", text)

    assert "5x3x3" in called(jnp.linalg.solve)
    assert set(called(linear_solve)) == {"3x3"}


def test_accelerators_take_a_batch_together(systems):
    """No loop, and one call for five matrices."""
    traced = of(linear_solve, DERIVATIVES["value"]).trace(*systems)
    cpu, gpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda"))
    assert "stablehlo.while" in cpu
    assert len(re.findall(r"custom_call @cu\w*getrf\w*\(.*tensor<5x3x3xf64>", gpu)) == 1
    assert "lapack" not in gpu


def test_bad_input():
    with pytest.raises(ValueError, match=r"matrix: expected a square matrix, got shape \(2, 3\)"):
        linear_solve(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"rhs: expected shape \(2,\) or \(2, k\), got \(3,\)"):
        linear_solve(jnp.eye(2), jnp.ones(3))


def test_is_a_head_that_influence_goes_through(rng):
    """A ridge head by it has the scores of the same head by JAX's solver."""

    def problem(solve):
        def adapt(meta_params, support, coefficients):
            seen = support["x"] @ jnp.diag(meta_params)
            gram = seen.T @ (coefficients[:, None] * seen) + 0.1 * jnp.eye(2)
            return solve(gram, seen.T @ (coefficients * support["y"]))

        def loss(params, meta_params, query):
            return (query["x"] @ (meta_params * params) - query["y"]) ** 2

        return mi.bilevel(loss, mi.adaptation.closed_form(adapt), meta_regularizer=mi.l2(0.1))

    def sides():
        return {"x": jnp.asarray(rng.normal(size=(4, 6, 2))), "y": jnp.asarray(rng.normal(size=(4, 6)))}

    tasks = mi.Task(sides(), sides())

    def scores(solve):
        made = problem(solve)
        score = jax.jit(mi.influence_scores(made, mi.query_loss(made), damping=1.0))
        return score(jnp.array([0.7, 1.2]), tasks, tasks)

    for name in ("task", "support", "query"):
        np.testing.assert_allclose(
            getattr(scores(linear_solve), name), getattr(scores(jnp.linalg.solve), name), rtol=1e-9, atol=1e-12
        )
