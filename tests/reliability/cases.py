"""Small problems of every kind of adaptation, each compiled once, and the data that hypothesis draws for them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import settings
from hypothesis.extra.numpy import arrays

import metainfluence as mi

T, SUPPORT, QUERY = 3, 3, 2
STEPS, RATE = 2, 0.3
QUICK = settings(derandomize=True, max_examples=12, deadline=None, database=None)
LONG = settings(QUICK, max_examples=300)


class Structure(NamedTuple):
    """What makes JAX compile anew."""

    adapt: str
    curvature: str
    ragged: bool
    dtype: str = "float64"

    def __str__(self) -> str:
        return "-".join([self.adapt, self.curvature, "ragged" if self.ragged else "full", self.dtype])


STRUCTURES = (
    Structure("closed_form", "exact", True),
    Structure("unrolled", "gauss_newton", False),
    Structure("implicit", "exact", True),
)
MORE = (
    Structure("closed_form", "gamma", False),
    Structure("unrolled", "exact", True),
    Structure("implicit", "linearized", False),
    Structure("closed_form", "direct", True),
    Structure("closed_form", "exact", False, "float32"),
)


def features(x: Any, meta_params: Any) -> Any:
    """What λ makes of the inputs."""
    return jnp.tanh(x * meta_params["scale"][None])


def model(params: Any, meta_params: Any, batch: Any) -> Any:
    """One prediction per example."""
    return features(batch["x"], meta_params) @ params + meta_params["head"][0]


def head(outputs: Any, batch: Any) -> Any:
    """log cosh of the residual: convex, and not quadratic."""
    residual = outputs - batch["y"]
    return jnp.logaddexp(residual, -residual) - jnp.log(jnp.asarray(2, residual.dtype))


def outer_loss(params: Any, meta_params: Any, batch: Any) -> Any:
    """The same as one function."""
    return head(model(params, meta_params, batch), batch)


def inner_loss(params: Any, meta_params: Any, batch: Any) -> Any:
    """Half the squared residual of the features alone, so that the minimum is a ridge regression's."""
    return 0.5 * (features(batch["x"], meta_params) @ params - batch["y"]) ** 2


def inner_regularizer(params: Any, meta_params: Any) -> Any:
    """Draws θ to a point that λ names."""
    strength, anchor = meta_params["head"][1]
    return 0.5 * jnp.exp(strength) * jnp.sum((params - anchor) ** 2)


def ridge(meta_params: Any, support: Any, coefficients: Any) -> Any:
    """The inner minimum in closed form."""
    x, (strength, anchor) = features(support["x"], meta_params), meta_params["head"][1]
    coefficients = coefficients.astype(x.dtype)
    gram = jnp.einsum("n,nd,ne->de", coefficients, x, x) + jnp.exp(strength) * jnp.eye(2, dtype=x.dtype)
    return jnp.linalg.solve(gram, jnp.einsum("n,nd,n->d", coefficients, x, support["y"]) + jnp.exp(strength) * anchor)


def start(meta_params: Any, support: Any) -> Any:
    """Where the inner loop begins."""
    del support
    return meta_params["head"][1][1]


def adaptation(kind: str, **options: Any) -> Any:
    """One of the ways to adapt."""
    if kind == "closed_form":
        return mi.adaptation.closed_form(ridge)
    if kind == "unrolled":
        return mi.adaptation.unrolled(
            inner_loss, start, optax.sgd(RATE), STEPS, regularizer=inner_regularizer, **options
        )
    return mi.adaptation.implicit(inner_loss, start, regularizer=inner_regularizer, **options)


def problem(kind: str, delta: Any = 0.0, **options: Any) -> mi.Bilevel:
    """The problem, with an l2 term of strength δ."""
    return mi.bilevel(model, adaptation(kind, **options), meta_regularizer=mi.l2(delta), outer_head=head)


def target(meta_params: Any, test_tasks: mi.Task, factor: Any) -> Any:
    """A multiple of the loss on held-out tasks; of closed form, so that it compiles quickly."""
    return factor * mi.query_loss(mi.bilevel(outer_loss, mi.adaptation.closed_form(ridge)))(meta_params, test_tasks)


class Inputs(NamedTuple):
    """Everything that the compiled functions take."""

    meta_params: Any
    tasks: mi.Task
    weights: mi.Weights
    damping: Any
    test_tasks: mi.Task
    delta: Any = 0.0
    factor: Any = 1.0


@functools.cache
def scores_of(structure: Structure) -> Any:
    """Inputs -> Scores, by the dense solver."""

    def run(inputs: Inputs) -> mi.Scores:
        maker = mi.influence_scores(
            problem(structure.adapt, inputs.delta), target, **strategies(structure, inputs.damping)
        )
        return maker(inputs.meta_params, inputs.tasks, inputs.test_tasks, inputs.factor, weights=inputs.weights)

    return jax.jit(run)


@functools.cache
def group_of(structure: Structure) -> Any:
    """(Inputs, direction) -> Influence, and the target's derivative along it."""

    def run(inputs: Inputs, direction: mi.Weights) -> tuple[mi.Influence, Any]:
        maker = mi.group_influence(problem(structure.adapt, inputs.delta), **strategies(structure, inputs.damping))
        influence = maker(inputs.meta_params, inputs.tasks, direction, weights=inputs.weights)
        slope = jax.grad(target)(inputs.meta_params, inputs.test_tasks, inputs.factor)
        return influence, optax.tree.vdot(slope, influence.delta)

    return jax.jit(run)


@functools.cache
def operator_of(structure: Structure) -> Any:
    """(Inputs, vector) -> product."""

    def run(inputs: Inputs, vector: Any) -> Any:
        curvature = getattr(mi.curvature, structure.curvature)()
        hessian = mi.total_hessian(problem(structure.adapt, inputs.delta), curvature, damping=inputs.damping)
        return hessian(inputs.meta_params, inputs.tasks, inputs.weights).matvec(vector)

    return jax.jit(run)


def strategies(structure: Structure, damping: Any) -> dict[str, Any]:
    """What all makers take."""
    curvature = getattr(mi.curvature, structure.curvature)()
    return {"solver": mi.solvers.dense(), "curvature": curvature, "damping": damping}


class Drawn(NamedTuple):
    """Numbers from hypothesis, without masks and in float64."""

    data: np.ndarray
    test: np.ndarray
    lam: np.ndarray
    vectors: np.ndarray
    weights: np.ndarray
    counts: np.ndarray
    damping: float
    order: tuple[int, ...]


def _numbers(shape: Any, low: float, high: float) -> Any:
    return arrays(np.float64, shape, elements=st.floats(low, high, width=32))


DRAWN = st.builds(
    Drawn,
    data=_numbers((T, SUPPORT + QUERY, 3), -3, 3),
    test=_numbers((1, SUPPORT + QUERY, 3), -3, 3),
    lam=_numbers(6, -1, 1),
    vectors=_numbers((2, 6), -2, 2),
    weights=_numbers((T, 1 + SUPPORT + QUERY), 0.25, 2),
    counts=arrays(np.int64, (T, 2), elements=st.integers(1, 3)),
    # Above what the drawn problems' curvature goes below 0, so that the solves are well conditioned.
    damping=st.floats(20, 50),
    order=st.permutations(range(T)).map(tuple),
)


def tasks_of(numbers: np.ndarray) -> mi.Task:
    """Tasks whose last column is the label."""
    batch = {"x": numbers[..., :2], "y": numbers[..., 2]}
    return mi.Task(
        *({k: jnp.asarray(v[:, rows]) for k, v in batch.items()} for rows in (slice(SUPPORT), slice(SUPPORT, None)))
    )


def meta_params_of(vector: np.ndarray) -> Any:
    """λ: a dictionary, a tuple in it, and a scalar."""
    return {
        "scale": jnp.asarray(vector[:2]),
        "head": (jnp.asarray(vector[2]), (jnp.asarray(vector[3]), jnp.asarray(vector[4:]))),
    }


def inputs_of(structure: Structure, drawn: Drawn) -> Inputs:
    """The numbers as the structure wants them."""
    tasks = tasks_of(drawn.data)
    if structure.ragged:
        # Three support and two query examples at most, one at least.
        real = np.minimum(drawn.counts, [SUPPORT, QUERY])
        tasks = tasks._replace(
            support_mask=jnp.arange(SUPPORT)[None] < jnp.asarray(real[:, :1]),
            query_mask=jnp.arange(QUERY)[None] < jnp.asarray(real[:, 1:]),
        )
    weights = mi.Weights(*map(jnp.asarray, np.split(drawn.weights, [1, 1 + SUPPORT], axis=1)))
    inputs = Inputs(
        meta_params_of(drawn.lam),
        tasks,
        weights._replace(task=weights.task[:, 0]),
        jnp.asarray(drawn.damping),
        tasks_of(drawn.test),
        jnp.asarray(0.5),
        jnp.asarray(1.0),
    )
    return cast(inputs, structure.dtype)


def cast(tree: Any, dtype: str) -> Any:
    """All floating-point leaves in another precision."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def tolerance(structure: Structure) -> dict[str, float]:
    """What rounding leaves of numbers of order one."""
    return {"rtol": 1e-9, "atol": 1e-11} if structure.dtype == "float64" else {"rtol": 1e-3, "atol": 1e-5}


def ravel(tree: Any) -> np.ndarray:
    """All leaves in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def values(scores: mi.Scores) -> mi.Weights:
    """Scores without the report."""
    return mi.Weights(scores.task, scores.support, scores.query)
