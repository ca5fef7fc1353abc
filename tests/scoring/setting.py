"""A small problem with a few meta-parameters, and sources of tasks, for the engine's tests and their subprocesses."""

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from metainfluence.scoring._passes import Passes, reader_of
from metainfluence.scoring._programs import programs_of

LAMBDA = {"scale": np.asarray([0.5, 0.8, -0.3]), "bias": np.asarray(0.1)}


def _ridge(meta_params, support, coefficients):
    x = jnp.tanh(support["x"] * meta_params["scale"][None] + meta_params["bias"])
    gram = jnp.einsum("n,nd,ne->de", coefficients, x, x) + 0.3 * jnp.eye(3, dtype=x.dtype)
    return jnp.linalg.solve(gram, jnp.einsum("n,nd,n->d", coefficients, x, support["y"]))


def _loss(params, meta_params, batch):
    x = jnp.tanh(batch["x"] * meta_params["scale"][None] + meta_params["bias"])
    return (x @ params - batch["y"]) ** 2


PROBLEM = mi.bilevel(_loss, mi.adaptation.closed_form(_ridge), meta_regularizer=mi.l2(0.5))


def target(meta_params, direction):
    return jnp.sum(meta_params["scale"] * direction) + jnp.sin(meta_params["bias"])


TARGET_ARGS = (np.asarray([1.0, -0.5, 0.25]),)


def tasks(count, *, ragged=False, seed=0, dtype=np.float64):
    """Single tasks in host memory."""

    def batch(rng, size):
        x = rng.normal(size=(size, 3))
        return {"x": x.astype(dtype), "y": (np.sin(x.sum(axis=1)) + 0.1 * rng.normal(size=size)).astype(dtype)}

    found = []
    for k in range(count):
        rng = np.random.default_rng([seed, k])
        sizes = (3 + k % 3, 2 + k % 4) if ragged else (4, 5)
        found.append(mi.Task(*(batch(rng, size) for size in sizes)))
    return found


def score(source, out, **options):
    """`scoring.score` on this problem, quietly and well solved."""
    given = {"problem": PROBLEM, "target": target, "meta_params": LAMBDA, "target_args": TARGET_ARGS, **options}
    problem, phi, at, args = (given.pop(name) for name in ("problem", "target", "meta_params", "target_args"))
    settings = {"solver": mi.solvers.cg(tol=1e-12), "damping": 1.0, "progress": False, "batch_size": 4, **given}
    return mi.scoring.score(problem, phi, at, source, *args, out=out, **settings)


def in_memory(found, **options):
    """`influence_scores` of the same tasks."""
    options = {"solver": mi.solvers.dense(), "damping": 1.0, **options}
    make = jax.jit(mi.influence_scores(PROBLEM, target, **options))
    return make(jax.tree.map(jnp.asarray, LAMBDA), mi.stack_tasks(found), *TARGET_ARGS)


EXACT = mi.curvature.exact()


def programs(mesh=None):
    return programs_of(PROBLEM, EXACT, mesh)


def reader(source, batch_size, on_error="raise", mesh=None):
    return reader_of(source, batch_size, on_error, mesh)


def passes(made, found, memory):
    return Passes(made, jax.tree.map(jnp.asarray, LAMBDA), found, memory=memory)


def solve(operator, solver):
    """A flat solution for one right-hand side, with loops around the products in Python, and the report."""
    with jax.disable_jit():
        state = solver.init(operator)
        solution, info = solver.solve(operator, state, jax.tree.map(jnp.asarray, LAMBDA))
    return operator.domain.ravel(solution), info
