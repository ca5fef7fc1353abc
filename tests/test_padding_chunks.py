"""Padding and chunking change nothing: garbage and NaN in the padding, and any number of tasks per chunk."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
import runs
from oracles.problems import spec
from oracles.reference import relative_error, solved

PADDED = ("implicit_head", "maml_sgd", "prototypes")


def compare(found, expected, tol=1e-12):
    """Leaf by leaf; absolute where the leaf is zero."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, got), wanted in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if np.any(np.asarray(wanted)):
            assert relative_error(got, wanted) <= tol, jax.tree_util.keystr(path)
        else:
            assert np.all(np.abs(got) <= tol), jax.tree_util.keystr(path)


def pad_batch(batch, mask, filling):
    """Doubles the number of examples; the padding that was there already is filled as well."""

    def extend(leaf):
        wide = jnp.concatenate([leaf, leaf], axis=1)
        value = filling if jnp.issubdtype(leaf.dtype, jnp.floating) else 10**6
        real = padded_mask(mask).reshape(*padded_mask(mask).shape, *[1] * (leaf.ndim - 2))
        return jnp.where(real, wide, jnp.full_like(wide, value))

    return jax.tree.map(extend, batch)


def padded_mask(mask):
    return jnp.concatenate([mask, jnp.zeros_like(mask)], axis=1)


def pad(tasks, filling):
    """Tasks padded to twice their size."""
    return mi.Task(
        pad_batch(tasks.support, tasks.support_mask, filling),
        pad_batch(tasks.query, tasks.query_mask, filling),
        padded_mask(tasks.support_mask),
        padded_mask(tasks.query_mask),
    )


@functools.cache
def everything(problem_name):
    """Compiled (meta_params, tasks, weights) -> losses, gradients, a solve and scores; numbers of padding cut off."""
    problem = runs.problem(problem_name)
    coefficients = runs.target_coefficients(problem_name)

    def run(meta_params, tasks, weights):
        widths = [leaf.shape[1] for leaf in solved(problem_name).weights[1:]]
        scores = mi.influence_scores(problem, runs.target, solver=mi.solvers.dense())
        found = scores(meta_params, tasks, coefficients, weights=weights)
        padding = (found.support[:, widths[0] :], found.query[:, widths[1] :])
        return {
            "losses": jax.vmap(mi.task_loss(problem), in_axes=(None, 0, 0))(meta_params, tasks, weights),
            "objective": mi.total_objective(problem)(meta_params, tasks, weights),
            "gradients": jax.vmap(mi.total_gradient(problem), in_axes=(None, 0, 0))(meta_params, tasks, weights),
            "task_if": mi.task_if(problem, solver=mi.solvers.dense())(meta_params, tasks, weights).delta,
            "scores": (found.task, found.support[:, : widths[0]], found.query[:, : widths[1]]),
        }, padding

    return jax.jit(run)


def filled_mask(tasks):
    """The same tasks with masks on both sides."""
    masks = [
        jnp.ones(weights.shape, bool) if mask is None else mask
        for mask, weights in zip(tasks[2:], mi.unit_weights(tasks)[1:], strict=True)
    ]
    return mi.Task(tasks.support, tasks.query, *masks)


@pytest.mark.parametrize("problem_name", PADDED)
@pytest.mark.parametrize("filling", [1e6, np.nan])
def test_padding_to_twice_the_size_changes_nothing(problem_name, filling):
    point, tasks = solved(problem_name), filled_mask(spec(problem_name).tasks)
    expected, _ = everything(problem_name)(point.meta_params, tasks, point.weights)
    # Weights on padding are no one's: any value must do.
    wide = mi.Weights(point.weights.task, *(jnp.tile(leaf, (1, 2)) for leaf in point.weights[1:]))
    found, padding = everything(problem_name)(point.meta_params, pad(tasks, filling), wide)
    compare(found, expected)
    assert all(np.all(scores == 0) for scores in padding)


def test_masks_of_ones_equal_no_masks():
    s = spec("context_vector")
    tasks = jax.tree.map(lambda leaf: leaf[:, :3], s.tasks)
    bare = tasks._replace(support_mask=None, query_mask=None)
    full = filled_mask(bare)
    make = jax.jit(jax.vmap(mi.task_loss(s.problem()), in_axes=(None, 0)))
    compare(make(s.meta_params, full), make(s.meta_params, bare), tol=1e-14)


def test_stacked_tasks_equal_single_ones():
    """`stack_tasks` pads ragged tasks; each keeps the loss that it has alone."""
    s, rng = spec("prototypes"), np.random.default_rng(1)
    single = [
        mi.Task(
            {"x": jnp.asarray(rng.normal(size=(n, 2))), "y": jnp.arange(n, dtype=jnp.int32) % 3},
            {"x": jnp.asarray(rng.normal(size=(m, 2))), "y": jnp.arange(m, dtype=jnp.int32) % 3},
        )
        for n, m in ((3, 4), (6, 2), (5, 5))
    ]
    stacked = mi.stack_tasks(single)
    assert jax.tree.leaves(stacked.support)[0].shape[:2] == (3, 6)
    assert stacked.support_mask.sum(axis=1).tolist() == [3, 6, 5]
    assert stacked.query_mask.sum(axis=1).tolist() == [4, 2, 5]
    loss = jax.jit(mi.task_loss(s.problem()))
    losses = jax.jit(jax.vmap(mi.task_loss(s.problem()), in_axes=(None, 0)))(s.meta_params, stacked)
    np.testing.assert_allclose(losses, [loss(s.meta_params, task) for task in single], rtol=1e-12)


def chunked(problem_name, batch_size, kinds):
    """What can be computed in chunks, by solves that are conditioned so well that rounding stays rounding."""
    problem = runs.problem(problem_name)
    options = {"solver": mi.solvers.cg(tol=1e-13), "damping": 1.0, "batch_size": batch_size}

    def run(meta_params, tasks, weights, direction, coefficients):
        return {kind: makers[kind](meta_params, tasks, weights, direction, coefficients) for kind in kinds}

    makers = {
        "objective": lambda m, t, w, d, c: mi.total_objective(problem, batch_size=batch_size)(m, t, w),
        "query_loss": lambda m, t, w, d, c: mi.query_loss(problem, batch_size=batch_size)(m, t),
        "product": lambda m, t, w, d, c: mi.total_hessian(problem, batch_size=batch_size)(m, t, w).matvec(c),
        "task_if": lambda m, t, w, d, c: mi.task_if(problem, **options)(m, t, w).delta,
        "group": lambda m, t, w, d, c: mi.group_influence(problem, **options)(m, t, d, w).delta,
        "scores": lambda m, t, w, d, c: mi.influence_scores(problem, runs.target, **options)(m, t, c, weights=w)[:3],
        "direct": lambda m, t, w, d, c: mi.baselines.direct_if(problem, runs.target, **options)(m, t, c, weights=w)[:3],
        "self": lambda m, t, w, d, c: mi.self_influence(problem, **options)(m, t, w)[:3],
        "edit": lambda m, t, w, d, c: mi.edit(problem, **options)(m, t, mi.drop(w, tasks=[0]), w).meta_params,
    }
    point = solved(problem_name)
    arguments = (runs.random_direction(problem_name), runs.target_coefficients(problem_name))
    return jax.jit(run)(point.meta_params, spec(problem_name).tasks, point.weights, *arguments)


whole = functools.cache(functools.partial(chunked, batch_size=None))

MAIN = ("objective", "product", "task_if", "scores")
OTHERS = ("query_loss", "group", "direct", "self", "edit")


@pytest.mark.parametrize(
    ("problem_name", "batch_size", "kinds"),
    [
        pytest.param("maml_sgd", 1, MAIN, marks=pytest.mark.slow),
        pytest.param("maml_sgd", 2, MAIN, marks=pytest.mark.slow),
        ("maml_sgd", 5, ("objective", "scores")),
        pytest.param("maml_sgd", 8, ("objective", "scores"), marks=pytest.mark.slow),
        pytest.param("prototypes", 3, OTHERS, marks=pytest.mark.slow),
        ("implicit_head", 3, ("product", "scores")),
    ],
)
def test_chunks_of_any_size_give_the_same(problem_name, batch_size, kinds):
    compare(chunked(problem_name, batch_size, kinds), whole(problem_name, kinds=kinds))


@pytest.mark.parametrize("kind", ["linearized", "gamma", "gauss_newton", "direct"])
def test_surrogate_curvatures_in_chunks_of_any_size_give_the_same(kind):
    s, curvature = spec("context_vector"), getattr(mi.curvature, kind)()
    matrices = []
    for batch_size in (None, 3):
        make = mi.total_hessian(runs.problem("context_vector"), curvature, batch_size=batch_size)
        matrices.append(jax.jit(lambda *arguments, make=make: make(*arguments).dense())(s.meta_params, s.tasks))
    assert relative_error(matrices[1], matrices[0]) <= 1e-12
