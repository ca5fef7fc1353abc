"""The same problems in other settings of JAX: float32 alone, NaN made an error, strict promotion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metainfluence.solvers import SolveStatus
from reliability import cases, golden, precision
from reliability import test_no_silent_approximation as walk

SLACK = 1.0  # digits, by which another processor's rounding may differ
QUICK_PROBLEMS = ["closed_form, exact"]
QUICK_SOLVERS = ["cg", "dense", "minres"]
BY_LABEL = {f"{structure.adapt}, {structure.curvature}": structure for structure in precision.PROBLEMS}


def selected(names, quick):
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def test_the_page_has_every_strategy_measured():
    heads = {"scores by the dense solver", ":---|---:|", "solver"}
    assert set(precision.stored()) - heads == set(BY_LABEL) | set(precision.SOLVERS)


@pytest.mark.parametrize("label", selected(BY_LABEL, QUICK_PROBLEMS))
def test_float32_loses_the_digits_that_the_page_says(label):
    (kept,) = precision.stored()[label]
    assert abs(precision.scores(BY_LABEL[label]) - float(kept)) <= SLACK


@pytest.mark.parametrize("name", selected(precision.SOLVERS, QUICK_SOLVERS))
def test_a_solver_in_float32_loses_the_digits_that_the_page_says(name):
    for condition, kept in zip(precision.CONDITIONS, precision.stored()[name], strict=True):
        digits, status = precision.solve(name, condition)
        assert abs(digits - float(kept.split()[0])) <= SLACK, condition
        # What says CONVERGED has a residual of at most 100 eps, in float64 of 1e-8.
        if status == SolveStatus.CONVERGED:
            assert digits <= 2 + np.log10(condition) + 0.5, condition


@pytest.mark.parametrize("structure", cases.STRUCTURES, ids=str)
def test_nothing_passes_through_nan_on_its_way(structure):
    kept = golden.stored()
    with jax.debug_nans(True):
        found = golden.scores(structure, kept["inputs"])
    for name, values in kept["scores"][str(structure)].items():
        np.testing.assert_allclose(found[name], values, **kept["tolerance"], err_msg=name)


@pytest.mark.parametrize("label", ["well conditioned", "indefinite", "singular", "zero"])
@pytest.mark.parametrize(("name", "k"), [("cg", 0), ("minres", 0), ("auto", 0)])
def test_no_solver_answers_with_nan_where_its_status_is_not_nonfinite(name, k, label):
    vectors, rhs = np.eye(walk.SIZE), np.ones(walk.SIZE)
    with jax.debug_nans(True):
        solution, info = walk.solving(name, k)(vectors, walk.SPECTRA[label], rhs)
    assert np.all(np.isfinite(solution))
    assert int(info.status) != SolveStatus.NONFINITE


def test_every_test_here_runs_under_strict_promotion_of_types_and_ranks():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.float64)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones(2) + jnp.ones((2, 2))
    with pytest.raises(FloatingPointError), jax.debug_nans(True):
        jnp.zeros(2) / jnp.zeros(2)
