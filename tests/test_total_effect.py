"""Scores of data that leave the target's own tasks too: what goes through λ, and what does not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.response import shares_support


def squares(params, meta_params, batch):
    return (batch["x"] @ params - batch["y"]) ** 2


def ridge(meta_params, support, coefficients):
    """The minimum of the weighted squares plus exp(λ) ‖θ‖²."""
    x, y = support["x"], support["y"]
    gram = x.T @ (coefficients[:, None] * x) + jnp.exp(meta_params) * jnp.eye(2)
    return jnp.linalg.solve(gram, x.T @ (coefficients * y))


# λ is the logarithm of a ridge regression's strength; the model is what it trains.
PROBLEM = mi.bilevel(squares, mi.adaptation.closed_form(ridge))
IMPLICIT = mi.bilevel(
    squares,
    mi.adaptation.implicit(
        squares, lambda m, support: jnp.zeros(2), regularizer=lambda params, m: jnp.exp(m) * jnp.sum(params**2)
    ),
)
TARGET = mi.query_loss(PROBLEM)
OBJECTIVE = mi.total_objective(PROBLEM)


def parts(tasks=1):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tasks, 30, 2))
    y = x @ np.array([1.0, -0.5]) + 0.5 * rng.normal(size=(tasks, 30))
    return [{"x": jnp.asarray(x[:, k : k + 10]), "y": jnp.asarray(y[:, k : k + 10])} for k in (0, 10, 20)]


TRAIN, VALIDATION, TEST = parts()
TASKS, HELD_OUT = mi.Task(TRAIN, VALIDATION), mi.Task(TRAIN, TEST)
WEIGHTS = mi.unit_weights(TASKS)


@jax.jit
def retrained(weights):
    """λ at the minimum of F, by Newton's method."""

    def step(meta_params, _):
        slope, curvature = (d(OBJECTIVE)(meta_params, TASKS, weights) for d in (jax.grad, jax.hessian))
        return meta_params - slope / curvature, slope

    meta_params, slopes = jax.lax.scan(step, jnp.asarray(-1.87), length=12)
    return meta_params, slopes[-1]


@pytest.fixture(scope="module")
def trained():
    meta_params, slope = retrained(WEIGHTS)
    assert abs(slope) < 1e-15
    return meta_params


@pytest.fixture(scope="module")
def total(trained):
    return jax.jit(mi.influence_scores(IMPLICIT, mi.query_loss(IMPLICIT), total_effect=True))(trained, TASKS, HELD_OUT)


def test_total_scores_are_those_of_retraining(trained, total):
    """By central differences: λ trained anew, the target's model trained anew from it."""

    def after(change):
        weights = WEIGHTS._replace(support=WEIGHTS.support + change)
        return TARGET(retrained(weights)[0], HELD_OUT, weights)

    step = 1e-5
    changes = step * jnp.eye(10)[:, None]
    up, down = jax.jit(jax.vmap(after))(changes), jax.jit(jax.vmap(after))(-changes)
    np.testing.assert_allclose(total.support[0], (down - up) / (2 * step), rtol=0, atol=1e-9)
    assert mi.check(total, tol=0.1) is total


@jax.jit
def answers(meta_params, tasks, held_out):
    """What is asked in all ways, by one program."""
    at = mi.optimum(PROBLEM)(meta_params, tasks)
    own = mi.scores(at, TARGET, total_effect=True)(tasks)
    swept = mi.damping.sweep(PROBLEM, TARGET, [0.0, 1.0], total_effect=True)(meta_params, tasks, held_out)
    direct, slope = (
        jax.grad(f, argnums=2)(meta_params, data, WEIGHTS) for f, data in ((TARGET, held_out), (OBJECTIVE, tasks))
    )
    return {
        "plain": mi.scores(at, TARGET)(held_out),
        "total": mi.scores(at, TARGET, total_effect=True)(held_out),
        "own": own,
        "swept": swept,
        "swept plain": mi.damping.sweep(PROBLEM, TARGET, [0.0])(meta_params, tasks, held_out),
        "direct": direct.support,
        "slope": slope.support,
    }


@pytest.fixture(scope="module")
def asked(trained):
    return answers(trained, TASKS, HELD_OUT)


def test_what_goes_through_lambda_alone_is_another_thing(asked, total):
    """The rest is minus the derivative of the target's own loss."""
    plain = asked["plain"]
    np.testing.assert_allclose(total.support - plain.support, -asked["direct"], rtol=0, atol=1e-12)
    assert np.corrcoef(total.support[0], plain.support[0])[0, 1] < 0.6
    np.testing.assert_allclose(total.query, plain.query, rtol=1e-8)
    np.testing.assert_allclose(total.task, plain.task, rtol=0, atol=1e-12)


def test_of_its_own_validation_loss_the_scores_are_minus_the_slope_of_f(asked):
    np.testing.assert_allclose(asked["own"].support, -asked["slope"], rtol=0, atol=1e-14)
    assert np.max(np.abs(asked["slope"])) > 0.05


def test_responses_and_sweeps_have_total_scores_too(asked, total):
    for support in (asked["total"].support, asked["swept"].support[0]):
        np.testing.assert_allclose(support, total.support, rtol=0, atol=1e-12)
    assert not np.allclose(asked["swept"].support[1], total.support, atol=1e-3)


def test_check_tells_of_scores_without_the_direct_effect(asked):
    for name in ("plain", "swept plain"):
        with pytest.warns(mi.DirectEffectWarning, match="pass total_effect=True") as caught:
            mi.check(asked[name], tol=0.1)
        assert [each.filename for each in caught] == [__file__]
    for name in ("total", "own", "swept"):
        # Warnings are errors.
        mi.check(asked[name])


def test_a_target_of_ones_own_may_pair_weights_as_it_likes(trained, asked):
    """Two folds of one training set; the target trains on all of it."""
    folds = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:, :5], leaf[:, 5:]]), TRAIN)
    tasks = mi.Task(folds, jax.tree.map(lambda leaf: leaf[::-1], folds))

    def target(meta_params, held_out, weights):
        own = mi.unit_weights(held_out)._replace(support=weights.support.reshape(1, 10))
        return OBJECTIVE(meta_params, held_out, own)

    @jax.jit
    def both(meta_params, tasks, held_out):
        at = mi.optimum(PROBLEM, solver=mi.solvers.cg(), damping=1.0)(meta_params, tasks)
        return mi.scores(at, target, total_effect=True)(held_out), mi.scores(at, TARGET)(held_out)

    found, through = both(trained, tasks, HELD_OUT)
    np.testing.assert_allclose(found.support - through.support, -asked["direct"].reshape(2, 5), rtol=0, atol=1e-12)
    assert through.info.support_shared


def rolled(batch):
    return jax.tree.map(lambda leaf: jnp.roll(leaf, 3, axis=1), batch)


def more(batch):
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:, :1] + 1.0], axis=1), batch)


def less(batch):
    return jax.tree.map(lambda leaf: leaf[:, 2:], batch)


def padded(batch, filled=0.5):
    """Support sets with a part as padding, in which something else stands."""
    return mi.Task(jax.tree.map(lambda leaf: leaf.at[:, 7:].set(filled), batch), TEST, jnp.arange(10)[None] < 7)


@pytest.mark.parametrize(
    ("held_out", "shared"),
    [
        (HELD_OUT, True),
        (mi.Task(rolled(TRAIN), TEST), True),
        (mi.Task(more(TRAIN), TEST), True),
        (mi.Task(less(TRAIN), TEST), False),
        (padded(TRAIN), False),
        (mi.Task(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), VALIDATION, TRAIN), (TEST, TEST)), True),
        (mi.Task(VALIDATION, TEST), False),
        (mi.Task(jax.tree.map(lambda leaf: leaf + 1e-12, TRAIN), TEST), False),
        (mi.Task({"x": rolled(TRAIN)["x"], "y": TRAIN["y"]}, TEST), False),
        (mi.Task({"x": TRAIN["x"], "y": TRAIN["y"], "id": jnp.zeros((1, 10))}, TEST), None),
    ],
)
def test_support_sets_that_are_shared(held_out, shared, monkeypatch):
    ask = lambda tasks, other: shares_support(tasks, (1.0, {"tasks": other}))  # noqa: E731
    found = jax.jit(ask)(TASKS, held_out)
    assert found is None if shared is None else bool(found) == shared
    # Where there are too many pairs, the first of the target's tasks alone is looked at, and of large examples a part.
    monkeypatch.setattr("metainfluence.response._direct._MOST_PAIRS", 1)
    monkeypatch.setattr("metainfluence.response._direct._MOST_WORDS", 1)
    found = jax.jit(lambda *data: ask(*data))(TASKS, held_out)
    assert found is None if shared is None else bool(found) == (shared and held_out.support["x"].shape[0] == 1)


def test_padding_is_no_part_of_a_support_set():
    ask = jax.jit(lambda tasks, other: shares_support(tasks, (other,)))
    assert ask(padded(TRAIN), padded(TRAIN, 0.2))
    assert ask(padded(TRAIN), HELD_OUT)
    assert not ask(padded(VALIDATION), padded(TRAIN))


@pytest.mark.parametrize("leaf", [jnp.arange(6).reshape(3, 2), jax.random.split(jax.random.key(0), (3, 2))])
def test_whole_numbers_and_keys_are_compared(leaf):
    ours = mi.Task(leaf, leaf)
    assert shares_support(ours, (mi.Task(leaf[1:2, ::-1], ()),))
    assert not shares_support(ours, (mi.Task(jnp.stack([leaf[0, 0], leaf[1, 1]])[None], ()),))


def test_a_call_outside_jit_tells_of_it_unless_nothing_reads_the_support_sets():
    problem = mi.from_task_loss(lambda m, task, w: (m - jnp.mean(w.support * task.support)) ** 2 * jnp.mean(w.query))
    tasks = mi.Task(jnp.asarray([[1.0], [2.0]]), jnp.zeros((2, 1)))
    with pytest.warns(mi.DirectEffectWarning) as caught:
        found = mi.influence_scores(problem, mi.query_loss(problem), solver=mi.solvers.cg())(
            jnp.asarray(1.5), tasks, tasks
        )
    assert [each.filename for each in caught] == [__file__]
    unread = found._replace(task=jnp.ones(2), support=jnp.zeros((2, 1)))
    unread = unread._replace(info=found.info._replace(effective_curvature=jnp.ones(())))
    with pytest.warns(mi.CouplingWarning, match="does not see the data weights") as caught:
        mi.check(unread)
    assert len(caught) == 1


def test_what_cannot_be_paired_is_named(trained):
    two = mi.Task(*(jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), side) for side in HELD_OUT[:2]))
    score = mi.influence_scores(PROBLEM, TARGET, total_effect=True)
    with pytest.raises(ValueError, match=r"weights\.support: expected shape \(2, 10\), .* got \(1, 10\)"):
        score(trained, TASKS, two)
    with pytest.raises(TypeError, match=r"target: expected a function \(meta_params, \*target_args, weights=\)"):
        mi.influence_scores(PROBLEM, lambda m, tasks: m**2, total_effect=True)(trained, TASKS, HELD_OUT)
    for maker in (mi.influence_scores, lambda *args, **options: mi.damping.sweep(*args, [0.0], **options)):
        with pytest.raises(TypeError, match=re.escape("total_effect: expected True or False, got 'yes'")):
            maker(PROBLEM, TARGET, total_effect="yes")
    with pytest.raises(TypeError, match=r"weights: expected metainfluence\.Weights, got int"):
        TARGET(trained, HELD_OUT, 3)


def test_a_stream_takes_the_total_effect_too_and_warns_where_it_is_left_out(tmp_path):
    """Batches of two tasks, the last one filled up; computed, and read from the finished file."""
    train, validation, test = parts(tasks=5)
    tasks, held_out = mi.Task(train, validation), mi.Task(train, test)
    source = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), tasks) for k in range(5)]
    meta_params = jnp.asarray(-1.5)
    shared = {"solver": mi.solvers.cg(), "progress": False, "batch_size": 2}

    def streamed(name, *args, **options):
        return mi.scoring.score(PROBLEM, TARGET, meta_params, source, *args, out=tmp_path / name, **shared, **options)

    def in_memory(**options):
        make = mi.influence_scores(PROBLEM, TARGET, solver=mi.solvers.cg(), **options)
        return jax.jit(make)(meta_params, tasks, held_out)

    total = in_memory(total_effect=True)
    for _ in range(2):
        found = streamed("total", held_out, total_effect=True)
        for side in mi.Weights._fields:
            np.testing.assert_allclose(getattr(found, side), getattr(total, side), rtol=1e-8, atol=1e-12)
        assert found.info.support_shared is None
    through = in_memory()
    assert np.abs(np.asarray(total.support - through.support)).max() > 0.01 * np.abs(total.support).max()
    for _ in range(2):
        with pytest.warns(mi.DirectEffectWarning, match="total_effect=True"):
            found = streamed("through", held_out)
        np.testing.assert_allclose(found.support, through.support, rtol=1e-8, atol=1e-12)
    others = mi.Task(test, validation)
    assert not streamed("others", others).info.support_shared
    with pytest.raises(ValueError, match=r"out: expected .*, which differs in target"):
        streamed("through", held_out, total_effect=True)
    source[3] = jax.tree.map(lambda leaf: leaf[:7], source[3])
    with pytest.raises(ValueError, match="total_effect: expected tasks of one size without masks"):
        streamed("ragged", held_out, total_effect=True)
