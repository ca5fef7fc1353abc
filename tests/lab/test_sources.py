import itertools

import jax
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab.data import fewshot
from metainfluence.lab.data.sources import FewShotSource

INFO = mi.SolveInfo(*map(np.asarray, (np.int32(mi.SolveStatus.MAX_STEPS), np.int32(7), 1e-3, 0.5, 2.0)))


@pytest.fixture
def tasks():
    labels = np.repeat(np.arange(3), 5)
    tasks = fewshot.sample_tasks(labels, num_tasks=4, ways=2, shots=1, queries=2, seed=0)
    tasks = fewshot.add_shortcut(fewshot.flip_labels(tasks, [1], share=0.5, seed=0), [2])
    return fewshot.add_noise(tasks, [3], seed=0)


@pytest.fixture
def images(rng):
    return rng.random((15, 3, 3))


def test_single_tasks_are_those_of_the_whole_list(tasks, images):
    source, whole = FewShotSource(tasks, images), fewshot.materialize(tasks, images)
    assert len(source) == 4
    for k in range(4):
        for single, stacked in zip(jax.tree.leaves(source[k]), jax.tree.leaves(whole), strict=True):
            assert isinstance(single, np.ndarray)
            assert single.dtype == stacked.dtype
            np.testing.assert_array_equal(single, stacked[k])


def test_the_score_file_holds_the_ground_truth(tasks, images, rng, tmp_path):
    scores = mi.Scores(*(rng.normal(size=shape) for shape in ((4,), (4, 2), (4, 4))), INFO)
    path = tmp_path / "new" / "scores.parquet"
    whole, source = fewshot.materialize(tasks, images), FewShotSource(tasks, images)
    mi.scoring.write_scores(path, scores, whole, source=source, metadata={"damping": 0.25})
    table = mi.read_scores(path)
    assert table.metadata == {
        "damping": 0.25,
        "solve": {
            "status": "MAX_STEPS",
            "num_matvecs": 7,
            "relative_residual": 1e-3,
            "min_curvature": 0.5,
            "outer_gradient_norm": 2.0,
        },
    }
    assert table.role.tolist() == (["task"] + ["support"] * 2 + ["query"] * 4) * 4
    assert table.task.tolist() == np.repeat(np.arange(4), 7).tolist()
    values = np.concatenate([scores.task[:, None], scores.support, scores.query], axis=1)
    np.testing.assert_array_equal(table.score, values.ravel())
    ids = [[None, *support, *query] for support, query in zip(tasks.support_ids, tasks.query_ids, strict=True)]
    assert table.example.tolist() == list(itertools.chain(*ids))
    assert table.labels["harm"].tolist() == np.repeat(fewshot.harm(tasks), 7).tolist()
    flipped = [[None, *pair[0], *pair[1]] for pair in zip(tasks.support_flipped, tasks.query_flipped, strict=True)]
    assert table.labels["label_flipped"].tolist() == list(itertools.chain(*flipped))
    assert int(table.labels["label_flipped"].sum()) == 2
