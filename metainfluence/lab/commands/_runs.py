"""Folders that `metainfluence train` writes: the configuration, checkpoints, and the trained meta-parameters."""

import dataclasses
import itertools
import shlex
from pathlib import Path
from typing import Any

import jax
import tyro

import metainfluence as mi
from metainfluence.lab.commands import _parameters as parameters
from metainfluence.lab.commands.config_files import as_arguments, check_ranges, load_toml
from metainfluence.lab.commands.job import Job, of_function
from metainfluence.lab.data import datasets, fewshot
from metainfluence.lab.data.sources import FewShotSource
from metainfluence.lab.experiments import setting, trainings
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, OutFolder, Size, Ways
from metainfluence.lab.experiments.setting import Lists
from metainfluence.lab.experiments.trainings import optimizer_of, schedule_of
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.learners import Learner
from metainfluence.scoring import ids_of

CONFIG, CHECKPOINTS, TRAINED, STATES = "train.toml", "checkpoints", "trained.npz", "states"
BLOCK = 25
MOST_STATES = 5


@dataclasses.dataclass(frozen=True)
class ImageConfig(setting.DataConfig):
    """Tasks of one image dataset."""

    dataset: str = "digits"
    """digits, which come with scikit-learn; mnist, omniglot, cifar_fs, fc100 or mini_imagenet, prepared beforehand; or
    a folder laid out as split/class/image.jpg, with splits train and test and optionally val, for which size is
    required."""
    ways: Ways = 5
    """Classes per task."""


@dataclasses.dataclass(frozen=True)
class StepsConfig(trainings.StepsConfig):
    """Meta-training by Adam, with a learning rate that falls to 0 along a cosine."""

    save_every: Count = 25
    """Steps between two checkpoints, a multiple of 25."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Meta-train a learner on few-shot tasks, some damaged on purpose; the other commands read its folder."""

    data: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    """Tasks."""
    harm: setting.HarmConfig = dataclasses.field(default_factory=setting.HarmConfig)
    """Damage."""
    learner: setting.LearnerConfig = dataclasses.field(default_factory=setting.LearnerConfig)
    """Learner."""
    training: StepsConfig = dataclasses.field(default_factory=StepsConfig)
    """Training."""
    float64: bool = True
    """Compute in float64."""
    seed: Size = 0
    """Seed of the tasks, the damage and the initial parameters."""
    out: OutFolder = Path("train-output")
    """Folder to write to."""


def read(folder: Path) -> TrainConfig:
    """The configuration of a folder that `train` wrote.

    Raises:
      FileNotFoundError: there is no such folder.
      ConfigError: the file makes no sense.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected a folder that `metainfluence train` wrote, got none with {CONFIG}")
    arguments = as_arguments(load_toml(path), TrainConfig, path)
    found = dataclasses.replace(tyro.cli(TrainConfig, prog=str(path), args=arguments), out=folder)
    try:
        # The file was written before and is only read now.
        check_ranges(found, places=False)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration with the full path of a dataset's folder, so that the run can be read from anywhere."""
    if not datasets.is_folder(config.data.dataset):
        return config
    whole = str(Path(config.data.dataset).resolve())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=whole))


def lists(config: TrainConfig) -> Lists:
    """Samples the tasks, and damages some of the training tasks."""
    return setting.image_lists(config.data, config.harm, config.seed)


def run_of(config: TrainConfig, problem: mi.Bilevel) -> Any:
    """The training in the form that `metainfluence.trajectory` differentiates."""
    return trainings.run_of(config.training, problem, config.seed)


def kept_steps(num_steps: int) -> list[int]:
    """The steps after which the states are kept, for segments: ends of blocks, spaced as evenly as these allow."""
    ends = list(itertools.accumulate([BLOCK] * (num_steps // BLOCK) + [num_steps % BLOCK] * (num_steps % BLOCK > 0)))
    count = min(MOST_STATES, len(ends))
    return sorted({ends[-(-len(ends) * k // count) - 1] for k in range(1, count + 1)})


def state_path(folder: Path, step: int) -> Path:
    """Where the state after a step is kept."""
    return folder / STATES / f"step-{step:06d}.npz"


def checkpoints_of(folder: Path, config: TrainConfig, initial: Any) -> tuple[mi.Checkpoint, ...] | None:
    """The run's checkpoints, for `metainfluence.segments`; None if any is missing.

    Raises:
      ValueError: files that make no sense.
    """
    steps = config.training
    kept = kept_steps(steps.num_steps)
    if not all(state_path(folder, step).exists() for step in kept):
        return None
    like = (initial, optimizer_of(steps).init(initial))
    states = [parameters.load(state_path(folder, step), like) for step in kept]
    return mi.checkpoints(
        states,
        steps=kept,
        learning_rate=schedule_of(steps),
        second_moments=True,
        eps_root=steps.eps_root,
        place="middle",
    )


def learner(config: TrainConfig, listed: Lists) -> tuple[Learner, Any]:
    """The learner and its initial meta-parameters."""
    first = fewshot.materialize(fewshot.take(listed.training, 0), listed.dataset.images)
    made = setting.make_learner(config.learner, first, config.data)
    return made, made.init(jax.random.key(config.seed), first.support.images[0])


def job_of(folder: Path) -> Job:
    """The job that the commands after `train` work on.

    Raises:
      FileNotFoundError: no such folder, or training has not finished.
      ValueError: files that make no sense.
    """
    config = read(folder)
    if not (folder / TRAINED).exists():
        raise FileNotFoundError(
            f"{folder}: expected {TRAINED}, got a run that has not finished; "
            "go on with: "
            + shlex.join(["metainfluence", "train", "--config", str(folder / CONFIG), "--out", str(folder)])
        )
    jax.config.update("jax_enable_x64", config.float64)
    listed = lists(config)
    made, initial = learner(config, listed)
    exact = dataclasses.replace(config, learner=dataclasses.replace(config.learner, compute_dtype=None))
    return Job(
        problem=made.problem,
        meta_params=parameters.load(folder / TRAINED, initial),
        source=FewShotSource(listed.training, listed.dataset.images, listed.dataset.class_names),
        target_args=(fewshot.materialize(listed.held_out, listed.dataset.images),),
        test=FewShotSource(listed.test, listed.dataset.images),
        metric=learners.accuracy(made.problem),
        metric_name="accuracy",
        images=lambda side: side.images,
        run=run_of(config, made.problem),
        start=initial,
        checkpoints=checkpoints_of(folder, config, initial),
        full=None if config.learner.compute_dtype is None else learner(exact, listed)[0].problem,
    )


def load(run: Path | None, problem: str | None) -> Job:
    """The job from a folder that `train` wrote, or from a user's function.

    Raises:
      ConfigError: neither or both are given, or the function cannot be found.
      TypeError: the function returns something else.
      ValueError: an invalid source, see `scoring.Source`.
    """
    if (run is None) == (problem is None):
        raise ConfigError(
            "expected one of --run FOLDER, written by `metainfluence train`, and --problem MODULE:FUNCTION"
        )
    if run is not None and ":" in str(run) and not run.exists():
        raise ConfigError(f"--run: expected a folder, got {str(run)!r}; did you mean --problem {run}?")
    job = job_of(run) if run is not None else of_function(str(problem))
    ids_of(job.source)
    return job
