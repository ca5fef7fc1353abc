"""The learners' option for half precision, and the comparison that comes before scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import score
from metainfluence.lab.commands.job import Job, tolerance
from metainfluence.lab.learn.learners import WithHead
from metainfluence.lab.learn.models import MLP, Conv4, apply


@pytest.mark.parametrize("network", [MLP((4,), 2), WithHead(MLP((4,), 2), 3), Conv4(2, 1, activation=jnp.tanh)])
def test_a_network_computes_in_what_its_configuration_says(network):
    images = jax.random.uniform(jax.random.key(1), (3, 4, 4))
    variables = network.init(jax.random.key(0), images)
    half = network.clone(
        **({"features": MLP((4,), 2, compute_dtype="bfloat16")} if hasattr(network, "features") else {})
        or {"compute_dtype": "bfloat16"}
    )
    found, wanted = apply(half, variables, images), apply(network, variables, images)
    assert found.dtype == wanted.dtype == images.dtype
    assert 1e-5 < np.abs(found - wanted).max() < 0.05
    assert jax.tree.structure(half.init(jax.random.key(0), images)) == jax.tree.structure(variables)


def test_scores_are_compared_before_anything_is_scored(monkeypatch, tmp_path):
    def problem_of(network):
        return mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * (network(task.query, m) + 300 - 300) ** 2))

    def cast(x, m):
        return jnp.asarray(jnp.matmul(x.astype(jnp.bfloat16), m.astype(jnp.bfloat16)) + 300, x.dtype) - 300

    tasks = [mi.Task((), jnp.asarray([[float(k)]])) for k in range(1, 9)]
    full, held_out = problem_of(jnp.matmul), mi.stack_tasks([mi.Task((), jnp.asarray([[9.5]]))])
    jobs = {
        name: Job(problem_of(network), jnp.asarray([0.4]), tasks, (held_out,), full=full)
        for name, network in {"cast": cast, "mixed": mi.mixed.compute_in(jnp.bfloat16)(jnp.matmul)}.items()
    }
    monkeypatch.setattr(runs, "load", lambda run, problem: jobs[problem])
    options = {"out": tmp_path / "scores.parquet", "damping": 1.0, "by": "optimum"}
    with pytest.raises(mi.mixed.PrecisionError, match=r"at least 0\.999, got"):
        score.run(score.ScoreConfig(problem="cast", **options))
    assert not list(tmp_path.iterdir())
    score.run(score.ScoreConfig(problem="mixed", **options))
    assert mi.read_scores(tmp_path / "scores.parquet").metadata["manifest"]["working_eps"] == 2.0**-7


def test_a_solve_in_half_precision_is_asked_for_what_rounding_leaves():
    full = mi.from_task_loss(lambda m, task, w: jnp.sum(m))
    assert tolerance(jnp.ones(2), full) > 1e-2 > tolerance(jnp.ones(2, jnp.float32))
