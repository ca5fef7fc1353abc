"""A score file as one HTML page that loads nothing and trusts nothing.

Everything from the file is escaped, and the page's own policy allows only the one script whose hash it names. The page
holds the scores of all tasks, as packed floats, and pictures of the worst and the best tasks.
"""

import base64
import hashlib
import html
import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

import metainfluence as mi
from metainfluence.lab.show.gallery import Shown
from metainfluence.lab.show.page_data import FEW, Measured, cell, packed, ranked
from metainfluence.lab.show.printing import OF_LAB, OF_SCORE, facts, in_options
from metainfluence.response import RunInfo, problems_of_run
from metainfluence.scoring import info_of
from metainfluence.trust import remedy

BARS = "·▁▂▃▄▅▆▇█"  # no task, and few to many


def page(
    table: mi.scoring.ScoreTable,
    *,
    title: str | None = None,
    most: int = 24,
    example: Callable[[int], Shown] | None = None,
    measured: Measured | None = None,
    meta_params: Any = None,
) -> str:
    """The page.

    Args:
      table: a score file that was read.
      title: title of the page; None takes it from the file.
      most: tasks that are shown with their examples, half of them from either end of the ranking; the same for single
        examples.
      example: (row about an example) -> its picture or text; None for none.
      measured: what was measured without the worst, shown next to the prediction.
      meta_params: λ; if given, its distance from stationarity is relative to it.

    Raises:
      ValueError: the metadata is not a score file's.
    """
    folder = files("metainfluence.lab.show") / "page"
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    template = string.Template((folder / "page.html").read_text(encoding="utf-8"))
    info, budget = told(table.metadata, meta_params)
    data = packed(table, most, example, measured)
    return template.substitute(
        title=_text(subject(table) if title is None else title),
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        verdict=_text(verdict(table, info, budget)),
        judged="good" if smooth(table.metadata) and believed(info, budget) else "bad",
        estimator=html.escape(estimator(table.metadata, info)),
        diagnostics=diagnostics(table.metadata, info, budget, meta_params is not None),
        ran=ran(table.metadata),
        plain=plain(table, data["roles"][0]),
        data=html.escape(json.dumps(data, ensure_ascii=False), quote=False),
    )


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _text(value: Any) -> str:
    """Anything as text that cannot be markup."""
    return html.escape(cell(value))


def plain(table: mi.scoring.ScoreTable, bins: Mapping[str, Any]) -> str:
    """The content without scripts: the histogram in characters, and both ends of the ranking."""
    edges, counts = bins["edges"], np.asarray(bins["counts"])
    if not counts.sum():
        return ""
    heights = np.ceil((len(BARS) - 1) * np.log1p(counts) / np.log1p(counts.max())).astype(int)
    drawn = "".join(BARS[height] for height in heights)
    ranks = ranked(table, "task")
    rows = ranks if len(ranks) <= 2 * FEW else np.concatenate([ranks[:FEW], ranks[-FEW:]])
    told = {name: values for name, values in table.labels.items() if any(cell(values[row]) != "–" for row in rows)}
    lines = [
        [table.task[row], signed(float(table.score[row])), *(values[row] for values in told.values())]
        for row in rows.tolist()
    ]
    ends = f"{signed(edges[0])} to {signed(edges[-1])}"
    shown = _table([["task", "score", *told], *lines])
    return f'<p>{len(ranks)} tasks from {ends}: {drawn}</p><div class="wide">{shown}</div>'


def told(metadata: Mapping[str, Any], meta_params: Any) -> tuple[Any, mi.ErrorBudget]:
    """What the solve, or the run, reports about itself, and its error budget.

    Raises:
      ValueError: no report on a solve.
    """
    try:
        info = info_of(metadata["solve"])
        facts(info)
        return info, mi.error_budget(info, meta_params)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"scores: expected a report on the solve in the file's metadata, got {error}") from error


def subject(table: mi.scoring.ScoreTable) -> str:
    """The page's subject, as a title."""
    count = int(np.sum(table.role == "task"))
    run: Any = table.metadata.get("run")
    try:
        name = str(run["training"]["data"]["dataset"])
    except (LookupError, TypeError):
        name = ""
    return f"Which of {count} {name + ' ' if name else ''}tasks help, and which harm"


def failed(info: Any) -> bool:
    """Whether the solve did not converge, or the derivative of the run does not hold."""
    if isinstance(info, RunInfo):
        return bool(problems_of_run(info))
    return int(info.status) != mi.SolveStatus.CONVERGED


def presumes_minimum(info: Any) -> bool:
    """Whether the estimator treats λ as a minimum."""
    return isinstance(info, mi.SolveInfo)


def smooth(metadata: Mapping[str, Any]) -> bool:
    """Whether the run responds smoothly to the data, if that was measured."""
    measured = metadata.get("smoothness")
    return not (isinstance(measured, Mapping) and measured.get("verdict") in ("between", "rough"))


def believed(info: Any, budget: mi.ErrorBudget) -> bool:
    """Whether the solve converged, or the run's derivative holds, and no source of error exceeds a tenth."""
    worst = getattr(budget, budget.dominant)
    minimum = not presumes_minimum(info) or bool(budget.min_curvature > 0)
    return not failed(info) and minimum and bool(worst <= 0.1)


def rounded_up(value: float) -> float:
    """A bound rounded up to one digit: 0.014 is at most 0.02."""
    exponent = math.floor(math.log10(value))
    # Numbers that one digit states exactly stay unchanged, up to rounding.
    return round(math.ceil(round(value / 10.0**exponent, 9)) * 10.0**exponent, -exponent)


def verdict(table: mi.scoring.ScoreTable, info: Any, budget: mi.ErrorBudget) -> str:
    """What was found, and whether to believe it, in one sentence."""
    scores = table.score[table.role == "task"]
    harmful = scores[scores < 0]
    if len(harmful):
        found = (
            f"{len(harmful)} of {len(scores)} tasks harm, and without them the target is predicted to change by "
            f"{signed(float(harmful.sum()))}"
        )
    else:
        found = f"None of {len(scores)} tasks harms"
    worst = float(getattr(budget, budget.dominant))
    source = {
        "outer_residual": "the unfinished solve",
        "precision": "rounding",
        "inner_residual": "tasks that are not adapted to the end",
        "outer_stationarity": "λ that is not trained to the end",
        "asymmetry": "derivatives that are not exact",
    }.get(budget.dominant, budget.dominant)
    if failed(info):
        what = "the solve failed" if presumes_minimum(info) else "its derivative does not hold"
        return f"{found}; do not believe it: {what}."
    if presumes_minimum(info) and not budget.min_curvature > 0:
        return f"{found}; do not believe the numbers: λ is no minimum along a direction that the solve met."
    if not smooth(table.metadata):
        return f"{found}; believe the order rather than the numbers: the run does not answer the data smoothly."
    if believed(info, budget):
        return f"{found}; believe it: no source of error that was looked for is above {rounded_up(max(worst, 1e-9)):g}."
    return f"{found}; believe the order rather than the numbers: {source} may shift them by {worst:.1g}, relatively."


def signed(value: float) -> str:
    """A number in the format of the page's script."""
    digits, _, power = f"{abs(value):.2e}".partition("e")
    return f"{'−' if value < 0 else '+'}{digits}e{int(power)}".replace("e-", "e−")


def estimator(metadata: Mapping[str, Any], info: Any) -> str:
    """Which estimator the scores are from, and why."""
    run: Any = metadata.get("run")
    asked = run.get("score") if isinstance(run, Mapping) else None
    asked = asked if isinstance(asked, Mapping) else {}
    named = metadata.get("estimator")
    if isinstance(named, str):
        measured = metadata.get("smoothness")
        advice = measured.get("advice") if isinstance(measured, Mapping) else None
        return f"Estimator: {cell(named)}{f'. Smoothness: {cell(advice)}' if isinstance(advice, str) else ''}."
    parts = [f"{cell(asked.get('curvature', 'the file does not say which'))} curvature"]
    if "solver" in asked:
        parts.append(f"solver {cell(asked['solver'])}")
    if info.damping is not None:
        chosen = " by the rule" if asked.get("damping") == "auto" else ""
        parts.append(f"damping {float(info.damping):.1e}{chosen}")
    why = ""
    if info.outer_gradient_norm is not None:
        why = f", which takes λ for a minimum of F; ‖D_λF‖ is {float(info.outer_gradient_norm):.1e}"
    return f"Estimator: the response of an optimum ({', '.join(parts)}){why}."


def diagnostics(metadata: Mapping[str, Any], info: Any, budget: mi.ErrorBudget, relative: bool) -> str:
    """What the solve reports about itself, and which error dominates."""
    budget = budget._replace(advice=_worded(metadata, budget.advice))
    if not presumes_minimum(info):
        return diagnostics_of_run(info, budget)
    terms = [
        ("unfinished solve", budget.outer_residual, "bound on the solution's relative error by its residual"),
        ("rounding", budget.precision, "estimate of what the precision leaves"),
        ("inner minimisers", budget.inner_residual, "estimate of what tasks that are not adapted to the end leave"),
        (
            "distance from stationarity",
            budget.outer_stationarity,
            f"bound on the distance to the optimum presumed, {'' if relative else 'not '}relative to ‖λ‖",
        ),
    ]
    good = int(info.status) == mi.SolveStatus.CONVERGED
    line = "The solve converged." if good else f"The solve failed: {_worded(metadata, remedy(info))}."
    if budget.asymmetry > 0:
        terms.append(("derivatives", budget.asymmetry, "bound by what they lack of symmetry, as inexact ones do"))
    errors = [(name, "unknown" if np.isnan(value) else f"{value:.1e}", meaning) for name, value, meaning in terms]
    skipped = metadata.get("skipped")
    left_out = "".join(f"<li>{_text(each)}</li>" for each in skipped) if isinstance(skipped, list) else ""
    found = _diagnosis(good, line, info, budget, errors)
    return f"{found}<h3>Tasks left out</h3><ul>{left_out}</ul>" if left_out else found


def _worded(metadata: Mapping[str, Any], cure: str) -> str:
    """A cure worded for whoever made the file: in options if a command did."""
    run: Any = metadata.get("run")
    if not isinstance(run, Mapping):
        return cure
    return in_options(cure, (*OF_SCORE, *OF_LAB) if "training" in run else OF_SCORE)


def diagnostics_of_run(info: Any, budget: mi.ErrorBudget) -> str:
    """The same for an estimator that uses the run."""
    bad = failed(info)
    whose = "The derivative of the run" if isinstance(info, RunInfo) else "The answer of the segments"
    line = f"{whose} does not hold: {budget.advice}." if bad else f"{whose} holds."
    replay = "how far the run, gone through again, ends from λ, relative to ‖λ‖"
    residual = replay if isinstance(info, RunInfo) else "estimate of what too few products leave"
    errors = [
        (
            "replay" if isinstance(info, RunInfo) else "unfinished functions of H",
            f"{budget.outer_residual:.1e}",
            residual,
        ),
        ("rounding", f"{budget.precision:.1e}", "estimate of what the precision leaves"),
    ]
    return _diagnosis(not bad, line, info, budget, errors)


def _diagnosis(good: bool, line: str, info: Any, budget: mi.ErrorBudget, errors: Sequence[Sequence[str]]) -> str:
    """A verdict, and its grounds."""
    return "".join(
        [
            f'<p class="{"good" if good else "bad"}">{_text(line)}</p>',
            f"<p>Error budget: {html.escape(budget.advice)}.</p>",
            _table(facts(info)),
            "<h3>Error budget, by source</h3>",
            _table(errors),
        ]
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{_text(cell)}</td>" for cell in line) for line in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def ran(metadata: Mapping[str, Any]) -> str:
    """Everything that the file says about how it was made."""
    kept = {name: value for name, value in metadata.items() if name not in ("solve", "skipped")}
    return html.escape(json.dumps(kept, indent=2, ensure_ascii=False))
