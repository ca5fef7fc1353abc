"""Chunks are chosen from shapes alone, the same under jit and outside, and change no answer."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from metainfluence._chunks import Chunks
from metainfluence.differentiation import FORWARD, REVERSE
from metainfluence.response import Options, _choice, _lean, batch_pull
from scoring import setting

COUNT = 40
EXACT = mi.curvature.exact()


@pytest.fixture(scope="module")
def tasks():
    return mi.stack_tasks(setting.tasks(COUNT))


@pytest.fixture(scope="module")
def meta_params():
    return jax.tree.map(jnp.asarray, setting.LAMBDA)


@pytest.fixture(scope="module")
def each(tasks, meta_params):
    return _choice.linearised_bytes(setting.PROBLEM, EXACT, meta_params, tasks)


def chosen(meta_params, tasks, vectors=1, **options):
    return _choice.fitting_chunks(setting.PROBLEM, EXACT, meta_params, tasks, vectors, None, **options)


def test_few_tasks_are_taken_at_once_without_a_look_at_them(tasks, meta_params, monkeypatch):
    monkeypatch.setattr(_choice, "linearised_bytes", lambda *args: pytest.fail("traced"))
    few = jax.tree.map(lambda leaf: leaf[:10], tasks)
    assert chosen(meta_params, few, 3) == Chunks(None)


def test_what_is_small_is_taken_at_once(tasks, meta_params, each, monkeypatch):
    monkeypatch.setattr(_choice, "CACHE_BYTES", each)
    assert chosen(meta_params, tasks, COUNT) == Chunks(None, None, True)
    monkeypatch.setattr(_choice, "AT_ONCE_BYTES", COUNT * each)
    assert chosen(meta_params, tasks).tasks is None
    monkeypatch.setattr(_choice, "AT_ONCE_BYTES", COUNT * each - 1)
    assert chosen(meta_params, tasks).tasks is not None


@pytest.fixture
def always_in_chunks(monkeypatch):
    monkeypatch.setattr(_choice, "AT_ONCE_BYTES", 0)


@pytest.mark.usefixtures("always_in_chunks")
def test_a_chunk_stays_in_the_cache(tasks, meta_params, each, monkeypatch):
    monkeypatch.setattr(_choice, "CACHE_BYTES", 25 * each)
    assert chosen(meta_params, tasks) == Chunks(20, None, True)
    # The least chunk that is worth while.
    monkeypatch.setattr(_choice, "CACHE_BYTES", each)
    assert chosen(meta_params, tasks) == Chunks(14, None, True)


@pytest.mark.usefixtures("always_in_chunks")
def test_what_does_not_fit_is_made_anew(tasks, meta_params, each, monkeypatch):
    monkeypatch.setattr(_choice, "usable_bytes", lambda: 2 * each)
    assert not chosen(meta_params, tasks).keep
    assert chosen(meta_params, tasks, COUNT).vectors < COUNT
    assert chosen(meta_params, tasks, batch_size=7).tasks == 7


def test_a_named_chunk_is_kept_where_all_of_them_fit(tasks, meta_params):
    assert chosen(meta_params, tasks, batch_size=7) == Chunks(7, None, True)
    assert chosen(meta_params, tasks, batch_size=COUNT).tasks is None


@pytest.mark.usefixtures("always_in_chunks")
def test_the_same_under_jit_and_on_shapes(tasks, meta_params, each, monkeypatch):
    monkeypatch.setattr(_choice, "CACHE_BYTES", 25 * each)
    found = []
    jax.eval_shape(lambda m, t: found.append(chosen(m, t)), meta_params, tasks)
    assert found == [chosen(meta_params, tasks)]


@pytest.mark.parametrize(
    ("cache", "room"),
    [
        (1, 1e9),
        (25, 30),
        (25, 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 30), (1, 3), (25, 1e9))),
    ],
)
def test_no_answer_depends_on_the_choice(tasks, meta_params, each, room, cache, monkeypatch):
    cg = mi.solvers.cg(tol=1e-13)
    scores = mi.influence_scores(setting.PROBLEM, setting.target, solver=cg, damping=1.0)
    deltas = mi.task_if(setting.PROBLEM, solver=cg, damping=1.0)

    def run(meta_params, tasks):
        return scores(meta_params, tasks, *setting.TARGET_ARGS)[:3], deltas(meta_params, tasks).delta

    whole = jax.jit(run)(meta_params, tasks)
    monkeypatch.setattr(_choice, "AT_ONCE_BYTES", 0)
    monkeypatch.setattr(_choice, "CACHE_BYTES", cache * each)
    monkeypatch.setattr(_choice, "usable_bytes", lambda: room * each)
    parts = jax.jit(lambda *args: run(*args))(meta_params, tasks)
    for got, wanted in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-14)


def test_what_an_accelerator_has_is_its_whole_memory(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1e10, "bytes_in_use": 9e9}

    assert _choice.usable_bytes() == _choice.HOST_BYTES
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _choice.usable_bytes() == 0.6e10


def test_what_is_dear_is_kept_where_not_all_fits(monkeypatch):
    """The same scores, to rounding, from a linearisation that keeps products of matrices and makes the rest anew."""
    rng = np.random.default_rng(3)
    layers = {"w": jnp.asarray(rng.normal(size=(3, 5))), "v": jnp.asarray(rng.normal(size=(5, 5)))}
    data = jnp.asarray(rng.normal(size=(9, 6, 3)))

    def losses(params, meta_params, batch):
        features = jnp.tanh(jnp.tanh(batch @ meta_params["w"]) @ meta_params["v"])
        return jnp.square(jnp.sin(features) @ params - batch[:, 0])

    fit = mi.adaptation.implicit(losses, lambda m, s: jnp.zeros(5), regularizer=lambda p, m: 0.1 * jnp.sum(p**2))
    problem = mi.bilevel(losses, fit)
    tasks = mi.Task(data, 0.5 * data)
    whole, lean = (_choice.linearised_bytes(problem, EXACT, layers, tasks, lean=lean) for lean in (False, True))
    assert lean < 0.6 * whole
    found = []
    for room, hvp in ((1e9, FORWARD), (9 * (whole + lean) / 2, FORWARD), (9 * (whole + lean) / 2, REVERSE)):
        monkeypatch.setattr(_choice, "usable_bytes", lambda room=room: room)
        chunks = _choice.fitting_chunks(problem, EXACT, layers, tasks, 1, None, batch_size=4)
        assert chunks[2:] == (True, bool(found))
        options = Options.of(problem, batch_size=4, hvp=hvp)

        @jax.jit
        def products(layers, options=options, chunks=chunks):
            at = options.expanded(layers, tasks, mi.unit_weights(tasks), chunks)
            return at.operator.matvec(layers), at.mixed_transposed(layers)

        found.append(ravel_pytree(products(layers))[0])
    for each in found[1:]:
        np.testing.assert_allclose(each, found[0], rtol=1e-9, atol=1e-12 * float(jnp.max(jnp.abs(found[0]))))


def test_minimisers_and_wide_products_are_not_made_anew_or_kept():
    def dear(fn, *args):
        return [
            _lean.dear(e.primitive, *[a.aval for a in e.invars], **e.params) for e in jax.make_jaxpr(fn)(*args).eqns
        ]

    matrix, vector = jnp.ones((4, 4)), jnp.ones((4, 1))
    assert dear(lambda m: m @ m, matrix) == [True]
    assert dear(lambda v, w: v @ w, vector, vector.T) == [False]
    assert dear(jnp.tanh, matrix) == dear(jax.nn.relu, matrix) == [False]
    assert dear(jnp.linalg.cholesky, matrix)[-1]
    assert dear(lambda m: jax.lax.while_loop(lambda m: m[0, 0] < 9, lambda m: m @ m, m), matrix) == [True]
    assert dear(lambda m: jax.jit(lambda m: m @ m)(m), matrix) == [True]


def test_a_problem_is_measured_once_for_the_same_shapes(monkeypatch):
    traced = []

    def counted(*args, **options):
        traced.append(args)
        return batch_pull(*args, **options)

    monkeypatch.setattr(_choice, "batch_pull", counted)

    def problem_of(size):
        return mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * (m - task.query[:, :size].sum(axis=1)) ** 2))

    def measured(problem, count, width):
        traced.clear()
        tasks = mi.Task((), jnp.zeros((count, 3, width)))
        found = _choice.linearised_bytes(problem, EXACT, jnp.zeros(()), tasks), len(traced)
        traced.clear()
        return found

    first, other = problem_of(1), problem_of(2)
    found, times = measured(first, 20, 4)
    assert times == 1
    assert measured(first, 30, 4) == (found, 0)
    assert measured(first, 20, 8)[1] == 1
    assert measured(other, 20, 4)[1] == 1
    known = len(_choice._BYTES)
    del first
    gc.collect()
    assert len(_choice._BYTES) == known - 1
