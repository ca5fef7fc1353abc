"""How the inner solver's errors affect the total gradient and task-IF, against the inner Hessian's condition number."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metainfluence as mi
from metainfluence.lab.experiments.measures import flat, relative_error
from metainfluence.lab.learn.timing import Compiled

NUM_TASKS, NUM_SUPPORT, NUM_QUERY, FEATURES, OUTPUTS, COVARIATES = 6, 60, 20, 12, 2, 3
UNROLLED_STEPS = 100
LAYER = mi.ekfac.Dense("kernel")
Row = dict[str, Any]

LINEAR_SOLVERS: dict[str, Callable[[], mi.solvers.Solver]] = {
    "dense cholesky": lambda: mi.solvers.dense(method="cholesky"),
    "cg, tol 1e-3": lambda: mi.solvers.cg(tol=1e-3),
    "cg, tol 1e-6": lambda: mi.solvers.cg(tol=1e-6),
    "cg, tol 1e-10": lambda: mi.solvers.cg(tol=1e-10),
    "cg + ekfac, tol 1e-10": lambda: mi.solvers.cg(tol=1e-10, preconditioner=mi.solvers.ekfac()),
    "ekfac alone": mi.solvers.ekfac,
    "minres, tol 1e-10": lambda: mi.solvers.minres(tol=1e-10),
    f"neumann, {UNROLLED_STEPS} terms": lambda: mi.solvers.neumann(UNROLLED_STEPS),
}
UNROLLED = f"unrolled, {UNROLLED_STEPS} gradient steps"


def make_tasks(condition: float, seed: int = 0) -> mi.Task:
    """Weighted least-squares tasks whose XᵀX has the given condition number.

    X = √n U Σ Vᵀ with random orthonormal U and V, Σ² from 1 down to 1/condition; queries share V and Σ.
    """
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1.0, condition**-0.5, FEATURES)

    def batch(count, rotation):
        basis = np.linalg.qr(rng.normal(size=(count, FEATURES)))[0] * count**0.5
        return {
            "x": basis * scales @ rotation.T,
            "basis": basis,
            "z": rng.normal(size=(count, COVARIATES)),
            "y": rng.normal(size=(count, OUTPUTS)),
        }

    def task():
        rotation = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
        support = batch(NUM_SUPPORT, rotation)
        # One copy per example, like the other leaves of a support set.
        support["back"] = np.broadcast_to(rotation / scales, (NUM_SUPPORT, FEATURES, FEATURES))
        return mi.Task(support, batch(NUM_QUERY, rotation), None, None)

    tasks = [task() for _ in range(NUM_TASKS)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *tasks)


def start(seed: int = 0) -> Any:
    """λ: parameters that shift the targets, and parameters that weight the examples."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.3 * rng.normal(size=(COVARIATES, OUTPUTS))) for name in ("target", "weight")}


def _targets(meta_params, batch):
    return batch["y"] + jnp.tanh(batch["z"] @ meta_params["target"])


def inner_loss(params, meta_params, batch):
    """Weighted squares; H_in depends on λ through the weights, and without them has the condition number of XᵀX."""
    outputs = mi.ekfac.outputs(LAYER(params, batch["x"]))
    weights = jnp.exp(batch["z"] @ meta_params["weight"])
    return 0.5 * jnp.sum(weights * (outputs - _targets(meta_params, batch)) ** 2, axis=1)


def outer_loss(params, meta_params, batch):
    """Squared errors of the predictions."""
    return 0.5 * jnp.sum((LAYER(params, batch["x"]) - _targets(meta_params, batch)) ** 2, axis=1)


def solution(meta_params, support, coefficients):
    """The exact answer: θ computed in the basis U, where the condition number of XᵀX plays no role."""
    weights = coefficients[:, None] * jnp.exp(support["z"] @ meta_params["weight"])
    basis = support["basis"]
    gram = jnp.einsum("no,nd,ne->ode", weights, basis, basis)
    moment = jnp.einsum("no,nd,no->od", weights, basis, _targets(meta_params, support))
    return {"kernel": support["back"][0] @ jnp.linalg.solve(gram, moment[..., None])[..., 0].T}


def adaptations() -> dict[str, Any]:
    """Adaptations by name; all implicit ones start at the exact minimum, so only their linear solves are judged."""

    def minimum(meta_params, support):
        return solution(meta_params, support, jnp.full(NUM_SUPPORT, 1 / NUM_SUPPORT))

    def zero(meta_params, support):
        return {"kernel": jnp.zeros((FEATURES, OUTPUTS))}

    implicit = {
        name: mi.adaptation.implicit(inner_loss, minimum, minimizer=mi.adaptation.given(), linear_solver=make())
        for name, make in LINEAR_SOLVERS.items()
    }
    # With weights up to about 2, the largest curvature is about 2 as well, so this step is close to the longest stable
    # one.
    unrolled = mi.adaptation.unrolled(inner_loss, zero, optax.sgd(0.5), UNROLLED_STEPS)
    return implicit | {UNROLLED: unrolled}


def inner_condition(meta_params: Any, tasks: mi.Task) -> float:
    """The largest condition number of H_in over tasks and outputs."""
    x, weights = np.asarray(tasks.support["x"]), np.exp(np.asarray(tasks.support["z"] @ meta_params["weight"]))
    matrices = np.sqrt(weights).transpose(0, 2, 1)[..., None] * x[:, None]
    return float(np.max(np.linalg.cond(matrices) ** 2))


def rows(conditions: Sequence[float], *, damping: float = 0.1) -> Iterator[Row]:
    """Errors of the total gradients and of task-IF of all tasks, by inner solver and condition number.

    Args:
      conditions: condition numbers to aim for.
      damping: damping of task-IF.
    """
    meta_params = start()
    data = [(condition, make_tasks(condition)) for condition in conditions]

    def programs(adapt):
        problem = mi.bilevel(outer_loss, adapt, meta_regularizer=mi.l2(1.0))
        gradient = jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))
        influence = mi.task_if(problem, solver=mi.solvers.dense(), damping=damping)

        def run(meta_params, tasks):
            return gradient(meta_params, tasks), influence(meta_params, tasks).delta

        return Compiled(run)

    exact = programs(mi.adaptation.closed_form(solution))
    truth = [[flat(part) for part in exact(meta_params, tasks)] for _, tasks in data]
    for name, adapt in adaptations().items():
        program = programs(adapt)
        for (condition, tasks), expected in zip(data, truth, strict=True):
            found = program(meta_params, tasks)
            errors = [relative_error(flat(part), right) for part, right in zip(found, expected, strict=True)]
            yield {
                "inner_solver": name,
                "asked": condition,
                "condition": inner_condition(meta_params, tasks),
                "gradient_error": errors[0],
                "task_if_error": errors[1],
            }
