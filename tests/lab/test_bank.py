"""Banks of outcomes: what is written is read, what was changed is refused, and scores are judged as they deserve."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

import metainfluence as mi
from lab.calls import called, done
from metainfluence.lab.experiments import bank, estimators, judging, results, run_tables, runs
from metainfluence.lab.experiments.run_methods import Scored
from metainfluence.lab.experiments.setting import DataConfig, HarmConfig, LearnerConfig, SettingConfig

RESULTS = Path(__file__).resolve().parents[2] / "notebooks" / "results"
BANKS = sorted(RESULTS.glob("*/small/bank.parquet"))
CONFIG = estimators.EstimatorsConfig(
    setting=SettingConfig(
        data=DataConfig(ways=2, shots=1, queries=2, num_tasks=6, num_held_out=4, num_test=2),
        harm=HarmConfig(flipped=0.2),
        learner=LearnerConfig(kind="protonet", widths=(3,)),
    ),
    trainings=("smooth",),
    seeds=(0, 1),
    removed=(0.5,),
    num_left_out=4,
    num_subsets=5,
    num_targets=2,
    num_steps=4,
    num_checkpoints=2,
    together=4,
    draws=50,
    smooth=runs.OptimizerConfig(warmup=1, cosine=True, eps_root=1e-3),
)
METHODS = """
import numpy as np

def right(case):
    return np.load("scores.npy")[int(case.name[-1])]

def mean(case):
    return right(case).mean(0)

def short(case):
    return right(case)[:, :-1]

def spoilt(case):
    return np.full(6, np.nan)
"""


@pytest.fixture(scope="module")
def tasks_and_learner():
    return estimators.data_of(CONFIG)


@pytest.fixture(scope="module")
def account(tasks_and_learner):
    """Outcomes that are sums of known effects of the tasks, but for noise that changes no order of single tasks."""
    tasks, learner = tasks_and_learner
    rng = np.random.default_rng(0)
    effects = rng.permuted(np.tile(np.arange(6.0), (2, 2, 1)), axis=2) - 2.0
    kept = {
        runs.LEFT_OUT: ~np.eye(6, dtype=bool)[:4],
        "0.5": np.stack([rng.permutation(6) < 3 for _ in range(8)]),
    }
    changes = {
        name: np.moveaxis(judging.predictions(effects, masks), 0, 1) + rng.normal(scale=1e-3, size=(2, len(masks), 2))
        for name, masks in kept.items()
    }
    starts = runs.starts_of(learner, tasks.training, CONFIG.seeds)
    ends = np.stack([np.asarray(ravel_pytree(runs.row_of(starts, index))[0]) for index in range(2)])
    scores = [
        Scored("trajectory", "", True, effects),
        Scored("segments", "end", True, -effects),
        Scored("segments", "middle", False, effects * 0.5),
        Scored("optimum", "auto", True, rng.normal(size=effects.shape)),
        Scored("TracIn", "", True, rng.normal(size=effects.shape)),
    ]
    facts = [
        {"case": f"seed {seed}", "gradient_norm_relative": 0.5, "smoothness": value}
        for seed, value in ((0, 0.95), (1, 0.3))
    ]
    damaged = tasks.task_harm != "clean"
    accuracies = [("nothing", 0.0, np.asarray([0.5, 0.6])), ("trajectory", 0.1, np.asarray([0.7, 0.8]))]
    truth = runs.Truth(kept, changes)
    hashes = estimators.hashes_of(tasks)
    return bank.Account("smooth", truth, damaged, ends, scores, accuracies, facts, hashes)


@pytest.fixture
def folder(account, tmp_path, monkeypatch):
    bank.save(tmp_path / "bank.parquet", results.plain(CONFIG), [account])
    (tmp_path / "strangers.py").write_text(METHODS)
    np.save(tmp_path / "scores.npy", account.scores[0].scores)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("strangers", None)


def test_what_is_written_is_read(folder, account):
    config, (found,) = bank.load(folder / "bank.parquet")
    assert estimators.config_of(config) == CONFIG
    assert found.facts == account.facts
    assert found.hashes == account.hashes
    np.testing.assert_array_equal(found.damaged, account.damaged)
    np.testing.assert_array_equal(found.ends, account.ends)
    for ours, theirs in zip(found.scores, account.scores, strict=True):
        assert ours[:3] == theirs[:3]
        np.testing.assert_array_equal(ours.scores, theirs.scores.astype(np.float32))
    for name, masks in account.truth.kept.items():
        np.testing.assert_array_equal(found.truth.kept[name], masks)
        np.testing.assert_array_equal(found.truth.changes[name], account.truth.changes[name])
    for ours, theirs in zip(found.accuracies, account.accuracies, strict=True):
        assert ours[:2] == theirs[:2]
        np.testing.assert_array_equal(ours[2], theirs[2])


@pytest.mark.parametrize("what", ["values", "lacks", "scores", "metadata"])
def test_a_bank_that_was_changed_is_refused(folder, what):
    path = folder / "bank.parquet"
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata)
    rows = table.to_pylist()
    if what == "metadata":
        content = json.loads(metadata[bank.KEY])
        content["trainings"][0]["facts"][0]["smoothness"] = 0.99
        metadata[bank.KEY] = json.dumps(content).encode()
    else:
        row = next(row for row in rows if row[what])
        row[what][0] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema).replace_schema_metadata(metadata), path)
    with pytest.raises(bank.BankError, match="expected the content that was written, SHA-256"):
        bank.load(path)


def test_what_is_no_bank_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a bank of outcomes"):
        bank.load(tmp_path / "none.parquet")
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(bank.BankError, match="expected a bank of outcomes, got"):
        bank.load(tmp_path / "other.parquet")


def test_agreement_is_spearmans(rng):
    kept = rng.permuted(np.tile(np.arange(7) < 4, (9, 1)), axis=1)
    scores, changes = rng.normal(size=(2, 3, 7)), rng.normal(size=(2, 9, 3))
    values, ahead = judging.agreement([scores, -scores], runs.Truth({"0.4": kept}, {"0.4": changes}), draws=20)
    each = [
        spearmanr([scores[s, j][~row].sum() for row in kept], changes[s, :, j]).statistic
        for s in range(2)
        for j in range(3)
    ]
    np.testing.assert_allclose(values["0.4"].value, [np.mean(each), -np.mean(each)], atol=1e-12)
    np.testing.assert_allclose(ahead["0.4"].value, [0, 2 * np.mean(each)], atol=1e-12)
    assert np.all(values["0.4"].low <= values["0.4"].value)
    assert np.all(values["0.4"].value <= values["0.4"].high)


def test_what_says_nothing_agrees_with_nothing():
    found = judging.correlations(np.asarray([[1.0, np.nan, 1.0], [1.0, 2.0, 2.0]]), np.asarray([[1.0] * 3, [2.0] * 3]))
    np.testing.assert_allclose(found, [0, 0, 1], atol=1e-12)
    assert judging.area(np.asarray([np.nan, 1.0]), np.asarray([True, False])) == 0.5


def test_right_scores_agree_and_options_are_chosen_by_the_truth(account):
    chosen = judging.in_use(account.scores, account.truth, best=True)
    assert [(each.method, each.option) for each in chosen[:2]] == [("trajectory", ""), ("segments", "middle")]
    found = judging.judged(account, judging.in_use(account.scores, account.truth, best=False), draws=30)
    assert found.names[:2] == ["trajectory", "segments"]
    np.testing.assert_allclose(found.agreement[runs.LEFT_OUT].value[:2], [1, -1])
    np.testing.assert_allclose(found.ahead[runs.LEFT_OUT].low[1], 2)
    kept = judging.kept_options(account.scores, account.truth)
    assert [(each.method, each.option) for each in kept if each.method == "segments"] == [
        ("segments", "end"),
        ("segments", "middle"),
    ]


def test_the_rule_is_held_against_the_best_of_the_three(account):
    rows = judging.rule(account, best=False)
    assert {(row["removed"], row["start"]): row["picked"] for row in rows} == {
        (runs.LEFT_OUT, 0): "trajectory",
        (runs.LEFT_OUT, 1): "segments",
        ("0.5", 0): "segments",
        ("0.5", 1): "segments",
    }
    assert rows[0]["short"] == pytest.approx(0)
    assert rows[1]["short"] == pytest.approx(2)


def test_a_strangers_scores_are_judged_beside_those_of_the_bank(folder):
    printed = done("bench", "--config", config_file(folder), "--method", "strangers:right")
    assert "strangers:right" in printed
    (row,) = json.loads((folder / "bank-output" / "bank.json").read_text())["rows"]
    assert row["method"] == "strangers:right"
    assert row[runs.LEFT_OUT] == pytest.approx([1, 1, 1])
    done("bench", "--config", config_file(folder), "--method", "strangers:mean")
    (row,) = json.loads((folder / "bank-output" / "bank.json").read_text())["rows"]
    assert row[runs.LEFT_OUT][0] < 1


def test_without_a_method_the_tables_are_made_again(folder):
    printed = done("bench", "--config", config_file(folder))
    assert (
        "smooth: agreement with retraining, each at its best option" in (folder / "bank-output" / "bank.md").read_text()
    )
    assert "0 of 1 learners" in " ".join(printed.split())


@pytest.mark.parametrize("ahead", [True, False])
def test_a_lead_is_one_over_every_method_at_every_small_removal(ahead):
    high, low = np.asarray([0.99, 0.5, 0.6]), np.asarray([0.0, 0.1, 0.2 if ahead else -0.1])
    estimates = {column: mi.evaluation.Estimate(high, high, high) for column in (runs.LEFT_OUT, "0.05", "0.5")}
    leads = {column: mi.evaluation.Estimate(low, low, low) for column in estimates}
    leads["0.5"] = mi.evaluation.Estimate(-high, -high, -high)
    found = judging.Judged(["trajectory", "a", "b"], [""] * 3, estimates, leads, np.full(3, np.nan))
    assert run_tables.leads(found) == ahead


@pytest.mark.parametrize(
    ("method", "status", "expected"),
    [
        ("strangers:short", 1, r"--method: expected scores [6] or [2, 6], got [2, 5] (protonet, smooth, seed 0)"),
        ("strangers:spoilt", 1, "--method: expected finite scores, got 6 others"),
        ("strangers:none", 2, "--method: expected a function in strangers"),
        ("strangers", 2, "--method: expected MODULE:FUNCTION"),
    ],
)
def test_scores_that_make_no_sense_are_refused(folder, method, status, expected):
    code, _, err = called("bench", "--config", config_file(folder), "--method", method)
    assert code == status
    assert expected in err


def test_tasks_that_are_others_here_are_refused(folder, account):
    other = account._replace(hashes={**account.hashes, "training": "0"})
    bank.save(folder / "bank.parquet", results.plain(CONFIG), [other])
    code, _, err = called("bench", "--config", config_file(folder), "--method", "strangers:right")
    assert code == 1
    assert "expected the tasks that its outcomes are of, got others (training)" in err


def config_file(folder):
    path = folder / "bank.toml"
    path.write_text('suite = "bank"\nbanks = ["bank.parquet"]\ndraws = 20\n')
    return path


def test_a_configuration_of_another_version_is_refused():
    stored = {**results.plain(CONFIG), "colour": 1}
    with pytest.raises(bank.BankError, match="unknown fields colour of EstimatorsConfig"):
        estimators.config_of(stored)


def test_the_banks_of_the_repository_are_whole_and_small():
    assert len(BANKS) >= 1
    assert sum(path.stat().st_size for path in BANKS) < 5e6
    for path in BANKS:
        config, accounts = bank.load(path)
        read = estimators.config_of(config)
        assert [account.name for account in accounts] == list(read.trainings)
        assert all(len(account.truth.kept[runs.LEFT_OUT]) >= 40 for account in accounts)


@pytest.mark.parametrize("path", BANKS, ids=lambda path: path.parent.parent.name)
def test_the_tables_of_the_repository_are_rebuilt_from_its_banks(path):
    _, accounts = bank.load(path)
    written = (path.parent / "table.md").read_text(encoding="utf-8")
    account = accounts[-1]
    found = judging.judged(account, judging.in_use(account.scores, account.truth, best=False), draws=1)
    headers, cells = run_tables.agreement_table(found)
    rebuilt = results.markdown(headers, cells)
    title = f"### {account.name}: agreement with retraining, each at its default\n\n"
    section = written.partition(title)[2].partition("\n\n")[0].splitlines()
    assert [without_intervals(line) for line in section] == [without_intervals(line) for line in rebuilt]


def without_intervals(line):
    return re.sub(r" \[[^]]*\]", "", line)


def test_retraining_is_training_without_the_tasks(tasks_and_learner, tmp_path):
    tasks, learner = tasks_and_learner
    run = runs.training_of(CONFIG.smooth, learner.problem, CONFIG.num_steps)
    starts = runs.starts_of(learner, tasks.training, CONFIG.seeds)
    targets = runs.groups_of(tasks.held_out, CONFIG.num_targets)
    again = runs.Retrained(learner, run, starts, tasks, CONFIG.together, tmp_path)
    truth, ends = runs.truth_of(again, tasks.training, targets, 4, CONFIG.removed, 5, seed=0)
    assert {name: masks.shape for name, masks in truth.kept.items()} == {runs.LEFT_OUT: (4, 6), "0.5": (5, 6)}
    for name, row in ((runs.LEFT_OUT, 2), ("0.5", 3)):
        lacking = np.flatnonzero(~truth.kept[name][row])
        assert len(lacking) == (1 if name == runs.LEFT_OUT else 3)
        weights = mi.drop(mi.unit_weights(tasks.training), tasks=lacking)
        loss = mi.query_loss(learner.problem)
        start, group = runs.row_of(starts, 1), runs.row_of(targets, 0)
        expected = float(loss(run(start, tasks.training, weights), group) - loss(run(start, tasks.training), group))
        np.testing.assert_allclose(truth.changes[name][1, row, 0], expected, rtol=1e-8, atol=1e-14)
    # What is kept is not computed again.
    kept = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz"))
    runs.truth_of(again, tasks.training, targets, 4, CONFIG.removed, 5, seed=0)
    assert kept == sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz"))
    expected = run(runs.row_of(starts, 1), tasks.training)
    for ours, theirs in zip(jax.tree.leaves(runs.row_of(ends, 1)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_the_experiment_from_scratch_and_from_what_it_kept(tmp_path):
    tiny = dataclasses.replace(CONFIG, worst=(0.2,), smoothness_directions=1)
    first = estimators.run(tiny, tmp_path / "cache")
    again = estimators.run(tiny, tmp_path / "cache")
    names = {row["method"] for row in first.rows}
    assert names >= {"trajectory", "segments", "optimum", "TRAK", "TLXML", "TracIn", "gradient similarity", "random"}
    assert (tmp_path / "bank.parquet").exists()
    for one, other in zip(first.rows, again.rows, strict=True):
        assert one == pytest.approx(other, abs=0.35, nan_ok=True)
