"""Pictures of scores: the ranking of tasks, and detection curves."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from metainfluence.evaluation import detection_curve
from metainfluence.lab.fewshot import CLEAN, FLIPPED, NOISE, SHORTCUT, WRONG_DOMAIN

HARM_COLORS = {
    CLEAN: "#b8bec6",
    FLIPPED: "#d1495b",
    SHORTCUT: "#2a6fb0",
    NOISE: "#00a6a6",
    WRONG_DOMAIN: "#c77dba",
}
METHOD_COLORS = (  # none stands for a kind of harm
    "#1b1b1b", "#e08e1b", "#3c8d5a", "#8a8f98", "#7b5ea7", "#a0522d", "#c2569b", "#3aa6b9", "#b5a642", "#5d6d7e",
    "#e0a3a3", "#7fbf7f", "#c9ced6", "#4b6cb7",
)  # fmt: skip


def ranking_and_detection(
    scores: np.ndarray, harm: np.ndarray, methods: Mapping[str, np.ndarray], path: Path, *, title: str
) -> None:
    """Draw the ranked task scores, coloured by the ground truth, beside the detection curves of several methods.

    Args:
      scores: [T], of every task.
      harm: [T], the ground truth as given by `fewshot.harm`.
      methods: name -> scores, [T] or [draws, T] whose curves are averaged.
      path: of the PNG.
      title: above both panels.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(title, fontsize=13)
    ranking, detection = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_ranking(ranking, scores, harm)
    _draw_detection(detection, harm != CLEAN, methods)
    figure.savefig(path, dpi=150)


def _draw_ranking(axes, scores: np.ndarray, harm: np.ndarray) -> None:
    order = np.argsort(scores, kind="stable")
    for kind, color in HARM_COLORS.items():
        ranks = np.flatnonzero(harm[order] == kind)
        if not len(ranks):
            continue
        axes.bar(ranks + 1, scores[order][ranks], width=1.0, color=color, label=f"{kind} ({len(ranks)})")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(0.5, len(scores) + 0.5)
    axes.set_title("Influence of every task")
    axes.set_xlabel("tasks, most harmful first")
    axes.set_ylabel("predicted change of the held-out loss on removal")
    axes.legend(title="ground truth", frameon=False, loc="lower right")
    clean(axes)


def _draw_detection(axes, damaged: np.ndarray, methods: Mapping[str, np.ndarray]) -> None:
    inspected = np.linspace(0, 1, len(damaged) + 1)
    share = damaged.mean()
    axes.plot([0, share, 1], [0, 1, 1], color="#d9dce1", linewidth=5, solid_joinstyle="round", label="best possible")
    for (name, scores), color in zip(methods.items(), METHOD_COLORS, strict=False):
        curve = np.mean([detection_curve(draw, damaged) for draw in np.atleast_2d(scores)], axis=0)
        axes.plot(inspected, curve, color=color, linewidth=1.8, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Harmful tasks found")
    axes.set_xlabel("share of tasks inspected, most harmful first")
    axes.set_ylabel(f"share of the {damaged.sum()} harmful tasks found")
    axes.legend(frameon=False, loc="lower right")
    clean(axes)


def clean(axes) -> None:
    """Takes away what is not data: two spines, and all grid lines but faint horizontal ones."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceef1")
    axes.set_axisbelow(True)
