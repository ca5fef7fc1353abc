"""Examples that see each other are found, and a user is told what scores then mean."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from tiny import LAMBDA, PROBLEM, outer_loss, ridge
from wrapping.page import SECTIONS, as_a_reader, execute


@pytest.fixture(scope="module")
def page():
    with as_a_reader(x64=False), pytest.warns(mi.CouplingWarning) as warned:
        scope = execute([*SECTIONS["Data"], *SECTIONS["Batch normalisation"]], {})
    return scope | {"warnings": [str(warning.message) for warning in warned]}


@pytest.fixture(scope="module")
def task():
    x, y = np.random.default_rng(3).normal(size=(2, 9, 2))
    return mi.Task({"x": x[:4], "y": y[:4, 0]}, {"x": x[4:], "y": y[4:, 0]})


def silent(values):
    """Zero but for rounding, which the compiler may take otherwise in one of two equal sums."""
    return np.all(values <= 4 * np.finfo(values.dtype).eps)


def test_batch_norm_of_a_flax_model_is_detected(page):
    assert np.all(page["coupled"].support > 1e-4)
    assert np.all(page["coupled"].query > 1e-4)


def test_warning_says_what_scores_mean(page):
    (message,) = page["warnings"]
    assert re.search("support set by .* query set by .*own term", message)


def test_layer_norm_and_fixed_statistics_are_silent(page):
    assert silent(page["free"].support)
    assert silent(page["free"].query)
    with as_a_reader(x64=False):
        fixed = mi.coupling(page["running"])(page["with_running_mean"], page["task"])
    assert silent(fixed.support)
    assert silent(fixed.query)


def test_statistics_threaded_from_the_support_set_couple_that_side_only():
    with as_a_reader(x64=False):
        scope = execute([*SECTIONS["Data"], *SECTIONS["Haiku, with its state threaded"]], {})
        task = jax.tree.map(lambda leaf: leaf[0], scope["tasks"])
        with pytest.warns(mi.CouplingWarning, match=r"\(support set by [^,]*, relative\)"):
            found = mi.coupling(scope["problem"])(scope["meta_params"], task)
    assert np.all(found.support > 1e-4)
    assert silent(found.query)


def test_code_that_forgets_the_weights_is_detected(task):
    forgetful = mi.bilevel(
        outer_loss, mi.adaptation.closed_form(lambda m, s, c: ridge(m, s, jnp.full(c.shape, 1 / c.size)))
    )
    with pytest.warns(mi.CouplingWarning, match="support set"):
        found = mi.coupling(forgetful)(LAMBDA, task)
    assert np.all(found.support > 1e-6)
    assert silent(found.query)


def test_padding_is_no_example(task):
    ragged = mi.stack_tasks([task, jax.tree.map(lambda leaf: leaf[:3], task)])
    second = jax.tree.map(lambda leaf: leaf[1], ragged)

    def gathered(params, meta_params, batch):  # pulls every example towards the others
        losses = outer_loss(params, meta_params, batch)
        return losses + 0.1 * jnp.max(losses)

    with pytest.warns(mi.CouplingWarning):
        found = mi.coupling(mi.bilevel(gathered, mi.adaptation.closed_form(ridge)))(LAMBDA, second)
    assert found.query.shape == (5,)
    assert np.any(found.query[:3])
    assert silent(found.query[3:])
    assert silent(found.support)


def test_under_jit_it_returns_the_numbers(task):
    found = jax.jit(mi.coupling(PROBLEM))(LAMBDA, task)
    assert found.support.shape == (4,)
    assert silent(found.support)
    assert silent(found.query)


def test_a_loss_that_is_not_finite_is_refused(task):
    problem = mi.from_task_loss(lambda meta_params, task, weights: jnp.sum(weights.query) * jnp.nan)
    with pytest.raises(ValueError, match="task: expected a finite loss"):
        mi.coupling(problem)(LAMBDA, task)


def test_a_task_without_a_support_set_is_probed_on_its_query_set():
    problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
    found = mi.coupling(problem)(jnp.asarray(1.0), mi.Task((), jnp.asarray([1.0, 2.0, 4.0])))
    assert found.support.shape == (0,)
    assert found.query.tolist() == [0, 0, 0]
