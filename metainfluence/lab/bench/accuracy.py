"""How good a learner is: meta-training in batches, and accuracy on 600 tasks of classes that training has not seen.

It also reports what a step costs: floating-point operations, and what limits them.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence._disk import write_atomically
from metainfluence.lab.bench._output import publish
from metainfluence.lab.data import fewshot
from metainfluence.lab.experiments import accuracies, results
from metainfluence.lab.experiments.code import code_of
from metainfluence.lab.experiments.ranges import Count, OutFolder, Positive, Size, Ways
from metainfluence.lab.experiments.setting import (
    SINUSOID,
    DataConfig,
    HarmConfig,
    LearnerConfig,
    SettingConfig,
    clean_pools,
    image_lists,
    make_learners,
    sinusoid_tasks,
)
from metainfluence.lab.experiments.trainings import TrainingConfig, optimizer_of
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.learners import Interval
from metainfluence.lab.learn.timing import Compiled
from metainfluence.lab.learn.train import TrainingError, meta_train
from metainfluence.lab.show.printing import progress_console, say

CHECKPOINTS, CURVE, RESULT = "checkpoints", "curve.json", accuracies.RESULT
BATCH, BLOCK = 20, 25
SIDE, COPIED, REPEATS = 1024, 1 << 24, 3


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """Meta-train a learner and measure it on tasks of unseen classes; a stopped run continues where it was."""

    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(num_tasks=10000, num_held_out=300, num_test=600)
    )
    """Tasks: for training, for the learning curve (held out), and for the test."""
    train_ways: Ways | None = None
    """Classes per training task, if they differ from the test's."""
    also_shots: tuple[Count, ...] = ()
    """Support examples per class in further tests of the same λ."""
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    """Learner."""
    training: TrainingConfig = dataclasses.field(default_factory=lambda: TrainingConfig(tasks_per_step=16))
    """Training; num_checkpoints is the number of points on the learning curve."""
    least: Positive | None = None
    """Accuracy that the test should reach; for regression, the squared error that it should stay below."""
    also_least: tuple[Positive, ...] = ()
    """The same for the further tests."""
    save_every: Count = 250
    """Steps between two checkpoints, a multiple of 25."""
    float64: bool = False
    """Compute in float64."""
    seed: Size = 0
    """Seed of the tasks, their order and the initial parameters."""
    out: OutFolder = Path("accuracy-output")
    """Folder for the checkpoints, the learning curve and accuracy.json."""


class _Prepared(NamedTuple):
    """What is trained on what: the initial λ, the tasks, the lookup of their images, and what is measured on."""

    initial: Any
    tasks: mi.Task
    lookup: Any
    data: tuple[Any, ...]
    held_out: mi.Task
    test: mi.Task
    also: tuple[mi.Task, ...]
    problem: mi.Bilevel
    tested: mi.Bilevel


def run(config: AccuracyConfig) -> dict[str, Any]:
    """Trains, tests, prints, and writes accuracy.json.

    Returns:
      The record: `accuracy` and `half_width` of its 95 % interval over the test tasks (for regression, the mean squared
      error); `untrained`, the same before training; `curve`, [step, held-out accuracy, half width]; times; the cost of
      one task.

    Raises:
      ValueError: a folder of another configuration; what `setting.image_lists` and `setting.make_learner` refuse.
      FileNotFoundError: the data is not there.
    """
    jax.config.update("jax_enable_x64", config.float64)
    ready = _prepared(config)
    measure = _measure(ready.tested, config)
    curve = _Curve(config)
    steps = config.training
    points = {steps.num_steps * k // steps.num_checkpoints for k in range(1, steps.num_checkpoints + 1)}

    def on_block(done: int, state: tuple[Any, Any]) -> None:
        if any(done - BLOCK < point <= done for point in points):
            curve.add(done, measure(state[0], ready.held_out))

    train = meta_train(
        ready.problem,
        optimizer_of(steps),
        steps.num_steps,
        tasks_per_step=steps.tasks_per_step,
        lookup=ready.lookup,
        seed=config.seed,
        block_size=BLOCK,
        console=progress_console(),
        checkpoints=config.out / CHECKPOINTS,
        save_every=config.save_every,
        on_block=on_block,
    )
    untrained = measure(ready.initial, ready.test)
    cost = _cost(config, ready)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        trained = train(ready.initial, ready.tasks, None, *ready.data)
    except TrainingError as error:
        # It would fail again, and another configuration may want to use the folder.
        curve.forget()
        raise error.by("--training.learning-rate", steps.learning_rate) from error
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found = measure(trained.meta_params, ready.test)
    also = [measure(trained.meta_params, tasks) for tasks in ready.also]
    regression = config.data.dataset == SINUSOID
    chance = None if regression else 1 / config.data.ways
    record = {
        "accuracy": found.mean,
        "half_width": found.half_width,
        "untrained": untrained.mean,
        "chance": chance,
        "also": {f"{shots}-shot": list(each) for shots, each in zip(config.also_shots, also, strict=True)},
        "curve": curve.points,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "compile_seconds": trained.compile_seconds,
        "meta_parameters": sum(leaf.size for leaf in jax.tree.leaves(ready.initial)),
        **cost,
    }
    about = {"machine": results.machine(), "code": code_of(accuracies.DEPENDS_ON)}
    path = config.out / f"{RESULT}.json"
    if trained.run_seconds == 0 and path.exists():
        # Nothing was trained now, so the times, the machine and the code of the training are those recorded then.
        before = json.loads(path.read_text(encoding="utf-8"))
        record |= {key: before[key] for key in ("wall_seconds", "cpu_seconds", "compile_seconds")}
        about = {key: before.get(key) for key in about}
    publish(RESULT, config, _table(config, record, found), **record, **about)
    return record


def _prepared(config: AccuracyConfig) -> _Prepared:
    data = config.data
    lookup: Any = None
    arrays: tuple[Any, ...] = ()
    also: tuple[mi.Task, ...] = ()
    if data.dataset == SINUSOID:
        tasks = sinusoid_tasks(SettingConfig(data=data, seed=config.seed))
        training, held_out, test = tasks.training, tasks.held_out, tasks.test
        like = training
    else:
        listed = image_lists(data, HarmConfig(), config.seed, config.train_ways)
        images = listed.dataset.images
        held_out, test = (fewshot.materialize(tasks, images) for tasks in (listed.held_out, listed.test))
        _, pool = clean_pools(listed.dataset, data.ways)
        also = tuple(
            fewshot.materialize(
                fewshot.sample_tasks(
                    listed.dataset.labels, num_tasks=data.num_test, ways=data.ways, shots=shots, queries=data.queries,
                    seed=config.seed + 2, pool=pool, class_names=listed.dataset.class_names,
                ),
                images,
            )
            for shots in config.also_shots
        )  # fmt: skip
        training, lookup, like = fewshot.indexed(listed.training), fewshot.lookup, test
        arrays = (jnp.asarray(images, jnp.result_type(float)),)
    learner, tested = make_learners(config.learner, like, data, config.train_ways)
    initial = learner.init(jax.random.key(config.seed), like.support[0][0])
    return _Prepared(initial, training, lookup, arrays, held_out, test, also, learner.problem, tested)


def _measure(problem: mi.Bilevel, config: AccuracyConfig) -> Callable[[Any, mi.Task], Interval]:
    """Makes (meta_params, tasks) -> mean accuracy with its interval; for regression, the mean squared error."""
    if config.data.dataset == SINUSOID:
        losses = jax.jit(jax.vmap(mi.task_loss(problem), in_axes=(None, 0)))
        return lambda meta_params, tasks: learners.mean_interval(2 * losses(meta_params, tasks))
    accuracy = jax.jit(learners.accuracy(problem, batch_size=BATCH))
    return lambda meta_params, tasks: learners.mean_interval(accuracy(meta_params, tasks))


class _Curve:
    """The learning curve, kept in the folder, so that a continued run still has its first part."""

    def __init__(self, config: AccuracyConfig):
        self._path = config.out / CURVE
        self._owner = {key: value for key, value in results.plain(config).items() if key not in ("out", "least")}
        self.points: list[list[float]] = []
        if self._path.exists():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            other = results.differences(found["config"], self._owner)
            if other:
                raise ValueError(
                    f"out: expected a new folder or one of this configuration, got {config.out}: {'; '.join(other)}; "
                    "name another --out, or remove that folder"
                )
            self.points = found["points"]

    def forget(self) -> None:
        """Removes what was kept of the run."""
        self._path.unlink(missing_ok=True)
        shutil.rmtree(self._path.with_name(CHECKPOINTS), ignore_errors=True)

    def add(self, step: int, measured: Interval) -> None:
        """Stores a point and prints it."""
        self.points = [*(point for point in self.points if point[0] < step), [step, *measured]]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps({"config": self._owner, "points": self.points}).encode())
        say(f"step {step}: {measured.mean:.4f} ± {measured.half_width:.4f} on held-out tasks")


def _cost(config: AccuracyConfig, ready: _Prepared) -> dict[str, float]:
    """What one task of a step costs: operations and bytes as counted by XLA, time, and the machine's own pace.

    The pace is that of a matrix product and of a copy. It is measured in the same seconds as the step, since other
    processes may be running.
    """
    count = min(config.training.tasks_per_step or config.data.num_tasks, config.data.num_tasks)
    tasks = jax.tree.map(lambda leaf: leaf[:count], ready.tasks)
    tasks = tasks if ready.lookup is None else ready.lookup(tasks, *ready.data)
    step = Compiled(jax.grad(mi.total_objective(ready.problem)))
    arguments = (ready.initial, tasks, mi.unit_weights(tasks))
    compiled = jax.jit(jax.grad(mi.total_objective(ready.problem))).lower(*arguments).compile()
    counted = compiled.cost_analysis() or {}
    matrix, memory = jnp.ones((SIDE, SIDE), jnp.float32), jnp.ones(COPIED, jnp.float32)
    product, copy = Compiled(lambda a: a @ a), Compiled(lambda a: a + 1)
    times: dict[str, list[float]] = {"step": [], "product": [], "copy": []}
    for _ in range(REPEATS + 1):
        for name, program, args in (
            ("step", step, arguments),
            ("product", product, (matrix,)),
            ("copy", copy, (memory,)),
        ):
            before = time.process_time()
            program(*args)
            times[name].append(time.process_time() - before)
    # The first call compiles.
    best = {name: min(each[1:]) for name, each in times.items()}
    flops, moved = float(counted.get("flops", np.nan)), float(counted.get("bytes accessed", np.nan))
    peak, bandwidth = 2 * SIDE**3 / best["product"], 8 * COPIED / best["copy"]
    return {
        "flops_per_task": flops / count,
        "bytes_per_task": moved / count,
        "cpu_seconds_per_task": best["step"] / count,
        "flops_of_product": flops / best["step"] / peak,
        "bytes_of_copy": moved / best["step"] / bandwidth,
    }


def _table(config: AccuracyConfig, record: dict[str, Any], found: Interval) -> str:
    """The text that is printed."""
    data, steps = config.data, config.training
    regression = data.dataset == SINUSOID
    what, of = ("MSE", "curves") if regression else ("Accuracy", "classes")
    shape = f"{data.shots} points" if regression else f"{data.ways}-way {data.shots}-shot"
    measured = f"{found.mean:.4f} ± {found.half_width:.4f}"
    head = (
        f"{what} on {data.num_test} tasks of {of} never trained on: **{measured}** (95 % interval; untrained "
        f"{record['untrained']:.4f})."
    )
    lines = [f"# {config.learner.kind} on {data.dataset}, {shape}", "", head, ""]
    if record["chance"] is not None and found.mean - found.half_width <= record["chance"]:
        lines += [f"**This cannot be told from guessing, {record['chance']:.4f}: the learner has learnt nothing.**", ""]
    if config.least is not None:
        met = found.mean <= config.least if regression else found.mean >= config.least
        side = "at most" if regression else "at least"
        lines += [f"Asked for: {side} {config.least:g}: {'met' if met else 'missed'}.", ""]
    for number, (name, (value, half)) in enumerate(record["also"].items()):
        told = f"The same λ on as many tasks, {name}: **{value:.4f} ± {half:.4f}**"
        if number < len(config.also_least):
            bar = config.also_least[number]
            told += f"; asked for: at least {bar:g}: {'met' if value >= bar else 'missed'}"
        lines += [f"{told}.", ""]
    trained = (
        f"{steps.num_steps} steps of {steps.tasks_per_step or data.num_tasks} tasks, {record['meta_parameters']} "
        f"meta-parameters: {record['wall_seconds']:.0f} s by the clock, {record['cpu_seconds']:.0f} s of processor "
        f"time; {record['compile_seconds']:.0f} s of the first went into compiling."
    )
    bound = "arithmetic" if record["flops_of_product"] >= record["bytes_of_copy"] else "memory"
    cost = (
        f"One task of a step: {record['flops_per_task'] / 1e9:.3g} GFLOP, {record['bytes_per_task'] / 1e6:.1f} MB, "
        f"{1e3 * record['cpu_seconds_per_task']:.2f} ms of processor time. That is {record['flops_of_product']:.0%} of "
        f"the pace of a matrix product and {record['bytes_of_copy']:.0%} of that of a copy: bound by {bound}."
    )
    lines += [trained, "", cost, "", f"| step | {what} on held-out tasks | ± 95 % |", "| ---: | ---: | ---: |"]
    lines += [f"| {step:.0f} | {value:.4f} | {half:.4f} |" for step, value, half in record["curve"]]
    return "\n".join(lines) + "\n"
