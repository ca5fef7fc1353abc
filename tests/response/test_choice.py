"""Chunks are chosen from shapes alone, the same under jit and outside, and change no answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence._chunks import Chunks
from metainfluence.response import _choice
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
    monkeypatch.setattr(_choice, "usable_bytes", lambda: 30 * each)
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


@pytest.mark.parametrize("room", [1e9, 30, 3])
@pytest.mark.parametrize("cache", [1, 25])
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
