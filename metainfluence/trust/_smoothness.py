"""Whether the end of a training run depends smoothly enough on the data weights for a derivative to be useful."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import calling, maker
from metainfluence.data import Task, Weights, resolve_weights, sizes
from metainfluence.differentiation import REVERSE
from metainfluence.problem import task_loss
from metainfluence.response import trajectory
from metainfluence.training import Run
from metainfluence.trust._parts import bent_ends, inner_share

__all__ = ["Smoothness", "smoothness"]

# Scores from which a run counts as smooth, and below which as rough: to be judged by measurement, as by LOO against
# retraining.
SMOOTH = 0.9
ROUGH = 0.5
SILENT = "silent"

STEP_SIZES = (1 / 16, 1 / 4, 1.0)
SHARE = 0.05

_REMEDIES = {
    "optimizer": "the optimiser bends most: give it a larger eps_root (Adam; 1e-5 and more), a warm-up of the learning "
    "rate, or a smaller one",
    "inner": "the inner adaptation bends most: lower its learning rate, take fewer steps, give an inner Adam a larger "
    "eps_root, and take tanh or softplus for ReLU",
    "outer": "the outer loss bends most: lower the learning rate, take tanh or softplus for ReLU, and average λ over "
    "the last steps",
}
_WHOLE = "no one part bends by itself: take a smaller learning rate, a warm-up, or an average of λ over the last steps"


class Smoothness(NamedTuple):
    """How smoothly the end of a run depends on the weights; all numbers but `step_sizes` are in [−1, 1], 1 for linear.

    Attributes:
      score: the mean of `derivative`: how good the derivative is, for comparing runs.
      step_sizes: h `[H]`; at 1 the data of a direction are removed.
      sign: `[H]`, metasmoothness (Engstrom et al., 2025): how often φ(w) − φ(w + hd) and φ(w − hd) − φ(w) have the same
        sign, weighted by their sizes.
      size: `[H]`, how well these differences a and b agree in size too: 2 Σab / Σ(a² + b²).
      derivative: `[H]`, how well the derivative along d agrees with φ(w + hd) − φ(w), in the same measure.
      optimizer: agreement with the derivative at the largest h if the gradient were linear in λ and w; None where the
        run's problem and optimiser are unknown, as in a `training_loop`.
      inner: the same if only the inner adaptation were nonlinear; None also for a problem whose levels cannot be told
        apart.
      outer: the same if only the outer loss were nonlinear (for a `from_task_loss`, the complete loss).
      verdict: "smooth", "between" or "rough"; "silent" where no weight moves any target and the derivative is exactly
        0: all numbers are 0 then.
      advice: what that means, which part bends most, and what to do.
    """

    score: float
    step_sizes: Float[np.ndarray, " H"]
    sign: Float[np.ndarray, " H"]
    size: Float[np.ndarray, " H"]
    derivative: Float[np.ndarray, " H"]
    optimizer: float | None
    inner: float | None
    outer: float | None
    verdict: str
    advice: str


class SmoothnessOf(Protocol):
    """What `smoothness` makes."""

    def __call__(self, start: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Smoothness:
        """The smoothness of the run from `start`."""


@maker
def smoothness(
    run: Run,
    target: Callable[..., Array] | None = None,
    *,
    step_sizes: Sequence[float] = STEP_SIZES,
    num_directions: int = 4,
    share: float = SHARE,
    parts: bool = True,
    runs_at_once: int | None = None,
    seed: int = 0,
) -> SmoothnessOf:
    """Makes (start, tasks, *target_args, weights=None) -> Smoothness; for use outside jit.

    Trains 1 + 2 · H · D times, for H step sizes and D directions. A direction d lowers the weights of a random group of
    tasks; the runs at w ± h d are compared with each other and with the derivative. With `parts`, D more runs of about
    four times the cost show which part of the run is nonlinear: in each of them, all parts but one are replaced by
    their tangents along the run.

    Args:
      run: made by `metainfluence.training` or `training_loop`.
      target: φ: (meta_params, *target_args) -> numbers that the end is judged by; None for the losses of all tasks or,
        for a run without a problem, λ itself.
      step_sizes: h, positive; 1 removes a group.
      num_directions: D.
      share: share of the tasks in a group, at least one task.
      parts: whether to measure the parts separately.
      runs_at_once: runs that are trained together, which bounds the memory; None for all.
      seed: of the groups.

    Raises:
      TypeError: not a run, or a target that cannot be called like this.
      ValueError: step sizes, directions or a share out of range; a start, tasks or weights that are not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> import optax
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(jnp.zeros((3, 1)), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> def measured(rate):
      ...     run = mi.training(problem, optax.sgd(rate), num_steps=10)
      ...     found = mi.smoothness(run, lambda m: m, step_sizes=(0.25, 1.0), parts=False)(jnp.asarray(0.0), tasks)
      ...     return round(found.score, 1), found.verdict
      >>> measured(0.1), measured(2.5)  # steps of more than 2 overshoot further each time
      ((1.0, 'smooth'), (0.6, 'between'))
    """
    if not isinstance(run, Run):
        raise TypeError(f"run: expected one made by metainfluence.training or training_loop, got {type(run).__name__}")
    if target is not None and not callable(target):
        raise TypeError(f"target: expected a function (meta_params, *target_args) -> numbers, got {target!r}")
    heights = np.asarray(step_sizes, float)
    if heights.ndim != 1 or not heights.size or not (np.all(heights > 0) and np.all(np.isfinite(heights))):
        raise ValueError(f"step_sizes: expected positive numbers, got {step_sizes!r}")
    if isinstance(num_directions, bool) or not isinstance(num_directions, int) or num_directions < 1:
        raise ValueError(f"num_directions: expected a positive integer, got {num_directions!r}")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share!r}")
    if runs_at_once is not None and (isinstance(runs_at_once, bool) or runs_at_once < 1):
        raise ValueError(f"runs_at_once: expected None or a positive integer, got {runs_at_once!r}")

    def measure(start: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Smoothness:
        weights = resolve_weights(weights, tasks)
        at = trajectory(run)(start, tasks, weights)
        tasks, weights = at.tasks, at.used_weights
        directions = _directions(tasks, weights, num_directions, share, seed)
        values = _values(run, target, tasks, target_args)

        def ends(start: PyTree, tasks: Task, weights: Weights, steps: Array) -> PyTree:
            """λ at the end at w + h d, `[2H, D, ...]`."""
            grid = jax.tree.map(lambda d: jnp.tensordot(steps.astype(d.dtype), d, 0), directions)
            moved = jax.tree.map(
                lambda w, d: (w[None, None] + d).reshape(d.shape[0] * d.shape[1], *w.shape), weights, grid
            )
            found = jax.lax.map(lambda w: run(start, tasks, w), moved, batch_size=runs_at_once or len(moved.task))
            return jax.tree.map(lambda leaf: leaf.reshape(len(steps), -1, *leaf.shape[1:]), found)

        rates = at.jvp(directions).delta
        steps = jnp.asarray(np.concatenate([heights, -heights]))
        moved = jax.jit(ends)(start, tasks, weights, steps)
        here, slopes = jax.jit(
            lambda m, rates: jax.vmap(lambda rate: jax.jvp(values, (m,), (rate,)), out_axes=(None, 0))(rates)
        )(at.meta_params, rates)
        changes = np.asarray(jax.jit(jax.vmap(jax.vmap(values)))(moved) - here[None, None])
        down, up = np.split(changes, 2)
        predicted = heights[:, None, None] * np.asarray(slopes)[None]
        # Separately compiled programs may differ in the last digits of equal numbers.
        rounding = 1e3 * float(jnp.finfo(here.dtype).eps) * float(np.max(np.abs(here)))
        if not np.any(predicted) and np.max(np.abs(changes)) <= rounding:
            return _silent(heights)
        sign, size, derivative = (
            np.mean(each, axis=1) for each in (signs(down, -up), sizes_of(down, -up), sizes_of(down, predicted))
        )
        told: tuple[Any, Any, Any] = (None, None, None)
        if parts:
            changed = jax.tree.map(lambda leaf, end: leaf[int(np.argmax(heights))] - end[None], moved, at.meta_params)
            told = _parts(
                run, start, tasks, weights, directions, float(np.max(heights)), at.meta_params, rates, changed, values
            )
        return _told(heights, sign, size, derivative, told)

    return measure


def signs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How often numbers on the last axis have the same sign, weighted by their sizes; 0 where one is not finite."""
    weight = np.abs(left) + np.abs(right)
    return _share(np.sum(weight * np.sign(left) * np.sign(right), axis=-1), np.sum(weight, axis=-1))


def sizes_of(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """2 Σab / Σ(a² + b²) over the last axis: 1 for equal numbers only; 0 where one is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return _share(2 * np.sum(left * right, axis=-1), np.sum(left**2 + right**2, axis=-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        share = np.where(whole == 0, 1.0, part / whole)
    return np.where(np.isfinite(share), share, 0.0)


def _directions(tasks: Task, weights: Weights, count: int, share: float, seed: int) -> Weights:
    """Groups of tasks whose weight goes down to 0 at h = 1, `[D, ...]`."""
    total = sizes(tasks).lead[0]
    rng = np.random.default_rng(seed)
    groups = np.zeros((count, total))
    for group in groups:
        group[rng.choice(total, max(1, round(share * total)), replace=False)] = 1.0
    zeros = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), weights)
    return zeros._replace(task=-jnp.asarray(groups, weights.task.dtype) * weights.task[None])


def _values(run: Run, target: Any, tasks: Task, target_args: tuple[Any, ...]) -> Callable[[PyTree], Float[Array, " M"]]:
    """φ, flat."""

    def values(meta_params: PyTree) -> Array:
        if target is not None:
            with calling("target", "(meta_params, *target_args)"):
                return jnp.ravel(target(meta_params, *target_args))
        if run.problem is None:
            return ravel_pytree(meta_params)[0]
        loss = task_loss(run.problem)
        return jax.vmap(lambda task: loss(meta_params, task))(tasks)

    return values


def _parts(
    run: Run,
    start: PyTree,
    tasks: Task,
    weights: Weights,
    directions: Weights,
    height: float,
    end: PyTree,
    rates: PyTree,
    changed: PyTree,
    values: Callable[[PyTree], Array],
) -> tuple[Any, Any, Any]:
    """Agreement with the derivative where only the optimiser, the adaptation or the outer loss bends."""
    problem, optimizer = run.problem, getattr(run, "optimizer", None)
    if problem is None or optimizer is None or problem.hvp == REVERSE:
        return None, None, None

    def bent(start: PyTree, tasks: Task, weights: Weights, rates: PyTree) -> tuple[Array, Array, Array]:
        ends = bent_ends(run, problem, optimizer)(start, tasks, weights, jax.tree.map(lambda d: height * d, directions))
        here, tangent = jax.linearize(values, end)
        moved = jax.tree.map(lambda leaf, change: leaf[None] + change, end, ends.gradient)
        predicted = jax.vmap(tangent)(jax.tree.map(lambda leaf: height * leaf, rates))
        return jax.vmap(tangent)(ends.optimizer), jax.vmap(values)(moved) - here[None], predicted

    by_optimizer, by_gradient, predicted = map(np.asarray, jax.jit(bent)(start, tasks, weights, rates))
    of_optimizer = np.mean(sizes_of(by_optimizer, predicted))
    of_gradient = np.mean(sizes_of(by_gradient, predicted))
    if problem.adapt is None:
        return of_optimizer, None, of_gradient
    inner = float(jax.jit(inner_share(problem))(end, changed, tasks, weights))
    inner = inner if np.isfinite(inner) else 0.5
    return of_optimizer, 1 - inner * (1 - of_gradient), 1 - (1 - inner) * (1 - of_gradient)


def _silent(heights: np.ndarray) -> Smoothness:
    """For a run that does not react to the weights: perfectly linear, but it says nothing about any datum."""
    none = np.zeros(len(heights))
    advice = (
        "the run does not answer the weights: no target moves when data are removed, and the derivative is exactly 0; "
        "units that are dead from the start (ReLU), a learning rate of 0, a loss that leaves out its weights, or a "
        "target that does not see λ: metainfluence.coupling tells of the weights"
    )
    return Smoothness(0.0, heights, none, none, none, None, None, None, SILENT, advice)


def _told(heights: np.ndarray, sign: np.ndarray, size: np.ndarray, derivative: np.ndarray, parts: Any) -> Smoothness:
    score = float(np.mean(derivative))
    verdict = "smooth" if score >= SMOOTH else "between" if score >= ROUGH else "rough"
    known = {name: float(value) for name, value in zip(_REMEDIES, parts, strict=True) if value is not None}
    worst = min(known, key=lambda name: known[name]) if known else ""
    remedy = _REMEDIES[worst] if worst and known[worst] < SMOOTH else _WHOLE
    advice = {
        "smooth": "the run's derivative tells what removals do: take metainfluence.trajectory",
        "between": f"the run's derivative tells part of what removals do; {remedy}",
        "rough": f"the run's derivative tells little of what removals do: take metainfluence.segments, or train "
        f"again; {remedy}",
    }[verdict]
    return Smoothness(
        score,
        heights,
        sign,
        size,
        derivative,
        optimizer=known.get("optimizer"),
        inner=known.get("inner"),
        outer=known.get("outer"),
        verdict=verdict,
        advice=advice,
    )
