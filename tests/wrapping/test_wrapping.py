"""Every way to wrap existing code on the page, against the same code before it was wrapped."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from wrapping.page import SECTIONS, as_a_reader, execute, quick_jit

LOOP = "A training loop of your own"
WRAPPED = [title for title in SECTIONS if title not in ("Data", "Scores", "Batch normalisation", LOOP)]
PLANTED = 3


def in_float64(scope):
    """Arrays of the scope that the page has made in float32."""

    def cast(leaf):
        return leaf.astype(float) if equinox.is_inexact_array(leaf) else leaf

    names = ("tasks", "held_out", "meta_params", "state", "stats")
    scope.update({name: jax.tree.map(cast, scope[name]) for name in names if name in scope})
    return scope


def plain_objective(scope):
    """The mean loss over tasks by the user's own code, and where to take it."""
    if "outer_loss" in scope:
        return scope["outer_loss"], scope["meta_params"]
    task_loss, keys = scope["task_loss"], [scope["task_keys"][:12]] if "task_keys" in scope else []
    # Of an Equinox module λ is the part that is trained; other sections make λ themselves.
    whole = scope["meta_params"] if "meta_params" in scope else scope["net"]
    meta_params, static = equinox.partition(whole, equinox.is_inexact_array)
    meta_params = jax.tree.map(lambda leaf: leaf.astype(float), meta_params)

    def objective(meta_params, *data):
        own = equinox.combine(meta_params, static)
        return jnp.mean(jax.vmap(lambda *task: task_loss(own, *task))(*data, *keys))

    return objective, meta_params


def one_product(gradient, meta_params, vector, title):
    if title == "jaxopt":
        return jax.vjp(gradient, meta_params)[1](vector)[0]
    return jax.jvp(gradient, (meta_params,), (vector,))[1]


@pytest.fixture(scope="module")
def data():
    with as_a_reader(x64=False):
        return execute(SECTIONS["Data"], {})


@pytest.mark.parametrize("title", [*WRAPPED, LOOP])
def test_wrapping_takes_at_most_ten_lines(title):
    lines = [line.partition("#")[0] for line in SECTIONS[title][-1].splitlines()]
    assert 0 < sum(1 for line in lines if line.strip()) <= 10


@pytest.mark.parametrize("title", WRAPPED)
def test_wrapped_code_has_the_derivatives_of_the_code_and_finds_the_planted_task(title, data):
    *own, wrapping = SECTIONS[title]
    with as_a_reader(x64=False):
        scope = execute(own, dict(data))
    with as_a_reader(x64=True):
        scope = in_float64(scope)
        objective, meta_params = plain_objective(scope)

        @quick_jit
        def by_hand(meta_params, vector, *data):
            gradient = jax.grad(objective)
            return gradient(meta_params, *data), one_product(lambda m: gradient(m, *data), meta_params, vector, title)

        rng = np.random.default_rng(7)
        vector = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta_params)
        expected = by_hand(meta_params, vector, scope["tasks"].support, scope["tasks"].query)

    # Only now, since it may rebind names of the user's code, as a loss that weighs its examples.
    with as_a_reader(x64=False):
        execute([wrapping], scope)
    with as_a_reader(x64=True):
        scope = in_float64(scope)
        problem = scope["problem"]

        @quick_jit
        def by_the_library(meta_params, vector, tasks, held_out):
            gradients = jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(meta_params, tasks)
            product = mi.total_hessian(problem)(meta_params, tasks).matvec(vector)
            scores = mi.influence_scores(problem, mi.query_loss(problem), solver=mi.solvers.cg(), damping=2.0)
            mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients)
            return (mean, product), scores(meta_params, tasks, held_out)

        found, scores = by_the_library(scope["meta_params"], vector, scope["tasks"], scope["held_out"])
        # jaxopt's own solver stops at a residual, and differently in each program.
        tol = 1e-8 if title == "jaxopt" else 1e-9
        for ours, theirs in zip(found, expected, strict=True):
            assert optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)) < tol * optax.tree.norm(theirs)
    mi.check(scores)
    assert int(np.argmin(scores.task)) == PLANTED
    assert np.all(np.isfinite(scores.support))
    assert np.all(scores.support != 0)
    assert np.all(scores.query != 0)


def test_scores_as_printed(data, capsys):
    with as_a_reader(x64=False):
        execute([*SECTIONS["Plain pytrees"], *SECTIONS["Scores"]], dict(data))
    assert capsys.readouterr().out.startswith(f"most harmful: task {PLANTED} ")


def test_a_loop_that_was_wrapped_ends_where_it_did_and_has_its_derivative(data):
    with as_a_reader(x64=False):
        scope = execute([*SECTIONS["Plain pytrees"], *SECTIONS[LOOP]], dict(data))
    with as_a_reader(x64=True):
        scope = in_float64(scope)
        meta_params, tasks, run = scope["meta_params"], scope["tasks"], scope["run"]
        start = (meta_params, scope["optimizer"].init(meta_params), meta_params)
        at = mi.trajectory(run)(start, tasks)
        by_hand = quick_jit(scope["train"])(meta_params)
        assert optax.tree.norm(optax.tree.sub(at.meta_params, by_hand)) < 1e-10 * optax.tree.norm(by_hand)

        target = mi.query_loss(scope["problem"])
        scores = mi.check(mi.scores(at, target)(scope["held_out"]))
        weights = mi.unit_weights(tasks)

        @quick_jit
        def ends(steps):
            def end(step):
                return target(
                    run(start, tasks, weights._replace(task=weights.task.at[PLANTED].add(step))), scope["held_out"]
                )

            return jax.vmap(end)(steps)

        up, down = ends(jnp.asarray([1e-4, -1e-4]))
        np.testing.assert_allclose(scores.task[PLANTED], -(up - down) / 2e-4, rtol=1e-5)
    assert np.all(scores.support != 0)
    assert np.all(scores.query != 0)
