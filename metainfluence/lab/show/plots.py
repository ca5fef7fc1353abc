"""Plots of the library's results: each function draws on given matplotlib axes, or on new ones, and returns them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

import metainfluence as mi
from metainfluence.evaluation import detection_curve, flags, numbers
from metainfluence.lab.data.fewshot import CLEAN, FLIPPED, NOISE, SHORTCUT, WRONG_DOMAIN

HARM_COLORS = {
    CLEAN: "#b8bec6",
    FLIPPED: "#d1495b",
    SHORTCUT: "#2a6fb0",
    NOISE: "#00a6a6",
    WRONG_DOMAIN: "#c77dba",
}
METHOD_COLORS = (  # none is used for a kind of harm
    "#1b1b1b", "#e08e1b", "#3c8d5a", "#8a8f98", "#7b5ea7", "#a0522d", "#c2569b", "#3aa6b9", "#b5a642", "#5d6d7e",
    "#e0a3a3", "#7fbf7f", "#c9ced6", "#4b6cb7", "#2f7d7d", "#d9b8e0",
)  # fmt: skip
KNOWN_BAD = "known bad"
_BAD_COLOR, _FAINT, _DARK = HARM_COLORS[FLIPPED], HARM_COLORS[CLEAN], METHOD_COLORS[0]


def ranking_and_detection(
    scores: np.ndarray, harm: np.ndarray, methods: Mapping[str, np.ndarray], path: Path, *, title: str
) -> None:
    """Draw the ranked task scores, coloured by the ground truth, next to the detection curves of several methods.

    Args:
      scores: [T], of every task.
      harm: [T], the ground truth from `fewshot.harm`.
      methods: name -> scores, as in `detection`.
      path: path of the PNG.
      title: title above both panels.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    ranking(scores, harm=harm, ax=left)
    damaged = harm != CLEAN
    detection(methods, damaged, ax=right)
    right.set(
        title="Harmful tasks found",
        xlabel="share of tasks inspected, most harmful first",
        ylabel=f"share of the {damaged.sum()} harmful tasks found",
    )
    figure.savefig(path, dpi=150)


def ranking(scores: ArrayLike, *, harm: ArrayLike | None = None, ax: Any = None) -> Any:
    """Bars of all tasks' scores, the most harmful first.

    Args:
      scores: [T], the predicted change of the target on removal.
      harm: ground truth to colour the bars by: known bad tasks, bool [T], or the kind of each task, as strings [T] from
        `fewshot.harm` or your own; None for none.
      ax: axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: scores that are not finite [T]; `harm` of another shape, or neither booleans nor strings.
    """
    values = numbers("scores", scores, (1,))
    kinds = np.full(len(values), CLEAN) if harm is None else _kinds(harm, len(values))
    order, ax = np.argsort(values, kind="stable"), _axes(ax)
    for kind, color in _kind_colors(kinds).items():
        ranks = np.flatnonzero(kinds[order] == kind)
        ax.bar(ranks + 1, values[order][ranks], width=1.0, color=color, label=f"{kind} ({len(ranks)})")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(
        xlim=(0.5, len(values) + 0.5),
        title="Influence of every task",
        xlabel="tasks, most harmful first",
        ylabel="predicted change of the held-out loss on removal",
    )
    if harm is not None:
        ax.legend(title="ground truth", frameon=False, loc="lower right")
    return clean(ax)


def examples(
    images: ArrayLike,
    scores: ArrayLike,
    *,
    labels: Sequence[Any] | np.ndarray | None = None,
    harm: ArrayLike | None = None,
    axes: Any = None,
) -> Any:
    """Images of a task's most harmful examples, in the first row, and of its most helpful, in the second.

    Args:
      images: [n, H, W] or [n, H, W, C], grey or with brightness in [0, 1].
      scores: [n], the predicted change of the target on removal, written above each image.
      labels: [n], also written above; None for none.
      harm: bool [n], the examples known to be bad, which get a red frame; None for none.
      axes: array [2, m] to draw on, m examples per row; None for new ones, with five examples or as many as there are.

    Returns:
      The axes, [2, m].

    Raises:
      TypeError: `harm` holds no booleans.
      ValueError: shapes that disagree, or more axes in a row than examples.
    """
    values, pictures = numbers("scores", scores, (1,)), np.asarray(images)
    count = len(values)
    if pictures.ndim not in (3, 4) or len(pictures) != count:
        raise ValueError(f"images: expected shape [{count}, H, W] or [{count}, H, W, C], got {pictures.shape}")
    if labels is not None and np.shape(labels) != (count,):
        raise ValueError(f"labels: expected shape {(count,)}, got {np.shape(labels)}")
    bad = np.zeros(count, bool) if harm is None else flags("harm", harm, (count,))
    if axes is None:
        shown = min(5, count)
        axes = Figure(figsize=(1.5 * shown, 3.9), layout="constrained").subplots(2, shown, squeeze=False)
    axes = np.asarray(axes)
    if axes.ndim != 2 or axes.shape[0] != 2 or not 1 <= axes.shape[1] <= count:
        raise ValueError(f"axes: expected shape [2, m] with m from 1 to {count}, the examples, got {axes.shape}")
    order = np.argsort(values, kind="stable")
    for name, row, chosen in zip(("most harmful", "most helpful"), axes, (order, order[::-1]), strict=True):
        for ax, k in zip(row, chosen, strict=False):
            ax.imshow(pictures[k], cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{values[k]:+.1e}" if labels is None else f"{labels[k]}\n{values[k]:+.1e}", fontsize="small")
            ax.spines[:].set(visible=bool(bad[k]), color=_BAD_COLOR, linewidth=3)
        row[0].set_ylabel(name)
    return axes


def detection(
    methods: Mapping[str, ArrayLike], damaged: ArrayLike, *, colors: Mapping[str, str] | None = None, ax: Any = None
) -> Any:
    """The share of damaged data found against the share inspected, most harmful first, for several methods.

    Args:
      methods: name -> scores, [N], or [draws, N], whose curves are averaged.
      damaged: bool [N], the ground truth.
      colors: name -> colour, to give a method the same colour in several plots; None for `METHOD_COLORS` in turn.
      ax: axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      TypeError: `damaged` holds no booleans.
      ValueError: `damaged` is a scalar, or scores have another shape; the message names the method.
    """
    truth = flags("damaged", damaged, (np.size(damaged),))
    curves = {}
    for name, scores in methods.items():
        draws = np.atleast_2d(numbers(f"methods[{name!r}]", scores, (1, 2)))
        if draws.shape[1] != len(truth):
            raise ValueError(
                f"methods[{name!r}]: expected {len(truth)} scores, one for each of damaged, got {draws.shape[1]}"
            )
        curves[name] = np.mean([detection_curve(draw, truth) for draw in draws], axis=0)
    inspected, share, ax = np.linspace(0, 1, len(truth) + 1), truth.mean(), _axes(ax)
    ax.plot([0, share, 1], [0, 1, 1], color="#d9dce1", linewidth=5, solid_joinstyle="round", label="best possible")
    colors = _in_turn(curves) if colors is None else colors
    for name, curve in curves.items():
        ax.plot(inspected, curve, color=colors.get(name), linewidth=1.8, label=name)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    ax.set(xlim=(0, 1), ylim=(0, 1.02), title="Damaged data found", xlabel="share inspected", ylabel="share found")
    ax.legend(frameon=False, loc="lower right")
    return clean(ax)


def predicted_and_retrained(
    predicted: ArrayLike, retrained: ArrayLike, *, harm: ArrayLike | None = None, ax: Any = None
) -> Any:
    """Predicted changes of the target against those found by retraining, with the line of equality.

    The title states Pearson's and Spearman's correlation.

    Args:
      predicted: [n], such as the scores of the removed data.
      retrained: [n], the changes found by retraining.
      harm: as in `ranking`.
      ax: axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: values that are not finite [n], or `retrained` or `harm` with another shape than `predicted`.
    """
    left, right = numbers("predicted", predicted, (1,)), numbers("retrained", retrained, (1,))
    if left.shape != right.shape:
        raise ValueError(f"retrained: expected shape {left.shape}, that of predicted, got {right.shape}")
    kinds = np.full(len(left), CLEAN) if harm is None else _kinds(harm, len(left))
    ax = _axes(ax)
    both = np.concatenate([left, right])
    margin = 0.05 * (np.ptp(both) or 1.0)
    ends = (both.min() - margin, both.max() + margin)
    ax.plot(ends, ends, color="#d9dce1", linewidth=2, label="equal", zorder=0)
    for kind, color in (_kind_colors(kinds) if harm is not None else {CLEAN: HARM_COLORS[SHORTCUT]}).items():
        own = kinds == kind
        ax.scatter(left[own], right[own], color=color, s=22, alpha=0.85, label=kind if harm is not None else None)
    ax.set(xlim=ends, ylim=ends, aspect="equal", xlabel="predicted change", ylabel="change found by retraining")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    if len(left) > 1 and np.ptp(left) > 0 and np.ptp(right) > 0:
        found = mi.evaluation.loo_correlation(left, right, num=1)
        ax.set_title(f"Pearson {float(found.pearson.value):.2f}, Spearman {float(found.spearman.value):.2f}")
    ax.legend(frameon=False, fontsize="small")
    return clean(ax)


def spectrum(found: mi.Spectrum, *, damping: float | None = None, ax: Any = None) -> Any:
    """Ritz values of the total Hessian in ascending order, each with its residual as an error bar.

    Each error bar contains an eigenvalue. If a damping δ is given, the band |θ| ≤ δ is shaded: in directions of less
    curvature the damping decides, not the data. Below −δ the damped Hessian is not positive definite.

    Args:
      found: from `metainfluence.spectrum`.
      damping: δ; None for none.
      ax: axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      TypeError: `found` is not a `Spectrum`.
      ValueError: a negative damping.
    """
    if not isinstance(found, mi.Spectrum):
        raise TypeError(f"found: expected a metainfluence.Spectrum, got {type(found).__name__}")
    if damping is not None and not damping >= 0:
        raise ValueError(f"damping: expected a non-negative number, got {damping!r}")
    valid = np.asarray(found.valid)
    values, residuals = np.asarray(found.values, float)[valid], np.asarray(found.residuals, float)[valid]
    ax = _axes(ax)
    ax.errorbar(
        np.arange(1, len(values) + 1), values, yerr=residuals, fmt="o", markersize=3.5, color=_DARK, ecolor="#e08e1b",
        elinewidth=2, label="Ritz value, and its residual",
    )  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    largest = np.abs(values).max()
    # The decades below the largest that are informative about the damping.
    smallest = min(damping, 1e-2 * largest) if damping else 1e-4 * largest
    ax.set_yscale("symlog", linthresh=smallest or 1.0)
    if damping is not None:
        ax.axhspan(-damping, damping, color="#2a6fb0", alpha=0.12, linewidth=0)
        ax.axhline(damping, color="#2a6fb0", linewidth=1.2, linestyle="--", label=f"damping {damping:.1e}")
    ax.set(title="Spectrum of the total Hessian", xlabel="Ritz values, ascending", ylabel="curvature")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="upper left")
    return clean(ax)


def damping_sweep(found: mi.damping.Sweep, *, harm: ArrayLike | None = None, ax: Any = None) -> Any:
    """How the tasks' ranking changes with the damping: each task's rank, and the correlation of neighbouring rankings.

    Ranks are shown because scores shrink as the damping grows. On a plateau the lines are level and the correlation is
    near 1; it is drawn halfway between two dampings, on the right-hand axis. A cross marks a solve that did not
    converge.

    Args:
      found: from `metainfluence.damping.sweep`.
      harm: as in `ranking`.
      ax: axes to draw on; None for new ones.

    Returns:
      The axes of the ranks; the axes of the correlation are their twin.

    Raises:
      TypeError: `found` is not a `Sweep`.
      ValueError: `harm` has another shape than the tasks.
    """
    if not isinstance(found, mi.damping.Sweep):
        raise TypeError(f"found: expected a metainfluence.damping.Sweep, got {type(found).__name__}")
    scores = np.asarray(found.task, float)
    kinds = np.full(scores.shape[1], CLEAN) if harm is None else _kinds(harm, scores.shape[1])
    ranks, ax = np.argsort(np.argsort(scores, axis=1), axis=1) + 1, _axes(ax)
    # Dampings are evenly spaced, so that 0 has a place among powers of ten.
    place, dampings = np.arange(len(scores)), np.asarray(found.dampings, float)
    for kind, color in _kind_colors(kinds).items():
        for number, k in enumerate(np.flatnonzero(kinds == kind)):
            label = kind if harm is not None and number == 0 else None
            ax.plot(place, ranks[:, k], color=color, linewidth=1, alpha=0.55 if kind == CLEAN else 1, label=label)
    failed = np.asarray(found.info.status) != mi.SolveStatus.CONVERGED
    if failed.any():
        height = np.full(failed.sum(), 0.0)
        ax.scatter(place[failed], height, marker="x", color=_BAD_COLOR, s=40, label="not converged", clip_on=False)
    ax.xaxis.set_major_locator(FixedLocator(place.tolist()))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{damping:.0e}" for damping in dampings]))
    # The most harmful at the top, where readers look for them.
    ax.set(ylim=(scores.shape[1] + 0.5, -0.5), xlim=(-0.1, len(place) - 0.9))
    ax.set(title="Ranking over dampings", xlabel="damping", ylabel="rank of every task, most harmful first")
    twin = ax.twinx()
    twin.plot(place[:-1] + 0.5, np.asarray(found.rank_correlation), color=_DARK, marker="o", markersize=4, linewidth=2)
    twin.set(ylim=(-0.05, 1.05), ylabel="rank correlation with the next damping")
    twin.spines[["top"]].set_visible(False)
    if harm is not None or failed.any():
        ax.legend(frameon=False, loc="lower left", fontsize="small")
    return clean(ax)


def error_against_products(curves: Mapping[str, Any], *, tol: float | None = None, ax: Any = None) -> Any:
    """Solvers' errors against the number J of Hessian products, on a logarithmic axis.

    Args:
      curves: name -> a `metainfluence.solvers.Trace` from `anytime`, whose relative residuals are drawn, or a pair
        (products [J], errors [J]).
      tol: tolerance, drawn as a line; None for none.
      ax: axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: no curves, or a curve whose two parts differ in shape; the message names it.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    read, traces = {}, [isinstance(curve, mi.solvers.Trace) for curve in curves.values()]
    for (name, curve), trace in zip(curves.items(), traces, strict=True):
        products, errors = (curve.num_matvecs, curve.relative_residual) if trace else curve
        products, errors = np.asarray(products), np.asarray(errors, float)
        if products.ndim != 1 or products.shape != errors.shape:
            raise ValueError(
                f"curves[{name!r}]: expected as many products as errors, got shapes {products.shape}, {errors.shape}"
            )
        read[name] = (products, errors)
    ax, colors = _axes(ax), _in_turn(read)
    for name, (products, errors) in read.items():
        ax.plot(products, errors, color=colors[name], linewidth=1.8, label=name)
    if tol is not None:
        ax.axhline(tol, color=_FAINT, linestyle="--", label=f"tol {tol:.0e}")
    ax.set(yscale="log", xlabel="Hessian products", ylabel="relative residual" if all(traces) else "relative error")
    ax.legend(frameon=False)
    return clean(ax)


def clean(ax: Any) -> Any:
    """Removes what is not data: two spines, and all grid lines except faint horizontal ones; returns the axes."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#eceef1")
    ax.set_axisbelow(True)
    return ax


def _axes(ax: Any) -> Any:
    """Axes of a new figure outside matplotlib's global state, unless axes are given."""
    return Figure(figsize=(6.5, 4.2), layout="constrained").subplots() if ax is None else ax


def _in_turn(names: Iterable[str]) -> dict[str, str]:
    return dict(zip(names, cycle(METHOD_COLORS), strict=False))


def _kinds(harm: ArrayLike, count: int) -> np.ndarray:
    """The kind of each datum, as strings [count]."""
    given = np.asarray(harm)
    if given.dtype.kind not in "bU":
        raise ValueError(f"harm: expected booleans or strings, got {given.dtype}")
    if given.shape != (count,):
        raise ValueError(f"harm: expected shape {(count,)}, got {given.shape}")
    return np.where(given, KNOWN_BAD, CLEAN) if given.dtype == np.bool_ else given


def _kind_colors(kinds: np.ndarray) -> dict[str, str]:
    """The colour of each kind that occurs, clean data first; other kinds take the remaining colours."""
    present = [kind for kind in (*HARM_COLORS, *np.unique(kinds).tolist()) if kind in kinds]
    own = (color for kind, color in HARM_COLORS.items() if kind not in (CLEAN, *present))
    spare = [*own, *METHOD_COLORS[1:]]
    return {kind: HARM_COLORS.get(kind) or spare.pop(0) for kind in dict.fromkeys(present)}
