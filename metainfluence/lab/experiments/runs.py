"""A training run as methods receive it, and its targets when it is trained again without some tasks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.evaluation import leave_groups_out, random_subsets, retrain
from metainfluence.lab.experiments.ranges import Count, NotNegative, Positive, Size
from metainfluence.lab.experiments.setting import Tasks
from metainfluence.lab.learn.learners import Learner, accuracy


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Options of Adam."""

    learning_rate: Positive = 0.02
    """Peak learning rate."""
    eps_root: NotNegative = 0.0
    """Added under Adam's root; optax's default is 0. The larger, the smoother."""
    warmup: Size = 0
    """Warm-up steps to the peak; 0 for none."""
    cosine: bool = False
    """Whether the learning rate falls to 0 along a cosine."""
    tasks_per_step: Count | None = None
    """Tasks in each step; by default all."""


class Case(NamedTuple):
    """One training run, from which a method predicts the targets without each task.

    Attributes:
      name: name of the setting and the seed.
      problem: the problem.
      run: the training run, made by `metainfluence.training`: run(start, tasks) is its end.
      start: λ before it.
      meta_params: λ after it.
      tasks: the T training tasks, stacked.
      targets: J groups of held-out tasks, `[J, n, ...]`; φ of a group is `metainfluence.query_loss(problem)` of it.
    """

    name: str
    problem: mi.Bilevel
    run: Any
    start: Any
    meta_params: Any
    tasks: mi.Task
    targets: mi.Task


class Truth(NamedTuple):
    """The targets after retraining, from S starts.

    Attributes:
      kept: name -> bool [m, T], the tasks that each of m runs keeps; "left out" for one task fewer.
      changes: name -> [S, m, J], the targets after those runs minus those after the run with all tasks.
    """

    kept: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]


LEFT_OUT = "left out"


def schedule_of(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of each step."""
    rate, warmup = config.learning_rate, config.warmup
    if config.cosine:
        return optax.warmup_cosine_decay_schedule(rate / max(warmup, 1), rate, warmup, num_steps)
    return optax.linear_schedule(rate / max(warmup, 1), rate, warmup) if warmup else optax.constant_schedule(rate)


def training_of(config: OptimizerConfig, problem: mi.Bilevel, num_steps: int) -> Any:
    """The training run."""
    optimizer = optax.adam(schedule_of(config, num_steps), eps_root=config.eps_root)
    return mi.training(problem, optimizer, num_steps, tasks_per_step=config.tasks_per_step)


def groups_of(held_out: mi.Task, num_targets: int) -> mi.Task:
    """Divides held-out tasks into groups.

    Raises:
      ValueError: a number of tasks that num_targets does not divide.
    """
    count = len(jax.tree.leaves(held_out)[0])
    if count % num_targets:
        raise ValueError(f"num_targets: expected a divisor of num_held_out {count}, got {num_targets}")
    return jax.tree.map(lambda leaf: leaf.reshape(num_targets, -1, *leaf.shape[1:]), held_out)


def starts_of(learner: Learner, tasks: mi.Task, seeds: Sequence[int]) -> Any:
    """λ before training, for all seeds, on a leading axis."""
    each = [learner.init(jax.random.key(seed), tasks.support[0][0]) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def row_of(tree: Any, index: int) -> Any:
    """One entry of the leading axis."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


class Retrained:
    """Retrains a run without some tasks, from every start, many at once; finished runs are kept.

    Args:
      learner: learner whose problem the run trains on.
      run: the run.
      starts: λ before training, with a leading axis.
      tasks: tasks of training and of the targets.
      together: runs trained at once.
      cache: folder for finished runs; None for none.
    """

    def __init__(self, learner: Learner, run: Any, starts: Any, tasks: Tasks, together: int, cache: Path | None):
        self._tasks, self._starts, self._cache, self._together = tasks, starts, cache, together
        self._run = run
        loss, right = mi.query_loss(learner.problem), accuracy(learner.problem)

        def losses(models: Any, targets: mi.Task) -> Any:
            def each(model: Any) -> Any:
                return jax.vmap(lambda held_out: loss(model, held_out))(targets)

            return jax.lax.map(each, models, batch_size=together)

        def accuracies(models: Any, test: mi.Task) -> Any:
            return jax.lax.map(lambda model: jnp.mean(right(model, test)), models, batch_size=together)

        self._losses, self._accuracies = jax.jit(losses), jax.jit(accuracies)

    def __call__(self, name: str, interventions: mi.Weights) -> Any:
        """λ at the ends, `[S, m, ...]`."""

        def train(weights: mi.Weights, tasks: mi.Task, key: Any) -> Any:
            return self._run(key, tasks, weights)

        folder = None if self._cache is None else self._cache / name
        again = retrain(train, batch_size=self._together, cache=folder)
        return again(interventions, self._tasks.training, keys=self._starts)

    def each_start(self, weights: Sequence[mi.Weights], name: str) -> Any:
        """The same with other interventions for every start: a list of S of them, `[S, m, ...]` at the end."""
        ends = []
        for index, own in enumerate(weights):
            folder = None if self._cache is None else self._cache / f"{name}-{index}"

            def train(weights: mi.Weights, start: Any, tasks: mi.Task) -> Any:
                return self._run(start, tasks, weights)

            again = retrain(train, batch_size=self._together, cache=folder)
            ends.append(again(own, row_of(self._starts, index), self._tasks.training))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ends)

    def losses(self, models: Any, targets: mi.Task) -> np.ndarray:
        """The targets at models `[S, m, ...]`: `[S, m, J]`."""
        return self._of_all(lambda flat: self._losses(flat, targets), models)

    def accuracies(self, models: Any) -> np.ndarray:
        """Mean accuracy on the test tasks of models `[S, m, ...]`: `[S, m]`."""
        return self._of_all(lambda flat: self._accuracies(flat, self._tasks.test), models)

    def _of_all(self, function: Any, models: Any) -> np.ndarray:
        lead = jax.tree.leaves(models)[0].shape[:2]
        found = function(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), models))
        return np.asarray(found.reshape(*lead, *found.shape[1:]))


def truth_of(
    again: Retrained, tasks: mi.Task, targets: mi.Task, num_left_out: int, removed: Sequence[float], num: int, seed: int
) -> tuple[Truth, Any]:
    """Retrains without single tasks and without shares of them.

    Args:
      again: the retrainer.
      tasks: the T training tasks.
      targets: J groups of held-out tasks.
      num_left_out: tasks left out one at a time.
      removed: shares of the tasks.
      num: subsets per share.
      seed: seed of both choices.

    Returns:
      The truth, and λ of the runs with all tasks, `[S, ...]`.
    """
    weights = mi.unit_weights(tasks)
    total = len(weights.task)
    left_out = np.random.default_rng(seed).permutation(total)[:num_left_out]
    kept = {LEFT_OUT: np.arange(total)[None] != left_out[:, None]}
    for share in removed:
        # A separate seed for each share, so that the subsets are not nested.
        kept[f"{share:g}"] = random_subsets(weights, num, 1 - share, seed + round(1000 * share))[1]
    masks = np.concatenate([np.ones((1, total), bool), *kept.values()])
    models = again("subsets", leave_groups_out(weights, [np.flatnonzero(~mask) for mask in masks]))
    after = again.losses(models, targets)
    changes = after[:, 1:] - after[:, :1]
    ends = np.cumsum([len(mask) for mask in kept.values()])[:-1]
    return Truth(kept, dict(zip(kept, np.split(changes, ends, axis=1), strict=True))), row_of(
        jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), models), 0
    )
