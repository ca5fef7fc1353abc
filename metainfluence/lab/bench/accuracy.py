"""Few-shot accuracy on Omniglot: prototypical networks on characters of alphabets that were never trained on."""

import dataclasses
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from metainfluence.lab.data import datasets, fewshot
from metainfluence.lab.experiments.ranges import Count, Positive, Size, Ways
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.models import Conv4
from metainfluence.lab.learn.train import meta_train


@dataclasses.dataclass(frozen=True)
class OmniglotAccuracyConfig:
    """Train prototypical networks on Omniglot's small1 and test them on the alphabets of small2 that it lacks."""

    ways: Ways = 5
    """Classes per test task."""
    shots: Count = 1
    """Support examples per class, in training and in tests."""
    queries: Count = 5
    """Query examples per class."""
    train_ways: Ways = 20
    """Classes per training task; harder tasks than the test's teach more (Snell et al., 2017)."""
    num_tasks: Count = 6000
    """Training tasks, over which the steps go again and again."""
    num_test_tasks: Count = 600
    """Test tasks."""
    width: Count = 32
    """Channels of the Conv4."""
    normalization: str | None = None
    """Of its layers; see Conv4."""
    pooling: str = "max"
    """Of its layers; see Conv4."""
    rotations: bool = True
    """Whether training characters turned by 90°, 180° and 270° are further classes."""
    distortions: Size = 9
    """Distorted copies of every training image, as further examples of its class."""
    tasks_per_step: Count = 1
    """Training tasks per step."""
    num_steps: Count = 6000
    """Training steps."""
    learning_rate: Positive = 3e-3
    """Adam's, falling to 0 along a cosine."""
    seed: Size = 0
    """Of the tasks, their order and the initial parameters."""
    out: Path = Path("omniglot-accuracy-output")
    """Folder for accuracy.json."""


def run(config: OmniglotAccuracyConfig) -> dict[str, float]:
    """Train, test, print, and write the accuracies.

    Returns:
      accuracy and half_width of its 95 % interval over the test tasks, both in [0, 1]; untrained, the accuracy before
      training; train_seconds.

    Raises:
      FileNotFoundError: Omniglot is not prepared.
    """
    console = Console(highlight=False)
    dataset = datasets.load("omniglot")
    source = datasets.with_rotations(dataset) if config.rotations else dataset
    if config.distortions:
        source = datasets.with_distortions(source, copies=config.distortions, seed=config.seed)
    shape = {"shots": config.shots, "queries": config.queries}
    listed = fewshot.sample(
        source, "train", num_tasks=config.num_tasks, ways=config.train_ways, seed=config.seed, **shape
    )
    test = fewshot.materialize(
        fewshot.sample(
            source, "test", num_tasks=config.num_test_tasks, ways=config.ways, seed=config.seed + 1, **shape
        ),
        source.images,
    )
    features = Conv4(config.width, normalization=config.normalization, pooling=config.pooling)
    learner = learners.protonet(features, config.train_ways)
    # The same features with a head of as many classes as a test task has.
    accuracy = jax.jit(learners.accuracy(learners.protonet(features, config.ways).problem, batch_size=20))

    tasks, images = fewshot.indexed(listed), jnp.asarray(source.images, jnp.result_type(float))
    initial = learner.init(jax.random.key(config.seed), test.support.images[0])
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    train = meta_train(
        learner.problem,
        optimizer,
        config.num_steps,
        tasks_per_step=config.tasks_per_step,
        lookup=fewshot.lookup,
        seed=config.seed,
        console=console,
    )
    untrained = learners.mean_interval(accuracy(initial, test))
    start = time.perf_counter()
    trained = train(initial, tasks, None, images)
    seconds = time.perf_counter() - start
    measured = learners.mean_interval(accuracy(trained.meta_params, test))
    result = {
        "accuracy": measured.mean,
        "half_width": measured.half_width,
        "untrained": untrained.mean,
        "train_seconds": seconds,
    }
    config.out.mkdir(parents=True, exist_ok=True)
    record = {"config": dataclasses.asdict(config) | {"out": str(config.out)}, **result}
    (config.out / "accuracy.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    console.print(
        f"{config.ways}-way {config.shots}-shot on {config.num_test_tasks} tasks of unseen alphabets: "
        f"{measured.mean:.1%} ± {measured.half_width:.1%} (untrained {untrained.mean:.1%}); trained in {seconds:.0f} s"
    )
    return result
