"""Every estimator and every baseline on a training run: scores of all tasks for all targets."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from metainfluence.lab.experiments.runs import Case, OptimizerConfig, schedule_of

TRAJECTORY, SEGMENTS, OPTIMUM = "trajectory", "segments", "optimum"
ESTIMATORS = (TRAJECTORY, SEGMENTS, OPTIMUM)
DAMPINGS = (1e-3, 1e-2, 3e-2, 1e-1, 1.0)


class Scored(NamedTuple):
    """One method with one option: scores `[J, T]`, and whether the option is its default."""

    method: str
    option: str
    default: bool
    scores: np.ndarray


class Methods:
    """All methods on one problem: everything that does not depend on the run is compiled once for all runs.

    Args:
      problem: the problem.
      num_tasks: T.
    """

    def __init__(self, problem: mi.Bilevel, num_tasks: int):
        self._problem, self._count = problem, num_tasks
        target = mi.query_loss(problem)
        flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])
        self.slopes = jax.jit(jax.vmap(jax.grad(target), in_axes=(None, 0)))
        self._flat = jax.jit(flat)
        self._segments = jax.jit(lambda known, tasks, slopes: mi.segments(problem)(known, tasks).vjp(slopes)[0].task)
        self._gradients = jax.jit(
            lambda m, tasks: flat(jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(m, tasks))
        )
        self._damping = jax.jit(lambda m, tasks: mi.damping.auto(problem)(m, tasks).value)
        self._dense = {
            name: jax.jit(lambda m, tasks, c=curvature: mi.total_hessian(problem, c)(m, tasks).dense())
            for name, curvature in (("exact", mi.curvature.exact()), ("gauss_newton", mi.curvature.gauss_newton()))
        }
        self._trak = self._mapped(lambda damping: mi.baselines.trak(problem, target, damping=damping))
        self._ekfac = self._mapped(lambda damping: mi.baselines.ekfac_if(problem, target, damping=damping))
        self._direct = self._mapped(
            lambda damping: mi.baselines.direct_if(problem, target, solver=mi.solvers.dense(), damping=damping)
        )
        self._tracin = self._mapped(lambda rates: mi.baselines.tracin(problem, target, rates))
        self._plain = {
            "gradient similarity": self._mapped(lambda _: mi.baselines.gradient_similarity(problem, target)),
            "plain loss": self._mapped(lambda _: mi.baselines.plain_loss(problem, target)),
        }

    def _mapped(self, make: Callable[[Any], Any]) -> Any:
        def scores(at: Any, tasks: mi.Task, targets: mi.Task, option: Any) -> Any:
            method = make(option)
            return jax.lax.map(lambda held_out: method(at, tasks, held_out).task, targets)

        return jax.jit(scores)

    def __call__(
        self, case: Case, respond: Any, states: Any, optimizer: OptimizerConfig, seed: int
    ) -> Iterator[Scored]:
        """Scores of every method with every option.

        Args:
          case: the run.
          respond: `metainfluence.trajectory(case.run)`, made once for all starts.
          states: λ and the optimiser's state at the checkpoints, stacked.
          optimizer: the run's optimiser.
          seed: seed of the random scores.
        """
        at, tasks, targets, count = case.meta_params, case.tasks, case.targets, self._count
        slopes = self.slopes(at, targets)
        yield Scored(TRAJECTORY, "", True, -np.asarray(respond(case.start, tasks).vjp(slopes)[0].task))
        num = len(jax.tree.leaves(states)[0])
        kept = [jax.tree.map(lambda leaf, k=k: leaf[k], states) for k in range(num)]
        schedule = schedule_of(optimizer, case.run.num_steps)
        for place in ("end", "middle"):
            known = mi.checkpoints(
                kept,
                num_steps=case.run.num_steps,
                learning_rate=schedule,
                second_moments=True,
                eps_root=optimizer.eps_root,
                place=place,
            )
            # Step numbers would be traced, and nothing needs them.
            bare = [each._replace(step=None) for each in known]
            yield Scored(SEGMENTS, place, place == "end", -np.asarray(self._segments(bare, tasks, slopes)))
        damping = self._damping(at, tasks)
        yield from self._by_matrix(at, tasks, np.asarray(self._flat(slopes)), float(damping))
        for value in (0.01, 0.1, 1.0, 10.0):
            found = self._trak(at, tasks, targets, jnp.asarray(value))
            yield Scored("TRAK", f"{value:g}", value == 0.1, np.asarray(found))
        yield from self._constant_adaptation(at, tasks, targets, damping)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(case.run.num_steps)))
        found = self._tracin(states[0], tasks, targets, jnp.asarray(rates.reshape(num, -1).sum(1)))
        yield Scored("TracIn", "", True, np.asarray(found))
        for name, program in self._plain.items():
            yield Scored(name, "", True, np.asarray(program(at, tasks, targets, None)))
        yield Scored("random", "", True, np.random.default_rng(seed).normal(size=(len(slopes_lead(slopes)), count)))

    def _by_matrix(self, at: Any, tasks: mi.Task, slopes: np.ndarray, damping: float) -> Iterator[Scored]:
        """`optimum`, TLXML, and no curvature: from dense matrices, since λ is small."""
        gradients = np.asarray(self._gradients(at, tasks)) / self._count
        values, vectors = np.linalg.eigh(np.asarray(self._dense["exact"](at, tasks)))
        forward, back = slopes @ vectors, (gradients @ vectors).T
        largest = np.max(np.abs(values))
        yield Scored(OPTIMUM, "auto", True, (forward / (values + damping)) @ back)
        for factor in DAMPINGS:
            yield Scored(OPTIMUM, f"|H|, {factor:g}", False, (forward / (np.abs(values) + factor * largest)) @ back)
        values, vectors = np.linalg.eigh(np.asarray(self._dense["gauss_newton"](at, tasks)))
        forward, back = slopes @ vectors, (gradients @ vectors).T
        for threshold in (1e-4, 1e-3, 1e-2, 1e-1):
            inverse = np.where(values > threshold * values[-1], 1 / values, 0.0)
            yield Scored("TLXML", f"{threshold:g}", threshold == 1e-3, (forward * inverse) @ back)
        yield Scored("identity", "", True, slopes @ gradients.T)

    def _constant_adaptation(self, at: Any, tasks: mi.Task, targets: mi.Task, damping: Any) -> Iterator[Scored]:
        """Methods that treat θ as constant; none if the outer loss sees λ only through θ: all scores are then 0."""
        for name, program in (("direct-IF", self._direct), ("EKFAC-IF", self._ekfac)):
            for factor in (1.0, 10.0, 100.0, 1000.0):
                try:
                    found = np.asarray(program(at, tasks, targets, factor * damping))
                except ValueError as error:
                    # Any other ValueError is a fault and must not be ignored.
                    if "covered by no layer" not in str(error):
                        raise
                    break
                if not np.any(found):
                    break
                yield Scored(name, f"{factor:g}", factor == 1.0, found)


def slopes_lead(slopes: Any) -> Any:
    """A leaf of the slopes; its length is the number of targets."""
    return jax.tree.leaves(slopes)[0]
