"""Predictions compared with retraining: changes of λ, leave-one-out, and each method's linear datamodeling score.

λ is small enough to diagonalise every curvature. Each method is judged at the automatic damping and at the best of a
grid that is the same for all: damping matters more than curvature, so a fair comparison tunes every method equally.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import metainfluence as mi
from metainfluence.evaluation import (
    Estimate,
    leave_one_out,
    linear_datamodeling_score,
    loo_correlation,
    random_subsets,
    retrain,
    roc_auc,
    seed_agreement,
    step_agreement,
)
from metainfluence.lab.experiments import methods as by
from metainfluence.lab.experiments.ranges import Count, NotNegative, Share, Size
from metainfluence.lab.experiments.results import Result, interval
from metainfluence.lab.experiments.setting import Setting, SettingConfig, make
from metainfluence.lab.experiments.trainings import checkpoint_rates
from metainfluence.lab.show.plots import METHOD_COLORS, clean

EXACT, ABSOLUTE = "influence", "influence, |H|"
OTHERS = ("TRAK", "TLXML", "TracIn", "gradient similarity", "plain loss", "random")


@dataclasses.dataclass(frozen=True)
class AgreementConfig:
    """Compares every method's scores and steps with retraining, at its default damping and at its best."""

    title: str = "Agreement with retraining"
    """Heading of the results."""
    setting: SettingConfig = dataclasses.field(default_factory=SettingConfig)
    """Data, damage, learner and training."""
    num_subsets: Count = 32
    """Subsets retrained from scratch, for the LDS."""
    share: Share = 0.5
    """Share of the tasks that each subset keeps."""
    num_left_out: Size = 20
    """Tasks left out one at a time; training then continues from λ."""
    num_targets: Count = 10
    """Groups of held-out tasks; the mean loss on each is one target."""
    floor_subsets: Size = 12
    """Subsets retrained from another start, for the noise floor; 0 for none."""
    factors: tuple[NotNegative, ...] = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    """The grid of dampings, in units of the automatic damping; 0 is no damping."""
    together: Count = 1
    """Retrainings run side by side."""
    draws: Count = 1000
    """Draws of each bootstrap."""


class Truth(NamedTuple):
    """The results of retraining.

    Attributes:
      kept: bool [m, T], tasks that each subset keeps.
      outcomes: [m, J], every target after retraining on each subset.
      left_out: [n], tasks left out one at a time.
      changes: [n, J], the targets after, minus those after training on with all tasks.
      steps: [n, p], λ after, minus λ after training on with all tasks.
      floor: agreement between two starts; None where it was not measured.
    """

    kept: np.ndarray
    outcomes: np.ndarray
    left_out: np.ndarray
    changes: np.ndarray
    steps: np.ndarray
    floor: Estimate | None


class Candidate(NamedTuple):
    """One method at one damping.

    Attributes:
      method: its name.
      factor: in units of the automatic damping, or the method's own setting; None if it has none.
      default: whether the factor is the method's default.
      scores: [J, T].
      steps: [n, p], predicted changes of λ when tasks are left out; None for methods that predict none.
    """

    method: str
    factor: float | None
    default: bool
    scores: np.ndarray
    steps: np.ndarray | None = None


def run(config: AgreementConfig, cache: Path | None = None) -> Result:
    """Trains, retrains and compares.

    Raises:
      ValueError: a grid without 1, a number of held-out tasks that num_targets does not divide, or what `setting.make`
        refuses.
    """
    if 1.0 not in config.factors:
        raise ValueError(f"factors: expected 1, the automatic damping, among them, got {config.factors}")
    if config.setting.data.num_held_out % config.num_targets:
        raise ValueError(
            f"num_targets: expected a divisor of num_held_out {config.setting.data.num_held_out}, got "
            f"{config.num_targets}"
        )
    setting = make(config.setting)
    targets = jax.tree.map(lambda leaf: leaf.reshape(config.num_targets, -1, *leaf.shape[1:]), setting.tasks.held_out)
    truth = ground_truth(config, setting, targets, cache)
    rule = by.chosen_damping(setting)
    rows = [
        judged(config, setting, truth, candidate) for candidate in candidates(config, setting, targets, truth, rule)
    ]
    facts = {
        "meta_parameters": sum(leaf.size for leaf in jax.tree.leaves(setting.trained)),
        "damping": float(rule.value),
        "largest": float(rule.largest),
        "smallest": float(rule.smallest),
        "outer_gradient_norm": float(rule.outer_gradient_norm),
    }
    rows = [{**row, **facts} for row in rows]
    return Result(rows, tables(config, rows), picture(config, rows), notes(config, facts, truth))


def ground_truth(config: AgreementConfig, setting: Setting, targets: mi.Task, cache: Path | None) -> Truth:
    """Retrains on the subsets, from another start, and without single tasks; finished parts are kept in `cache`."""
    weights, tasks = mi.unit_weights(setting.tasks.training), setting.tasks.training
    each = jax.jit(jax.vmap(setting.target, in_axes=(None, 0)))
    fit = setting.fit

    def train(weights: mi.Weights, start: Any, tasks: mi.Task) -> Any:
        return fit(weights, start, tasks)

    def again(name: str, interventions: mi.Weights, start: Any) -> Any:
        folder = None if cache is None else cache / name
        return retrain(train, batch_size=config.together, cache=folder)(interventions, start, tasks)

    def outcomes(models: Any) -> np.ndarray:
        count = len(jax.tree.leaves(models)[0])
        return np.stack(
            [np.asarray(each(jax.tree.map(lambda leaf, k=k: leaf[k], models), targets)) for k in range(count)]
        )

    subsets, kept = random_subsets(weights, config.num_subsets, config.share, config.setting.seed)
    of_subsets = outcomes(again("subsets", subsets, setting.initial))
    floor = None
    if config.floor_subsets:
        other = setting.learner.init(jax.random.key(config.setting.seed + 1), tasks.support[0][0])
        some = jax.tree.map(lambda leaf: leaf[: config.floor_subsets], subsets)
        from_other = outcomes(again("floor", some, other))
        pair = np.stack([of_subsets[: config.floor_subsets].mean(1), from_other.mean(1)])
        floor = seed_agreement(pair, num=config.draws)

    left_out = np.random.default_rng(config.setting.seed).permutation(len(weights.task))[: config.num_left_out]
    # The first run removes nothing, since continued training changes λ too.
    one_less = leave_one_out(weights, tasks=left_out)
    interventions = jax.tree.map(lambda full, less: jnp.concatenate([full[None], less]), weights, one_less)
    models = again("left_out", interventions, setting.trained)
    after = outcomes(models)
    vectors = np.asarray(jax.vmap(lambda tree: ravel_pytree(tree)[0])(models))
    return Truth(kept, of_subsets, left_out, after[1:] - after[0], vectors[1:] - vectors[0], floor)


def candidates(
    config: AgreementConfig, setting: Setting, targets: mi.Task, truth: Truth, rule: mi.damping.Damping
) -> Iterator[Candidate]:
    """All methods at all dampings."""
    yield from by_curvature(config, setting, targets, truth, float(rule.value))
    baselines = mi.baselines
    target = setting.target

    def scores(method: Callable[..., mi.Scores], at: Any = None) -> np.ndarray:
        at = setting.trained if at is None else at

        def all_targets(at: Any, tasks: mi.Task, targets: mi.Task) -> jax.Array:
            return jax.lax.map(lambda held_out: method(at, tasks, held_out).task, targets)

        return np.asarray(jax.jit(all_targets)(at, setting.tasks.training, targets))

    # The damping is an argument of the program, which is thus compiled once for the whole grid.
    def trak(at: Any, tasks: mi.Task, targets: mi.Task, damping: jax.Array) -> jax.Array:
        method = baselines.trak(setting.problem, target, damping=damping)
        return jax.lax.map(lambda held_out: method(at, tasks, held_out).task, targets)

    program = jax.jit(trak)
    for damping in (0.01, 0.1, 1.0, 10.0, 100.0):
        found = program(setting.trained, setting.tasks.training, targets, jnp.asarray(damping))
        yield Candidate("TRAK", damping, damping == 0.1, np.asarray(found))
    yield from by_ekfac(config, setting, targets, float(rule.value))
    rates = checkpoint_rates(config.setting.training)
    yield Candidate(
        "TracIn", None, True, scores(baselines.tracin(setting.problem, target, rates), setting.full.checkpoints)
    )
    for name in ("gradient similarity", "plain loss", "random"):
        yield Candidate(name, None, True, scores(by.METHODS[name](setting.problem, target, None)))


def by_ekfac(config: AgreementConfig, setting: Setting, targets: mi.Task, damping: float) -> Iterator[Candidate]:
    """EKFAC-IF at every damping of the grid; nothing if it does not apply."""
    target = setting.target

    def all_targets(at: Any, tasks: mi.Task, targets: mi.Task, damping: jax.Array) -> jax.Array:
        method = mi.baselines.ekfac_if(setting.problem, target, damping=damping)
        return jax.lax.map(lambda held_out: method(at, tasks, held_out).task, targets)

    program = jax.jit(all_targets)
    try:
        for factor in config.factors:
            found = program(setting.trained, setting.tasks.training, targets, jnp.asarray(factor * damping))
            yield Candidate("EKFAC-IF", factor, factor == 1.0, np.asarray(found))
    except ValueError as error:
        # Any other ValueError is a fault and must not be ignored.
        if "covered by no layer" not in str(error):
            raise


def by_curvature(
    config: AgreementConfig, setting: Setting, targets: mi.Task, truth: Truth, damping: float
) -> Iterator[Candidate]:
    """Influence with every curvature, its matrix diagonalised, at every damping of the grid."""
    problem, tasks = setting.problem, setting.tasks.training
    count = config.setting.data.num_tasks

    def flat(tree: Any) -> jax.Array:
        return jax.vmap(lambda one: ravel_pytree(one)[0])(tree)

    def gradients(problem: mi.Bilevel) -> np.ndarray:
        each = jax.jit(lambda m, t: flat(jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(m, t)))
        return np.asarray(each(setting.trained, tasks)) / count

    slopes = jax.jit(lambda m, t: flat(jax.vmap(jax.grad(setting.target), in_axes=(None, 0))(m, t)))
    of_targets = np.asarray(slopes(setting.trained, targets))
    total = gradients(problem)
    adapt = problem.adapt
    assert adapt is not None
    held = problem._replace(adapt=lambda meta_params, task, w: adapt(jax.lax.stop_gradient(meta_params), task, w))
    kinds: dict[str, tuple[mi.curvature.Curvature, bool, np.ndarray]] = {
        EXACT: (mi.curvature.exact(), False, total),
        ABSOLUTE: (mi.curvature.exact(), True, total),
        "linearized": (mi.curvature.linearized(), True, total),
        "gamma": (mi.curvature.gamma(), True, total),
        "Gauss-Newton": (mi.curvature.gauss_newton(), True, total),
        "direct-IF": (mi.curvature.direct(), True, gradients(held)),
    }
    matrices: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (curvature, absolute, of_tasks) in kinds.items():
        if curvature.name not in matrices:
            dense = jax.jit(lambda m, t, c=curvature: mi.total_hessian(problem, c)(m, t).dense())
            values, vectors = np.linalg.eigh(np.asarray(dense(setting.trained, tasks)))
            matrices[curvature.name] = values, vectors
        values, vectors = matrices[curvature.name]
        for factor in config.factors:
            damped = (np.abs(values) if absolute else values) + factor * damping
            inverse = (vectors / np.where(damped == 0, np.inf, damped)) @ vectors.T
            steps = of_tasks @ inverse
            yield Candidate(name, factor, factor == 1.0, of_targets @ steps.T, steps[truth.left_out])
    # Solves as baselines.tlxml does: by a pseudo-inverse on the eigenvalues above a share of the largest.
    values, vectors = matrices["gauss_newton"]
    for threshold in (1e-4, 1e-3, 1e-2, 3e-2, 1e-1):
        inverse = (vectors / np.where(values > threshold * values[-1], values, np.inf)) @ vectors.T
        steps = total @ inverse
        yield Candidate("TLXML", threshold, threshold == 1e-3, of_targets @ steps.T, steps[truth.left_out])
    yield Candidate("identity", None, True, of_targets @ total.T, total[truth.left_out])


def judged(config: AgreementConfig, setting: Setting, truth: Truth, candidate: Candidate) -> dict[str, Any]:
    """Compares one method at one damping with retraining."""
    options = {"num": config.draws}
    scores = candidate.scores
    each = linear_datamodeling_score(scores, truth.kept, truth.outcomes, **options).mean
    overall = linear_datamodeling_score(scores.mean(0), truth.kept, truth.outcomes.mean(1), **options).mean
    loo = loo_correlation(scores.mean(0)[truth.left_out], truth.changes.mean(1), **options)
    row: dict[str, Any] = {"method": candidate.method, "factor": candidate.factor, "default": candidate.default}
    for name, estimate in {
        "lds": each, "lds_mean": overall, "loo_pearson": loo.pearson, "loo_spearman": loo.spearman,
    }.items():  # fmt: skip
        row |= {name: float(estimate.value), f"{name}_low": float(estimate.low), f"{name}_high": float(estimate.high)}
    damaged = by.level_harm(setting, "task")
    if damaged.any():
        row["auc"] = roc_auc(scores.mean(0), damaged)
    if candidate.steps is not None:
        agreement = step_agreement(candidate.steps, truth.steps)
        row |= {
            "step_cosine": float(np.median(agreement.cosine)),
            "step_norm_ratio": float(np.median(agreement.norm_ratio)),
        }
    return row


def best(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A method's row with the highest LDS over its grid."""
    return max((row for row in rows if row["method"] == name), key=lambda row: row["lds"])


def tables(config: AgreementConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every method at its default and at its best damping."""
    headers = (
        "method", "damping", "LDS per target", "LDS of the mean", "LOO Spearman", "LOO Pearson", "Δλ cosine",
        "Δλ length", "ROC AUC",
    )  # fmt: skip
    names = list(dict.fromkeys(row["method"] for row in rows))
    shown = {
        "At the default damping": [
            next(row for row in rows if row["method"] == name and row["default"]) for name in names
        ],
        "At the damping of highest LDS over the grid": [best(rows, name) for name in names],
    }
    found = {title: (headers, [cells(row) for row in chosen]) for title, chosen in shown.items()}
    undamped = [row for row in rows if row["factor"] == 0.0]
    if undamped:
        found["Without damping"] = (headers, [cells(row) for row in undamped])
    return found


def cells(row: dict[str, Any]) -> list[Any]:
    """One row of a table."""
    intervals = [
        interval(row[name], row[f"{name}_low"], row[f"{name}_high"])
        for name in ("lds", "lds_mean", "loo_spearman", "loo_pearson")
    ]
    factor = "" if row["factor"] is None else f"{row['factor']:g}"
    rest = [f"{row[name]:.3f}" if name in row else "" for name in ("step_cosine", "step_norm_ratio", "auc")]
    return [row["method"], factor, *intervals, *rest]


def notes(config: AgreementConfig, facts: dict[str, Any], truth: Truth) -> list[str]:
    """Explanations of the numbers."""
    floor = "not measured" if truth.floor is None else interval(*(float(end) for end in truth.floor))
    spectrum = f"{facts['smallest']:.2g} … {facts['largest']:.3g}, gradient norm {facts['outer_gradient_norm']:.1e}."
    return [
        f"{facts['meta_parameters']} meta-parameters; automatic damping {facts['damping']:.2g}; Ritz values {spectrum}",
        f"{config.num_subsets} subsets of half the tasks retrained from scratch.",
        f"{config.num_left_out} tasks left out one at a time, trained on from λ beside training on with all tasks.",
        f"Noise floor (Spearman between outcomes from two starts, {config.floor_subsets} subsets): {floor}.",
        "",
        "Damping is in units of the automatic one, for TRAK and TLXML in those of their own argument.",
        "Curvatures other than exact are solved with the absolute values of their eigenvalues.",
        "Intervals: bootstrap, 95 %. Δλ: medians over the tasks left out.",
    ]


def picture(config: AgreementConfig, rows: list[dict[str, Any]]) -> Figure:
    """LDS against damping, and LDS of all methods at their default and best."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    figure.suptitle(config.title)
    curve, bars = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["method"] for row in rows))
    swept = [name for name in names if sum(row["method"] == name for row in rows) > 1 and name not in OTHERS]
    for name, color in zip(swept, METHOD_COLORS, strict=False):
        own = [row for row in rows if row["method"] == name and row["factor"]]
        curve.plot(
            [row["factor"] for row in own], [row["lds"] for row in own], color=color, marker="o", ms=3, label=name
        )
    curve.set(xscale="log", xlabel="damping / automatic damping", ylabel="LDS per target", title="Damping decides")
    curve.axvline(1.0, color="#c9ced6", zorder=0)
    curve.legend(frameon=False, fontsize="small")
    clean(curve)
    place = np.arange(len(names))
    defaults = [next(row for row in rows if row["method"] == name and row["default"]) for name in names]
    for offset, label, chosen, color in (
        (-0.2, "default", defaults, "#2a6fb0"),
        (0.2, "best of the grid", [best(rows, name) for name in names], "#e08e1b"),
    ):
        values = np.array([row["lds"] for row in chosen])
        ends = np.array([[row["lds"] - row["lds_low"], row["lds_high"] - row["lds"]] for row in chosen]).T
        bars.bar(place + offset, values, 0.4, yerr=np.maximum(np.nan_to_num(ends), 0), color=color, label=label)
    bars.set_xticks(place, names, rotation=40, ha="right", fontsize="small")
    bars.set(title="All methods, with 95 % intervals", ylabel="LDS per target")
    bars.legend(frameon=False, fontsize="small")
    clean(bars)
    return figure
