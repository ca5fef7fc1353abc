"""Where an experiment starts: tasks with known damage, a learner, and its trained meta-parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.data import datasets, fewshot, sinusoid
from metainfluence.lab.experiments.ranges import Count, NotNegative, Positive, Share, Size
from metainfluence.lab.learn import learners, models
from metainfluence.lab.learn.learners import Learner
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import Trained, train_many

SINUSOID = "sinusoid"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Tasks of one dataset."""

    dataset: str = "digits"
    """A name in metainfluence.lab.data.datasets, or sinusoid for regression."""
    size: Count | None = None
    """Height and width of the images; none for the dataset's own."""
    ways: Count = 5
    """Classes per task; 1 for regression."""
    shots: Count = 5
    """Support examples per class; for regression, support examples."""
    queries: Count = 10
    """Query examples per class; for regression, query examples."""
    num_tasks: Count = 100
    """Meta-training tasks, the harmful ones included."""
    num_held_out: Count = 100
    """Clean tasks whose mean loss the scores are about."""
    num_test: Count = 200
    """Clean tasks on which accuracy is measured; no score sees them."""


@dataclasses.dataclass(frozen=True)
class HarmConfig:
    """Damage done on purpose; shares of tasks, or of the examples of all tasks."""

    flipped: Share = 0.0
    """Tasks with flipped query labels; for regression, with the sign of the query targets turned."""
    shortcut: Share = 0.0
    """Tasks with dimmed images whose label is painted into one pixel of the top row."""
    noise: Share = 0.0
    """Tasks whose images are noise."""
    flip_share: Share = 0.4
    """Of the labels of a task with flipped labels."""
    query_examples: Share = 0.0
    """Query examples of any task with flipped labels."""
    support_examples: Share = 0.0
    """Support examples of any task with flipped labels."""


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """A meta-learner of metainfluence.lab.learn.learners."""

    kind: str = "implicit_head"
    """One of implicit_head, anil, maml, first_order_maml, meta_sgd, imaml, r2d2, protonet."""
    model: str = "mlp"
    """Feature extractor: mlp or conv4."""
    widths: tuple[Count, ...] = (32, 16)
    """Layers of the mlp."""
    width: Count = 32
    """Channels of conv4."""
    pooling: str = "max"
    """Of conv4: max, average or stride."""
    normalization: str | None = None
    """Of conv4: layer, group, instance or none."""
    activation: str = "tanh"
    """Of either model: tanh, or relu, with which the total Hessian does not exist everywhere."""
    head_l2: Positive = 0.03
    """Penalty of implicit_head's head."""
    proximal: Positive = 1.0
    """Weight of imaml's proximal term."""
    inner_lr: Positive = 0.1
    """Of the unrolled learners' gradient steps."""
    inner_steps: Count = 5
    """The unrolled learners' gradient steps."""
    inner_tol: Positive = 1e-8
    """Relative gradient norm of inner minimisers, and relative residual of their derivative."""
    meta_l2: NotNegative = 1e-3
    """Penalty of the meta-parameters."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Meta-training by Adam on all tasks, its learning rate falling to 0 along a cosine."""

    learning_rate: Positive = 0.05
    """At the first step."""
    num_steps: Count = 200
    """Steps."""
    num_checkpoints: Count = 5
    """Evenly spaced, for TracIn; they divide num_steps."""


@dataclasses.dataclass(frozen=True)
class SettingConfig:
    """Data, damage, learner and training."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Tasks."""
    harm: HarmConfig = dataclasses.field(default_factory=HarmConfig)
    """Damage."""
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    """Learner."""
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    """Training."""
    float64: bool = True
    """Compute in float64."""
    seed: Size = 0
    """Of the tasks, the damage and the initial parameters."""


class Tasks(NamedTuple):
    """Three lists of tasks, and what was done to the first.

    Attributes:
      training: T tasks, some damaged.
      held_out: clean ones, on which the target is taken.
      test: clean ones, on which accuracy is measured.
      task_harm: [T] strings, `fewshot.CLEAN` or what was done.
      support_harm: bool [T, n_support], examples whose own label was flipped.
      query_harm: bool [T, n_query].
    """

    training: mi.Task
    held_out: mi.Task
    test: mi.Task
    task_harm: np.ndarray
    support_harm: np.ndarray
    query_harm: np.ndarray


class Run(NamedTuple):
    """Training of one model.

    Attributes:
      meta_params: λ at the end.
      checkpoints: λ along the way, every leaf [C, ...].
      losses: F before each step, [num_steps].
      seconds: without compiling.
    """

    meta_params: Any
    checkpoints: Any
    losses: np.ndarray
    seconds: float


class Setting(NamedTuple):
    """A learner trained on tasks with known damage.

    Attributes:
      config: what it was made from.
      tasks: the tasks.
      learner: the learner.
      initial: λ before training.
      full: the training on all tasks.
      fit: the pure function behind it, (weights, start, tasks) -> Trained.
      train: (weights, start) -> Run, compiled.
    """

    config: SettingConfig
    tasks: Tasks
    learner: Learner
    initial: Any
    full: Run
    fit: Callable[[mi.Weights, Any, mi.Task], Trained]
    train: Callable[[mi.Weights, Any], Run]

    @property
    def trained(self) -> Any:
        """λ after training on all tasks."""
        return self.full.meta_params

    @property
    def problem(self) -> mi.Bilevel:
        """The learner's problem."""
        return self.learner.problem


def make(config: SettingConfig) -> Setting:
    """Samples the tasks, damages some, and trains.

    Raises:
      ValueError: an unknown dataset, learner, model or split of the checkpoints; more damage than tasks.
      FileNotFoundError: the dataset is not there.
    """
    jax.config.update("jax_enable_x64", config.float64)
    tasks = sinusoid_tasks(config) if config.data.dataset == SINUSOID else image_tasks(config)
    learner = make_learner(config.learner, tasks.training, config.data)
    inputs = tasks.training.support[0][0]
    initial = learner.init(jax.random.key(config.seed), inputs)
    fit = fitting(config.training, learner.problem)
    train = timed(fit, tasks.training)
    full = train(mi.unit_weights(tasks.training), initial)
    return Setting(config, tasks, learner, initial, full, fit, train)


def fitting(config: TrainingConfig, problem: mi.Bilevel) -> Callable[[mi.Weights, Any, mi.Task], Trained]:
    """Makes the pure function (weights, start, tasks) -> Trained of one model.

    Raises:
      ValueError: a number of checkpoints that does not divide that of the steps.
    """
    if config.num_checkpoints < 1 or config.num_steps % config.num_checkpoints:
        raise ValueError(
            f"num_checkpoints: expected a divisor of num_steps {config.num_steps}, got {config.num_checkpoints}"
        )
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    many = train_many(problem, optimizer, config.num_steps, keep_every=config.num_steps // config.num_checkpoints)

    def fit(weights: mi.Weights, start: Any, tasks: mi.Task) -> Trained:
        stacked = jax.tree.map(lambda leaf: leaf[None], weights)
        return jax.tree.map(lambda leaf: leaf[0], many(start, tasks, stacked))

    return fit


def timed(fit: Callable[[mi.Weights, Any, mi.Task], Trained], tasks: mi.Task) -> Callable[..., Run]:
    """Makes (weights, start) -> Run of one model, compiled once."""
    program = Compiled(fit)

    def run(weights: mi.Weights, start: Any) -> Run:
        done = program(weights, start, tasks)
        return Run(done.meta_params, done.kept, np.asarray(done.losses), program.run_seconds)

    return run


def checkpoint_rates(config: TrainingConfig) -> jax.Array:
    """For TracIn: the learning rates summed over the steps that each checkpoint stands for, [C]."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    rates = jnp.stack([schedule(step) for step in range(config.num_steps)])
    return jnp.sum(rates.reshape(config.num_checkpoints, -1), axis=1)


def make_learner(config: LearnerConfig, tasks: mi.Task, data: DataConfig) -> Learner:
    """One of the learners, for tasks of this kind.

    Raises:
      ValueError: an unknown learner or model.
    """
    regression = data.dataset == SINUSOID
    ways = 1 if regression else data.ways
    inputs = tasks.support[0]
    if config.activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {config.activation!r}")
    activation = ACTIVATIONS[config.activation]
    if config.model == "mlp":
        features: Any = models.MLP(config.widths, image_ndim=inputs.ndim - 2, activation=activation)
    elif config.model == "conv4":
        features = models.Conv4(
            width=config.width, pooling=config.pooling, normalization=config.normalization, activation=activation
        )
    else:
        raise ValueError(f"model: expected mlp or conv4, got {config.model!r}")
    loss: dict[str, Any] = {"loss": models.squared_error} if regression else {}
    steps: dict[str, Any] = {"steps": config.inner_steps, "lr": config.inner_lr}
    meta_l2: dict[str, Any] = {"meta_l2": config.meta_l2}
    makers: dict[str, Callable[[], Learner]] = {
        "implicit_head": lambda: learners.implicit_head(
            features, ways, head_l2=config.head_l2, tol=config.inner_tol, **meta_l2
        ),
        "anil": lambda: learners.anil(features, ways, **steps, **meta_l2, **loss),
        "maml": lambda: learners.maml(features, ways, **steps, **meta_l2, **loss),
        "first_order_maml": lambda: learners.maml(features, ways, order=1, **steps, **meta_l2, **loss),
        "meta_sgd": lambda: learners.meta_sgd(features, ways, **steps, **meta_l2, **loss),
        "imaml": lambda: learners.imaml(
            features, ways, proximal=config.proximal, tol=config.inner_tol, **meta_l2, **loss
        ),
        "r2d2": lambda: learners.r2d2(features, ways, **meta_l2),
        "protonet": lambda: learners.protonet(features, ways, **meta_l2),
    }
    if config.kind not in makers:
        raise ValueError(f"kind: expected one of {', '.join(makers)}, got {config.kind!r}")
    return makers[config.kind]()


def harmful(config: HarmConfig, num_tasks: int, seed: int) -> dict[str, np.ndarray]:
    """Which tasks are damaged in which way, chosen at random, no task twice."""
    counts = {name: round(getattr(config, name) * num_tasks) for name in ("flipped", "shortcut", "noise")}
    total = sum(counts.values())
    if total > num_tasks:
        raise ValueError(f"harm: expected shares of tasks that sum to at most 1, got {total / num_tasks:g}")
    chosen = np.random.default_rng(seed).choice(num_tasks, size=total, replace=False)
    ends = np.cumsum(list(counts.values()))
    return dict(zip(counts, np.split(chosen, ends[:-1]), strict=True))


def image_tasks(config: SettingConfig) -> Tasks:
    """Tasks of an image dataset: trained on its split "train", scored and tested on images of the others."""
    data, harm, seed = config.data, config.harm, config.seed
    source = datasets.load(data.dataset, size=data.size)
    shape: dict[str, Any] = {"ways": data.ways, "shots": data.shots, "queries": data.queries}
    listed = fewshot.sample(source, "train", num_tasks=data.num_tasks, seed=seed, **shape)
    held_out_pool, test_pool = clean_pools(source, data.ways)
    held_out, test = (
        fewshot.sample_tasks(
            source.labels, num_tasks=count, seed=seed + offset, pool=pool, class_names=source.class_names, **shape
        )
        for offset, (count, pool) in enumerate(
            ((data.num_held_out, held_out_pool), (data.num_test, test_pool)), start=1
        )
    )
    chosen = harmful(harm, data.num_tasks, seed)
    listed = fewshot.flip_labels(listed, chosen["flipped"], share=harm.flip_share, seed=seed)
    listed = fewshot.add_shortcut(listed, chosen["shortcut"])
    listed = fewshot.add_noise(listed, chosen["noise"], seed=seed)
    task_harm = fewshot.harm(listed)
    if harm.query_examples:
        listed = fewshot.flip_examples(listed, share=harm.query_examples, seed=seed, side="query")
    if harm.support_examples:
        listed = fewshot.flip_examples(listed, share=harm.support_examples, seed=seed, side="support")
    training, clean, tested = (fewshot.materialize(tasks, source.images) for tasks in (listed, held_out, test))
    return Tasks(
        training,
        clean,
        tested,
        task_harm,
        listed.support_flipped,
        listed.query_flipped,
    )


def clean_pools(source: datasets.Dataset, ways: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples for the target and for the test, which share no class, or, of datasets with few classes, no example."""
    datasets.check_split(source, "test")
    test = source.pools["test"]
    if "val" in source.pools:
        return source.pools["val"], test
    labels = source.labels[test]
    classes = np.unique(labels)
    shared = np.isin(classes, source.labels[source.pools["train"]]).any()
    if shared:
        halves = datasets.by_example(labels)
        return test[halves["train"]], test[halves["test"]]
    # Neighbouring classes are alike (characters of one alphabet), so each half gets every other one.
    if len(classes) < 2 * ways:
        raise ValueError(f"ways: expected at most {len(classes) // 2}, half of the test classes, got {ways}")
    first = np.isin(labels, classes[::2])
    return test[first], test[~first]


def sinusoid_tasks(config: SettingConfig) -> Tasks:
    """Regression tasks, some with the sign of their query targets turned."""
    data, harm, seed = config.data, config.harm, config.seed
    for name in ("shortcut", "noise", "query_examples", "support_examples"):
        if getattr(harm, name):
            raise ValueError(f"{name}: expected 0, since {SINUSOID} knows no such damage, got {getattr(harm, name)}")
    lists = [
        sinusoid.sample_tasks(num_tasks=count, seed=seed + offset)
        for offset, count in enumerate((data.num_tasks, data.num_held_out, data.num_test))
    ]
    lists[0] = sinusoid.flip_sign(lists[0], harmful(harm, data.num_tasks, seed)["flipped"])
    task_harm = np.where(lists[0].wrong_sign, fewshot.FLIPPED, fewshot.CLEAN)
    training, held_out, test = (sinusoid.materialize(tasks, shots=data.shots, queries=data.queries) for tasks in lists)
    return Tasks(
        training,
        held_out,
        test,
        task_harm,
        np.zeros((data.num_tasks, data.shots), bool),
        np.zeros((data.num_tasks, data.queries), bool),
    )


def performance(setting: Setting) -> Callable[[Any], np.ndarray]:
    """Makes (meta_params) -> accuracy of each test task, [n]; for regression, minus the mean squared error."""
    problem, test = setting.problem, setting.tasks.test
    if setting.config.data.dataset == SINUSOID:
        losses = Compiled(jax.vmap(mi.task_loss(problem), in_axes=(None, 0)))
        return lambda meta_params: -2 * np.asarray(losses(meta_params, test))
    accuracy = Compiled(learners.accuracy(problem))
    return lambda meta_params: np.asarray(accuracy(meta_params, test))
