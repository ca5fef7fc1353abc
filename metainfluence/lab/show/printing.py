"""What the commands print: results on standard output, progress on standard error."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

import metainfluence as mi
from metainfluence.response import RunInfo, SegmentsInfo

Options = Sequence[tuple[str, str]]

# The library's wording of a cure, and the command's options for it; longer phrases come first.
OF_SCORE: Options = (
    ("lower the solver's tol, or raise the damping", "lower --tol, or raise --damping"),
    ("lower the solver's tol, allow more steps, or raise the damping", "lower --tol, raise --max-steps or --damping"),
    (
        "allow more steps, raise the damping, loosen tol, precondition, or compute in float64",
        "raise --max-steps, --damping or --tol, try --solver auto, or compute in float64",
    ),
    (
        "allow more steps, raise the damping, loosen tol, or precondition",
        "raise --max-steps, --damping or --tol, or try --solver auto",
    ),
    (
        "use a solver for indefinite operators (minres, dense)",
        "use --solver minres, or --solver auto, which goes on with |H|",
    ),
    ("solve with |H| (solvers.auto does where it must)", "solve with |H| (--solver auto does where it must)"),
    (
        'in float32 try solver=metainfluence.solvers.auto(tol=1e-3) with damping="auto" first',
        "in float32 try --solver auto --tol 1e-3 --damping auto first",
    ),
    ("raise rank, or tol", "take --by trajectory, or --by optimum"),
    ("or ask metainfluence.optimum", "or take --by optimum"),
    ("whether it predicts a removal, smoothness tells", "whether it predicts a removal, --smoothness tells"),
    ("was not measured: metainfluence.smoothness", "was not measured, as --no-smoothness asks for"),
    # The command uses the automatic damping by default, and prints the budget.
    (': take damping="auto", and mind the budget', ""),
)
OF_EDIT: Options = (
    ("lower the solver's tol, or raise the damping", "raise --damping, or remove less"),
    ("lower the solver's tol, allow more steps, or raise the damping", "raise --damping, or remove less"),
    (
        "allow more steps, raise the damping, loosen tol, precondition, or compute in float64",
        "raise --damping, remove less, or compute in float64",
    ),
    ("allow more steps, raise the damping, loosen tol, or precondition", "raise --damping, or remove less"),
    (", or use a solver for indefinite operators (minres, dense)", ", or take fewer --num-newton-steps"),
    (", or solve with |H| (solvers.auto does where it must)", ", or take fewer --num-newton-steps"),
    ('in float32 try solver=metainfluence.solvers.auto(tol=1e-3) with damping="auto" first; ', ""),
)
OF_DEMO: Options = (
    ("lower the solver's tol, or raise the damping", "raise --damping"),
    ("lower the solver's tol, allow more steps, or raise the damping", "raise --damping"),
    ("with a falling learning rate, until outer_gradient_norm is small", "with more --num-steps"),
    (", or solve with |H| (solvers.auto does where it must)", ""),
)
EVERYWHERE: Options = (
    ("raise the damping", "raise --damping"),
    (
        "lower their tol or allow more steps",
        "lower --learner.inner-tol of metainfluence train, or, in a problem of yours, the tol of its minimizer",
    ),
    (
        "with a falling learning rate, until outer_gradient_norm is small",
        "with more --training.num-steps of metainfluence train, until the outer gradient norm is small",
    ),
    (
        (
            '; or ask at the Newton-corrected λ of edit(problem, damping="auto", num_newton_steps=…)(meta_params, '
            "tasks, weights, weights)"
        ),
        "",
    ),
    (
        'compute in float64 (jax.config.update("jax_enable_x64", True), or JAX_ENABLE_X64=1)',
        "compute in float64 (--float64 of metainfluence train; for a problem of yours, JAX_ENABLE_X64=1)",
    ),
    (", which solvers.auto gives, is 0 there", " is 0 there"),
    (
        "lower the tol of their minimizer or allow more steps",
        "lower --learner.inner-tol of metainfluence train, or, in a problem of yours, the tol of its minimizer",
    ),
    (", or let the solver find the scale (scale=None)", ""),
    (
        "; of solvers.ekfac it tells that its approximation has an eigenvalue that is not positive",
        "",
    ),
    (
        "(dtype, param_dtype, compute_dtype)",
        (
            "(without --learner.compute-dtype of metainfluence train; in a problem of yours dtype, param_dtype, "
            "compute_dtype)"
        ),
    ),
    (
        "lower the learning rate, clip the gradient, or give Adam an eps_root > 0",
        (
            "lower --training.learning-rate of metainfluence train, or raise its --training.eps-root; in a run of "
            "yours, clip the gradient"
        ),
    ),
    ("as in Adam without eps_root", "as in Adam without --training.eps-root of metainfluence train"),
    (
        "train with a lower learning rate, warm-up or a larger eps_root",
        (
            "train with a lower --training.learning-rate, a --training.warmup or a larger --training.eps-root of "
            "metainfluence train"
        ),
    ),
    (": metainfluence.coupling tells of the weights", ": metainfluence.coupling, in Python, tells of the weights"),
    (
        "pass total_effect=True if a removed example leaves the target's tasks too",
        (
            "where a removed example leaves the target's tasks too, total_effect of metainfluence.scoring.score, in "
            "Python, adds the rest"
        ),
    ),
    ("; called outside jit, the functions name the task and the leaf", ""),
    ("metainfluence.coupling(problem)(meta_params, task) tells", "metainfluence.coupling, in Python, tells"),
)

# The lab's own learners have exact closed forms.
OF_LAB: Options = (
    ("; whether an inner problem of yours is solved is unknown (closed_form measures it by inner_loss)", ""),
)
# λ of a user's own problem was not trained by `metainfluence train`.
OF_OWN: Options = (("until outer_gradient_norm is small", "until the outer gradient norm is small"),)

# Wording of cures in errors that end a command.
IN_ERRORS: Options = (
    ("resume=False starts anew, with a smaller batch_size", "--no-resume starts anew, with a smaller --batch-size"),
    ("resume=False starts anew", "--no-resume starts anew"),
    ("give another folder, or resume=False replaces it", "--no-resume starts anew"),
    ('on_error="skip"', "--on-error skip"),
    (
        "or compute in full precision",
        "or compute in full precision (metainfluence train without --learner.compute-dtype)",
    ),
    ("batch_size=", "--batch-size "),
    (
        "jax.config.update('jax_enable_x64', False)",
        "--no-float64 of metainfluence train; for a problem of yours, JAX_ENABLE_X64=0",
    ),
)
BY_COMMAND = {"score": OF_SCORE, "edit": OF_EDIT, "demo": OF_DEMO}


def say(text: str) -> None:
    """Prints a line immediately, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def progress_console() -> Console:
    """Where progress is shown: bars on a terminal, otherwise plain lines."""
    return Console(stderr=True, highlight=False)


def facts(info: Any) -> list[tuple[str, str, str]]:
    """What a solve, a run or its segments report about themselves: name, value, and what the value means."""
    if not isinstance(info, mi.SolveInfo):
        return facts_of_run(info) if isinstance(info, RunInfo) else facts_of_segments(info)
    positive = "the smallest that was met along any direction, damping included; positive, as it has to be"
    if info.min_curvature == np.inf:
        positive = "no direction was met"
    elif not info.min_curvature > 0:
        positive = "not positive: H has directions along which λ is no minimum"
    met = (
        ("products with the total Hessian", info.num_matvecs, "d", "what the solve took"),
        ("relative residual", info.relative_residual, ".1e", "‖b − Hx‖ / ‖b‖, recomputed at the end"),
        ("smallest curvature", info.min_curvature, ".1e", positive),
        ("damping", info.damping, ".1e", "added to every eigenvalue of H"),
        ("outer gradient norm", info.outer_gradient_norm, ".1e", "‖D_λF‖: how far λ is from the optimum presumed"),
        (
            "inner gradient norm",
            info.inner_gradient_norm,
            ".1e",
            "‖∂_θ L_in‖, the largest: how well tasks were adapted to",
        ),
    )
    status = mi.SolveStatus(int(info.status))
    lines = [("status", status.name, "whether the solve reached what was asked for")]
    return lines + [
        (name, format(value.item(), form), meaning) for name, value, form, meaning in met if value is not None
    ]


def facts_of_run(info: RunInfo) -> list[tuple[str, str, str]]:
    """What a run's derivative reports about itself."""
    met = (
        ("steps", info.num_steps, "d", "of the run, gone through and back"),
        ("growth of the cotangent", info.growth, ".1e", "its largest norm on the way back over that at the end"),
        ("replay", info.replay_difference, ".1e", "‖λ_N − λ‖ / ‖λ‖: whether the run ends where training ended"),
        ("outer gradient norm", info.outer_gradient_norm, ".1e", "‖D_λF‖ at its end, which need not be small"),
    )
    return [
        (name, format(np.asarray(value).item(), form), meaning)
        for name, value, form, meaning in met
        if value is not None
    ]


def facts_of_segments(info: SegmentsInfo) -> list[tuple[str, str, str]]:
    """What an answer by segments reports about itself."""
    errors, norms = np.asarray(info.relative_error), np.asarray(info.outer_gradient_norm)
    status = mi.SolveStatus(int(info.status)).name
    return [
        ("status", status, "whether the functions of the Hessian reached what was asked for"),
        ("segments", f"{len(errors)}", "checkpoints that the run is known by"),
        ("products with the total Hessian", f"{int(info.num_matvecs)}", "of all segments"),
        ("relative error", f"{float(np.sum(errors)):.1e}", "estimate, of all segments together"),
        ("smallest curvature", f"{float(np.min(info.min_curvature)):.1e}", "that was seen; a negative one counts as 0"),
        ("outer gradient norm", f"{float(norms[-1]):.1e}", "‖D_λF‖ at the last checkpoint, which need not be small"),
    ]


def in_options(text: str, options: Options) -> str:
    """Rewords a cure, which the library states for its Python functions, in a command's options."""
    for phrase, option in (*options, *EVERYWHERE):
        text = text.replace(phrase, option)
    return text


def in_options_of(command: str, text: str) -> str:
    """An error or a warning of the library, on one line and reworded for a command."""
    return in_options(" ".join(text.split()), (*BY_COMMAND.get(command, ()), *IN_ERRORS))


def say_budget(result: Any, meta_params: Any, options: Options, *, own: bool = True) -> None:
    """Prints which error dominates, and which of the command's options reduce it.

    Args:
      result: an argument for `error_budget`.
      meta_params: λ.
      options: the wording of the library's cures.
      own: whether the problem is the user's, not one of the lab's learners.
    """
    options = (*options, *(OF_OWN if own else OF_LAB))
    advice = in_options(mi.error_budget(result, meta_params).advice, options)
    solved = isinstance(result.info if hasattr(result, "info") else result, mi.SolveInfo)
    say(f"Error budget{' (distance from stationarity relative to ‖λ‖)' if solved else ''}: {advice}")


def check_solve(result: Any, options: Options) -> None:
    """Like `metainfluence.check`, worded in options, without the budget and its warnings, which `say_budget` prints.

    Raises:
      SolveError: as `check`.
    """
    try:
        with warnings.catch_warnings():
            for told in (mi.BudgetWarning, mi.SlopeWarning, mi.CouplingWarning):
                warnings.simplefilter("ignore", told)
            mi.check(result)
    except mi.SolveError as error:
        raise mi.SolveError(in_options(str(error).partition(" Error budget: ")[0], options)) from error


def say_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints cells in columns, the last of which is ragged."""
    lines = [list(map(str, row)) for row in (headers, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(headers))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
