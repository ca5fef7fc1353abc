"""Folders that `metainfluence train` writes: the configuration, checkpoints, and the trained meta-parameters."""

import dataclasses
import itertools
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import tyro

import metainfluence as mi
from metainfluence.lab.commands import _parameters as parameters
from metainfluence.lab.commands.config_files import as_arguments, check_ranges, load_toml
from metainfluence.lab.commands.job import Job, of_function
from metainfluence.lab.data import datasets, fewshot
from metainfluence.lab.data.sources import FewShotSource
from metainfluence.lab.experiments import setting
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, NotNegative, Positive, Size, Ways
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
    """digits, which come with scikit-learn; or mnist, omniglot, cifar_fs, fc100, mini_imagenet, prepared beforehand; or
    a folder laid out as split/class/image.jpg, with the splits train and test and maybe val, which needs a size."""
    ways: Ways = 5
    """Classes per task."""


@dataclasses.dataclass(frozen=True)
class StepsConfig:
    """Meta-training by Adam, its learning rate falling to 0 along a cosine."""

    learning_rate: Positive = 0.05
    """At its height, which without a warm-up is the first step."""
    warmup: Size = 0
    """Steps up to the height: with them the run answers the data more smoothly."""
    eps_root: NotNegative = 0.0
    """Under Adam's root, where optax has 0 by default; 1e-6 and more make the run smoother."""
    num_steps: Count = 200
    """Steps."""
    tasks_per_step: Count | None = None
    """Tasks in each step's batch; none for all."""
    save_every: Count = 25
    """Steps between two checkpoints, a multiple of 25."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Meta-train a learner on few-shot tasks, some damaged on purpose; the folder is what the other commands take."""

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
    """Of the tasks, the damage and the initial parameters."""
    out: Path = Path("train-output")
    """Folder to write."""


class Lists(NamedTuple):
    """Tasks by their ids: those trained on, some damaged; the target's; and those of the test."""

    dataset: datasets.Dataset
    training: fewshot.FewShotTasks
    held_out: fewshot.FewShotTasks
    test: fewshot.FewShotTasks


def read(folder: Path) -> TrainConfig:
    """The configuration of a folder that `train` wrote.

    Raises:
      FileNotFoundError: it wrote none there.
      ConfigError: the file makes no sense.
    """
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: expected a folder that `metainfluence train` wrote, got none with {CONFIG}")
    arguments = as_arguments(load_toml(path), TrainConfig, path)
    found = dataclasses.replace(tyro.cli(TrainConfig, prog=str(path), args=arguments), out=folder)
    try:
        check_ranges(found)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration with a dataset's folder named in full, so that the run can be read from anywhere."""
    if not datasets.is_folder(config.data.dataset):
        return config
    whole = str(Path(config.data.dataset).resolve())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=whole))


def lists(config: TrainConfig) -> Lists:
    """Samples the tasks, and damages some of those that are trained on."""
    data, harm, seed = config.data, config.harm, config.seed
    dataset = datasets.load(data.dataset, size=data.size)
    names = dataset.class_names
    shape: dict[str, Any] = {"ways": data.ways, "shots": data.shots, "queries": data.queries}
    training = fewshot.sample(dataset, "train", num_tasks=data.num_tasks, seed=seed, **shape)
    held_out_pool, test_pool = setting.clean_pools(dataset, data.ways)
    held_out = fewshot.sample_tasks(
        dataset.labels, num_tasks=data.num_held_out, seed=seed + 1, pool=held_out_pool, class_names=names, **shape
    )
    test = fewshot.sample_tasks(
        dataset.labels, num_tasks=data.num_test, seed=seed + 2, pool=test_pool, class_names=names, **shape
    )
    chosen = setting.harmful(harm, data.num_tasks, seed)
    training = fewshot.flip_labels(training, chosen["flipped"], share=harm.flip_share, seed=seed)
    training = fewshot.add_shortcut(training, chosen["shortcut"])
    training = fewshot.add_noise(training, chosen["noise"], seed=seed)
    for side, share in (("query", harm.query_examples), ("support", harm.support_examples)):
        if share:
            training = fewshot.flip_examples(training, share=share, seed=seed, side=side)
    return Lists(dataset, training, held_out, test)


def schedule_of(steps: StepsConfig) -> optax.Schedule:
    """The learning rate of each step."""
    if steps.warmup:
        return optax.warmup_cosine_decay_schedule(
            steps.learning_rate / steps.warmup, steps.learning_rate, steps.warmup, steps.num_steps
        )
    return optax.cosine_decay_schedule(steps.learning_rate, steps.num_steps)


def optimizer_of(steps: StepsConfig) -> optax.GradientTransformation:
    """What is trained with.

    Raises:
      ConfigError: a warm-up of all steps.
    """
    if steps.warmup >= steps.num_steps:
        raise ConfigError(
            f"--training.warmup: expected fewer than --training.num-steps {steps.num_steps}, got {steps.warmup}"
        )
    return optax.adam(schedule_of(steps), eps_root=steps.eps_root)


def run_of(config: TrainConfig, problem: mi.Bilevel) -> Any:
    """The training as what `metainfluence.trajectory` differentiates."""
    steps = config.training
    return mi.training(
        problem, optimizer_of(steps), steps.num_steps, tasks_per_step=steps.tasks_per_step, seed=config.seed
    )


def kept_steps(num_steps: int) -> list[int]:
    """After which steps the states are kept, for segments: ends of blocks, as even as these allow."""
    ends = list(itertools.accumulate([BLOCK] * (num_steps // BLOCK) + [num_steps % BLOCK] * (num_steps % BLOCK > 0)))
    count = min(MOST_STATES, len(ends))
    return sorted({ends[-(-len(ends) * k // count) - 1] for k in range(1, count + 1)})


def state_path(folder: Path, step: int) -> Path:
    """Where the state after a step is kept."""
    return folder / STATES / f"step-{step:06d}.npz"


def checkpoints_of(folder: Path, config: TrainConfig, initial: Any) -> tuple[mi.Checkpoint, ...] | None:
    """The run's checkpoints, for `metainfluence.segments`; None where they are not there.

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
    """The learner and the meta-parameters that it starts from."""
    first = fewshot.materialize(fewshot.take(listed.training, 0), listed.dataset.images)
    made = setting.make_learner(config.learner, first, config.data)
    return made, made.init(jax.random.key(config.seed), first.support.images[0])


def job_of(folder: Path) -> Job:
    """What the commands after `train` work on.

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
    )


def load(run: Path | None, problem: str | None) -> Job:
    """The job of a folder that `train` wrote, or of a user's function.

    Raises:
      ConfigError: none or both are given, or the function cannot be found.
      TypeError: it returns something else.
      ValueError: a source that is none, see `scoring.Source`.
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
