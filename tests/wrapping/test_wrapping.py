"""Every way to wrap existing code on the page, against the same code before it was wrapped."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from oracles.reference import light_jit
from wrapping.page import SECTIONS, as_a_reader, execute

WRAPPED = [title for title in SECTIONS if title not in ("Data", "Scores", "Batch normalisation")]
PLANTED = 3


def in_float64(scope):
    """Arrays of the scope that the page has made in float32."""

    def cast(leaf):
        return leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    names = ("tasks", "held_out", "meta_params", "state", "stats")
    scope.update({name: jax.tree.map(cast, scope[name]) for name in names if name in scope})
    return scope


def plain_objective(plain, scope):
    """The mean loss over tasks by the user's own code."""
    if "outer_loss" in plain:
        return plain["outer_loss"]
    keys = [plain["task_keys"][:12]] if "task_keys" in plain else []

    def objective(meta_params, *data):
        # Of Equinox, λ is the part of the module that is trained.
        own = equinox.combine(meta_params, scope["static"]) if "static" in scope else meta_params
        return jnp.mean(jax.vmap(lambda *task: plain["task_loss"](own, *task))(*data, *keys))

    return objective


def one_product(gradient, meta_params, vector, title):
    if title == "jaxopt":
        return jax.vjp(gradient, meta_params)[1](vector)[0]
    return jax.jvp(gradient, (meta_params,), (vector,))[1]


@pytest.fixture(scope="module")
def data():
    with as_a_reader(x64=False):
        return execute(SECTIONS["Data"], {})


@pytest.mark.parametrize("title", WRAPPED)
def test_wrapping_takes_at_most_ten_lines(title):
    lines = [line.partition("#")[0] for line in SECTIONS[title][-1].splitlines()]
    assert 0 < sum(1 for line in lines if line.strip()) <= 10


@pytest.mark.parametrize("title", WRAPPED)
def test_wrapped_code_has_the_derivatives_of_the_code_and_finds_the_planted_task(title, data):
    *own, wrapping = SECTIONS[title]
    with as_a_reader(x64=False):
        # The wrapping may rebind names of the user's code, as a loss that weighs its examples.
        plain, scope = execute(own, dict(data)), execute([*own, wrapping], dict(data))
    with as_a_reader(x64=True):
        plain, scope = in_float64(plain), in_float64(scope)
        problem, meta_params, objective = scope["problem"], scope["meta_params"], plain_objective(plain, scope)

        @light_jit
        def by_hand(meta_params, vector, *data):
            gradient = jax.grad(objective)
            return gradient(meta_params, *data), one_product(lambda m: gradient(m, *data), meta_params, vector, title)

        @light_jit
        def by_the_library(meta_params, vector, tasks, held_out):
            gradients = jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(meta_params, tasks)
            product = mi.total_hessian(problem)(meta_params, tasks).matvec(vector)
            scores = mi.influence_scores(problem, mi.query_loss(problem), solver=mi.solvers.cg(), damping=2.0)
            mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)
            return (mean, product), scores(meta_params, tasks, held_out)

        rng = np.random.default_rng(7)
        vector = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta_params)
        expected = by_hand(meta_params, vector, plain["tasks"].support, plain["tasks"].query)
        found, scores = by_the_library(meta_params, vector, scope["tasks"], scope["held_out"])
        # jaxopt's own solver stops at a residual, and differently in each program.
        tol = 1e-8 if title == "jaxopt" else 1e-9
        for ours, theirs in zip(found, expected, strict=True):
            assert optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)) < tol * optax.tree.norm(theirs)
    mi.check(scores)
    assert int(np.argmin(scores.task)) == PLANTED
    assert np.all(np.isfinite(scores.support))
    assert np.all(scores.support != 0)
    assert np.all(scores.query != 0)
