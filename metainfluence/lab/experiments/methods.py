"""The methods that experiments compare, each from a trained setting to scores, with its run time."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.experiments.ranges import Count, Positive
from metainfluence.lab.experiments.setting import SINUSOID, Setting
from metainfluence.lab.experiments.trainings import checkpoint_rates, checkpoints_of
from metainfluence.lab.learn import learners
from metainfluence.lab.learn.timing import Compiled

INFLUENCE, SEGMENTS, TRAJECTORY, OWN = "optimum", "segments", "trajectory", "influence on F"
ESTIMATORS = (INFLUENCE, SEGMENTS, TRAJECTORY)
HELD_OUT = ("held_out_loss", "calibrated_loss")
Score = Callable[..., mi.Scores]


@dataclasses.dataclass(frozen=True)
class SolvesConfig:
    """Costs allowed for the estimators; the defaults are the library's."""

    tol: Positive = 1e-6
    """Relative residual at which the solves of optimum and direct-IF stop."""
    damping_rank: Count = 40
    """Products from which the damping is chosen."""
    segments_rank: Count = 12
    """Products per segment, at most."""
    tlxml_rank: Count = 100
    """Number of eigenpairs of TLXML."""
    ekfac_tasks: Count | None = None
    """Tasks at a time for the factors of EKFAC-IF, which bounds their memory; by default all."""


class Scored(NamedTuple):
    """One method's scores.

    Attributes:
      name: name of the method.
      scores: scores of all tasks and examples; None if the method does not apply.
      seconds: run time, without compiling.
      reason: why it does not apply; otherwise "".
    """

    name: str
    scores: mi.Scores | None
    seconds: float
    reason: str = ""


def influence_on_objective(problem: mi.Bilevel, target: Any = None, *, damping: Any = 0.0) -> Score:
    """Makes (meta_params, tasks, *target_args) -> Scores: the change of min F itself on removal, − w ∂_w F.

    By the envelope theorem the change of λ adds nothing to first order. For a support example this is only the effect
    through its task's parameters, the paper's inner influence. The target and the damping are not used.
    """
    del target, damping
    objective = mi.total_objective(problem)

    def run(meta_params: Any, tasks: mi.Task, *target_args: Any) -> mi.Scores:
        del target_args
        weights = mi.unit_weights(tasks)
        slopes = jax.grad(lambda weights: objective(meta_params, tasks, weights))(weights)
        info = mi.baselines.random_scores()(meta_params, tasks).info
        return mi.Scores(-slopes.task, -slopes.support, -slopes.query, info)

    return run


def _curved(curvature: Callable[[], mi.curvature.Curvature]) -> Callable[..., Score]:
    return lambda problem, target, damping: mi.influence_scores(problem, target, curvature=curvature(), damping=damping)


# name -> (problem, target, damping) -> function of (meta_params, tasks, held_out).
METHODS: dict[str, Callable[..., Score]] = {
    INFLUENCE: _curved(mi.curvature.exact),
    "linearized": _curved(mi.curvature.linearized),
    "gamma": _curved(mi.curvature.gamma),
    "Gauss-Newton": _curved(mi.curvature.gauss_newton),
    "direct-IF": lambda problem, target, damping: mi.baselines.direct_if(problem, target, damping=damping),
    "EKFAC-IF": lambda problem, target, damping: mi.baselines.ekfac_if(problem, target, damping=damping),
    "TLXML": lambda problem, target, damping: mi.baselines.tlxml(problem, target, rank=100),
    "TRAK": lambda problem, target, damping: mi.baselines.trak(problem, target),
    "identity": lambda problem, target, damping: mi.influence_scores(problem, target, solver=mi.solvers.identity()),
    "gradient similarity": lambda problem, target, damping: mi.baselines.gradient_similarity(problem, target),
    "plain loss": lambda problem, target, damping: mi.baselines.plain_loss(problem, target),
    OWN: lambda problem, target, damping: influence_on_objective(problem),
    "random": lambda problem, target, damping: mi.baselines.random_scores(),
}
TRACIN = "TracIn"
SOLVING = (INFLUENCE, "linearized", "gamma", "Gauss-Newton", "direct-IF")
NAMES = (*METHODS, TRACIN, SEGMENTS, TRAJECTORY)


def check_names(field: str, names: Sequence[str]) -> None:
    """Raises ValueError for an unknown method."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"{field}: expected some of {', '.join(NAMES)}; got {name!r}")


def chosen_damping(setting: Setting, rank: int = SolvesConfig.damping_rank) -> mi.damping.Damping:
    """The damping that damping="auto" chooses at the trained λ."""
    rule: mi.damping.Damping = Compiled(mi.damping.auto(setting.problem, rank=rank))(
        setting.trained, setting.tasks.training
    )
    return rule


def score(setting: Setting, name: str, damping: Any, solves: SolvesConfig | None = None) -> Scored:
    """Scores of all tasks and examples for the held-out loss, by one method.

    The scores of `trajectory` repeat the training, and then go back through it.
    """
    target, tasks, training = setting.target, setting.tasks, setting.config.training
    solves = SolvesConfig() if solves is None else solves
    solver = mi.solvers.auto(tol=solves.tol)
    at = {
        TRACIN: lambda: setting.full.checkpoints,
        SEGMENTS: lambda: checkpoints_of(training, setting.full.states),
        TRAJECTORY: lambda: setting.initial,
    }.get(name, lambda: setting.trained)()

    def method(damping: Any) -> Score:
        if name == TRACIN:
            return mi.baselines.tracin(setting.problem, target, checkpoint_rates(training))
        if name == SEGMENTS:
            return _answering(mi.segments(setting.problem, rank=solves.segments_rank), target)
        if name == TRAJECTORY:
            return _answering(mi.trajectory(setting.run), target)
        if name == INFLUENCE:
            return mi.influence_scores(setting.problem, target, solver=solver, damping=damping)
        if name == "direct-IF":
            return mi.baselines.direct_if(setting.problem, target, solver=solver, damping=damping)
        if name == "TLXML":
            return mi.baselines.tlxml(setting.problem, target, rank=solves.tlxml_rank)
        if name == "EKFAC-IF":
            return mi.baselines.ekfac_if(setting.problem, target, damping=damping, batch_size=solves.ekfac_tasks)
        return METHODS[name](setting.problem, target, damping)

    # The damping is an argument, so that all seeds share a program. XLA leaves out what is not returned: a method that
    # solves nothing does not pay for the residual in its report, which nobody needs here.
    def run(at: Any, training: mi.Task, held_out: mi.Task, damping: jax.Array) -> tuple[Any, ...]:
        scores = method(damping)(at, training, held_out)
        return tuple(scores) if name in SOLVING else (*scores[:3], None)

    program = Compiled(run)
    try:
        parts = jax.tree.map(np.asarray, program(at, tasks.training, tasks.held_out, jnp.asarray(damping)))
    except ValueError as error:
        return Scored(name, None, float("nan"), str(error))
    return Scored(name, mi.Scores(*parts), program.run_seconds)


def _answering(respond: Callable[..., Any], target: Any) -> Score:
    return lambda at, tasks, *target_args: mi.scores(respond(at, tasks), target)(*target_args)


def gradient_ratio(setting: Setting) -> float:
    """‖D_λF‖ at the trained λ over that at the start, as used by `metainfluence.choose`."""
    slope = jax.grad(mi.total_objective(setting.problem))
    norm = jax.jit(lambda m, tasks: optax.tree.norm(slope(m, tasks)))
    return float(norm(setting.trained, setting.tasks.training) / norm(setting.initial, setting.tasks.training))


def held_out_losses(setting: Setting) -> dict[str, float]:
    """The held-out loss of the trained λ, plain and at the temperature that fits it best; for classification only."""
    if setting.config.data.dataset == SINUSOID:
        return {}
    makers = (mi.query_loss, learners.calibrated_loss)
    return {
        name: float(jax.jit(make(setting.tested))(setting.trained, setting.tasks.held_out))
        for name, make in zip(HELD_OUT, makers, strict=True)
    }


def level_scores(scores: mi.Scores, level: str) -> np.ndarray:
    """Scores of tasks, or of support or query examples, as one vector."""
    return np.ravel(getattr(scores, level))


def most_harmful(values: np.ndarray, share: float) -> np.ndarray:
    """Indices of the share of the data with the lowest scores, most harmful first; ties keep their order."""
    return np.argsort(values, kind="stable")[: round(share * len(values))]


def level_harm(setting: Setting, level: str) -> np.ndarray:
    """Which data of a level were damaged, as one boolean vector."""
    tasks = setting.tasks
    if level == "task":
        return tasks.task_harm != "clean"
    return np.ravel(tasks.support_harm if level == "support" else tasks.query_harm)


def without(setting: Setting, level: str, removed: np.ndarray) -> mi.Weights:
    """Unit weights with 0 for the removed data, given as indices into `level_scores`."""
    weights = mi.unit_weights(setting.tasks.training)
    field = getattr(weights, level)
    return weights._replace(**{level: jnp.ravel(field).at[removed].set(0.0).reshape(field.shape)})
