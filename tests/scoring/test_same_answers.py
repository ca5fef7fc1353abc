"""Scores of tasks that are read in batches are those of tasks in memory: same defaults, same numbers, same status."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi

FEATURES, CLASSES, COUNT = 4, 3, 12


def losses(params, meta_params, batch):
    logits = jnp.tanh(batch["x"] @ meta_params["features"]) @ params
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)[:, 0]


def network_losses(params, meta_params, batch):
    return losses(params["head"], params, batch)


def ridge(meta_params, support, coefficients):
    x = jnp.tanh(support["x"] @ meta_params["features"])
    gram = x.T @ (coefficients[:, None] * x) + 0.1 * jnp.eye(x.shape[1])
    return mi.adaptation.linear_solve(gram, x.T @ (coefficients[:, None] * jax.nn.one_hot(support["y"], CLASSES)))


def problem_of(kind, width):
    if kind == "unrolled":
        steps = mi.adaptation.unrolled(network_losses, lambda meta_params, support: meta_params, sgd(), 3)
        return mi.bilevel(network_losses, steps, meta_regularizer=mi.l2(0.01))
    adapt = mi.adaptation.closed_form(ridge)
    if kind == "implicit":
        adapt = mi.adaptation.implicit(
            losses,
            lambda meta_params, support: jnp.zeros((width, CLASSES)),
            regularizer=lambda params, meta_params: 0.05 * jnp.sum(params**2),
        )
    return mi.bilevel(losses, adapt, meta_regularizer=mi.l2(0.01))


def sgd():
    import optax

    return optax.sgd(0.3)


def point(width, rng):
    def examples(number):
        return {
            "x": jnp.asarray(rng.normal(size=(number, 5, FEATURES))),
            "y": jnp.asarray(rng.integers(0, CLASSES, size=(number, 5))),
        }

    meta_params = {
        "features": jnp.asarray(rng.normal(size=(FEATURES, width))),
        "head": jnp.asarray(rng.normal(size=(width, CLASSES))),
    }
    return meta_params, mi.Task(examples(COUNT), examples(COUNT)), mi.Task(examples(3), examples(3))


# `auto` forms the matrix of a small operator, and grows a basis for a larger one.
DAMPINGS = [(5.0, True), (0.0, False), ("auto", True)]
EVERY = list(itertools.product(["closed_form", "unrolled", "implicit"], DAMPINGS, [6, 40]))
# Every kind, at every damping, in either width; the rest takes long.
QUICK = {
    ("closed_form", 0.0, 6),
    ("closed_form", "auto", 6),
    ("unrolled", 0.0, 6),
    ("implicit", 0.0, 6),
    ("implicit", "auto", 40),
}


@pytest.mark.parametrize(
    ("kind", "damping", "definite", "width"),
    [
        pytest.param(kind, *damping, width, marks=[] if (kind, damping[0], width) in QUICK else [pytest.mark.slow])
        for kind, damping, width in EVERY
    ],
)
def test_streamed_and_in_memory(kind, damping, definite, width, rng, tmp_path):
    problem = problem_of(kind, width)
    meta_params, tasks, held_out = point(width, rng)
    if kind != "unrolled":
        del meta_params["head"]
    target = mi.query_loss(problem)
    there = jax.jit(mi.influence_scores(problem, target, damping=damping))(meta_params, tasks, held_out)
    source = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), tasks) for k in range(COUNT)]
    here = mi.scoring.score(
        problem,
        target,
        meta_params,
        source,
        held_out,
        out=tmp_path / "scores.parquet",
        damping=damping,
        batch_size=5,
        progress=False,
    )
    assert int(here.info.status) == int(there.info.status)
    assert (float(there.info.min_curvature) > 0) == definite
    for name in ("task", "support", "query"):
        expected = np.asarray(getattr(there, name))
        np.testing.assert_allclose(getattr(here, name), expected, rtol=0, atol=1e-9 * np.max(np.abs(expected)))
    assert int(here.info.choice) == int(there.info.choice)
    assert int(here.info.num_matvecs) == int(there.info.num_matvecs)
    np.testing.assert_allclose(here.info.damping, there.info.damping, rtol=1e-9)
