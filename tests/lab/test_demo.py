import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from metainfluence.lab import cli, demo, fewshot, score_table

SMALL = [
    *("--num-tasks", "40", "--num-held-out", "40", "--num-flipped", "4", "--num-shortcut", "4", "--queries", "8"),
    *("--ways", "3", "--widths", "16", "8", "--num-steps", "100"),
]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A shrunken demo, from the command line to the files."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    cli.main(["demo", *SMALL, "--out", str(out)])
    return out


def test_the_demo_finds_the_harmful_tasks(small_run):
    table, metadata = score_table.read(small_run / "scores.parquet")
    assert metadata["solve"]["status"] == "CONVERGED"
    assert metadata["solve"]["relative_residual"] < 1e-6
    assert metadata["config"]["num_tasks"] == 40
    assert metadata["damping"] > 0
    rows = [row for row in table.to_pylist() if row["role"] == "task"]
    harmful = [row["harm"] != fewshot.CLEAN for row in rows]
    assert len(rows) == 40
    assert sum(harmful) == 8
    assert roc_auc_score(harmful, [-row["score"] for row in rows]) > 0.9


def test_the_demo_finds_flipped_query_labels(small_run):
    rows = score_table.read(small_run / "scores.parquet")[0].to_pylist()
    query = [row for row in rows if row["role"] == "query"]
    assert len(query) == 40 * 24
    assert roc_auc_score([row["label_flipped"] for row in query], [-row["score"] for row in query]) > 0.6


def test_the_demo_draws_a_picture(small_run):
    assert (small_run / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in small_run.iterdir()) == ["scores.parquet", "scores.png"]


def test_held_out_tasks_are_clean_and_share_no_image_with_training():
    data = demo.make_data(demo.DemoConfig(num_tasks=40, num_held_out=30, num_flipped=4, num_shortcut=5))
    counts = {
        str(kind): int(np.sum(fewshot.harm(data.listed) == kind)) for kind in np.unique(fewshot.harm(data.listed))
    }
    assert counts == {"clean": 31, "flipped labels": 4, "shortcut": 5}

    def images(task):
        return {np.asarray(image).tobytes() for side in task[:2] for image in np.reshape(side.images, (-1, 64))}

    clean = fewshot.materialize(data.listed._replace(shortcut=np.zeros(40, bool)), demo.digits.load().images)
    assert not images(clean) & images(data.held_out)
