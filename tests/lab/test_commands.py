import contextlib
import dataclasses
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import metainfluence as mi
from lab.calls import TRAIN, called, done
from metainfluence._disk import of_arrays
from metainfluence.lab.commands import _parameters as parameters
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import cli, edit, evaluate, score
from metainfluence.lab.commands import job as job_module
from metainfluence.lab.commands.job import tolerance
from metainfluence.lab.data import fewshot
from metainfluence.lab.data.places import Place, locator
from metainfluence.lab.learn.checkpoints import Checkpoints
from metainfluence.lab.show import printing
from metainfluence.scoring._passes import Passes

# A ridge head on learned features; a delay makes reading slow enough to be stopped.
MODULE = """
import os, time
import jax, jax.numpy as jnp, numpy as np
import metainfluence as mi
import optax

jax.config.update("jax_enable_x64", True)

def loss(params, meta_params, batch):
    return (jnp.tanh(batch["x"] @ meta_params) @ params - batch["y"]) ** 2

def adapt(meta_params, support, coefficients):
    seen = jnp.tanh(support["x"] @ meta_params)
    gram = seen.T @ (coefficients[:, None] * seen) + jnp.eye(2)
    return jnp.linalg.solve(gram, seen.T @ (coefficients * support["y"]))

def task(k):
    rng = np.random.default_rng(k)
    x = rng.normal(size=(6, 3))
    y = np.tanh(x[:, 0] + rng.normal() * x[:, 1])
    return mi.Task({"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}, None, None)

class Source:
    ids = [f"task {k}" for k in range(8)]

    def __len__(self):
        return 8

    def __getitem__(self, k):
        time.sleep(float(os.environ.get("DELAY", "0")))
        return task(k)

    def columns(self, k):
        return {"harm": ("clean", ["clean"] * 3, ["clean"] * 3)}

def make():
    problem = mi.bilevel(loss, mi.adaptation.closed_form(adapt), meta_regularizer=mi.l2(4.0))
    held_out = mi.stack_tasks([task(k) for k in (100, 101)])
    meta_params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    return {"problem": problem, "meta_params": meta_params, "source": Source(), "target_args": (held_out,),
            "test": [task(k) for k in range(200, 207)]}

def number():
    return 3

def incomplete():
    return {"problem": 1, "meta_params": 2}

def misspelt():
    return {**make(), "metrik": None}

def no_problem():
    return {**make(), "problem": loss}

def single():
    made = make()
    return {**made, "meta_params": made["meta_params"].astype("float32")}

def half():
    made = make()
    source = [jax.tree.map(lambda leaf: leaf.astype("float16"), task(k)) for k in range(8)]
    args = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), made["target_args"])
    return {**made, "meta_params": made["meta_params"].astype("bfloat16"), "source": source, "target_args": args,
            "test": source[:3]}

def no_target():
    made = make()
    return {name: made[name] for name in ("problem", "meta_params", "source", "test")}

def own_target():
    return {**no_target(), "target": lambda meta_params: jnp.sum(meta_params**2)}

def wrong_target():
    return {**make(), "target": lambda meta_params: jnp.sum(meta_params)}

def endless_target():
    return {**no_target(), "target": lambda meta_params: jnp.sqrt(jnp.sum(meta_params) - 1e9)}

def endless_target_of_a_run():
    run = mi.training(make()["problem"], optax.sgd(0.01), 2)
    return {**endless_target(), "run": run, "start": jnp.ones((3, 2))}

def endless_metric():
    return {**make(), "metric": lambda meta_params, tasks: jnp.full(len(tasks.query["y"]), jnp.nan)}

def spoilt():
    kink = lambda m, t, w: jnp.sum(w.query * t.query["y"] ** 2) * jnp.sum(m) + jnp.linalg.norm(m * t.query["y"][0])
    source = [task(k) for k in range(8)]
    source[int(os.environ.get("SPOILT", "4"))].query["y"][0] = 0
    return {**own_target(), "problem": mi.from_task_loss(kink), "source": source}

def unreadable():
    class Torn(Source):
        def __getitem__(self, k):
            return task(k) if k != 5 else 1 / 0
    return {**make(), "source": Torn()}

def with_functions():
    return {**make(), "meta_params": {"kernel": jnp.ones((3, 2)), "activation": jax.nn.relu}}

def no_tuple():
    return {**make(), "target_args": 1}
"""


def assert_same_change(before, found, expected):
    for start, got, leaf in zip(*map(jax.tree.leaves, (before, found, expected)), strict=True):
        np.testing.assert_allclose(got - start, leaf - start, atol=1e-4 * np.abs(leaf - start).max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train, score, edit, evaluate, report; what they printed is in `printed.json`."""
    folder = tmp_path_factory.mktemp("run") / "new" / "run"
    scores = folder / "scores.parquet"
    printed = {
        "train": done("train", *TRAIN, "--out", folder),
        "score": done("score", folder, "--damping", "0.1"),
        "edit": done("edit", scores, "--most-harmful", "3"),
        "evaluate": done("evaluate", folder),
        "report": done("report", scores),
    }
    (folder / "printed.json").write_text(json.dumps(printed))
    return folder


@pytest.fixture(scope="module")
def printed(folder):
    return json.loads((folder / "printed.json").read_text())


@pytest.fixture(scope="module")
def job(folder):
    return runs.load(folder, None)


@pytest.fixture(scope="module")
def scores(folder):
    return mi.read_scores(folder / "scores.parquet")


@pytest.fixture(scope="module")
def edit_of(job):
    """The same by another solver."""
    return jax.jit(mi.edit(job.problem, solver=mi.solvers.dense(), damping=0.1, num_newton_steps=0))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module in the current directory."""
    (tmp_path / "theirs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "theirs", raising=False)
    yield tmp_path
    sys.modules.pop("theirs", None)


def test_training_lowers_the_objective(printed, job):
    first, last = (float(word) for word in printed["train"].partition("F from ")[2].split()[:3:2])
    assert last < first
    assert last > float(mi.total_objective(job.problem)(job.meta_params, job.stacked()))
    assert "12 tasks of digits, 3 of them damaged" in printed["train"]


def test_a_finished_training_is_not_repeated(folder):
    before = (folder / runs.TRAINED).stat().st_mtime_ns
    assert "Already trained" in done("train", "--config", folder / runs.CONFIG, "--out", folder)
    assert (folder / runs.TRAINED).stat().st_mtime_ns == before


def test_a_stopped_training_goes_on(folder, job, tmp_path, monkeypatch):
    save = Checkpoints.save

    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", save_and_stop)
        status, _, err = called("train", *TRAIN, "--out", out)
    assert status == 130
    again = shlex.join(["metainfluence", "train", *TRAIN, "--out", str(out)])
    assert err.splitlines()[-1] == f"metainfluence train: stopped; go on with: {again}"
    status, _, err = called("score", out)
    assert status == 1
    assert f"go on with: metainfluence train --config {out / runs.CONFIG} --out {out}" in err
    with contextlib.redirect_stderr(io.StringIO()) as progress:
        cli.main(["train", "--config", str(out / runs.CONFIG), "--out", str(out)])
    # The first 25 steps are not taken again.
    assert "step 25/30" not in progress.getvalue()
    assert "step 30/30" in progress.getvalue()
    found, expected = (parameters.load(each / runs.TRAINED, job.meta_params) for each in (out, folder))
    jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, rtol=1e-9), found, expected)


def test_a_folder_of_another_configuration_is_refused(folder):
    status, _, err = called("train", *TRAIN, "--seed", "1", "--out", folder)
    assert status == 1
    assert "seed: 0 there, 1 here" in err


def test_scores_are_those_of_the_library(job, scores):
    score = mi.influence_scores(job.problem, mi.query_loss(job.problem), solver=mi.solvers.dense(), damping=0.1)
    expected = jax.jit(score)(job.meta_params, job.stacked(), *job.target_args)
    own = scores.score[scores.role == "task"]
    np.testing.assert_allclose(own, expected.task, rtol=1e-4, atol=1e-4 * np.abs(expected.task).max())
    assert sum(scores.labels["harm"][scores.role == "task"] == fewshot.FLIPPED) == 3


def test_the_score_file_tells_what_was_run(folder, scores):
    run = scores.metadata["run"]
    assert run["command"].startswith("metainfluence score ")
    assert run["score"]["damping"] == 0.1
    assert run["training"]["learner"]["kind"] == "protonet"
    assert run["machine"]["jax"] == jax.__version__


def test_a_finished_score_is_not_repeated(folder, printed):
    again = done("score", folder, "--damping", "0.1")
    assert "Already in" in again
    assert "Wrote" in printed["score"]
    assert "CONVERGED" in again
    status, _, err = called("score", folder, "--damping", "0.2")
    assert status == 1
    assert "differs in damping" in err
    status, _, err = called("score", folder, "--by", "segments")
    told = "differs in estimator: this run has 'segments', that one 'optimum'; --no-resume starts anew"
    assert (status, told in err) == (1, True), err


def test_the_edit_removes_the_most_harmful(folder, job, scores, printed, edit_of):
    change = json.loads((folder / "edited.json").read_text())
    own = np.flatnonzero(scores.role == "task")
    worst = own[np.argsort(scores.score[own])[:3]]
    assert change["removed"] == [str(k) for k in scores.task[worst].tolist()]
    assert change["change predicted by the scores"] == pytest.approx(scores.score[worst].sum())
    edited = parameters.load(folder / "edited.npz", job.meta_params)
    weights = mi.drop(mi.unit_weights(job.stacked()), tasks=scores.task[worst])
    expected = edit_of(job.meta_params, job.stacked(), weights)
    assert_same_change(job.meta_params, edited, expected.meta_params)
    target = jax.jit(mi.query_loss(job.problem))
    assert change["target after"] == pytest.approx(float(target(edited, *job.target_args)), rel=1e-6)
    assert change["target before"] == pytest.approx(float(target(job.meta_params, *job.target_args)), rel=1e-6)
    assert f"Removed 3 (task): {', '.join(change['removed'])}" in printed["edit"]


def test_evaluation_compares_the_same_tasks(folder, job, printed):
    found = json.loads((folder / "evaluation.json").read_text())
    tasks = mi.stack_tasks([job.test[k] for k in range(5)])
    edited = parameters.load(folder / "edited.npz", job.meta_params)
    before, after = (np.asarray(job.metric(at, tasks)) for at in (job.meta_params, edited))
    for name, values in {"before": before, "after": after, "after - before": after - before}.items():
        assert found[name]["mean"] == pytest.approx(values.mean())
        assert found[name]["half_width"] == pytest.approx(1.96 * values.std(ddof=1) / 5**0.5)
    assert found["metric"] == "accuracy"
    assert set(found["detection"]) == {"task", "query label"}
    assert found["detection"]["task"]["damaged"] == 3
    assert "95 % interval" in printed["evaluate"]


def test_the_last_batch_overlaps(job):
    points = (job.meta_params, jax.tree.map(lambda leaf: 1.1 * leaf, job.meta_params))
    whole = evaluate.per_task(job, points, 5)
    assert whole.shape == (2, 5)
    assert np.any(whole[0] != whole[1])
    np.testing.assert_allclose(evaluate.per_task(job, points, 2), whole)


def test_an_edit_of_other_meta_parameters_is_refused(folder, job, tmp_path):
    edited = tmp_path / "edited.npz"
    parameters.save(edited, job.meta_params)
    change = edited.with_name("edited.json")
    evaluate.refuse_others(edited, job)
    change.write_text(json.dumps({"meta_params": of_arrays(job.meta_params)}))
    evaluate.refuse_others(edited, job)
    other = job._replace(meta_params=jax.tree.map(lambda leaf: 2 * leaf, job.meta_params))
    with pytest.raises(ValueError, match="edited: expected an edit of these meta-parameters"):
        evaluate.refuse_others(edited, other)
    change.write_text(json.dumps({"meta_params": of_arrays(other.meta_params)}))
    with pytest.raises(ValueError, match="edited: expected an edit of these meta-parameters"):
        evaluate.run(evaluate.EvaluateConfig(run=folder, edited=edited))
    change.write_text("[]")
    with pytest.raises(ValueError, match=r"edited: expected .* as `metainfluence edit` writes it"):
        evaluate.refuse_others(edited, job)


def test_detection_takes_the_harmful_for_damaged(scores):
    own = scores.role == "task"
    damaged = scores.labels["harm"][own] != fewshot.CLEAN
    pairs = scores.score[own][damaged][:, None] < scores.score[own][~damaged][None]
    assert evaluate.detection(scores)["task"]["auc"] == pytest.approx(pairs.mean())


def test_rows_are_found_in_the_source(job, scores):
    place = locator(job.source, scores)
    for row in range(0, len(scores.score), 5):
        found = place(row)
        assert found.task == scores.task[row]
        if scores.role[row] == "task":
            assert found == Place(found.task)
        else:
            ids = getattr(job.source.tasks, f"{scores.role[row]}_ids")
            assert ids[found.task, found.example] == scores.example[row]
    other = dataclasses.replace(scores, task=scores.task + 12)
    with pytest.raises(ValueError, match="rows about tasks of the source, got task of task 12"):
        locator(job.source, other)(0)


def test_the_report_has_pictures(folder):
    page = (folder / "scores.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") > 12
    assert "The solve converged." in page
    assert "flipped labels" in page


def test_data_are_removed_by_their_ids(folder, job, scores, edit_of):
    rows = np.flatnonzero((scores.role == "query") & (scores.task == 4))
    name = f"4:{scores.example[rows[2]]}"
    out = folder / "by-id"
    done("edit", "--run", folder, "--role", "query", "--remove", name, "--damping", "0.1", "--out", out)
    assert json.loads((out / "edited.json").read_text())["removed"] == [name]
    edited = parameters.load(out / "edited.npz", job.meta_params)
    weights = mi.drop(mi.unit_weights(job.stacked()), query=[(4, 2)])
    expected = edit_of(job.meta_params, job.stacked(), weights)
    assert_same_change(job.meta_params, edited, expected.meta_params)


def test_scores_of_other_meta_parameters_are_refused(folder, job, tmp_path):
    done("train", *TRAIN, "--seed", "3", "--training.num-steps", "25", "--out", tmp_path / "other")
    status, _, err = called("edit", folder / "scores.parquet", "--run", tmp_path / "other", "--most-harmful", "1")
    assert status == 1
    assert "which is about others" in err
    status, _, err = called("evaluate", tmp_path / "other")
    assert status == 1
    assert "edited.npz: expected a file of meta-parameters" in err


def test_a_dry_run_shows_all_and_writes_nothing(tmp_path):
    out = tmp_path / "nothing"
    text = done("train", *TRAIN, "--out", out, "--dry-run")
    shown, _, plan = text.partition("\n\ntasks")
    config = tomllib.loads(shown)
    assert config["data"]["num_tasks"] == 12
    assert config["learner"] == {
        "kind": "protonet",
        "model": "mlp",
        "widths": [6],
        "width": 32,
        "pooling": "max",
        "activation": "tanh",
        "head_l2": 0.03,
        "learned_head": True,
        "proximal": 1.0,
        "inner_lr": 0.1,
        "inner_steps": 5,
        "inner_tol": 1e-8,
        "meta_l2": 0.05,
    }
    assert "meta-parameters" in plan
    assert "tasks per chunk" in plan
    assert not out.exists()


def test_what_a_dry_run_shows_is_a_configuration(tmp_path):
    shown = done("report", "a.parquet", "--most", "7", "--dry-run")
    (tmp_path / "report.toml").write_text(shown)
    assert done("report", "--config", tmp_path / "report.toml", "--dry-run") == shown
    assert "run" not in tomllib.loads(shown)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["report"], 2, "expected a score file"),
        (["report", "nowhere.parquet"], 1, "file that `metainfluence score` wrote, got none at nowhere.parquet"),
        (["edit", "nowhere.parquet", "--most-harmful", "1"], 1, "got none at nowhere.parquet"),
        (["score", "theirs:make"], 2, "did you mean --problem theirs:make?"),
        (["edit", "--problem", "theirs:make", "--remove", "task 1:2"], 1, "for an example add --role support or"),
        (["score", "--problem", "theirs:make", "--solver", "auto", "--max-steps", "3"], 2, "--solver cg or minres"),
        (["report", "theirs.py"], 1, "expected a score file of metainfluence"),
        (["score"], 2, "expected one of --run FOLDER"),
        (["score", "nowhere"], 1, "expected a folder that `metainfluence train` wrote"),
        (["score", "--problem", "nowhere:make"], 2, "got 'nowhere', which there is not"),
        (["score", "--problem", "theirs:nothing"], 2, "got 'nothing', which there is not"),
        (["score", "--problem", "theirs"], 2, "expected MODULE:FUNCTION"),
        (["score", "--problem", "theirs:number"], 1, "or a dict of its fields, got int"),
        (["score", "--problem", "theirs:incomplete"], 1, "without 'source'"),
        (["score", "--problem", "theirs:misspelt"], 1, "with 'metrik'; nearest is 'metric'"),
        (["score", "--problem", "theirs:no_problem"], 1, "problem: expected one made by metainfluence.bilevel"),
        (["score", "--problem", "theirs:no_tuple"], 1, "target_args: expected a tuple"),
        (["score", "--problem", "theirs:wrong_target"], 1, "target: expected a function (meta_params, *target_args)"),
        (["score", "--problem", "theirs:with_functions"], 1, "['activation']: expected an array, got an object"),
        (["edit", "a.parquet"], 2, "expected one of --most-harmful, --harm-above, --remove, got none"),
        (["edit", "a.parquet", "--most-harmful", "2", "--harm-above", "0"], 2, "--most-harmful and --harm-above"),
        (["edit", "a.parquet", "--most-harmful", "0"], 2, "--most-harmful: expected a positive number"),
        (["edit", "--problem", "theirs:make", "--remove", "task 9"], 1, "TASK, an id of the source, got 'task 9'"),
        (["edit", "--problem", "theirs:make", "--role", "query", "--remove", "task 1:9"], 1, "as 0, 1, 2; got '9'"),
        (["evaluate", "--problem", "theirs:make"], 1, "edited.npz: expected a file of meta-parameters"),
        (["train", "--data.dataset", "digit", "--out", "new"], 1, "nearest is 'digits'"),
        (["train", "--config", "wrong.toml"], 2, "nearest is 'num_tasks'"),
        (["scor"], 2, "nearest is 'score'"),
    ],
)
def test_what_makes_no_sense_is_one_line(args, status, message, module):
    (module / "wrong.toml").write_text("[data]\nnum_task = 3\n")
    found, _, err = called(*args)
    assert found == status
    assert message in err
    assert not list(module.glob("*.parquet*"))
    assert len(err.splitlines()) == 1


def test_a_score_that_gives_nan_names_the_task_and_leaves_nothing(module, monkeypatch):
    for place in "42":
        monkeypatch.setenv("SPOILT", place)
        status, _, err = called("score", "--problem", "theirs:spoilt", "--damping", "1")
        assert (status, f"got NaN or infinity from tasks {place}:" in err) == (1, True), err
        assert not list(module.glob("*.parquet*"))


def test_errors_name_options_of_the_command(module):
    status, _, err = called("score", "--problem", "theirs:unreadable", "--damping", "1")
    assert (status, "--on-error skip leaves out such tasks" in err) == (1, True), err
    assert "Left out: task 'task 5'" in done(
        "score", "--problem", "theirs:unreadable", "--damping", "1", "--on-error", "skip"
    )
    status, _, err = called("score", "--problem", "theirs:make", "--damping", "1")
    assert (status, "; --no-resume starts anew" in err) == (1, True), err


def test_a_target_that_is_not_finite_leaves_nothing(module):
    out = module / "new" / "scores.parquet"
    for given in (
        ("theirs:endless_target", "--damping", "1"),
        ("theirs:endless_target_of_a_run", "--by", "trajectory"),
    ):
        status, _, err = called("score", "--out", out, "--problem", *given)
        assert (status, "target: expected a finite gradient at meta_params" in err) == (1, True), err
        assert not out.parent.exists()


def test_a_metric_that_is_not_finite_is_told(module):
    parameters.save(module / "edited.npz", runs.load(None, "theirs:make").meta_params)
    status, printed, err = called("evaluate", "--problem", "theirs:endless_metric")
    assert (status, "metric: expected finite numbers, got nan for test task 0 before the edit" in err) == (1, True), err
    assert "nan" not in printed
    assert not (module / "evaluation.json").exists()


@pytest.mark.filterwarnings("always::metainfluence.response.DirectEffectWarning")
def test_without_target_args_the_training_tasks_are_the_target(module):
    printed = done("score", "--problem", "theirs:no_target", "--damping", "1")
    assert printed.startswith("Target: the mean query loss of the training tasks themselves")
    job = runs.load(None, "theirs:make")
    score = mi.influence_scores(job.problem, mi.query_loss(job.problem), solver=mi.solvers.dense(), damping=1.0)
    expected = jax.jit(score)(job.meta_params, job.stacked(), job.stacked())
    found = mi.read_scores(module / "scores.parquet")
    np.testing.assert_allclose(found.score[found.role == "task"], expected.task, rtol=1e-4, atol=1e-9)
    assert "Removed 1 (task): task 1" in done("edit", "--problem", "theirs:no_target", "--remove", "task 1")
    # Of many tasks some.
    few = job_module.aimed(job._replace(target_args=(), source=[job.source[k % 8] for k in range(201)]))
    np.testing.assert_array_equal(few.target_args[0].query["y"][1], job.source[2].query["y"])
    assert len(few.target_args[0].query["y"]) == job_module.MOST_AIMED


def test_a_failed_solve_is_not_told_what_comes_next(module):
    status, printed, err = called("score", "--problem", "theirs:make", "--max-steps", "1", "--damping", "0.1")
    assert (status, "MAX_STEPS" in err) == (1, True), err
    assert printed.endswith("Wrote scores.parquet\n")


@pytest.mark.filterwarnings("always::metainfluence.response.DirectEffectWarning")
def test_warnings_are_lines_in_options(module):
    status, _, err = called("score", "--problem", "theirs:no_target", "--damping", "1")
    told = [line for line in err.splitlines() if line.startswith("WARNING: ")]
    assert (status, len(told)) == (0, 1), err
    assert "total_effect of metainfluence.scoring.score, in Python" in told[0]
    assert ".py" not in err


def test_an_error_can_be_traced(module):
    with pytest.raises(TypeError, match="got int"):
        cli.entry(["score", "--problem", "theirs:number", "--traceback"])


def table_about(path, meta_params):
    """A score file of one task, about these meta-parameters."""
    zero = np.zeros(1)
    info = mi.SolveInfo(np.int32(0), np.int32(1), np.float64(0), np.float64(1))
    tasks = mi.Task({"x": np.zeros((1, 1))}, {"x": np.zeros((1, 1))}, None, None)
    scores = mi.Scores(zero, zero[None], zero[None], info)
    path.parent.mkdir(exist_ok=True)
    mi.scoring.write_scores(
        path,
        scores,
        mi.stack_tasks([tasks]),
        metadata={"run": {"meta_params": of_arrays(meta_params)}},
    )


def test_evaluate_takes_the_scores_beside_the_edited_and_refuses_others(module):
    made = runs.load(None, "theirs:make")
    here, beside = module / "scores.parquet", module / "new" / "scores.parquet"
    edited = module / "new" / "edited.npz"
    parameters.save(edited, made.meta_params)
    args = ("evaluate", "--problem", "theirs:make", "--edited", edited)
    table_about(here, made.meta_params)
    assert "Scores: none beside" in done(*args)
    table_about(beside, made.meta_params)
    assert f"Scores: {beside}\n" in done(*args)
    table_about(beside, made.meta_params + 1)
    assert f"Scores: left out {beside}, which is about other meta-parameters" in done(*args)
    status, _, err = called(*args, "--scores", beside)
    assert status == 1
    assert "which is about others" in err


def test_the_edit_names_the_scores_for_evaluate_and_its_error_budget(folder, printed):
    edited, scores = folder / "edited.npz", folder / "scores.parquet"
    assert f"next: metainfluence evaluate {folder} --edited {edited} --scores {scores}" in printed["edit"]
    assert f"Scores: {scores}" in printed["evaluate"]
    assert "Error budget (distance from stationarity relative to ‖λ‖): " in printed["edit"]


def test_the_edit_tells_whether_it_came_closer(folder, job, scores, printed):
    change = json.loads((folder / "edited.json").read_text())
    tasks = job.stacked()
    weights = mi.drop(mi.unit_weights(tasks), tasks=np.asarray([int(k) for k in change["removed"]]))
    slope = jax.jit(jax.grad(mi.total_objective(job.problem)))
    for name, each in {"with all data": mi.unit_weights(tasks), "before": weights}.items():
        norm = float(optax.tree.norm(slope(job.meta_params, tasks, each)))
        assert change[f"gradient norm {name}"] == pytest.approx(norm, rel=1e-6)
    assert edit.RAISED not in printed["edit"]


def test_an_edit_that_goes_too_far_is_told(module, monkeypatch):
    args = ("edit", "--problem", "theirs:make", "--remove", "task 1", "--damping", "30")
    assert edit.RAISED not in done(*args)

    make = mi.edit

    def far(problem, **options):
        def run(meta_params, tasks, weights):
            found = make(problem, **options)(meta_params, tasks, weights)
            return found._replace(info=found.info._replace(outer_gradient_norm=jax.numpy.full(1, 250.0)))

        return run

    monkeypatch.setattr(mi, "edit", far)
    text = done(*args)
    assert edit.RAISED in text
    assert "and 2.5e+02 after" in text


def test_the_budget_is_not_printed_twice(monkeypatch):
    info = mi.SolveInfo(np.int32(1), np.int32(3), np.float64(0.1), np.float64(1), outer_gradient_norm=np.float64(1))
    with pytest.raises(mi.SolveError, match="MAX_STEPS") as caught:
        printing.check_solve(info, printing.OF_SCORE)
    assert "Error budget" not in str(caught.value)


def test_float32_is_asked_for_what_it_can_reach(module):
    job = runs.load(None, "theirs:single")
    assert tolerance(job.meta_params) == 1e-4
    assert tolerance(runs.load(None, "theirs:make").meta_params) == 1e-6
    asked = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mi.solvers, "cg", lambda **options: asked.append(options))
        score.solver(score.ScoreConfig(), job)
        score.solver(score.ScoreConfig(tol=1e-3), job)
    assert [options["tol"] for options in asked] == [1e-4, 1e-3]


def test_auto_solves_as_the_library_does(module):
    text = done("score", "--problem", "theirs:make", "--solver", "auto", "--out", "a.parquet", "--damping", "0.1")
    assert "CONVERGED" in text
    job = runs.load(None, "theirs:make")
    expected = mi.influence_scores(job.problem, mi.query_loss(job.problem), damping=0.1)
    expected = jax.jit(expected)(job.meta_params, job.stacked(), *job.target_args)
    found = mi.read_scores("a.parquet")
    np.testing.assert_allclose(found.score[found.role == "task"], expected.task, rtol=1e-8, atol=1e-12)


def test_pickles_are_not_read(tmp_path, job):
    np.savez(tmp_path / "a.npz", meta_params=np.array([{}], object))
    with pytest.raises(ValueError, match="without pickles"):
        parameters.load(tmp_path / "a.npz", np.zeros(1))
    (tmp_path / "b.npz").write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="without pickles"):
        parameters.load(tmp_path / "b.npz", np.zeros(1))


@pytest.mark.parametrize("other", [np.zeros(3), np.zeros(2, np.float32), {"a": np.zeros(2)}])
def test_other_meta_parameters_are_refused(other, tmp_path):
    parameters.save(tmp_path / "a.npz", other)
    with pytest.raises(ValueError, match="expected"):
        parameters.load(tmp_path / "a.npz", np.zeros(2))


def process(module, *args, **environment):
    """The command line in a process of its own, which takes Ctrl-C even where the tests were started not to."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from metainfluence.__main__ import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=module,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_leaves_a_run_that_goes_on(module, monkeypatch):
    args = ["score", "--problem", "theirs:make", "--damping", "0.1", "--batch-size", "2", "--out", "scores.parquet"]
    running = process(module, *args, DELAY="0.1")
    left = module / "scores.parquet.run"
    while running.poll() is None and not list(left.glob("gradient-*.npz")):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert f"go on with: metainfluence {' '.join(args)}" in err
    assert "Traceback" not in err
    # Both streams are pipes.
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    assert not (module / "scores.parquet").exists()
    assert list(left.glob("gradient-*.npz"))

    with monkeypatch.context() as patched:
        # The pass that is kept is not done again.
        patched.delattr(Passes, "slope")
        resumed = done(*args)
    done(*args[:-1], "whole.parquet")
    assert "Wrote scores.parquet" in resumed
    found, expected = (mi.read_scores(module / name) for name in ("scores.parquet", "whole.parquet"))
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-6, atol=1e-12)
    assert found.task[0] == "task 0"

    # And on with the user's problem, in the current directory.
    harmful = np.flatnonzero((expected.role == "query") & (expected.score < 0))
    assert len(harmful) > 0
    text = done("edit", "scores.parquet", "--problem", "theirs:make", "--role", "query", "--harm-above", "0")
    assert f"Removed {len(harmful)} (query)" in text
    text = done("evaluate", "--problem", "theirs:make")
    assert "query loss" in text
    assert "names no damaged data" in text
    assert "without pictures" in done("report", "scores.parquet", "--problem", "theirs:make")


def test_what_the_budget_says_is_not_said_again():
    """As a warning, which is an error here; that a target has no gradient stands in the line before."""
    info = mi.SolveInfo(*map(np.asarray, (0, 1, 0.0, 1.0, 0.0, 0.0, 0.0)))
    scores = mi.Scores(np.zeros(2), np.zeros((2, 3)), np.zeros((2, 3)), info)
    assert "gradient is exactly 0" in mi.error_budget(scores).advice
    printing.check_solve(scores, printing.OF_SCORE)


def test_half_precision_is_taken_to_float32(module):
    done("score", "--problem", "theirs:half", "--damping", "0.1")
    done("score", "--problem", "theirs:single", "--damping", "0.1", "--out", "single.parquet")
    half, single = (mi.read_scores(module / name).score for name in ("scores.parquet", "single.parquet"))
    # bfloat16 has eight bits.
    np.testing.assert_allclose(half, single, atol=0.1 * np.abs(single).max())
    assert np.any(half != single)
    edited = done("edit", "--problem", "theirs:half", "--remove", "1", "--damping", "0.1")
    assert "Removed 1 (task): 1" in edited
    assert parameters.load(module / "edited.npz", np.ones((3, 2), np.float32)).dtype == np.float32
    assert "query loss" in done("evaluate", "--problem", "theirs:half")


def test_a_target_of_its_own_needs_no_arguments(module):
    done("score", "--problem", "theirs:own_target", "--damping", "0.1")
    assert np.any(mi.read_scores(module / "scores.parquet").score)


@pytest.mark.parametrize(("mark", "encoding"), [(b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le")])
def test_byte_order_marks(mark, encoding, tmp_path):
    path = tmp_path / "train.toml"
    path.write_bytes(mark + "seed = 7\n".encode(encoding))
    status, out, err = called("train", "--config", path, "--dry-run")
    if encoding == "utf-8":
        assert (status, "seed = 7\n" in out) == (0, True), err
    else:
        assert status == 2
        assert "expected TOML in UTF-8" in err


@pytest.fixture
def pictures(tmp_path):
    """A folder of images as a user has them: two splits of three classes, of six images each."""
    rng = np.random.default_rng(0)
    for split, names in (("train", "ant bee cat"), ("test", "dog elk fox gnu hen ibis")):
        for name in names.split():
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for k in range(6):
                pixels = rng.integers(0, 255, size=(8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / split / name / f"{k}.png")
    return tmp_path / "pictures"


def test_any_folder_of_images_can_be_trained_on(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["train", *TRAIN, "--training.num-steps", "1", "--out", "run", "--data.dataset", "pictures"]
    status, _, err = called(*given)
    assert (status, "size: expected the height and width" in err) == (1, True)
    assert "on 12 tasks of" in done(*given, "--data.size", "4")
    monkeypatch.chdir(pictures)
    read = runs.job_of(tmp_path / "run")
    assert read.source[0].query.images.shape == (12, 4, 4, 3)
    status, _, err = called("train", *TRAIN, "--out", "run", "--data.dataset", "./nowhere", "--data.size", "4")
    assert (status, "nowhere: expected a folder laid out as split/class/image.jpg" in err) == (1, True)
    status, _, err = called("train", *TRAIN, "--out", "run", "--data.dataset", "train", "--data.size", "4")
    assert status == 1
    assert not (pictures / "run").exists()


@pytest.mark.parametrize(("split", "name"), [("train", "bee"), ("test", "elk")])
def test_a_class_with_too_few_images_is_named_by_its_folder(split, name, pictures, tmp_path):
    (pictures / split / name / "0.png").unlink()
    given = ["train", *TRAIN, "--out", tmp_path / "run", "--data.dataset", pictures, "--data.size", "4"]
    status, _, err = called(*given)
    assert status == 1
    assert f"shots + queries: expected at most 5, the examples of class '{name}', got 6" in err


def test_a_folder_without_a_split_names_those_that_there_are(pictures, tmp_path):
    (pictures / "test").rename(pictures / "tests")
    given = ["train", *TRAIN, "--out", tmp_path / "run", "--data.dataset", pictures, "--data.size", "4"]
    status, _, err = called(*given)
    assert status == 1
    assert "split: expected one of tests, train of pictures, got 'test'" in err
