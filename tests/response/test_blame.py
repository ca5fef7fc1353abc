"""Programs that have no derivative at one task: which task, which step, which example, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence.response import without_spoilt

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


@pytest.mark.parametrize("make", CASES)
def test_the_task_and_the_place_are_named(make):
    problem, tasks, weights = make()
    spoilt, place = CASES[make]
    remedy = rf"drop the task \(weights=mi\.drop\(weights, tasks=\[{spoilt}\]\)\), and the others keep their scores"
    with pytest.raises(ValueError, match=rf"program of task {spoilt}, whose data are finite: .*{place}.*{remedy}"):
        without_spoilt(problem, jnp.asarray(jnp.nan), LAMBDA, tasks, weights)


def test_the_others_keep_their_scores():
    """At weight 0 the task is absent, although it is its weights that spoil it."""
    problem, tasks, weights = clipped()
    with pytest.raises(ValueError, match="inner gradient is exactly 0 at step 0"):
        score(problem, tasks, weights)
    weights = mi.drop(weights, tasks=[2])
    found = score(problem, tasks, weights)
    others = np.asarray([0, 1, 3])
    # The same with another task's data at weight 0.
    filled = jax.tree.map(lambda leaf: leaf[np.asarray([0, 1, 0, 3])], (tasks, weights))
    expected = jax.jit(lambda *data: score(problem, *data))(filled[0], mi.drop(filled[1], tasks=[2]))
    np.testing.assert_allclose(found.task[others], expected.task[others], rtol=1e-9)
    assert np.all(found.task[others] != 0)
    assert found.task[2] == 0


def test_an_example_of_weight_0_is_absent_whatever_its_program_gives():
    problem, tasks, weights = coinciding()
    found = score(problem, tasks, mi.drop(weights, query=[(2, 1)]))
    # With a difference in its place that has a derivative, and that nobody sees.
    moved = tasks._replace(query=tasks.query | {"x": tasks.query["x"].at[2, 1].set(0.7)})
    expected = jax.jit(lambda *data: score(problem, *data))(moved, mi.drop(weights, query=[(2, 1)]))
    np.testing.assert_allclose(found.query, expected.query, rtol=1e-9)
    assert found.query[2, 1] == 0
    assert np.all(np.isfinite(found.support))
