"""Which of the three responses to believe."""

from __future__ import annotations

from typing import Any, NamedTuple

from metainfluence.trust._smoothness import SILENT, SMOOTH, Smoothness

__all__ = ["Chosen", "choose"]

# To be judged by measurement: how far each estimator's agreement with retraining is from the best of the three.
STATIONARY = 1e-3
LARGE_REMOVAL = 0.3


class Chosen(NamedTuple):
    """An estimator and why.

    Attributes:
      estimator: "optimum", "trajectory" or "segments".
      reason: a sentence.
    """

    estimator: str
    reason: str


def choose(
    *,
    gradient_norm: Any = None,
    smoothness: Smoothness | float | None = None,
    share_removed: float = 0.0,
    run: bool = False,
    checkpoints: bool = False,
) -> Chosen:
    """Chooses which of `optimum`, `trajectory` and `segments` should answer a question.

    If λ is a stationary point: `optimum`, which ignores how λ got there. If the run is at hand and smooth:
    `trajectory`, whose derivative is exact for it. If the run is rough, only its checkpoints are left, or a large part
    of its data is to be removed: `segments`. If only λ is at hand, or the run does not react to its data at all:
    `optimum`, damped.

    Args:
      gradient_norm: ‖D_λF‖ at λ divided by that at the start of training; None if unknown.
      smoothness: as measured by `metainfluence.smoothness`, or its score; None if it was not measured.
      share_removed: share of the tasks that is to be removed at once; 0 for single data.
      run: whether the run can be repeated.
      checkpoints: whether checkpoints of it are left.

    Raises:
      ValueError: numbers out of range.

    Examples:
      >>> import metainfluence as mi
      >>> mi.choose(smoothness=0.95, run=True).estimator
      'trajectory'
      >>> mi.choose(smoothness=0.95, run=True, share_removed=0.5).estimator
      'segments'
      >>> mi.choose(gradient_norm=1e-5, run=True).reason
      'λ is stationary: the gradient is 1.0e-05 of that at the start of training'
    """
    score = float(smoothness.score) if isinstance(smoothness, Smoothness) else smoothness
    if score is not None and not -1 <= score <= 1:
        raise ValueError(f"smoothness: expected a Smoothness, or its score in [-1, 1], got {smoothness!r}")
    if gradient_norm is not None and not float(gradient_norm) >= 0:
        raise ValueError(f"gradient_norm: expected a number from 0 on, got {gradient_norm!r}")
    if not 0 <= share_removed <= 1:
        raise ValueError(f"share_removed: expected a number from 0 to 1, got {share_removed!r}")
    if gradient_norm is not None and float(gradient_norm) <= STATIONARY:
        return Chosen(
            "optimum", f"λ is stationary: the gradient is {float(gradient_norm):.1e} of that at the start of training"
        )
    if isinstance(smoothness, Smoothness) and smoothness.verdict == SILENT:
        return Chosen("optimum", f"neither the run nor its checkpoints tell of any datum: {smoothness.advice}")
    known = run or checkpoints
    if not known:
        return Chosen(
            "optimum",
            'only λ is at hand, and it is not known to be stationary: take damping="auto", and mind the budget',
        )
    if share_removed >= LARGE_REMOVAL:
        return Chosen(
            "segments", f"{share_removed:.0%} of the tasks are too many for a derivative at the run's weights"
        )
    if not run:
        return Chosen("segments", "the run cannot be run again, and its checkpoints are left")
    if score is None:
        return Chosen(
            "trajectory", "the run is at hand; whether it is smooth was not measured: metainfluence.smoothness"
        )
    if score >= SMOOTH:
        return Chosen("trajectory", f"the run is at hand, and smooth ({score:.2f})")
    return Chosen("segments", f"the run is not smooth ({score:.2f}): its derivative is exact, and tells little")
