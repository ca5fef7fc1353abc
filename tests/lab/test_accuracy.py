"""Learners measured: training in batches, a learning curve, and accuracy on new tasks; and what editing is worth."""

import dataclasses
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence.lab.bench import accuracy
from metainfluence.lab.commands import reproduce
from metainfluence.lab.data import fewshot
from metainfluence.lab.experiments import accuracies, editing
from metainfluence.lab.experiments.setting import DataConfig, HarmConfig, LearnerConfig, SettingConfig
from metainfluence.lab.experiments.trainings import TrainingConfig
from metainfluence.lab.learn import learners, models

DIGITS = DataConfig(ways=3, shots=1, queries=3, num_tasks=20, num_held_out=10, num_test=40)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    config = accuracy.AccuracyConfig(
        data=DIGITS,
        also_shots=(3,),
        learner=LearnerConfig(kind="r2d2", widths=(8,), meta_l2=0.0),
        training=TrainingConfig(learning_rate=0.01, num_steps=50, tasks_per_step=4, num_checkpoints=2),
        least=0.4,
        also_least=(2.0,),
        float64=True,
        save_every=25,
        out=tmp_path_factory.mktemp("accuracy"),
    )
    return config, accuracy.run(config)


def test_a_learner_is_trained_and_tested(measured):
    config, record = measured
    assert [point[0] for point in record["curve"]] == [25, 50]
    assert 1 / 3 + record["half_width"] < record["accuracy"] <= 1
    assert record["accuracy"] < record["also"]["3-shot"][0] <= 1  # more examples, the same test
    assert record["flops_per_task"] > 0
    assert record["cpu_seconds_per_task"] > 0
    text = (config.out / "accuracy.md").read_text(encoding="utf-8")
    assert "Asked for: at least 0.4: met" in text
    assert "asked for: at least 2: missed" in text
    assert "guessing" not in text


def test_a_finished_run_is_only_measured_again(measured):
    config, record = measured
    again = accuracy.run(config)
    assert (again["accuracy"], again["curve"]) == (record["accuracy"], record["curve"])
    assert again["wall_seconds"] == record["wall_seconds"]  # what training took, and not what looking again did
    with pytest.raises(ValueError, match=r"out: expected a new folder .* learner\.widths: \[8\] there, \[9\] here"):
        accuracy.run(dataclasses.replace(config, learner=LearnerConfig(kind="r2d2", widths=(9,), meta_l2=0.0)))


def test_the_page_of_results_has_the_learners(measured, tmp_path, monkeypatch):
    config, record = measured
    shutil.copytree(config.out, tmp_path / "learner_digits")
    reproduce.report([], "small", tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Learner: r2d2 on digits, 3-way 1-shot" in page
    assert "`metainfluence bench --config configs/learner_digits.toml`: " in page
    assert f"| 50 | {record['curve'][-1][1]:.4f} |" in page
    told = f"{record['accuracy']:.3f} ± {record['half_width']:.3f}"
    assert f"| r2d2 on digits: accuracy on classes never trained on, 3-way 1-shot | {told} | ≥ 0.4 | met |" in page
    assert re.search(r"never trained on, 3-way 3-shot \| .* \| ≥ 2 \| missed \|", page)
    assert "Older than the code" not in page
    code = accuracies.records(tmp_path)["learner_digits"]["code"]
    monkeypatch.setattr(accuracies, "code_of", lambda name: {**code, "krylov.py": "changed"})
    reproduce.report([], "small", tmp_path)
    assert "learner_digits (krylov.py)" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_editing_is_held_against_training(tmp_path):
    config = editing.EditingConfig(
        setting=SettingConfig(
            data=DIGITS,
            harm=HarmConfig(flipped=0.2),
            learner=LearnerConfig(kind="r2d2", widths=(4,), meta_l2=0.01),
            training=TrainingConfig(learning_rate=0.01, num_steps=20, tasks_per_step=5, num_checkpoints=2),
        ),
        removed=(0.0, 0.4),
        chosen_by="plain loss",
        learning_rates=(0.01,),
        block=2,
        most_blocks=3,
        seeds=(0,),
    )
    found = editing.run(config, tmp_path)
    rows = {(row["how"], row["removed"]): row for row in found.rows}
    assert set(rows) == {
        (editing.BEFORE, 0),
        *(
            (how, count)
            for how in (editing.EDIT, editing.PREPARED, editing.AGAIN, editing.ON, editing.SHORT)
            for count in (1, 8)
        ),
    }
    assert all(row["seconds"] > 0 and np.isfinite(row["loss"]) for row in found.rows)
    assert rows[editing.EDIT, 8]["products"] > 0
    assert all(rows[editing.ON, count]["steps"] <= 6 for count in (1, 8))
    assert {rows[editing.SHORT, count]["steps"] for count in (1, 8)} == {2}
    assert all(rows[editing.PREPARED, count]["preparation"] > 0 for count in (1, 8))
    assert any(
        "The prepared edit solves with the curvature of a sixteenth of the tasks" in note for note in found.notes
    )
    assert editing.run(config, tmp_path).rows == found.rows


def test_a_removal_by_a_prepared_response_is_that_of_its_weights():
    """The gradients of the tasks that go, solved with the curvature of all tasks: the response along dropping them."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(2, 6, 4, 3)), np.tile([0, 0, 1, 1], (6, 1))
    tasks = mi.Task(*(fewshot.Batch(jnp.asarray(each), jnp.asarray(labels)) for each in images))
    learner = learners.r2d2(models.MLP((2,), image_ndim=1), 2, meta_l2=0.1, learned_head=False)
    start = learner.init(jax.random.key(0), tasks.support[0][0])
    weights, gone = mi.unit_weights(tasks), jnp.asarray([1, 4])
    direction = jax.tree.map(jnp.subtract, mi.drop(weights, tasks=[1, 4]), weights)
    removal, residual = editing.removal_of(learner.problem, 6)

    @jax.jit
    def both():
        at = mi.optimum(learner.problem, solver=mi.solvers.dense(absolute=True), damping=0.1)(start, tasks)
        removed = jax.tree.map(lambda leaf: leaf[gone], tasks)
        return removal(at, removed), optax.tree.add(start, at.jvp(direction).delta), residual(at, removed)

    found, expected, left = both()
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11)
    assert left < 1e-8
