"""What commands say of a solve: plain where it is good, and with cures that the command has."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from metainfluence.lab.commands.edit import EditConfig
from metainfluence.lab.commands.score import ScoreConfig
from metainfluence.lab.experiments.demo import DemoConfig
from metainfluence.lab.show import printing
from metainfluence.response import _direct as direct
from metainfluence.trust import _smoothness, remedy
from metainfluence.trust import _words as words

COMMANDS = {
    "score": (printing.OF_SCORE, ScoreConfig),
    "edit": (printing.OF_EDIT, EditConfig),
    "demo": (printing.OF_DEMO, DemoConfig),
}


def info(**fields):
    known = dict(
        zip(mi.SolveInfo._fields[:9], map(np.asarray, (0, 9, 3e-7, 9e-3, 1e-9, 1e-9, 9e-3, 0, 0.1)), strict=True)
    )
    return mi.SolveInfo(**(known | {name: np.asarray(value) for name, value in fields.items()}))


def test_a_positive_curvature_is_not_called_anything_else():
    said = {name: meaning for name, _, meaning in printing.facts(info())}
    assert said["smallest curvature"].endswith("positive, as it has to be")
    assert "no minimum" not in said["smallest curvature"]
    none = {name: meaning for name, _, meaning in printing.facts(info(min_curvature=np.inf))}
    assert none["smallest curvature"] == "no direction was met"
    for bad in (0.0, -1e-3, np.nan):
        said = {name: meaning for name, _, meaning in printing.facts(info(min_curvature=bad))}
        assert said["smallest curvature"].startswith("not positive")


# Each is a state of a result that has a cure.
STATES = {
    "unfinished": info(relative_residual=1e-2, choice=int(mi.solvers.Choice.CG)),
    "rounding": info(relative_residual=np.float32(1e-2), choice=int(mi.solvers.Choice.DENSE)),
    "single": info(relative_residual=np.float32(1e-2)),
    "inner": info(inner_gradient_norm=0.1),
    "far": info(outer_gradient_norm=0.1),
    "indefinite": info(min_curvature=-0.1),
    "met": info(status=int(mi.SolveStatus.INDEFINITE), min_curvature=-0.1),
    "nonfinite": info(status=int(mi.SolveStatus.NONFINITE), relative_residual=np.nan),
    "without a minimum": info(inner_gradient_norm=np.inf),
    "inexact": info(asymmetry=1e-2, min_curvature=1e-4),
    "inexact inner": info(asymmetry=1e-2, min_curvature=1e-4, inner_gradient_norm=1e-3),
    "flat, seen": info(status=int(mi.SolveStatus.INDEFINITE), flat_directions=3, relative_residual=0.3),
    "coarse": info(working_eps=2**-7, min_curvature=1e-4),
    "turned": info(min_curvature=-0.1, choice=int(mi.solvers.Choice.DENSE_ABSOLUTE)),
    "finished": info(relative_residual=3e-7, min_curvature=1e-7, choice=int(mi.solvers.Choice.CG)),
}


def run_info(**fields):
    """Of a run's derivative: every wrong that `check` tells of."""
    known = {"num_steps": 9, "outer_gradient_norm": np.asarray(0.1), "replay_difference": np.asarray(0.0)}
    return mi.response.RunInfo(**(known | {"first_nonfinite_step": np.asarray(-1)} | fields))


SEGMENTS = mi.response.SegmentsInfo(*(np.zeros(2) for _ in mi.response.SegmentsInfo._fields))._replace(
    status=np.asarray(int(mi.SolveStatus.MAX_STEPS)), relative_error=np.asarray([0.2, 0.3])
)
RUNS = {
    "not finite": run_info(first_nonfinite_step=np.asarray(3)),
    "derivative not finite": run_info(cotangent_norms=np.asarray([np.nan, 1.0]), growth=np.asarray(1.0)),
    "chaotic": run_info(cotangent_norms=np.asarray([1e20, 1.0]), growth=np.asarray(1e20)),
    "another end": run_info(replay_difference=np.asarray(0.5)),
    "segments": SEGMENTS,
}


@pytest.mark.parametrize("state", RUNS)
def test_cures_of_runs_are_options_too(state):
    with pytest.raises(mi.SolveError) as caught:
        printing.check_solve(RUNS[state], printing.OF_SCORE)
    check_words(str(caught.value), ScoreConfig)
    assert "metainfluence." not in str(caught.value)
    assert not re.search("eps_root|rank", str(caught.value))


@pytest.mark.parametrize("run", [False, True])
def test_reasons_for_an_estimator_are_in_options(run):
    check_words(printing.in_options(mi.choose(run=run).reason, printing.OF_SCORE), ScoreConfig)
    assert "metainfluence" not in printing.in_options(mi.choose(run=run).reason, printing.OF_SCORE)


def test_a_small_residual_is_not_called_unfinished():
    said = printing.in_options(mi.error_budget(STATES["finished"]).advice, printing.OF_SCORE)
    assert "the solve is finished, to 3e-07" in said
    assert "unfinished" not in said
    assert "unfinished" in mi.error_budget(STATES["unfinished"]).advice


def test_single_precision_is_told_the_options_of_the_call():
    state = info(status=int(mi.SolveStatus.MAX_STEPS), relative_residual=np.float32(0.1), choice=0)
    for options, config in (COMMANDS["score"], COMMANDS["edit"]):
        with pytest.raises(mi.SolveError) as caught:
            printing.check_solve(state, options)
        check_words(str(caught.value), config)


def test_errors_and_warnings_are_in_options():
    problem = mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * (m - task.query) ** 2))
    score = mi.scoring.score
    with pytest.raises(MemoryError) as caught:
        score(problem, lambda m: m, jnp.asarray(2.0), [mi.Task((), np.ones(2))], out="/nowhere/at/all", memory=1.0)
    assert "--no-float64 of metainfluence train" in printing.in_options_of("score", str(caught.value))
    shared = info(support_shared=True)
    scores = mi.Scores(np.ones(2), np.ones((2, 3)), np.full((2, 2), 0.5), shared)
    with pytest.warns(mi.response.DirectEffectWarning) as told:
        printing.check_solve(scores, printing.OF_SCORE)
    assert "=True" not in printing.in_options_of("score", str(told[0].message))


def test_a_users_own_problem_is_not_sent_to_train(capsys):
    for own in (True, False):
        printing.say_budget(STATES["far"], np.ones(2), printing.OF_SCORE, own=own)
        assert ("--training.num-steps" in capsys.readouterr().out) != own


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("state", STATES)
def test_cures_are_options_of_the_command(command, state):
    options, config = COMMANDS[command]
    check_words(printing.in_options(mi.error_budget(STATES[state]).advice, options), config)


@pytest.mark.parametrize("command", ["score", "edit"])
@pytest.mark.parametrize("status", [kind for kind in mi.SolveStatus if kind != mi.SolveStatus.CONVERGED])
@pytest.mark.parametrize("curvature", [-0.1, 0.1])
def test_failed_solves_name_options_of_the_command(command, status, curvature):
    options, config = COMMANDS[command]
    with pytest.raises(mi.SolveError) as caught:
        printing.check_solve(info(status=int(status), min_curvature=curvature), options)
    text = str(caught.value)
    assert "Error budget" not in text
    check_words(text, config)


def check_words(text, config):
    """No Python call, no name of a Python option; and every option is the command's, or said to be train's."""
    python = r"\w\(\w*\)|[a-z]=[\w…]|jax\.config|outer_gradient_norm|num_newton_steps|the damping|solvers\.\w+"
    assert not re.search(python, text), text
    for phrase in ("solver's tol", "allow more steps", "solvers.auto", "minres, dense"):
        assert phrase not in text, text
    for option in re.findall(r"(?<![\w.])--([\w-]+(?:\.[\w-]+)?)", text):
        if option.startswith(("learner.", "training.", "float64")):
            assert "metainfluence train" in text
        else:
            assert option.removeprefix("no-").replace("-", "_") in config.__dataclass_fields__, (option, text)


@pytest.mark.parametrize("own", [True, False])
def test_users_are_not_asked_about_problems_of_the_lab(own, capsys):
    printing.say_budget(info()._replace(inner_gradient_norm=None), np.ones(2), printing.OF_SCORE, own=own)
    assert ("inner problem of yours" in capsys.readouterr().out) == own


def test_every_phrase_is_one_of_the_librarys():
    told = [*mi.solvers.REMEDIES.values(), *words.ADVICE.values(), words.ROUNDING, words.NO_SUPPORT, words.SEEN]
    told += [words.INNER_INEXACT, words.UNKNOWN]
    told += [remedy(info(status=int(kind))) for kind in mi.SolveStatus if kind != mi.SolveStatus.CONVERGED]
    told += [mi.error_budget(state).advice for state in (*STATES.values(), *RUNS.values())]
    told += [mi.choose(run=run).reason for run in (False, True)]
    told += [mi.error_budget(run_info()).advice]
    told += [words.ONE_CALL + "; ", direct.ADVICE, _smoothness._silent(np.ones(1)).advice]
    every = (printing.OF_SCORE, printing.OF_EDIT, printing.OF_DEMO, printing.OF_LAB, printing.OF_OWN)
    for options in (*every, printing.EVERYWHERE):
        for phrase, _ in options:
            assert any(phrase in text for text in told), phrase
