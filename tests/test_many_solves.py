"""Many right-hand sides and many tasks: what the default solver does in the influence functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from oracles.reference import relative_error, rows

NUM_TASKS, WIDTH, DAMPING = 64, 16, 0.01


def ridge(meta_params, support, coefficients):
    features = jnp.tanh(support["x"][:, None] * meta_params["w"][None] + meta_params["b"][None])
    gram = jnp.einsum("n,nd,ne->de", coefficients, features, features) + 0.1 * jnp.eye(WIDTH)
    return jnp.linalg.solve(gram, jnp.einsum("n,nd,n->d", coefficients, features, support["y"]))


def loss(params, meta_params, batch):
    features = jnp.tanh(batch["x"][:, None] * meta_params["w"][None] + meta_params["b"][None])
    return (features @ params - batch["y"]) ** 2


PROBLEM = mi.bilevel(loss, mi.adaptation.closed_form(ridge), meta_regularizer=mi.l2(0.01))


@pytest.fixture(scope="module")
def point():
    """Sinusoid tasks, and meta-parameters at which no training has been."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_TASKS, 12))
    y = rng.uniform(0.5, 1.5, (NUM_TASKS, 1)) * np.sin(x + rng.uniform(0, 3, (NUM_TASKS, 1)))
    side = lambda part: {"x": jnp.asarray(x[:, part]), "y": jnp.asarray(y[:, part])}  # noqa: E731
    meta_params = {"w": jnp.asarray(rng.normal(size=WIDTH)), "b": jnp.asarray(rng.normal(size=WIDTH))}
    return meta_params, mi.Task(side(slice(5)), side(slice(5, 12)))


@pytest.fixture(scope="module")
def exact(point):
    return jax.jit(mi.task_if(PROBLEM, solver=mi.solvers.dense(absolute=True), damping=DAMPING))(*point)


@pytest.mark.parametrize("kind", ["auto", "auto_krylov", "block_cg"])
def test_task_if_of_all_tasks_shares_one_basis(kind, point, exact):
    solver = {
        "auto": mi.solvers.auto(tol=1e-9),
        "auto_krylov": mi.solvers.auto(tol=1e-9, dense_size=0),
        "block_cg": mi.solvers.block_cg(tol=1e-9, absolute=True),
    }[kind]
    found = jax.jit(mi.task_if(PROBLEM, solver=solver, damping=DAMPING))(*point)
    with pytest.warns(mi.BudgetWarning, match="λ is no minimum"):
        mi.check(found)
    assert relative_error(rows(found.delta), rows(exact.delta)) <= 1e-6
    assert found.info.status.shape == found.info.damping.shape == (NUM_TASKS,)
    # Two meta-parameters for each of 16 features: no basis is larger than that, for however many right-hand sides.
    assert np.all(np.asarray(found.info.num_matvecs) <= 2 * (2 * WIDTH) + 8)


def test_the_default_solver_samples_tasks_to_precondition_and_counts_that(point):
    meta_params, tasks = point
    hessian = jax.jit(mi.total_hessian(PROBLEM, damping=DAMPING))(meta_params, tasks)
    assert hessian.num_groups == NUM_TASKS
    solver = mi.solvers.sampled(8, rank=10)
    state = jax.jit(solver.init)(hessian)
    # Ten products with an eighth of the tasks.
    assert solver.init_matvecs(state) == 2
    rhs = jax.tree.map(jnp.ones_like, meta_params)
    other = jax.tree.map(lambda leaf: jnp.linspace(-1.0, 1.0, leaf.size), meta_params)
    apply = jax.jit(lambda b: solver.solve(hessian, state, b)[0])
    left, right = jax.tree.map(jnp.vdot, other, apply(rhs)), jax.tree.map(jnp.vdot, apply(other), rhs)
    np.testing.assert_allclose(sum(jax.tree.leaves(left)), sum(jax.tree.leaves(right)), rtol=1e-10)
    assert sum(jax.tree.leaves(jax.tree.map(jnp.vdot, rhs, apply(rhs)))) > 0


def test_a_sample_of_all_tasks_is_the_operator(point):
    meta_params, tasks = point
    hessian = jax.jit(mi.total_hessian(PROBLEM))(meta_params, tasks)
    whole = jax.jit(lambda operator: operator.sample(NUM_TASKS).dense())(hessian)
    np.testing.assert_allclose(whole, jax.jit(lambda operator: operator.dense())(hessian), atol=1e-12)


def test_scores_by_the_default_solver_are_the_exact_ones(point):
    meta_params, tasks = point
    target = lambda m: jnp.sum(m["w"] ** 3 + m["b"])  # noqa: E731
    exact = jax.jit(mi.influence_scores(PROBLEM, target, solver=mi.solvers.dense(absolute=True), damping=DAMPING))(
        meta_params, tasks
    )
    krylov = jax.jit(
        mi.influence_scores(PROBLEM, target, solver=mi.solvers.auto(tol=1e-10, dense_size=0), damping=DAMPING)
    )(meta_params, tasks)
    for field in ("task", "support", "query"):
        assert relative_error(getattr(krylov, field), getattr(exact, field)) <= 1e-7
    assert krylov.info.choice in (mi.solvers.Choice.KRYLOV, mi.solvers.Choice.KRYLOV_ABSOLUTE)
    default = jax.jit(mi.influence_scores(PROBLEM, target, damping=DAMPING))(meta_params, tasks)
    assert default.info.choice in (mi.solvers.Choice.DENSE, mi.solvers.Choice.DENSE_ABSOLUTE)


def test_self_influence_of_a_task_is_solved_as_a_block(point):
    meta_params, tasks = point
    few = jax.tree.map(lambda leaf: leaf[:3], tasks)
    found = jax.jit(mi.self_influence(PROBLEM, solver=mi.solvers.block_cg(tol=1e-9, absolute=True), damping=0.1))(
        meta_params, few
    )
    expected = jax.jit(mi.self_influence(PROBLEM, solver=mi.solvers.dense(absolute=True), damping=0.1))(
        meta_params, few
    )
    with pytest.warns(mi.BudgetWarning, match="λ is no minimum"):
        mi.check(found)
    assert found.info.status.shape == (3, 1 + 5 + 7)
    for field in ("task", "support", "query"):
        assert relative_error(getattr(found, field), getattr(expected, field)) <= 1e-6
