"""Compares other libraries with ours on the same problem, at the same error."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence.lab.bench._output import publish
from metainfluence.lab.bench.peers import problem as common
from metainfluence.lab.bench.peers import single_level, with_jax
from metainfluence.lab.bench.peers.candidates import (
    GRADIENT,
    LINEAR,
    PRODUCT,
    ROUTE,
    SCORES,
    SINGLE,
    one_level_candidates,
    two_level_candidates,
)
from metainfluence.lab.bench.peers.compare import Candidate, Row, race
from metainfluence.lab.bench.peers.problem import Problem
from metainfluence.lab.bench.peers.single_level import SingleLevel
from metainfluence.lab.data import datasets, digits, fewshot
from metainfluence.lab.experiments.ranges import Count, NotNegative, OutFolder, Positive, Ways
from metainfluence.lab.learn.models import MLP

TWO_LEVELS = (GRADIENT, PRODUCT, LINEAR, SCORES, ROUTE)


@dataclasses.dataclass(frozen=True)
class PeersBenchConfig:
    """Total gradients, Hessian products and scores against other libraries: logistic heads on a tanh MLP, in float64.

    Every library runs at its loosest setting whose error against a dense reference is within the target.
    """

    dataset: str = "omniglot"
    """Name of the data set."""
    num_tasks: Count = 64
    """Tasks."""
    ways: Ways = 5
    """Classes per task."""
    shots: Count = 2
    """Support examples per class."""
    queries: Count = 5
    """Query examples per class."""
    widths: tuple[Count, ...] = (64, 32)
    """Layers of the feature extractor."""
    head_l2: Positive = 0.1
    """Penalty of the head that each task fits."""
    num_train: Count = 500
    """Digits that the single-level MLP is trained on."""
    num_test: Count = 20
    """Digits whose losses are the single-level targets."""
    hidden: Count = 16
    """Hidden units of the single-level MLP."""
    single_damping: Positive = 0.1
    """Damping of the single-level solves."""
    target: Positive = 1e-6
    """Relative error to reach."""
    repeats: Count = 20
    """Timed runs of each, at most; the shortest is reported."""
    budget: Positive = 5.0
    """Seconds after which a slow candidate is not run again."""
    quantities: tuple[str, ...] = (*TWO_LEVELS, SINGLE)
    """Quantities to measure."""
    libraries: tuple[str, ...] = ("metainfluence", "jaxopt", "optimistix", "torch.func", "dattri", "pyDVL")
    """Libraries to measure."""
    least_gradient: NotNegative = 2.0
    """Target for total gradients: the fastest peer's time over ours, at least."""
    least_product: NotNegative = 8.0
    """Target for a Hessian product: the same ratio."""
    least_scores: NotNegative = 50.0
    """Target for all scores: the same ratio."""
    out: OutFolder = Path("bench-output")
    """Folder for peers.md and peers.json."""


class Target(NamedTuple):
    """A bar, and the measured ratio: the fastest peer's time over ours."""

    quantity: str
    peer: str
    ratio: float
    bar: float

    @property
    def met(self) -> bool:
        """Whether the ratio reaches the bar."""
        return self.ratio >= self.bar


def run(config: PeersBenchConfig) -> None:
    """Measure, print, and write the table.

    Raises:
        ValueError: an unknown quantity.
        FileNotFoundError: the data set is not prepared.
    """
    known = (*TWO_LEVELS, SINGLE)
    if unknown := set(config.quantities) - set(known):
        raise ValueError(f"quantities: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    jax.config.update("jax_enable_x64", True)
    rows = measure(config)
    judged = [target._asdict() | {"met": target.met} for target in targets(config, rows)]
    publish("peers", config, markdown(config, rows), rows=[row._asdict() for row in rows], targets=judged)


def two_levels(config: PeersBenchConfig) -> Problem:
    """The few-shot problem at an untrained λ."""
    data = datasets.load(config.dataset)
    listed = fewshot.sample_tasks(
        data.labels,
        num_tasks=config.num_tasks,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        seed=0,
        pool=data.pools["train"],
    )
    tasks = fewshot.materialize(listed, data.images)
    model = MLP(config.widths, image_ndim=1)

    def arrays(batch: fewshot.Batch) -> tuple[jax.Array, jax.Array]:
        images = jnp.asarray(batch.images, float)
        return images.reshape(*images.shape[:2], -1), jnp.asarray(batch.labels)

    support, query = arrays(tasks.support), arrays(tasks.query)
    params = model.init(jax.random.key(0), query[0][0])["params"]
    layers = tuple((params[name]["kernel"], params[name]["bias"]) for name in sorted(params))
    return Problem(layers, config.head_l2, config.ways, mi.Task(support, query))


def one_level(config: PeersBenchConfig) -> SingleLevel:
    """The MLP on digits."""
    data = digits.load()
    chosen = np.random.default_rng(0).permutation(len(data.labels))[: config.num_train + config.num_test]
    images = jnp.asarray(data.images[chosen].reshape(len(chosen), -1), float)
    labels = jnp.asarray(data.labels[chosen])
    split = config.num_train
    sizes = (images.shape[1], config.hidden, int(data.labels.max()) + 1)
    train, test = (images[:split], labels[:split]), (images[split:], labels[split:])
    return single_level.trained(sizes, train, test, config.single_damping)


def measure(config: PeersBenchConfig) -> list[Row]:
    """Measures all rows; ours come first for each quantity."""
    found: list[Row] = []
    timed = functools.partial(race, target=config.target, repeats=config.repeats, budget=config.budget)

    def chosen(candidates: list[Candidate]) -> list[Candidate]:
        return [candidate for candidate in candidates if candidate.library.startswith(config.libraries)]

    if set(config.quantities) & set(TWO_LEVELS):
        problem = two_levels(config)
        for quantity in config.quantities:
            if quantity != SINGLE:
                found += timed(quantity, chosen(two_level_candidates(problem, quantity)), reference(problem, quantity))
    if SINGLE in config.quantities:
        single = one_level(config)
        found += timed(SINGLE, chosen(one_level_candidates(single)), single_level.dense_scores(single))
    return found


def reference(problem: Problem, quantity: str) -> Any:
    """The quantity by dense linear algebra, in float64, without this library."""
    loss = common.task_loss(common.dense_fit(problem))
    if quantity == GRADIENT:
        return jax.jit(functools.partial(with_jax.gradients, loss))(problem.layers, problem.tasks)
    way = with_jax.forward_over_reverse if quantity in (PRODUCT, LINEAR) else with_jax.scores_at_once
    return jax.jit(functools.partial(way, loss))(problem.layers, problem.tasks, problem.direction)


def ratios(rows: list[Row]) -> list[float | None]:
    """Each row's time over that of our first row for the same quantity; None if either is missing."""
    ours: dict[str, float] = {}
    for row in rows:
        if row.ours and row.seconds is not None:
            ours.setdefault(row.quantity, row.seconds)
    return [
        None if row.seconds is None or row.quantity not in ours else row.seconds / ours[row.quantity] for row in rows
    ]


def targets(config: PeersBenchConfig, rows: list[Row]) -> list[Target]:
    """The bars of the quantities that were measured, against the fastest peer that is accurate enough."""
    bars = {
        GRADIENT: config.least_gradient,
        PRODUCT: config.least_product,
        LINEAR: config.least_product,
        SCORES: config.least_scores,
    }
    found = []
    for quantity, bar in bars.items():
        peers = [
            (ratio, row.library)
            for row, ratio in zip(rows, ratios(rows), strict=True)
            if row.quantity == quantity and not row.ours and ratio is not None and accurate(config, row)
        ]
        if peers:
            ratio, library = min(peers)
            found.append(Target(quantity, library, ratio, bar))
    return found


def accurate(config: PeersBenchConfig, row: Row) -> bool:
    """Whether a row is within the error asked for."""
    return row.error is not None and row.error <= config.target


def markdown(config: PeersBenchConfig, rows: list[Row]) -> str:
    """The table, with the targets below."""
    device = jax.devices()[0]
    lines = [
        (
            f"{config.num_tasks} {config.ways}-way {config.shots}-shot {config.dataset} tasks, {config.queries} "
            f"queries per class; implicit logistic head on a tanh MLP of widths {', '.join(map(str, config.widths))}. "
            f"Single level: {config.num_train} digits on {config.num_test}, an MLP with {config.hidden} hidden units. "
            f"{jnp.result_type(float)}; {device.platform} ({device.device_kind}, {os.cpu_count()} cores, load "
            f"{os.getloadavg()[0]:.1f} at the end), jax {jax.__version__}. Each library at its loosest setting with a "
            f"relative error of at most {config.target:g}; compile time is left out; the shortest of some runs in turn."
        ),
        "",
        "| quantity | library | seconds | ratio to ours | relative error | how | runs |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row, ratio in zip(rows, ratios(rows), strict=True):
        seconds = "" if row.seconds is None else f"{row.seconds:.4f}"
        times = "" if ratio is None else f"{ratio:.2f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append(
            f"| {row.quantity} | {row.library} | {seconds} | {times} | {error} | {row.note} | {row.runs or ''} |"
        )
    lines += ["", "| target | fastest accurate peer | its time over ours | bar | met |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {quantity} | {peer} | {ratio:.2f} | {bar:g} | {'yes' if ratio >= bar else 'NO'} |"
        for quantity, peer, ratio, bar in targets(config, rows)
    ]
    return "\n".join([*lines, ""])
