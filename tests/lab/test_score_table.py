import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab import fewshot, score_table

INFO = mi.SolveInfo(
    jnp.int32(mi.SolveStatus.MAX_STEPS), jnp.int32(7), jnp.float64(1e-3), jnp.float64(0.5), jnp.float64(2.0)
)


@pytest.fixture
def tasks():
    labels = np.repeat(np.arange(3), 5)
    tasks = fewshot.sample_tasks(labels, num_tasks=3, ways=2, shots=1, queries=2, seed=0)
    return fewshot.add_shortcut(fewshot.flip_labels(tasks, [1], share=0.5, seed=0), [2])


@pytest.fixture
def scores(rng):
    shapes = ((3,), (3, 2), (3, 4))
    return mi.Scores(*(jnp.asarray(rng.normal(size=shape)) for shape in shapes), INFO)


def test_round_trip(tasks, scores, tmp_path):
    score_table.write(score_table.score_table(scores, tasks, {"damping": 0.25}), tmp_path / "scores.parquet")
    table, metadata = score_table.read(tmp_path / "scores.parquet")
    assert table.schema.remove_metadata() == score_table.SCHEMA
    assert metadata == {
        "damping": 0.25,
        "solve": {
            "status": "MAX_STEPS",
            "num_matvecs": 7,
            "relative_residual": 1e-3,
            "min_curvature": 0.5,
            "outer_gradient_norm": 2.0,
        },
    }
    columns = table.to_pydict()
    assert columns["role"] == ["task"] * 3 + ["support"] * 6 + ["query"] * 12
    assert columns["task"] == [0, 1, 2, *np.repeat([0, 1, 2], 2).tolist(), *np.repeat([0, 1, 2], 4).tolist()]
    assert columns["example"] == [None] * 3 + tasks.support_ids.ravel().tolist() + tasks.query_ids.ravel().tolist()
    assert columns["score"] == np.concatenate([np.ravel(scores.task), *map(np.ravel, scores[1:3])]).tolist()
    assert columns["harm"][:3] == ["clean", "flipped labels", "shortcut"]
    assert columns["harm"][9:] == np.repeat(fewshot.harm(tasks), 4).tolist()
    assert columns["label_flipped"] == [None] * 3 + [False] * 6 + tasks.query_flipped.ravel().tolist()
    assert sum(columns["label_flipped"][9:]) == 2
