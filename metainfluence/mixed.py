"""Mixed precision: networks with matrix products in half precision, and a probe of whether scores survive it.

`compute_in` wraps the network, never a complete loss: norms, distances, softmax, heads and their solves stay in λ's own
precision. `probe` compares the scores of a few tasks with those in full precision, and raises where their ranks differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from metainfluence._checks import check_positive, concrete
from metainfluence._rounded import rounded
from metainfluence.data import PIECE, Task, sizes, stack_tasks
from metainfluence.influence import Scores, influence_scores
from metainfluence.problem import Bilevel, check_meta_params

__all__ = ["PrecisionError", "Probe", "compute_in", "probe"]

F = TypeVar("F", bound=Callable[..., Any])

LEAST = 0.999


class PrecisionError(RuntimeError):
    """Scores no longer have the same ranking in lower precision."""


class Probe(NamedTuple):
    """How scores of some tasks differ between a problem in mixed precision and the same problem in full precision.

    Attributes:
      rank_correlation: Spearman's correlation of the scores of all tasks, support and query examples; NaN where some
        are not finite or all are the same.
      error: norm of the difference over the norm of the scores in full precision.
      num_scores: how many were compared.
    """

    rank_correlation: float
    error: float
    num_scores: int


def compute_in(dtype: Any) -> Callable[[F], F]:
    """Makes a wrapper that computes a network's matrix products and convolutions in half precision.

    Both operands of each product are rounded to `dtype`, in derivatives of every order too. Sums within a product are
    taken in float32. Everything else stays as it is: parameters, activations, normalisation, cotangents, and sums over
    examples and tasks. So an optimiser, a Hessian product and a solve get numbers of λ's own dtype. This holds on every
    device; on a CPU it takes longer than full precision.

    Args:
      dtype: `jnp.bfloat16`, which has float32's range, or `jnp.float16`, which has more digits and overflows at 65504.

    Returns:
      Function that wraps any (params, inputs, ...) -> outputs, such as `model.apply`.

    Raises:
      ValueError: another dtype.
      TypeError: when called, products inside a `custom_vjp`, a `custom_jvp`, a branch or a loop of unknown length.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> def network(weights, images):
      ...     return images @ weights
      >>> half = mi.mixed.compute_in(jnp.bfloat16)(network)
      >>> half(jnp.full((1, 1), 1.001), jnp.ones((1, 1))).item(), half(jnp.ones((1, 1)), jnp.ones((1, 1))).dtype.name
      (1.0, 'float32')
    """
    known = jnp.dtype(dtype) if dtype is not None else None
    if known not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"dtype: expected jnp.bfloat16 or jnp.float16, got {dtype!r}")

    def around(apply: F) -> F:
        if not callable(apply):
            raise TypeError(f"apply: expected a function (params, inputs) -> outputs, got {apply!r}")
        return rounded(apply, known)  # type: ignore[return-value]

    return around


class ProbeOf(Protocol):
    """What `probe` makes."""

    def __call__(self, meta_params: PyTree, tasks: Any, *target_args: Any) -> Probe:
        """The probe at λ, on some of the tasks: stacked ones, or a source of single ones."""


def probe(
    problem: Bilevel,
    full: Bilevel,
    target: Callable[..., Array],
    *,
    num_tasks: int = 8,
    least: float = LEAST,
    damping: Any = 0.0,
    **options: Any,
) -> ProbeOf:
    """Makes (meta_params, tasks, *target_args) -> Probe, to be called before a run in mixed precision, outside jit.

    Scores a few tasks twice, with the problem and with the same problem in full precision, and compares the ranks.
    Whatever makes a ranking meaningless shows there: a loss that overflows, a norm that underflows, a distance that
    rounding wipes out.

    Args:
      problem: with a network wrapped by `compute_in`, or one that computes in half precision by itself.
      full: the same problem, made with the network itself.
      target: φ: (meta_params, *target_args) -> scalar, as in `influence_scores`; if it is made from a problem, then
        from `full`.
      num_tasks: how many tasks to score, spread evenly over all.
      least: rank correlation below which it raises.
      damping: as in `influence_scores`; with "auto" both use what the rule chooses for `full`.
      **options: options of `influence_scores`, those of the run that follows.

    Raises:
      PrecisionError: the rank correlation, which the message names, is below `least`.
      ValueError: as `influence_scores`; fewer than two scores.
      TypeError: under jit.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> def problem_of(network):
      ...     return mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * (network(task.query, m) - 1) ** 2))
      >>> full, tasks = problem_of(jnp.matmul), mi.Task((), jnp.asarray([[[1.0]], [[2.0]], [[3.0]]]))
      >>> half = problem_of(mi.mixed.compute_in(jnp.bfloat16)(jnp.matmul))
      >>> found = mi.mixed.probe(half, full, lambda m: m[0], damping=1.0)(jnp.asarray([0.4]), tasks)
      >>> round(found.rank_correlation, 3), found.error < 0.01
      (1.0, True)
    """
    check_positive("num_tasks", num_tasks, integer=True)
    if not 0 < least <= 1:
        raise ValueError(f"least: expected a number above 0, and of at most 1, got {least!r}")
    if not callable(target):
        raise TypeError(f"target: expected a function (meta_params, *target_args) -> scalar, got {target!r}")

    def run(meta_params: PyTree, tasks: Any, *target_args: Any) -> Probe:
        check_meta_params(meta_params)
        if not concrete(meta_params, target_args, tasks if isinstance(tasks, Task) else ()):
            raise TypeError("meta_params: expected arrays with values, got traced ones; call the probe outside of jit")
        few = _some(tasks, num_tasks)

        def scores(problem: Bilevel, damping: Any) -> Scores:
            made = influence_scores(problem, target, damping=damping, **options)
            return jax.jit(made)(meta_params, few, *target_args)

        wanted = scores(full, damping)
        # What the rule chose.
        chosen: Any = wanted.info.damping if isinstance(damping, str) else damping
        found = scores(problem, float(chosen))
        return _checked(_compared(_flat(found, few), _flat(wanted, few)), least)

    return run


def _some(tasks: Any, count: int) -> Task:
    """Some tasks, spread evenly."""
    stacked = isinstance(tasks, Task)
    if not stacked and not (hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__")):
        raise TypeError(
            f"tasks: expected stacked tasks, or a source of single ones, got {type(tasks).__name__}; {PIECE}"
        )
    number = sizes(tasks).lead[0] if stacked else len(tasks)
    chosen = np.unique(np.linspace(0, number - 1, count).astype(int))
    if stacked:
        return jax.tree.map(lambda leaf: leaf[chosen], tasks)
    return stack_tasks([tasks[k] for k in chosen.tolist()])


def _flat(scores: Scores, tasks: Task) -> np.ndarray:
    """All scores of real data."""
    masks = (None, tasks.support_mask, tasks.query_mask)
    sides = [np.asarray(side, float) for side in (scores.task, scores.support, scores.query)]
    real = [each if mask is None else each[np.asarray(mask)] for each, mask in zip(sides, masks, strict=True)]
    return np.concatenate([each.ravel() for each in real])


def _compared(found: np.ndarray, wanted: np.ndarray) -> Probe:
    from scipy.stats import rankdata

    if len(wanted) < 2:
        raise ValueError(f"tasks: expected at least two scores to compare in their ranks, got {len(wanted)}")
    norm = float(np.linalg.norm(wanted))
    error = float(np.linalg.norm(found - wanted)) / norm if norm else float("nan")
    correlation = float("nan")
    if np.all(np.isfinite(found)) and np.all(np.isfinite(wanted)) and np.ptp(found) > 0 and np.ptp(wanted) > 0:
        correlation = float(np.corrcoef(rankdata(found), rankdata(wanted))[0, 1])
    return Probe(correlation, error, len(wanted))


def _checked(found: Probe, least: float) -> Probe:
    """Raises unless the rankings agree."""
    if found.rank_correlation >= least:
        return found
    told = f"{found.rank_correlation:.5f}"
    if np.isnan(found.rank_correlation):
        told = "none: scores are not finite, or all the same"
    raise PrecisionError(
        f"problem: expected scores whose rank correlation with those in full precision is at least {least}, got {told} "
        f"(relative error {found.error:.1e}, {found.num_scores} scores): keep losses, norms, distances and heads out "
        "of compute_in, which goes around the network alone; or compute in full precision"
    )
