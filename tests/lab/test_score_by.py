"""Scores by the run, from the command line: the estimator that is asked for, or the rule's, and what is told of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from lab.calls import TRAIN, called, done
from metainfluence.lab.commands import _estimators as estimators
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.experiments.trainings import optimizer_of
from metainfluence.lab.learn.train import training_steps

SMOOTH = [
    *("--training.num-steps", "60", "--training.learning-rate", "0.003", "--training.warmup", "5"),
    *("--training.eps-root", "1e-5", "--training.tasks-per-step", "4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by") / "run"
    done("train", *TRAIN, *SMOOTH, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def told(folder):
    """What the rule's choice printed, and printed again."""
    return [done("score", folder) for _ in range(2)]


@pytest.fixture(scope="module")
def by_trajectory(folder, told):
    assert "By trajectory: the run is at hand, and smooth" in told[0]
    return mi.read_scores(folder / "scores.parquet")


@pytest.fixture(scope="module")
def by_segments(folder):
    out = folder / "segments.parquet"
    printed = done("score", folder, "--by", "segments", "--out", out)
    assert "By segments: as --by segments asks for" in printed
    return mi.read_scores(out)


@pytest.fixture(scope="module")
def job(folder):
    return runs.load(folder, None)


@pytest.fixture(scope="module")
def slopes(folder, job):
    """dφ/dw of a task's, a support and a query example's weight, by training as `train` does at other weights."""
    config = runs.read(folder)
    steps = config.training
    optimizer = optimizer_of(steps)
    train = training_steps(job.problem, optimizer, steps.num_steps, tasks_per_step=steps.tasks_per_step)
    tasks = job.stacked()
    target = job.phi()

    @jax.jit
    @jax.vmap
    def ends(weights):
        end = train(job.start, optimizer.init(job.start), tasks, weights, 0, config.seed)[0]
        return target(end, *job.target_args)

    changes = np.zeros((3, 12 + 12 * 6 + 12 * 12))
    for row, place in enumerate((5, 12 + 6 * 5 + 2, 12 + 72 + 12 * 5 + 3)):
        changes[row, place] = 1e-3
    task, support, query = np.split(np.concatenate([1 + changes, 1 - changes]), [12, 84], axis=1)
    weights = mi.Weights(
        jnp.asarray(task), jnp.asarray(support.reshape(6, 12, 6)), jnp.asarray(query.reshape(6, 12, 12))
    )
    up, down = np.split(np.asarray(ends(weights)), 2)
    return (up - down) / 2e-3


def of(table, role, index):
    return table.score[table.role == role][index]


def test_scores_by_trajectory_are_the_derivative_of_the_training(by_trajectory, slopes):
    found = [of(by_trajectory, *place) for place in (("task", 5), ("support", 6 * 5 + 2), ("query", 12 * 5 + 3))]
    np.testing.assert_allclose(found, -slopes, rtol=1e-4)


def test_the_run_ends_where_training_ended(by_trajectory):
    solve = by_trajectory.metadata["solve"]
    assert solve["kind"] == "trajectory"
    assert solve["replay_difference"] < 1e-10
    assert solve["num_steps"] == 60


def test_the_rule_says_what_it_takes_and_why_and_is_not_asked_again(told, by_trajectory):
    assert "training eight times" in told[0]
    assert "Wrote" in told[0]
    assert "growth of the cotangent" in told[0]
    assert by_trajectory.metadata["smoothness"]["verdict"] == "smooth"
    assert by_trajectory.metadata["run"]["score"]["by"] == "auto"
    assert "training eight times" not in told[1]
    assert "Already in" in told[1]
    assert [line for line in told[0].splitlines() if line[:1].isdigit()] == [
        line for line in told[1].splitlines() if line[:1].isdigit()
    ]


def test_segments_come_near_to_the_trajectory(by_segments, by_trajectory):
    assert by_segments.metadata["estimator"].startswith("segments")
    assert len(by_segments.metadata["solve"]["relative_error"]) == len(runs.kept_steps(60)) == 3
    own = by_segments.role == "task"
    assert np.corrcoef(by_segments.score[own], by_trajectory.score[own])[0, 1] > 0.9


def test_a_file_of_another_estimator_is_refused(folder, by_segments):
    status, _, err = called("score", folder, "--by", "trajectory", "--out", folder / "segments.parquet")
    assert status == 1
    assert "differs in estimator: this run has 'trajectory', that one 'segments'; --no-resume" in " ".join(err.split())


def test_the_report_shows_the_estimator(folder, by_trajectory):
    done("report", folder / "scores.parquet", "--no-pictures")
    page = (folder / "scores.html").read_text(encoding="utf-8")
    assert "Estimator: trajectory: the run is at hand, and smooth" in page
    assert "The derivative of the run holds." in page
    assert "growth of the cotangent" in page
    assert "λ is no minimum" not in page


def test_the_report_on_segments_speaks_of_segments(folder, by_segments):
    done("report", folder / "segments.parquet", "--no-pictures")
    page = (folder / "segments.html").read_text(encoding="utf-8")
    assert "The answer of the segments holds." in page
    assert "how well they stand for the run between the checkpoints" in page
    assert "derivative of the run" not in page


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--by", "segments", "--damping", "3"], "--damping: expected with --by optimum alone, got --by segments"),
        (["--by", "trajectory", "--max-steps", "3"], "--max-steps: expected with --by optimum alone"),
    ],
)
def test_options_of_the_solve_are_of_the_optimum(folder, arguments, expected):
    status, _, err = called("score", folder, *arguments, "--out", folder / "none.parquet")
    assert status == 2
    assert expected in err


def test_an_option_of_the_solve_chooses_the_optimum(job):
    assert estimators.chosen(job, "auto", "--damping", smooth=True).name == "optimum"


def test_what_an_estimator_needs_is_asked_for(job):
    for by in ("trajectory", "segments"):
        with pytest.raises(ValueError, match=f"^--by {by}: expected .* got n"):
            estimators.chosen(job._replace(run=None, checkpoints=None), by, "", smooth=True)
    assert estimators.chosen(job._replace(run=None, checkpoints=None), "auto", "", smooth=True).name == "optimum"


def test_states_are_kept_at_the_ends_of_blocks(folder):
    assert runs.kept_steps(30) == [25, 30]
    assert runs.kept_steps(200) == [50, 100, 125, 175, 200]
    assert runs.kept_steps(10) == [10]
    assert sorted(path.name for path in (folder / runs.STATES).iterdir()) == [
        f"step-{step:06d}.npz" for step in (25, 50, 60)
    ]


def test_a_warm_up_of_all_steps_is_refused(tmp_path):
    status, _, err = called("train", *TRAIN, "--training.warmup", "30", "--out", tmp_path / "run")
    assert status == 2
    assert "--training.warmup: expected fewer than --training.num-steps 30, got 30" in err
    assert not (tmp_path / "run").exists()


def test_reports_on_runs_go_to_json_and_back(by_trajectory, by_segments):
    for table, kind in ((by_trajectory, mi.RunInfo), (by_segments, mi.SegmentsInfo)):
        found = mi.scoring.info_of(json.loads(json.dumps(table.metadata["solve"])))
        assert isinstance(found, kind)
        mi.check(found)
