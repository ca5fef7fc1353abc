"""The complete task on real data: train on digits, find the harmful tasks, edit them out, check by retraining."""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.data import digits, fewshot
from metainfluence.lab.data.sources import FewShotSource
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFolder, Positive, Share, Size, Ways
from metainfluence.lab.learn.models import MLP, logistic_head_problem
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import TrainingError, meta_train
from metainfluence.lab.show import plots, report

NUM_RANDOM_ORDERS = 100


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Find harmful few-shot tasks on scikit-learn's digits: train, score, edit, and check by retraining."""

    num_tasks: Count = 200
    """Meta-training tasks, the harmful ones included."""
    num_held_out: Count = 200
    """Clean tasks on other images; their mean loss is the target of the scores."""
    num_flipped: Size = 20
    """Tasks whose query labels are flipped."""
    num_shortcut: Size = 20
    """Tasks with dimmed images whose label is painted into one pixel of the top row."""
    flip_share: Share = 0.4
    """Share of query labels replaced in a task with flipped labels."""
    ways: Ways = 5
    """Classes per task."""
    shots: Count = 5
    """Support examples per class."""
    queries: Count = 10
    """Query examples per class."""
    widths: tuple[Count, ...] = (32, 16)
    """Layers of the feature extractor."""
    head_l2: Positive = 0.03
    """Penalty of the head that each task fits."""
    meta_l2: NotNegative = 1e-3
    """Penalty of the meta-parameters."""
    learning_rate: Positive = 0.05
    """Adam's learning rate, falling to 0 along a cosine."""
    num_steps: Count = 200
    """Meta-training steps on all tasks."""
    damping: NotNegative | None = None
    """Added to every eigenvalue of the total Hessian; by default the rule of metainfluence.damping.auto decides."""
    trajectory: bool = False
    """Whether to score also by the derivative through the training run. This is one sweep back through all its steps,
    and takes as long as everything else."""
    seed: Size = 0
    """Seed of the tasks, the damage and the initial parameters."""
    out: OutFolder = Path("demo-output")
    """Folder for scores.parquet and scores.png."""


class Data(NamedTuple):
    """Both task lists, as ids with their ground truth and as arrays."""

    listed: fewshot.FewShotTasks
    tasks: mi.Task
    held_out: mi.Task


def make_data(config: DemoConfig) -> Data:
    """Sample the tasks and damage some of them, chosen at random.

    Raises:
      ValueError: more damaged tasks than there are tasks.
    """
    damaged = config.num_flipped + config.num_shortcut
    if damaged > config.num_tasks:
        raise ValueError(f"num_flipped + num_shortcut: expected at most num_tasks {config.num_tasks}, got {damaged}")
    source = digits.load(seed=config.seed)
    shape: dict[str, Any] = {"ways": config.ways, "shots": config.shots, "queries": config.queries}
    listed = fewshot.sample_tasks(
        source.labels, num_tasks=config.num_tasks, seed=config.seed, pool=source.train_pool, **shape
    )
    held_out = fewshot.sample_tasks(
        source.labels, num_tasks=config.num_held_out, seed=config.seed + 1, pool=source.held_out_pool, **shape
    )
    harmful = np.random.default_rng(config.seed).choice(
        config.num_tasks, size=config.num_flipped + config.num_shortcut, replace=False
    )
    flipped, shortcut = np.split(harmful, [config.num_flipped])
    listed = fewshot.flip_labels(listed, flipped, share=config.flip_share, seed=config.seed)
    listed = fewshot.add_shortcut(listed, shortcut)
    return Data(listed, fewshot.materialize(listed, source.images), fewshot.materialize(held_out, source.images))


def run(config: DemoConfig) -> None:
    """Run the demo, print its tables and write its two files."""
    jax.config.update("jax_enable_x64", True)
    started = time.perf_counter()
    console = report.console()
    data = make_data(config)
    truth = fewshot.harm(data.listed)
    report.setting(console, config, truth)
    model = MLP(config.widths)
    problem = logistic_head_problem(model, config.ways, head_l2=config.head_l2, meta_l2=config.meta_l2)
    initial = model.init(jax.random.key(config.seed), data.tasks.support.images[0])
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    train = meta_train(problem, optimizer, config.num_steps, console=console)
    try:
        trained = train(initial, data.tasks)
    except TrainingError as error:
        raise error.by("--learning-rate", config.learning_rate) from error

    target = mi.query_loss(problem)

    # The damping rule sees the total Hessian and the gradient, but not what is harmful. A preconditioner would take
    # longer to compile than it saves, here and in the edit.
    solver = mi.solvers.block_cg()
    score = Compiled(
        mi.influence_scores(
            problem, target, solver=solver, damping="auto" if config.damping is None else config.damping
        )
    )
    scores = score(trained.meta_params, data.tasks, data.held_out)
    mi.check(scores)
    assert scores.info.damping is not None
    damping = float(scores.info.damping)
    config.out.mkdir(parents=True, exist_ok=True)
    metadata = {"config": dataclasses.asdict(config) | {"out": str(config.out)}, "damping": damping}
    source = FewShotSource(data.listed, digits.load(seed=config.seed).images)
    mi.scoring.write_scores(config.out / "scores.parquet", scores, data.tasks, source=source, metadata=metadata)
    report.diagnostics(console, scores.info, mi.error_budget(scores, trained.meta_params))
    report.most_harmful(console, scores, data.listed, truth)

    losses = Compiled(jax.vmap(mi.task_loss(problem), (None, 0)))
    methods = {"exact influence": np.asarray(scores.task)}
    through = Compiled(through_the_run(problem, optimizer, config.num_steps, target))
    if config.trajectory:
        methods["through the run"] = np.asarray(through(initial, data.tasks, data.held_out))
    methods |= {
        "plain loss": -np.asarray(losses(trained.meta_params, data.tasks)),
        "TracIn-like": first_order_scores(problem, target, trained.meta_params, data),
        "random": np.random.default_rng(config.seed).random((NUM_RANDOM_ORDERS, config.num_tasks)),
    }
    report.detection(console, methods, truth, np.asarray(scores.query), data.listed.query_flipped)

    # Flagged without the ground truth: removing the task is predicted to lower the held-out loss.
    flagged = np.flatnonzero(methods["exact influence"] < 0)
    without = mi.drop(mi.unit_weights(data.tasks), tasks=flagged)
    edit = Compiled(mi.edit(problem, solver=solver, damping=damping))
    edited = edit(trained.meta_params, data.tasks, without)
    retrained = train(initial, data.tasks, without)

    def held_out_loss(meta_params: Any) -> float:
        return float(np.mean(losses(meta_params, data.held_out)))

    before = held_out_loss(trained.meta_params)
    rows = [
        report.Removal(
            f"predicted: {name}", before + float(methods[name][flagged].sum()), how.compile_seconds, how.run_seconds
        )
        for name, how in (("exact influence", score), ("through the run", through))
        if name in methods
    ]
    rows += [
        report.Removal("edited", held_out_loss(edited.meta_params), edit.compile_seconds, edit.run_seconds),
        report.Removal(
            "retrained", held_out_loss(retrained.meta_params), trained.compile_seconds, retrained.run_seconds
        ),
    ]
    report.removal(console, flagged, truth, before, rows)

    title = f"{config.num_tasks} few-shot digits tasks, {np.sum(truth != fewshot.CLEAN)} of them harmful in two ways"
    plots.ranking_and_detection(methods["exact influence"], truth, methods, config.out / "scores.png", title=title)
    report.files(console, config.out, time.perf_counter() - started)


def through_the_run(problem: mi.Bilevel, optimizer: Any, num_steps: int, target: Any) -> Any:
    """Makes (initial λ, tasks, held-out tasks) -> scores of the tasks [T], by the derivative through their training."""
    at = mi.trajectory(mi.training(problem, optimizer, num_steps))
    return lambda initial, tasks, held_out: mi.scores(at(initial, tasks), target)(held_out).task


def first_order_scores(problem: mi.Bilevel, target: Any, meta_params: Any, data: Data) -> np.ndarray:
    """TracIn-like scores of the tasks, [T]: the identity instead of the inverse total Hessian."""
    score = mi.influence_scores(problem, target, solver=mi.solvers.identity())
    # Only these results are requested, so that XLA leaves out the Hessian that the diagnostics would need.
    return np.asarray(Compiled(lambda *args: score(*args).task)(meta_params, data.tasks, data.held_out))
