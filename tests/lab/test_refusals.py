"""What is refused leaves nothing behind, so that the corrected command runs; and names the option that was wrong."""

import dataclasses
import importlib
from typing import get_args, get_type_hints

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from lab.calls import TRAIN, called, done
from metainfluence.lab.commands import _runs as runs
from metainfluence.lab.commands import cli, reproduce
from metainfluence.lab.experiments import ranges
from metainfluence.lab.experiments.demo import DemoConfig, make_data
from metainfluence.lab.experiments.kept import Kept
from metainfluence.lab.experiments.setting import DataConfig, LearnerConfig, SettingConfig, make
from metainfluence.lab.experiments.trainings import TrainingConfig
from metainfluence.lab.learn.train import TrainingError, meta_train


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--harm.flipped", "1.5", "--harm.flipped: expected a number from 0 to 1, got 1.5"),
        ("--harm.flipped", "-0.1", "--harm.flipped: expected a number from 0 to 1, got -0.1"),
        ("--harm.query-examples", "nan", "--harm.query-examples: expected a number from 0 to 1, got nan"),
        ("--seed", "-1", "--seed: expected a number of at least 0, got -1"),
        ("--learner.head-l2", "-1", "--learner.head-l2: expected a number above 0, got -1.0"),
        ("--learner.meta-l2", "inf", "--learner.meta-l2: expected a number of at least 0, got inf"),
        ("--learner.inner-steps", "0", "--learner.inner-steps: expected a positive number, got 0"),
        ("--training.learning-rate", "0", "--training.learning-rate: expected a number above 0, got 0.0"),
        ("--training.tasks-per-step", "0", "--training.tasks-per-step: expected a positive number, got 0"),
        ("--data.ways", "1", "--data.ways: expected a number of at least 2, got 1"),
    ],
)
def test_numbers_out_of_range_are_named(option, value, expected, tmp_path):
    status, _, err = called("train", *TRAIN, option, value, "--out", tmp_path / "run")
    assert status == 2
    assert expected in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ("--harm.flipped", "0.7", "--harm.shortcut", "0.7"),
        ("--training.tasks-per-step", "13"),
        ("--training.save-every", "7"),
        ("--data.dataset", "nonsense"),
        ("--data.queries", "1000"),
        ("--learner.kind", "nonsense"),
        ("--learner.activation", "nonsense"),
        ("--learner.model", "conv4", "--learner.pooling", "nonsense"),
    ],
)
def test_a_refused_training_leaves_nothing(wrong, tmp_path):
    status, _, err = called("train", *TRAIN, *wrong, "--out", tmp_path / "new" / "run")
    assert status in (1, 2), err
    assert not list(tmp_path.iterdir())
    # The option is named where one alone is wrong.
    if len(wrong) == 2 and wrong[0] != "--data.queries":
        assert f"metainfluence train: {wrong[0]}: expected " in err


def test_what_other_commands_refuse_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (
        ("demo", "--num-flipped", "300"),
        ("demo", "--ways", "11"),
        ("bench", "--repeats", "0"),
        ("evaluate", "nowhere", "--batch-size", "0"),
        ("score", "nowhere", "--damping", "-1"),
        ("edit", "nowhere.parquet", "--most-harmful", "0"),
        ("edit", "nowhere.parquet", "--harm-above", "nan"),
        ("report", "nowhere.parquet", "--most", "1"),
    ):
        status, _, err = called(*args)
        assert status in (1, 2), (args, err)
        assert args[-2] in err or "expected" in err
        assert not list(tmp_path.iterdir()), args


def test_a_folder_of_another_configuration_names_the_remedy(tmp_path):
    out = tmp_path / "run"
    done("train", *TRAIN, "--training.num-steps", "1", "--out", out)
    status, _, err = called("train", *TRAIN, "--training.num-steps", "2", "--out", out)
    assert status == 1
    assert "training.num_steps: 1 there, 2 here; name another --out, or remove that folder" in err


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "reproduce"])
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    module, _ = cli.parse(command, [])
    monkeypatch.setattr(module, "run", lambda _: pytest.fail("it has begun"))
    file_wanted = command in ("score", "evaluate", "report")
    for out in ("folder" if file_wanted else "file", "file/below"):
        status, _, err = called(command, "--out", out)
        assert status == 2
        assert f"metainfluence {command}: --out: expected a {'file' if file_wanted else 'folder'} to write" in err
        assert out in err
    monkeypatch.setattr("os.access", lambda *args: False)
    status, _, err = called(command, "--out", "new")
    assert (status, "new: no permission" in err) == (2, True)


def numbers_of(config, prefix=""):
    """The options of a configuration that hold numbers or say where to write, with what they are annotated with."""
    plain, annotated = get_type_hints(config), get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        kind = plain[field.name]
        if dataclasses.is_dataclass(kind):
            yield from numbers_of(kind, f"{prefix}{field.name}.")
        elif {int, float} & {kind, *get_args(kind)} or field.name == "out":
            yield prefix + field.name, ranges.allowed_by(annotated[field.name])


def test_every_number_has_a_range_and_every_place_is_checked():
    suites = [suite for command in cli.COMMANDS.values() for suite in command.suites.values()]
    seen = []
    for module, kind in (*suites, *reproduce.EXPERIMENTS.values()):
        for option, allowed in numbers_of(getattr(importlib.import_module(module), kind)):
            assert allowed, (kind, option)
            seen.append(option)
    assert {"learner.head_l2", "harm_above", "curve", "out", "budget", "seed"} <= set(seen)


def test_a_training_that_ends_in_nan_fails_and_frees_its_folder(tmp_path):
    out = tmp_path / "new" / "run"
    status, printed, err = called("train", *TRAIN, "--training.learning-rate", "1e300", "--out", out)
    assert status == 1
    assert "at step 2" in err
    assert "the learning rate is too large" in err
    assert "lower --training.learning-rate 1e+300" in err
    assert "next:" not in printed
    assert not out.exists()
    assert not (tmp_path / "new").exists()
    assert "next: metainfluence score" in done("train", *TRAIN, "--training.num-steps", "1", "--out", out)
    assert (out / runs.TRAINED).exists()


@pytest.mark.parametrize(("start", "step"), [(0.0, 5), (3.0, 2), (5.0, 1)])
def test_where_training_stops_being_finite_is_told(start, step, tmp_path):
    def loss(meta_params, task, weights):
        # λ grows by 1 a step.
        return jnp.where(meta_params > 3.5, jnp.nan, -meta_params) * jnp.sum(task.query)

    problem = mi.from_task_loss(loss)
    tasks = mi.Task(jnp.ones((2, 1)), jnp.ones((2, 1)), None, None)
    train = meta_train(problem, optax.sgd(1.0), 6, block_size=2, save_every=2, checkpoints=tmp_path)
    with pytest.raises(TrainingError, match=f"F is nan at step {step}[,;]") as caught:
        train(jnp.asarray(start), tasks)
    assert ("nothing has been trained yet" in str(caught.value)) == (step == 1)
    # Where nothing has been trained, no rate is the cause.
    assert ("lower --rate 0.5" in str(caught.value.by("--rate", 0.5))) == (step > 1)
    # What was right before is kept, and nothing of what was not.
    assert {int(path.name) for path in tmp_path.iterdir()} == {before for before in (2, 4) if before < step}


def test_a_training_that_breaks_off_with_nothing_kept_frees_its_folder(tmp_path, monkeypatch):
    def broken(*args, **options):
        def train(*_):
            raise MemoryError("too large")

        return train

    with monkeypatch.context() as patched:
        patched.setattr("metainfluence.lab.commands.train.meta_train", broken)
        status, _, err = called("train", *TRAIN, "--out", tmp_path / "new" / "run")
    assert (status, "too large" in err) == (1, True)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_parts_of_something_else_is_left_alone(tmp_path):
    theirs = tmp_path / "checkpoints" / "theirs"
    theirs.parent.mkdir()
    theirs.touch()
    status, _, err = called("train", *TRAIN, "--out", tmp_path)
    assert (status, "which has checkpoints without it; name another --out" in err) == (1, True)
    assert list(tmp_path.rglob("*")) == [theirs.parent, theirs]


def test_the_demo_names_its_option_for_a_rate_that_is_too_large(tmp_path):
    few = ("--num-tasks", "4", "--num-held-out", "2", "--num-flipped", "1", "--num-shortcut", "1", "--ways", "2")
    small = ("--shots", "1", "--queries", "2", "--widths", "3", "--num-steps", "3", "--learning-rate", "1e300")
    status, printed, err = called("demo", *few, *small, "--out", tmp_path / "new")
    assert (status, "; lower --learning-rate 1e+300" in err) == (1, True)
    assert "Wrote" not in printed
    assert not (tmp_path / "new").exists()


def test_an_experiment_refuses_a_training_that_ends_in_nan(tmp_path):
    setting = SettingConfig(
        data=DataConfig(num_tasks=4, num_held_out=2, num_test=2, ways=2, shots=1, queries=2),
        learner=LearnerConfig(kind="protonet", widths=(3,)),
        training=TrainingConfig(learning_rate=1e300, num_steps=4, num_checkpoints=2),
    )
    told = r"not finite after step \d of 4: .*; lower --setting\.training\.learning-rate 1e\+300"
    with pytest.raises(TrainingError, match=told):
        make(setting, Kept(tmp_path / "new"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError])
def test_an_experiment_that_fails_with_nothing_kept_leaves_nothing(error, tmp_path, monkeypatch):
    def run(config, cache=None):
        raise error("broken")

    config = tmp_path / "tiny.toml"
    config.write_text('experiment = "agreement"\n[small]\n')
    run.__module__ = "metainfluence.lab.experiments.agreement"
    monkeypatch.setattr(f"{run.__module__}.run", run)
    status, _, err = called("reproduce", "--config", config, "--out", tmp_path / "new" / "out")
    assert (status, "broken" in err) == (1, True)
    assert list(tmp_path.iterdir()) == [config]
    status, _, err = called("reproduce", "--config", config, "--out", config)
    assert (status, "--out: expected a folder to write" in err) == (2, True)


def test_the_demo_names_more_harm_than_tasks():
    with pytest.raises(ValueError, match=r"num_flipped \+ num_shortcut: expected at most num_tasks 5, got 40"):
        make_data(DemoConfig(num_tasks=5))


@dataclasses.dataclass(frozen=True)
class Part:
    rate: ranges.Positive = 1.0


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part = dataclasses.field(default_factory=Part)
    sizes: tuple[ranges.Count, ...] = (1, 2)
    most: ranges.Count | None = None
    damping: ranges.NotNegative | str = "auto"


def test_ranges_are_found_in_every_kind_of_field():
    ranges.check(Whole())
    ranges.check(Whole(most=3, damping=0.0))
    for wrong, name in (
        ({"part": Part(rate=0.0)}, "--part.rate"),
        ({"sizes": (1, 0)}, "--sizes"),
        ({"most": 0}, "--most"),
        ({"damping": np.nan}, "--damping"),
    ):
        with pytest.raises(ranges.RangeError, match=name):
            ranges.check(Whole(**wrong))
