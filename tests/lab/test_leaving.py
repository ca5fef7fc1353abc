"""One task left out at a time on a trained learner, against training that is written out here."""

import dataclasses

import jax
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab.experiments import leaving
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.setting import (
    DataConfig,
    HarmConfig,
    LearnerConfig,
    SettingConfig,
    TrainingConfig,
    make,
)

CONFIG = leaving.LeavingConfig(
    setting=SettingConfig(
        data=DataConfig(ways=3, shots=2, queries=4, num_tasks=60, num_held_out=10, num_test=8),
        harm=HarmConfig(flipped=0.3, shortcut=0.3),
        learner=LearnerConfig(kind="r2d2", widths=(8,), meta_l2=0.01),
        training=TrainingConfig(learning_rate=0.01, warmup=10, eps_root=1e-5, num_steps=20, num_checkpoints=2),
    ),
    each=5,
    methods=(by.TRAJECTORY, by.SEGMENTS, "direct-IF", "random"),
    draws=50,
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    cache = tmp_path_factory.mktemp("leaving")
    return leaving.run(CONFIG, cache), cache


def rows_of(found, how):
    return {row["method"]: row for row in found.rows if row["how"] == how}


def test_changes_are_those_of_training_without_the_task(ran):
    setting = make(CONFIG.setting)
    weights = mi.unit_weights(setting.tasks.training)
    loss = jax.jit(setting.target)

    @jax.jit
    def trained(weights):
        return setting.run(setting.initial, setting.tasks.training, weights)

    before = loss(trained(weights), setting.tasks.held_out)
    out = [row for row in ran[0].rows if row["how"] == "left out"]
    assert sorted({row["kind"] for row in out}) == sorted(set(setting.tasks.task_harm))
    assert len(out) == 15
    assert len({row["task"] for row in out}) == 15
    for row in out[::4]:
        assert row["kind"] == setting.tasks.task_harm[row["task"]]
        after = loss(trained(mi.drop(weights, tasks=[row["task"]])), setting.tasks.held_out)
        np.testing.assert_allclose(row["change"], after - before, rtol=1e-6)


def test_the_derivative_of_the_run_agrees_best_and_tells_damage_as_the_truth_does(ran):
    scored, (truth,) = rows_of(ran[0], "scored"), rows_of(ran[0], "retrained").values()
    assert scored[by.TRAJECTORY]["spearman"] > 0.9
    assert scored[by.TRAJECTORY]["pearson"] > 0.85
    assert scored[by.TRAJECTORY]["spearman"] == max(row["spearman"] for row in scored.values())
    assert abs(scored["random"]["spearman"]) < 0.7
    out = [row for row in ran[0].rows if row["how"] == "left out"]
    kind = "flipped labels"
    harmed, whole = ([row["change"] for row in out if row["kind"] == name] for name in (kind, "clean"))
    pairs = np.mean([bad < good for bad in harmed for good in whole])
    assert truth[f"auc {kind}"] == pytest.approx(pairs)
    assert truth[f"auc {kind}_low"] <= pairs <= truth[f"auc {kind}_high"]
    assert abs(scored[by.TRAJECTORY][f"auc {kind}"] - pairs) < 0.15


def test_the_page_has_the_truth_first_and_what_leaving_out_does(ran):
    agreement, changes = ran[0].tables.values()
    assert "15 of 60 tasks left out one at a time" in ran[0].tables
    assert agreement[1][0][:3] == [leaving.TRUTH, "", ""]
    assert agreement[1][1][0] == by.TRAJECTORY
    assert len(agreement[0]) == len(agreement[1][1])
    assert [cells[:2] for cells in changes[1]] == [["clean", 5], ["flipped labels", 5], ["shortcut", 5]]
    assert "of flipped labels" in ran[0].notes[1]
    assert "the accuracy on test tasks 0." in ran[0].notes[0]
    assert ran[0].warnings == []


def test_it_goes_on_where_it_was(ran):
    result, cache = ran
    left = sorted(cache.glob("without *.npz"))
    assert len(left) == 15
    left[0].unlink()
    assert leaving.run(CONFIG, cache).rows == result.rows
    assert left[0].exists()


def test_a_method_that_does_not_apply_is_named_with_its_reason():
    rows = [
        {"method": leaving.TRUTH, "how": "retrained", "auc x": 0.5, "auc x_low": 0.4, "auc x_high": 0.6},
        {"method": "a", "how": "scored", "reason": "no layers"},
    ]
    assert leaving.agreement_table(rows)[1][1] == ["a", "", "", "", "no layers"]


def test_a_learner_that_may_only_guess_is_told():
    setting = dataclasses.replace(CONFIG.setting, harm=HarmConfig(flipped=0.0))
    setting = dataclasses.replace(setting, training=TrainingConfig(learning_rate=1e-9, num_steps=2, num_checkpoints=1))
    setting = dataclasses.replace(
        setting, learner=LearnerConfig(kind="maml", widths=(2,), inner_lr=1e-6, inner_steps=1)
    )
    found = leaving.run(dataclasses.replace(CONFIG, setting=setting, each=2, methods=("random",)))
    assert found.warnings
    assert "chance 0.333" in found.warnings[0]
    assert len(found.notes) == 1


def test_what_makes_no_sense_is_refused():
    with pytest.raises(
        ConfigError, match=r"--each: expected at most the 18 tasks of the kind 'flipped labels', got 19"
    ):
        leaving.run(dataclasses.replace(CONFIG, each=19))
    with pytest.raises(ValueError, match=r"methods: expected some of .*; got 'guess'"):
        leaving.run(dataclasses.replace(CONFIG, methods=("guess",)))
