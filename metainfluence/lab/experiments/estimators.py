"""Compares the three responses and all baselines with retraining without one task, or without shares of the tasks.

Everything is trained from the same start in the same order. On purpose, no run ends near a stationary point. All
methods are judged by the same retrained models, which are stored in a bank, see `metainfluence.lab.experiments.bank`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from metainfluence._disk import of_arrays
from metainfluence.evaluation import leave_groups_out
from metainfluence.lab.experiments import bank, results
from metainfluence.lab.experiments.judging import kept_options
from metainfluence.lab.experiments.methods import most_harmful
from metainfluence.lab.experiments.named import ConfigError
from metainfluence.lab.experiments.ranges import Count, Positive, Share, Size
from metainfluence.lab.experiments.run_methods import ESTIMATORS, Methods, Scored
from metainfluence.lab.experiments.run_tables import result_of
from metainfluence.lab.experiments.runs import (
    Case,
    OptimizerConfig,
    Retrained,
    groups_of,
    row_of,
    starts_of,
    training_of,
    truth_of,
)
from metainfluence.lab.experiments.setting import (
    SINUSOID,
    SettingConfig,
    Tasks,
    image_tasks,
    make_learner,
    sinusoid_tasks,
)
from metainfluence.lab.experiments.trainings import check_end, states_of
from metainfluence.lab.learn.learners import Learner
from metainfluence.lab.learn.train import TrainingError
from metainfluence.lab.show.printing import say

NOTHING = "nothing"
REMOVING = (*ESTIMATORS, "TRAK", "TracIn", "gradient similarity", "random")


@dataclasses.dataclass(frozen=True)
class EstimatorsConfig:
    """Trajectory, segments, optimum and the baselines, compared with retraining."""

    title: str = "Trajectory, segments, optimum"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage and learner; its `training` is not used; its seed is that of tasks, damage and subsets."""
    trainings: tuple[str, ...] = ("adam", "smooth")
    """Which of the following trainings to run."""
    adam: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Training with common settings."""
    smooth: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=0.01, eps_root=1e-5, warmup=10, cosine=True)
    )
    """Training with settings that make a run smooth."""
    batches: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=0.01, eps_root=1e-5, warmup=10, cosine=True, tasks_per_step=20
        )
    )
    """The same with batches of tasks."""
    num_steps: Count = 60
    """Steps of every run."""
    num_checkpoints: Count = 5
    """Checkpoints for segments and TracIn; must divide num_steps."""
    seeds: tuple[Size, ...] = (0, 1, 2)
    """Seeds of the start."""
    removed: tuple[Share, ...] = (0.01, 0.05, 0.2, 0.5)
    """Shares of the tasks that the subsets leave out."""
    num_subsets: Count = 20
    """Subsets per share."""
    num_left_out: Count = 40
    """Tasks left out one at a time."""
    worst: tuple[Share, ...] = (0.05, 0.1, 0.2)
    """Shares of the tasks, the worst by a method's scores; accuracy is measured after retraining without them."""
    num_targets: Count = 10
    """Groups of held-out tasks; the mean loss on each is one target."""
    together: Count = 8
    """Retrainings run side by side."""
    smoothness_directions: Count = 4
    """Directions of `metainfluence.smoothness`, with three step sizes each."""
    draws: Count = 500
    """Draws of each bootstrap."""
    least_difference: Positive = 0.05
    """How far the rule may be from the best of the three estimators."""


def run(config: EstimatorsConfig, cache: Path | None = None) -> results.Result:
    """Trains, retrains, scores and compares; finished parts are kept in `cache`, with the bank next to it.

    Raises:
      ValueError: an unknown training, a number of held-out tasks that num_targets does not divide, checkpoints that do
        not divide the steps, or what `setting.image_tasks` and `setting.make_learner` refuse.
    """
    for name in config.trainings:
        if name not in ("adam", "smooth", "batches"):
            raise ValueError(f"trainings: expected some of adam, smooth, batches, got {name!r}")
    tasks, learner = data_of(config)
    methods = Methods(learner.problem, config.setting.data.num_tasks)
    accounts = []
    for name in config.trainings:
        folder = None if cache is None else cache / name
        done = None if folder is None else folder / "account.parquet"
        # The caller records the configuration of a folder, and refuses a folder of another one.
        if done is not None and done.exists():
            accounts += bank.load(done)[1]
            continue
        accounts.append(account_of(config, name, tasks, learner, methods, folder))
        if done is not None:
            bank.save(done, results.plain(config), accounts[-1:])
        say(f"{config.title}: {name} is done")
    if cache is not None:
        bank.save(cache.parent / "bank.parquet", results.plain(config), accounts)
    return result_of(config, accounts)


def data_of(config: EstimatorsConfig) -> tuple[Tasks, Learner]:
    """The tasks and the learner of a configuration; sets the process's precision."""
    jax.config.update("jax_enable_x64", config.setting.float64)
    for name, needed in (("train_ways", None), ("target", "loss")):
        if (got := getattr(config.setting, name)) != needed:
            raise ConfigError(f"setting.{name}: expected {needed} in an experiment on runs, got {got!r}")
    tasks = sinusoid_tasks(config.setting) if config.setting.data.dataset == SINUSOID else image_tasks(config.setting)
    return tasks, make_learner(config.setting.learner, tasks.training, config.setting.data)


def hashes_of(tasks: Tasks) -> dict[str, str]:
    """Digests by which a bank recognises its tasks."""
    return {"training": of_arrays(tasks.training), "held_out": of_arrays(tasks.held_out)}


def cases_of(config: EstimatorsConfig, name: str, tasks: Tasks, learner: Learner, ends: Any) -> list[Case]:
    """The runs of one training from every start.

    Args:
      config: the experiment's configuration.
      name: name of the training.
      tasks: the tasks.
      learner: the learner.
      ends: λ after each run, `[S, ...]` or flat `[S, p]`.
    """
    again = training_of(getattr(config, name), learner.problem, config.num_steps)
    starts = starts_of(learner, tasks.training, config.seeds)
    targets = groups_of(tasks.held_out, config.num_targets)
    unravel = ravel_pytree(row_of(starts, 0))[1]
    cases = []
    for index, seed in enumerate(config.seeds):
        end = unravel(ends[index]) if isinstance(ends, np.ndarray) else row_of(ends, index)
        label = f"{config.setting.learner.kind}, {name}, seed {seed}"
        cases.append(Case(label, learner.problem, again, row_of(starts, index), end, tasks.training, targets))
    return cases


def account_of(
    config: EstimatorsConfig, name: str, tasks: Tasks, learner: Learner, methods: Methods, cache: Path | None
) -> bank.Account:
    """Everything about one training."""
    optimizer: OptimizerConfig = getattr(config, name)
    seeded = training_of(optimizer, learner.problem, config.num_steps)
    starts = starts_of(learner, tasks.training, config.seeds)
    targets = groups_of(tasks.held_out, config.num_targets)
    again = Retrained(learner, seeded, starts, tasks, config.together, cache)
    states = jax.jit(states_of(seeded, config.num_checkpoints))
    truth, ends = truth_of(
        again, tasks.training, targets, config.num_left_out, config.removed, config.num_subsets, config.setting.seed
    )
    cases = cases_of(config, name, tasks, learner, ends)
    for case in cases:
        try:
            check_end(case.meta_params, seeded, case.start, tasks.training)
        except TrainingError as error:
            raise error.by(f"--{name}.learning-rate", optimizer.learning_rate) from error
    respond = mi.trajectory(seeded)
    each = [
        list(methods(case, respond, states(case.start, tasks.training), optimizer, seed))
        for case, seed in zip(cases, config.seeds, strict=True)
    ]
    scores = kept_options([together(found) for found in zip(*each, strict=True)], truth)
    facts = [facts_of(config, case, seeded) for case in cases]
    return bank.Account(
        name,
        truth,
        tasks.task_harm != "clean",
        np.stack([np.asarray(ravel_pytree(case.meta_params)[0]) for case in cases]),
        scores,
        accuracies_of(config, again, tasks.training, scores),
        facts,
        hashes_of(tasks),
    )


def together(found: Sequence[Scored]) -> Scored:
    """The results of one method from all starts, `[S, J, T]`."""
    return found[0]._replace(scores=np.stack([each.scores for each in found]))


def facts_of(config: EstimatorsConfig, case: Case, seeded: Any) -> dict[str, Any]:
    """Further facts about a run: how stationary and how smooth it is."""
    measured: Any = mi.smoothness(
        seeded, num_directions=config.smoothness_directions, parts=False, runs_at_once=config.together
    )(case.start, case.tasks)
    slope = jax.grad(mi.total_objective(case.problem))
    norms = jax.jit(lambda m: sum(jax.numpy.sum(leaf**2) for leaf in jax.tree.leaves(slope(m, case.tasks))) ** 0.5)
    here, before = float(norms(case.meta_params)), float(norms(case.start))
    return {
        "case": case.name,
        "meta_parameters": int(ravel_pytree(case.start)[0].size),
        "gradient_norm": here,
        "gradient_norm_relative": here / before,
        "smoothness": float(measured.score),
        "sign": float(np.mean(measured.sign)),
        "size": float(np.mean(measured.size)),
        "verdict": measured.verdict,
    }


def accuracies_of(
    config: EstimatorsConfig, again: Retrained, tasks: mi.Task, scores: Sequence[Scored]
) -> list[tuple[str, float, np.ndarray]]:
    """Accuracy on test tasks after retraining without the worst tasks by each method's default scores."""
    chosen = {each.method: each.scores.mean(1) for each in scores if each.default and each.method in REMOVING}
    places = [(method, share) for method in chosen for share in config.worst]
    if not places:
        return []
    weights = mi.unit_weights(tasks)
    interventions = [
        leave_groups_out(weights, [[], *(most_harmful(chosen[method][start], share) for method, share in places)])
        for start in range(len(config.seeds))
    ]
    found = again.accuracies(again.each_start(interventions, "worst"))
    return [(NOTHING, 0.0, found[:, 0]), *((*place, found[:, 1 + k]) for k, place in enumerate(places))]


def config_of(stored: dict[str, Any]) -> EstimatorsConfig:
    """Restores a configuration from what a bank stores of it.

    Raises:
      bank.BankError: unknown fields.
    """

    def made(kind: Any, values: Any) -> Any:
        fields = {field.name: field for field in dataclasses.fields(kind)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise bank.BankError(f"bank: unknown fields {', '.join(unknown)} of {kind.__name__}: of another version")
        found = {}
        for name, value in values.items():
            default = getattr(kind(), name)
            if dataclasses.is_dataclass(default):
                value = made(type(default), value)
            found[name] = tuple(value) if isinstance(value, list) else value
        return kind(**found)

    config: EstimatorsConfig = made(EstimatorsConfig, json.loads(json.dumps(stored)))
    return config
