"""From an experiment's TOML to its files and the report, on tasks so few that only the machinery is tested."""

import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from metainfluence.lab.commands import cli, reproduce
from metainfluence.lab.commands.config_files import ConfigError
from metainfluence.lab.experiments import (
    agreement,
    answers,
    code,
    estimators,
    methods,
    removal,
    removal_tables,
    results,
    setting,
    verdicts,
)

ROOT = Path(__file__).resolve().parents[2]

TINY = """
experiment = "removal"

[common]
title = "Tiny"
methods = ["optimum", "segments", "trajectory", "plain loss", "random"]
retrained = ["segments", "random"]
edited = []
draws = 20
curve = [0.5]
curve_methods = ["random"]
published = ["task, retrain, 0.7, 3"]

[common.setting.data]
ways = 3
shots = 2
queries = 3
num_tasks = 10
num_held_out = 10
num_test = 10

[common.setting.learner]
widths = [4]

[common.setting.training]
num_steps = 10
tasks_per_step = 5

[common.task]
run = true
flipped = 0.2
shortcut = 0.1
removed = 0.3

[small]

[full.setting.training]
num_steps = 20
"""


def write(folder: Path, text: str, name: str = "tiny.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One experiment, from the command line to the report."""
    folder = tmp_path_factory.mktemp("reproduce")
    path, out = write(folder, TINY), folder / "out"
    cli.main(["reproduce", "--config", str(path), "--out", str(out)])
    cli.main(["reproduce", "--report", "--configs", str(folder), "--out", str(out)])
    return path, out


def test_an_experiment_leaves_rows_a_picture_a_table_and_a_record(finished):
    folder = finished[1] / "tiny" / "small"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cache",
        "picture.png",
        "ran.json",
        "results.parquet",
        "table.md",
    ]
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert {row["method"] for row in rows} >= {"optimum", "plain loss", "random", removal.TRUTH, removal.NOTHING}
    scored = {row["method"]: row for row in rows if row["how"] == "scored"}
    assert all(0 <= row["auc"] <= 1 for row in scored.values())
    assert set(scored) == {"optimum", "segments", "trajectory", "plain loss", "random"}
    assert scored["optimum"]["damaged"] == 3
    # Three of ten tasks are a large removal, for which the rule names segments whatever they find.
    assert scored["optimum"]["picked"] == "segments"
    assert scored["random"]["ahead"] == pytest.approx(scored["segments"]["auc"] - scored["random"]["auc"])
    assert scored["segments"]["ahead"] is None
    assert [row["share"] for row in rows if row["how"] == "curve"] == [0.5]
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "ran.json").read_text())["config"]["setting"]["training"]["num_steps"] == 10


def test_more_damage_than_tasks_is_refused_and_leaves_nothing(tmp_path):
    path, out = write(tmp_path, TINY), tmp_path / "out"
    with pytest.raises(ValueError, match=r"at most 1, got 1\.1 \(flipped 1, shortcut 0\.1, noise 0\); lower one"):
        cli.main(["reproduce", "--config", str(path), "--out", str(out), "--task.flipped", "1.0"])
    assert not out.exists() or not any(out.iterdir())


def test_a_run_that_was_cut_goes_on_from_what_is_kept(finished, monkeypatch):
    """All parts are read from the cache: nothing is trained, scored or measured again, and the rows are the same."""
    folder = finished[1] / "tiny" / "small"
    config = reproduce.configured(finished[0], "small", [])[1]

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(methods, "score", never)
    monkeypatch.setattr(methods, "chosen_damping", never)
    again = removal.run(config, folder / "cache")
    rows = pq.read_table(folder / "results.parquet").to_pylist()
    assert results.aligned(again.rows) == rows


def test_results_of_other_code_are_refused_and_told(finished, monkeypatch, capsys):
    path, out = finished
    now = {**reproduce.code_of("removal"), "influence.py": "another"}
    monkeypatch.setattr(reproduce, "code_of", lambda name: now)
    with pytest.raises(SystemExit) as caught:
        cli.main(["reproduce", "--config", str(path), "--out", str(out)])
    assert caught.value.code == 2
    assert "written by other code (influence.py changed since); name another --out" in capsys.readouterr().err
    with pytest.raises(results.OtherConfigError, match=r"cache: written by other code \(influence\.py"):
        results.claim(out / "tiny" / "small", reproduce.configured(path, "small", [])[1], now)
    reproduce.report([path], "small", out)
    assert "Older than the code" in capsys.readouterr().out
    assert "tiny (influence.py)" in (out / "README.md").read_text(encoding="utf-8")


def test_the_code_of_an_experiment_is_what_its_results_depend_on():
    names = set(code.code_of("removal"))
    assert {"influence.py", "lab/learn/models.py", "lab/experiments/removal.py", "lab/experiments/kept.py"} <= names
    assert not names & {"lab/experiments/agreement.py", "lab/show/plots.py", "lab/commands/cli.py"}
    assert code.digest('"""A."""\nx = 1  # one\n') == code.digest("x = 1\n") != code.digest("x = 2\n")
    assert code.changed(None, {"a": "1"}) == [code.UNKNOWN]
    assert code.changed({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c"]
    # What changes no result does not count in a record that has it, either.
    assert code.changed({"lab/experiments/code.py": "1"}, {}) == []


def test_the_digest_of_a_module_is_the_same_on_every_python():
    text = 'def f(x: int, *, y=None):\n    """A."""\n    print(f"{x:<{y}}")\n    return f"{x:<{y}}", None, [], {**x}\n'
    assert code.digest(text) == "46f6353f1994"


def test_a_learner_that_may_only_guess_is_told_before_any_score(tmp_path):
    shared = {"level": "task", "seed": 0, "how": "trained", "method": removal.NOTHING, "half_width": 0.02}
    learnt, guessing = ({**shared, "accuracy": value, "chance": 0.2} for value in (0.25, 0.21))
    assert removal_tables.warnings_of([learnt, {**guessing, "chance": None}]) == []
    (warning,) = removal_tables.warnings_of([guessing])
    assert "accuracy 0.210 ± 0.020, chance 0.200" in warning
    found = results.Result([guessing], {"Scores": (("a",), [[1]])}, Figure(), ["A note"], [warning])
    results.write(found, setting.SettingConfig(), tmp_path, title="T", command="c", seconds=1.0, code={})
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.index("has learnt nothing") < text.index("### Scores") < text.index("A note")


def test_differences_of_accuracy_are_taken_task_by_task():
    rng = np.random.default_rng(0)
    each = {(name, seed): rng.random(20) for name in ("a", "random") for seed in (0, 1)}
    rows = [
        {"method": name, "seed": seed, "how": "retrained", "each": list(values)}
        for (name, seed), values in each.items()
    ]
    value, half, above, seeds = removal_tables.paired(rows, rows[:2], lambda row: "random")
    gaps = [each["a", seed] - each["random", seed] for seed in (0, 1)]
    assert value == pytest.approx(np.mean(gaps))
    assert half == pytest.approx(1.96 * np.sqrt(sum(np.var(gap, ddof=1) / 20 for gap in gaps)) / 2)
    assert (above, seeds) == (sum(gap.mean() > 0 for gap in gaps), 2)
    assert removal_tables.paired(rows[:2], rows[:2], lambda row: "random") is None


def test_each_kind_of_damage_is_judged_by_itself(finished):
    rows = pq.read_table(finished[1] / "tiny" / "small" / "results.parquet").to_pylist()
    again = {row["method"] for row in rows if row["how"] == "retrained"}
    kinds = {f"{removal.TRUTH}, flipped labels", f"{removal.TRUTH}, shortcut"}
    assert again >= kinds | {"random, as many: 1", "random, as many: 2"}
    assert all(0 <= row["auc shortcut"] <= 1 for row in rows if row["how"] == "scored")
    # Two kinds of different size have two random removals, so that neither is held against the other's.
    assert removal_tables.harms(rows, "accuracy") == []


@pytest.mark.parametrize(("gain", "does"), [(0.2, "shortcut does harm:"), (-0.01, "shortcut does no harm that")])
def test_damage_does_harm_where_its_removal_gains_more_than_a_random_one(gain, does):
    spread = np.linspace(-0.1, 0.1, 20)
    shared = {"level": "task", "seed": 0, "how": "retrained"}
    rows = [
        {**shared, "method": f"{removal.TRUTH}, shortcut", "each": 0.5 + gain + spread, "auc shortcut": None},
        {**shared, "method": f"{removal_tables.AS_MANY}4", "each": 0.5 + spread[::-1]},
    ]
    (line,) = removal_tables.harms(rows, "accuracy")
    assert does in line
    assert f"{gain:+.4f}" in line


def test_kinds_are_told_apart_among_what_is_whole():
    values, damaged = np.array([0.0, 3.0, 1.0, 2.0]), np.array([True, True, False, False])
    first, second = np.array([True, False, False, False]), np.array([False, True, False, False])
    assert removal._among_clean(values, damaged, first) == 1.0
    assert removal._among_clean(values, damaged, second) == 0.0


def test_the_page_begins_with_what_a_reader_asks(tmp_path):
    folder = tmp_path / "table_omniglot" / "small"
    folder.mkdir(parents=True)
    shared = {"level": "task", "seed": 0, "picked": "segments", "chance": 0.2}
    accuracies = {"segments": 0.8, "random": 0.5, "direct-IF": 0.9, "TracIn": 0.6, removal.TRUTH: 0.7}
    rows = [
        {**shared, "method": name, "how": "retrained", "accuracy": value, "each": [value, value]}
        for name, value in accuracies.items()
    ]
    rows += [{**shared, "method": removal.NOTHING, "how": "trained", "accuracy": 0.6}]
    rows += [{**shared, "method": "segments", "how": "scored", "auc": 0.75, "auc noise": 0.625}]
    pq.write_table(pa.Table.from_pylist(results.aligned(rows)), folder / "results.parquet")
    learners, detection, gain = answers.lines(tmp_path, "small")
    assert "Omniglot 60.0%" in learners
    assert "70.0% (chance 20%)" in learners
    assert "segments" in detection
    assert "Omniglot 0.750 (noise 0.625)" in detection
    assert "Omniglot +0.3000 [+0.3000, +0.3000]" in gain
    assert gain.endswith("Omniglot -0.1000 [-0.1000, -0.1000] (direct-IF).")
    alone = tmp_path / "leaving_omniglot" / "small"
    alone.mkdir(parents=True)
    rows = [{"method": "training without it", "how": "retrained", "auc flipped": 0.75}]
    measured = {"trajectory": 0.96875, "optimum": 0.9375, "TRAK": 0.5, "direct-IF": 0.25}
    rows += [
        {"method": name, "how": "scored", **{f"spearman{end}": value for end in ("", "_low", "_high")}}
        for name, value in measured.items()
    ]
    rows += [{"how": "left out", "kind": kind} for kind in ("clean", "flipped")]
    pq.write_table(pa.Table.from_pylist(results.aligned(rows)), alone / "results.parquet")
    single = answers.lines(tmp_path, "small")[-1]
    assert single.startswith("4. ")
    assert single.endswith("Omniglot 0.97 (best baseline: TRAK 0.50; ROC AUC of the truth: flipped 0.75).")
    few = [{"how": "retrained"}, *(row for row in rows if row.get("method") == "optimum")]
    pq.write_table(pa.Table.from_pylist(results.aligned(few)), alone / "results.parquet")
    single = answers.lines(tmp_path, "small")[-1]
    assert single.endswith("Omniglot unknown (best baseline: none; ROC AUC of the truth: unknown).")
    pq.write_table(pa.Table.from_pylist(results.aligned(rows)), alone / "results.parquet")
    (told,) = verdicts.alone("Omniglot", verdicts.rows_of(tmp_path, "leaving_omniglot", "small"))
    assert (told.measured, told.met) == ("0.969 [0.969, 0.969]", True)
    folder = tmp_path / "editing_omniglot" / "small"
    folder.mkdir(parents=True)
    shared = {"removed": 1, "of": 20, "accuracy": 0.5, "reached": True}
    seconds = {"edit": 2.0, "edit, prepared once": 0.25, "trained from scratch": 10.0, "trained on": 0.5}
    seconds["trained on for a share of the steps"] = 1.0
    shared |= {"preparation": 4.0, "steps": 9, "each": [0.5, 0.5]}
    rows = [{**shared, "how": how, "seconds": value} for how, value in seconds.items()]
    rows[1] |= {"each": [0.625, 0.625]}
    rows[-1] |= {"each": [0.375, 0.375]}
    rows[0].pop("preparation")
    rows += [{**row, "removed": count, "seconds": row["seconds"] + count} for count in (2, 8) for row in rows]
    pq.write_table(pa.Table.from_pylist(results.aligned(rows)), folder / "results.parquet")
    editing = answers.lines(tmp_path, "small")[-1]
    assert editing.startswith("5. ")
    assert "Omniglot without 1 of 20 tasks 40 × (+0.1250 [+0.1250, +0.1250]), without 8 of 20 tasks 2.18 × (" in editing
    assert "), after 4.0 s of preparing. " in editing
    assert "without 2 of 20" not in editing
    assert editing.endswith("An edit by itself: 1.8 to 5 × as fast. Training on for 9 steps: 2 to 10 × as fast.")
    unprepared = [row for row in rows if row["how"] != "edit, prepared once"]
    pq.write_table(pa.Table.from_pylist(results.aligned(unprepared)), folder / "results.parquet")
    assert "so much: Omniglot unknown. An edit by itself: 1.8 to 5 ×" in answers.lines(tmp_path, "small")[-1]
    pq.write_table(pa.Table.from_pylist(results.aligned(rows)), folder / "results.parquet")
    edited, prepared, *_ = verdicts.worth("Omniglot", verdicts.rows_of(tmp_path, "editing_omniglot", "small"))
    assert (edited.measured, edited.met) == ("5.0 ×", False)
    assert (prepared.measured, prepared.met) == ("40 ×, +0.1250 ± 0.0000", True)
    assert answers.lines(tmp_path, "full") == []
    # Where the tables are there and their rows are not, as in a clone, what was said stands.
    said = answers.lines(tmp_path, "small")
    for name in ("table_omniglot", "editing_omniglot"):
        (tmp_path / name / "small" / "table.md").touch()
    (tmp_path / "table_omniglot" / "small" / "results.parquet").unlink()
    assert answers.lines(tmp_path, "small", "\n\n".join(said)) == said
    (tmp_path / "editing_omniglot" / "small" / "results.parquet").unlink()
    assert answers.lines(tmp_path, "small", "\n\n".join(said)) == said


def test_the_report_has_every_section_and_where_it_was_run(finished):
    text = (finished[1] / "README.md").read_text(encoding="utf-8")
    assert "## Tiny" in text
    assert "(tiny/small/picture.png)" in text
    assert "Published (arXiv 2501.15963)" in text
    assert "cores" in text


def test_what_is_finished_is_not_run_again(finished, capsys):
    cli.main(["reproduce", "--config", str(finished[0]), "--out", str(finished[1])])
    assert "already in" in capsys.readouterr().out


def test_results_of_another_configuration_are_refused(finished, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["reproduce", "--config", str(finished[0]), "--out", str(finished[1]), "--draws", "21"])
    assert caught.value.code == 2
    assert "draws: 20 there, 21 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (('experiment = "removal"', 'experiment = "removel"'), "experiment: expected one of .*nearest is 'removal'"),
        (("[full.setting", "[ful.setting"), "unknown key 'ful'.*nearest is 'full'"),
        (("num_held_out", "num_heldout"), "unknown key 'setting.data.num_heldout'.*nearest is 'num_held_out'"),
        (("[small]\n", ""), r"expected a table \[small\]"),
        (('title = "Tiny"', "title = "), "Invalid value"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path, change, expected):
    with pytest.raises(ConfigError, match=expected):
        reproduce.configured(write(tmp_path, TINY.replace(*change)), "small", [])


def test_a_mistyped_value_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        reproduce.configured(write(tmp_path, TINY.replace("num_tasks = 10", 'num_tasks = "ten"')), "small", [])
    assert "num-tasks" in capsys.readouterr().err


def test_a_size_is_laid_over_what_is_common(tmp_path):
    path = write(tmp_path, TINY)
    small, full = (reproduce.configured(path, size, [])[1] for size in ("small", "full"))
    assert (small.setting.training.num_steps, full.setting.training.num_steps) == (10, 20)
    assert small.setting.data == full.setting.data


@pytest.mark.parametrize("size", reproduce.SIZES)
def test_every_experiment_of_the_repository_can_be_read(size):
    paths = reproduce.experiment_files(ROOT / "configs", size)
    assert len(paths) >= 10
    for path in paths:
        assert reproduce.configured(path, size, [])[1].title


def test_verdicts_name_experiments_that_there_are():
    stems = {path.stem for path in reproduce.experiment_files(ROOT / "configs", "small")}
    own = (verdicts.DETECTION, verdicts.EXAMPLES, verdicts.EDITING)
    named = (*own, verdicts.WORTH, verdicts.AGREEMENT, verdicts.ALONE)
    assert {name for each in named for name in each.values()} | {"speed"} <= stems


def row(**values):
    return {"level": "task", "seed": 0, "of": 100, "picked": "optimum", **values}


def test_verdicts_whose_rows_are_not_here_are_those_of_the_report_before(tmp_path):
    row = {"level": "task", "how": "scored", "method": methods.INFLUENCE, "auc": 0.5, "seconds": 1.0}
    place = tmp_path / verdicts.DETECTION["digits"] / "small" / results.ROWS
    place.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), place)
    old = "# R\n\n## What was promised\n\n| promise | measured | bar |  |\n| :--- | :--- | :--- | :--- |\n"
    lines = [
        "| digits: x | 0.9 | ≥ 1 | missed |",
        "| MAML: y | 1 | ≥ 1 | met |",
        "| One removal, z | 1 × | ≥ 2 × | missed |",
    ]
    found = verdicts.lines(tmp_path, "small", old + "\n".join(lines) + "\n\n## Another\n\n| MAML: no | 1 | 1 | met |\n")
    assert found[2:4] == old.splitlines()[-2:]
    assert found[4:] == ["| digits: ROC AUC of damaged tasks, optimum | 0.500 | ≥ 0.95 | missed |", *lines[1:]]


def test_flipped_examples_have_a_verdict_of_their_own(tmp_path):
    row = {"level": "support", "how": "scored", "method": methods.OWN, "auc": 0.875}
    place = tmp_path / verdicts.EXAMPLES["Omniglot, examples"] / "small" / results.ROWS
    place.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), place)
    (told,) = verdicts.all_of(tmp_path, "small")
    assert told == ("Omniglot, examples: ROC AUC of flipped support examples, influence on F", "0.875", "≥ 0.9", False)


def test_verdicts_hold_the_measurement_against_the_bar():
    rows = [
        row(method=removal.NOTHING, how="trained", accuracy=0.5, seconds=4.0),
        row(method="optimum", how="scored", auc=0.96, seconds=2.0),
        row(method="segments", how="scored", auc=0.97, ahead=-0.01, ahead_low=-0.05),
        row(method="plain loss", how="scored", auc=0.9, ahead=0.06, ahead_low=-0.01),
        row(method="random", how="scored", auc=0.5, ahead=0.46, ahead_low=0.4),
        row(method="optimum", how="retrained", accuracy=0.6),
        row(method="optimum", how="edited", accuracy=0.59),
    ]
    found, lead = verdicts.detection("x", rows)
    assert found.met
    assert found.measured == "0.960"
    assert not lead.met
    assert "plain loss" in lead.what
    assert verdicts.FOUND_IN["mini-ImageNet"] == 0.9
    trained = row(method=removal.NOTHING, how="trained", accuracy=0.21, half_width=0.02, chance=0.2)
    assert [verdict.met for verdict in verdicts.learner("x", [trained])] == [False]
    each = {"optimum": [0.6, 0.7, 0.6], "random": [0.5, 0.6, 0.5], "TRAK": [0.7, 0.7, 0.6]}
    again = [row(method=name, how="retrained", each=values) for name, values in each.items()]
    assert [(v.what.rpartition(" ")[2], v.met) for v in verdicts.removed("x", again)] == [
        ("random", True),
        ("TRAK", False),
    ]
    kept, saved = verdicts.editing("x", rows)
    assert not kept.met  # 0.09 of 0.10 is less than 95 %
    assert saved.measured == "200 ×"


def test_the_best_damping_is_that_of_highest_lds():
    rows = [{"method": "a", "lds": 0.2}, {"method": "a", "lds": 0.4}, {"method": "b", "lds": 0.9}]
    assert agreement.best(rows, "a") is rows[1]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"retrained: expected some of .*got 'magic'"):
        methods.check_names("retrained", ["optimum", "magic"])
    config = dataclasses.replace(setting.SettingConfig(), learner=setting.LearnerConfig(kind="magic"))
    tasks = setting.sinusoid_tasks(dataclasses.replace(config, data=setting.DataConfig(dataset="sinusoid")))
    with pytest.raises(ValueError, match=r"kind: expected one of implicit_head, .*got 'magic'"):
        setting.make_learner(config.learner, tasks.training, config.data)
    with pytest.raises(ValueError, match="model: expected mlp or conv4, got 'magic'"):
        setting.make_learner(setting.LearnerConfig(model="magic"), tasks.training, config.data)
    with pytest.raises(ValueError, match="experiment: expected run = true"):
        removal.run(removal.RemovalConfig())


def test_the_lowest_scores_are_removed_at_their_own_level():
    assert methods.most_harmful(np.array([0.3, -0.2, 0.0, -0.5]), 0.5).tolist() == [3, 1]
    points = setting.sinusoid_tasks(
        setting.SettingConfig(data=setting.DataConfig(dataset="sinusoid", num_tasks=3, queries=4))
    )
    holder = setting.Setting(*[None] * len(setting.Setting._fields))._replace(tasks=points)
    weights = methods.without(holder, "query", np.array([1, 6]))
    assert np.argwhere(np.asarray(weights.query) == 0).tolist() == [[0, 1], [1, 2]]
    assert np.all(weights.task == 1)
    assert np.all(weights.support == 1)


def test_no_task_is_damaged_twice():
    chosen = setting.harmful(setting.HarmConfig(flipped=0.3, shortcut=0.3, noise=0.4), 50, seed=1)
    assert sorted(np.concatenate(list(chosen.values()))) == list(range(50))
    with pytest.raises(ValueError, match=r"harm: expected shares of tasks that sum to at most 1, got 1\.2"):
        setting.harmful(setting.HarmConfig(flipped=0.6, shortcut=0.6), 50, seed=1)


def test_target_and_test_share_no_example_and_no_class_where_there_are_enough():
    digits = setting.datasets.load("digits")
    held_out, test = setting.clean_pools(digits, 5)
    assert not np.intersect1d(held_out, test).size
    assert set(digits.labels[held_out]) == set(digits.labels[test]) == set(range(10))
    split = digits._replace(
        pools={"train": np.flatnonzero(digits.labels < 4), "test": np.flatnonzero(digits.labels >= 4)}
    )
    held_out, test = setting.clean_pools(split, 3)
    assert not np.intersect1d(digits.labels[held_out], digits.labels[test]).size
    with pytest.raises(ValueError, match="ways: expected at most 3, half of the test classes, got 4"):
        setting.clean_pools(split, 4)


def test_cells_of_tables_are_escaped_and_aligned():
    lines = results.markdown(("a", "b"), [["x|y", 1.0], ["z", float("nan")]])
    assert lines == ["| a | b |", "| :--- | ---: |", "| x\\|y | 1 |", "| z | – |"]
    assert results.aligned([{"a": 1}, {"b": 2}]) == [{"a": 1, "b": None}, {"a": None, "b": 2}]


@pytest.mark.slow
def test_agreement_from_scratch_and_from_its_cache(tmp_path):
    small = dataclasses.replace(
        agreement.AgreementConfig(),
        setting=dataclasses.replace(
            setting.SettingConfig(),
            data=setting.DataConfig(ways=3, shots=2, queries=3, num_tasks=10, num_held_out=10, num_test=10),
            harm=setting.HarmConfig(flipped=0.2),
            learner=setting.LearnerConfig(widths=(4,)),
            training=setting.TrainingConfig(num_steps=10),
        ),
        num_subsets=4,
        num_left_out=3,
        floor_subsets=3,
        num_targets=2,
        draws=20,
    )
    first = agreement.run(small, tmp_path)
    again = agreement.run(small, tmp_path)
    assert {row["method"] for row in first.rows} >= {"influence", "direct-IF", "TRAK", "TLXML", "TracIn", "random"}
    for one, other in zip(first.rows, again.rows, strict=True):
        assert one == pytest.approx(other, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a = " + b"[" * 5000 + b"]" * 5000, "recursion|nested"),
        (b"#" * (1 << 21), "at most 1048576 bytes"),
        (b"\xff", "decode"),
    ],
    ids=["deep", "large", "no text"],
)
def test_a_file_that_cannot_be_an_experiment_is_named(tmp_path, content, why):
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.toml: .*({why})"):
        reproduce.read(path, "small")


class _Done:
    returncode = 0


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Experiments that take a second of a pretended clock each, in a folder; what was begun, and with which timeout."""
    folder, begun, clock = tmp_path / "configs", [], [0.0]
    folder.mkdir()
    for name in ("a", "table_omniglot", "b", "table_mini_imagenet"):
        write(folder, TINY, f"{name}.toml")

    def begin(command, *, timeout, **_):
        name = Path(command[command.index("--config") + 1]).stem
        begun.append((name, timeout))
        clock[0] += 1.0 if timeout is None else min(1.0, timeout)
        if timeout is not None and timeout < 1:
            raise reproduce.subprocess.TimeoutExpired(command, timeout)
        return _Done()

    monkeypatch.setattr(reproduce.subprocess, "run", begin)
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: clock[0])
    return folder, begun


def test_a_budget_runs_what_matters_first_and_says_what_is_left(pretended, tmp_path, capsys):
    folder, begun = pretended
    command = ["--all", "--configs", str(folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        reproduce.main([*command, "--budget", "2.5"])
    assert caught.value.code == reproduce.CUT
    assert begun == [("table_omniglot", 2.5), ("table_mini_imagenet", 1.5), ("a", 0.5)]
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 4 experiments are there" in said
    assert "The 2.5 s are up: left are a, b; the same command goes on" in said
    begun.clear()
    reproduce.main([*command, "--budget", "5"])
    assert [name for name, _ in begun] == ["table_omniglot", "table_mini_imagenet", "a", "b"]
    begun.clear()
    reproduce.main(command)
    assert begun == [("a", None), ("b", None), ("table_mini_imagenet", None), ("table_omniglot", None)]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (["--all", "--budget", "0"], "--budget: expected a positive number of seconds, got 0"),
        (["--all", "--budget", "nan"], "--budget: expected a positive number of seconds, got nan"),
        (["--report", "--budget", "5"], "expected --budget with --all"),
        (["--all", "--dry-run", "--budget", "5"], "without --dry-run"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(given, why, capsys):
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(given)
    assert why in capsys.readouterr().err


def test_what_matters_first_is_there():
    assert set(reproduce.FIRST) <= {path.stem for path in reproduce.experiment_files(ROOT / "configs", "full")}


def test_an_experiment_of_one_size_is_left_out_at_the_other(tmp_path):
    write(tmp_path, TINY, "both.toml")
    write(tmp_path, TINY.partition("[full")[0], "small.toml")
    write(tmp_path, 'experiment = "removal"\n', "neither.toml")
    write(tmp_path, "[small]\n", "other.toml")
    found = {size: [path.stem for path in reproduce.experiment_files(tmp_path, size)] for size in reproduce.SIZES}
    # One without any size is a mistake, and running it says so.
    assert found == {"small": ["both", "neither", "small"], "full": ["both", "neither"]}


def test_training_tasks_of_more_classes_than_the_target_has(monkeypatch):
    """λ is the same for both; the held-out loss and the accuracy are those of the fewer classes."""
    config = dataclasses.replace(
        setting.SettingConfig(train_ways=5, target="calibrated loss"),
        data=setting.DataConfig(ways=3, shots=2, queries=3, num_tasks=6, num_held_out=4, num_test=4),
        learner=setting.LearnerConfig(kind="r2d2", widths=(4,)),
        training=setting.TrainingConfig(num_steps=5),
    )
    made = setting.make(config)
    assert made.tasks.training.query.labels.shape == (6, 15)
    assert made.tasks.test.query.labels.shape == (4, 9)
    expected = setting.learners.calibrated_loss(made.tested)(made.trained, made.tasks.held_out)
    np.testing.assert_allclose(made.target(made.trained, made.tasks.held_out), expected)
    losses = methods.held_out_losses(made)
    assert losses["calibrated_loss"] == pytest.approx(float(expected))
    assert losses["calibrated_loss"] <= losses["held_out_loss"]
    found = methods.score(made, "optimum", 0.1)
    assert found.scores is not None
    assert found.scores.task.shape == (6,)
    # Of ridge heads that know of more classes the accuracy is the same but for ties, so this asks whose is measured.
    measured = []
    monkeypatch.setattr(setting.learners, "accuracy", measured.append)
    setting.performance(made)
    assert measured[0] is made.tested
    assert made.tested is not made.problem


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"train_ways": 5}, "train_ways: expected 3, as data.ways, since the meta-parameters of anil depend on"),
        ({"data": setting.DataConfig("sinusoid"), "train_ways": 7}, "train_ways: expected none, since sinusoid has no"),
        (
            {"data": setting.DataConfig("sinusoid"), "target": "calibrated loss"},
            "target: expected loss, since sinu",
        ),
    ],
    ids=["head", "regression", "target"],
)
def test_classes_and_targets_that_a_setting_cannot_have(change, why):
    config = setting.SettingConfig(
        data=setting.DataConfig(ways=3, shots=2, queries=3, num_tasks=6, num_held_out=4, num_test=4),
        learner=setting.LearnerConfig(kind="anil", widths=(4,)),
    )
    with pytest.raises(ConfigError, match=why):
        setting.make(dataclasses.replace(config, **change))


def test_an_experiment_on_runs_refuses_what_it_does_not_use():
    for change, why in (({"train_ways": 5}, "train_ways: expected None"), ({"target": "calibrated loss"}, "target")):
        config = estimators.EstimatorsConfig(setting=setting.SettingConfig(**change))
        with pytest.raises(ConfigError, match=why):
            estimators.run(config)


def test_how_sure_the_outputs_are_is_said():
    rows = [row(how="trained", method=removal_tables.NOTHING, held_out_loss=1.8, calibrated_loss=1.4)]
    (line,) = removal_tables.confidence(rows)
    assert "Held-out loss 1.800; at the temperature that fits it best 1.400" in line
    assert removal_tables.confidence([row(how="trained", method=removal_tables.NOTHING)]) == []


def test_a_dry_run_shows_and_runs_nothing(tmp_path, capsys):
    command = ["--config", str(ROOT / "configs" / "speed.toml"), "--out", str(tmp_path), "--dry-run"]
    reproduce.main([*command, "--num-removed", "7"])
    shown = capsys.readouterr().out
    assert "would be in" in shown
    assert tomllib.loads(shown)["num_removed"] == 7
    assert tomllib.loads(shown)["setting"]["training"]["num_steps"] == 3000
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        reproduce.main(["--report", "--dry-run"])
