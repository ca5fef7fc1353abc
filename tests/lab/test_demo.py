import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import metainfluence as mi
from metainfluence.lab.commands import cli
from metainfluence.lab.data import fewshot
from metainfluence.lab.experiments import demo

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
    table = mi.read_scores(small_run / "scores.parquet")
    metadata = table.metadata
    assert metadata["solve"]["status"] == "CONVERGED"
    assert metadata["solve"]["relative_residual"] < 1e-6
    assert metadata["config"]["num_tasks"] == 40
    assert metadata["damping"] > 0
    own = table.role == "task"
    harmful = table.labels["harm"][own] != fewshot.CLEAN
    assert len(harmful) == 40
    assert sum(harmful) == 8
    assert roc_auc_score(harmful, -table.score[own]) > 0.9


def test_the_demo_finds_flipped_query_labels(small_run):
    table = mi.read_scores(small_run / "scores.parquet")
    query = table.role == "query"
    assert query.sum() == 40 * 24
    assert roc_auc_score(np.asarray(table.labels["label_flipped"][query]), -table.score[query]) > 0.6


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


@pytest.mark.slow
def test_the_derivative_through_the_run_stands_beside_the_others(tmp_path, capsys):
    cli.main(["demo", *SMALL, "--num-steps", "25", "--trajectory", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "predicted: through the run" in printed
    row = next(line for line in printed.splitlines() if line.startswith("all") and "through the run" in line)
    assert float(row.split()[-1]) > 0.7
