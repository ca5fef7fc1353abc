"""Adaptation: the same θ and the same derivatives, however it is computed; and what cannot be differentiated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence import minimizers
from metainfluence.adaptation import usual_linear_solver
from oracles.parts import anchored, lenient
from oracles.problems import NAMES, spec
from oracles.reference import flat, ravel, relative_error, row, share, solved


def support_of(problem_name, k):
    """Support set and coefficients of task k at the optimum's weights."""
    point, task = solved(problem_name), row(spec(problem_name).tasks, k)
    return task.support, share(point.weights.support[k], task.support_mask)


@pytest.mark.parametrize("problem_name", NAMES)
def test_adapted_parameters_are_the_re_solved_ones(problem_name):
    point = solved(problem_name)
    theta = jax.jit(spec(problem_name).adapt.adapt)(point.meta_params, *support_of(problem_name, 1))
    assert relative_error(ravel(theta), point.bases.theta[1]) <= 1e-10


@pytest.mark.parametrize("problem_name", ["imaml", "maml_sgd", "prototypes"])
def test_an_adaptation_is_a_function_to_every_transformation(problem_name):
    adapt, tasks = spec(problem_name).adapt, spec(problem_name).tasks
    coefficients = jax.vmap(share)(mi.unit_weights(tasks).support, tasks.support_mask)
    mapped = jax.vmap(jax.jit(adapt), in_axes=(None, 0, 0))(spec(problem_name).meta_params, tasks.support, coefficients)
    single = adapt(spec(problem_name).meta_params, row(tasks.support, 1), coefficients[1])
    assert relative_error(ravel(row(mapped, 1)), ravel(single)) <= 1e-12


def lenient_lbfgs():
    """optax's L-BFGS under JAX's usual promotion."""
    optimizer = optax.lbfgs()

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


COMBINATIONS = {
    "newton_cg and cg": lambda: (mi.adaptation.newton_cg(), mi.solvers.cg(tol=1e-13)),
    "lbfgs and minres": lambda: (
        mi.adaptation.optax_minimizer(lenient_lbfgs(), 200, tol=1e-12),
        mi.solvers.minres(tol=1e-13),
    ),
    "gradient descent and dense": lambda: (
        mi.adaptation.optax_minimizer(optax.sgd(0.1), 2000, tol=1e-12),
        mi.solvers.dense(),
    ),
    "dense newton and an accelerator's solver": lambda: (
        mi.adaptation.newton(),
        usual_linear_solver(jnp.zeros(3), "gpu"),
    ),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_minimizers_and_linear_solvers_can_be_exchanged(combination):
    """Gradient of, and a product with the Hessian of, the objective against the independent program."""
    s, point = spec("imaml"), solved("imaml")
    minimizer, linear_solver = COMBINATIONS[combination]()
    adapt = mi.adaptation.implicit(
        s.inner.loss,
        s.inner.start,
        minimizer=minimizer,
        linear_solver=linear_solver,
        regularizer=s.inner.regularizer,
    )
    problem = mi.bilevel(s.outer_loss, adapt, meta_regularizer=s.meta_regularizer)

    def run(meta_params, tasks, weights, vector):
        gradient = jax.grad(mi.total_objective(problem))
        return jax.jvp(lambda m: gradient(m, tasks, weights), (meta_params,), (vector,))

    vector = jnp.cos(jnp.arange(len(point.lam), dtype=point.lam.dtype))
    gradient, product = jax.jit(run)(point.meta_params, s.tasks, point.weights, point.flat.unravel(vector))
    assert np.linalg.norm(ravel(gradient)) <= 1e-10
    assert relative_error(ravel(product), point.derivatives.hessian @ vector) <= 1e-9


def test_remat_changes_nothing():
    s = spec("maml_sgd")

    def loss(remat, meta_params):
        adapt = mi.adaptation.unrolled(
            lambda params, meta_params, batch: s.outer_loss(params, meta_params, batch),
            lambda meta_params, support: meta_params,
            optax.sgd(0.3),
            3,
            remat=remat,
        )
        problem = mi.bilevel(s.outer_loss, adapt)
        return mi.task_loss(problem)(meta_params, row(s.tasks, 0))

    plain, remat = (jax.jit(jax.grad(functools.partial(loss, flag)))(s.meta_params) for flag in (False, True))
    assert relative_error(ravel(remat), ravel(plain)) <= 1e-13


def depressed_cubic(slope):
    """The real root of θ³ + θ = slope."""
    return 2 / jnp.sqrt(3.0) * jnp.sinh(jnp.arcsinh(1.5 * jnp.sqrt(3.0) * slope) / 3)


@pytest.mark.parametrize("transforms", ["rrr", "ffr", "frf", "rfr"])
def test_implicit_is_differentiable_to_the_third_order_in_every_order_of_modes(transforms):
    """θ = argmin ¼θ⁴ + ½θ² − λθ has a closed form whose derivatives autodiff gives."""
    adapt = mi.adaptation.implicit(
        lambda params, meta_params, batch: (params**4 / 4 + params**2 / 2 - meta_params * params)[None] + 0 * batch,
        lambda meta_params, support: jnp.zeros(()),
    )

    def theta(slope):
        return adapt(slope, jnp.zeros(2), jnp.asarray([0.25, 0.75]))

    # The order in which the transformations are applied, innermost last.
    derivative, expected = theta, depressed_cubic
    for mode in reversed(transforms):
        derivative = {"r": jax.jacrev, "f": jax.jacfwd}[mode](derivative)
        expected = jax.jacfwd(expected)
    point = jnp.asarray(0.7)
    np.testing.assert_allclose(jax.jit(derivative)(point), expected(point), rtol=1e-9)


def ignorant_problem(inner_loss, init, regularizer=None):
    """A problem whose inner objective has no term with λ, as MAML's if it were minimised to the end."""
    s = spec("imaml")
    adapt = mi.adaptation.implicit(inner_loss, init, regularizer=regularizer)
    return mi.bilevel(s.outer_loss, adapt), s


INITS = {
    "itself": lambda meta_params, support: meta_params,
    "scaled": lambda meta_params, support: jax.tree.map(lambda leaf: 0.5 * leaf, meta_params),
    "loop": lambda meta_params, support: jax.lax.fori_loop(
        0, 3, lambda _, params: jax.tree.map(lambda leaf: 0.9 * leaf, params), meta_params
    ),
}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_initialisation_that_cannot_matter_is_refused_at_trace_time(init, compiled):
    s = spec("imaml")

    def inner_loss(params, meta_params, batch):
        return s.inner.loss(params, meta_params, batch)

    def ridge(params, meta_params):
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    problem, s = ignorant_problem(jax.jit(inner_loss) if compiled else inner_loss, INITS[init], ridge)
    for traced in (
        lambda: jax.eval_shape(mi.total_gradient(problem), s.meta_params, row(s.tasks, 0)),
        lambda: jax.eval_shape(mi.total_objective(problem), s.meta_params, s.tasks),
        lambda: jax.eval_shape(mi.task_if(problem), s.meta_params, s.tasks),
    ):
        with pytest.raises(ValueError, match=r"init.*meta_params.*inner objective.*zero.*proximal"):
            traced()


@pytest.mark.parametrize("term", ["loss", "regularizer"])
def test_an_initialisation_beside_a_term_with_lambda_is_accepted(term):
    s = spec("imaml")

    def inner_loss(params, meta_params, batch):
        scale = jnp.exp(meta_params[0][0, 0]) if term == "loss" else jnp.ones(())
        return scale * s.inner.loss(params, meta_params, batch)

    def regularizer(params, meta_params):
        if term == "regularizer":
            return s.inner.regularizer(params, meta_params)
        return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    problem, s = ignorant_problem(inner_loss, INITS["itself"], regularizer)
    gradient = jax.eval_shape(mi.total_gradient(problem), s.meta_params, row(s.tasks, 0))
    assert jax.tree.structure(gradient) == jax.tree.structure(s.meta_params)


def test_a_lambda_free_init_of_a_lambda_free_objective_is_accepted():
    """A head trained on raw inputs, λ in the outer loss only: dθ/dλ = 0 is then no surprise."""

    def inner_loss(params, meta_params, batch):
        return (batch["x"] @ params - batch["y"])[:, 0] ** 2

    adapt = mi.adaptation.implicit(
        inner_loss, lambda meta_params, support: jnp.zeros((2, 1)), regularizer=lambda p, m: jnp.sum(p**2)
    )
    problem = mi.bilevel(lambda p, m, batch: m * inner_loss(p, m, batch), adapt)
    tasks = spec("imaml").tasks
    gradient = jax.jit(mi.total_gradient(problem))(jnp.asarray(2.0), row(tasks, 0))
    loss = jax.jit(mi.task_loss(problem))(jnp.asarray(1.0), row(tasks, 0))
    np.testing.assert_allclose(gradient, loss, rtol=1e-12)


def test_inner_gradient_norm_reports_an_inner_problem_that_was_not_solved():
    s = spec("imaml")
    adapt = mi.adaptation.implicit(
        s.inner.loss,
        s.inner.start,
        minimizer=mi.adaptation.optax_minimizer(optax.sgd(0.1), 2),
        regularizer=s.inner.regularizer,
    )
    problem = mi.bilevel(s.outer_loss, adapt, meta_regularizer=anchored(1.0, s.meta_params))
    info = jax.jit(mi.task_if(problem, solver=mi.solvers.identity()))(s.meta_params, s.tasks).info

    def norm(task):
        theta = adapt(s.meta_params, task.support, share(jnp.ones(6), task.support_mask))
        slope = jax.grad(flat("imaml").inner)(
            jax.flatten_util.ravel_pytree(theta)[0], jnp.asarray(ravel(s.meta_params)), task, jnp.ones(6)
        )
        return jnp.linalg.norm(slope)

    expected = max(float(norm(row(s.tasks, k))) for k in range(4))
    assert expected > 1e-3
    np.testing.assert_allclose(info.inner_gradient_norm, np.full(4, expected), rtol=1e-10)


def test_unrolled_adam_follows_optax():
    """The library's scan against a plain loop over optax itself."""
    s = spec("maml_sgd")
    optimizer = lenient(optax.adam(0.1, eps_root=1e-6))
    adapt = mi.adaptation.unrolled(s.outer_loss, lambda meta_params, support: meta_params, optimizer, 3)
    task = row(s.tasks, 0)
    coefficients = share(jnp.ones(6), task.support_mask)

    params, state = s.meta_params, optimizer.init(s.meta_params)
    for _ in range(3):
        gradient = jax.grad(lambda p: jnp.sum(coefficients * s.outer_loss(p, s.meta_params, task.support)))(params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    got = jax.jit(adapt.adapt)(s.meta_params, task.support, coefficients)
    assert relative_error(ravel(got), ravel(params)) <= 1e-12


def test_dense_newton_reaches_the_minimum_of_a_head_to_rounding(rng):
    """As near as newton_cg's goal at least, for tasks side by side, one of them with weights of 0."""
    x, y = jnp.asarray(rng.normal(size=(3, 8, 4))), jnp.asarray(rng.integers(0, 3, size=(3, 8)))
    weights = jnp.ones((3, 8)).at[1, :5].set(0.0) / 8

    def gradient_norms(minimizer):
        def objective(params, data):
            logits = data[0] @ params["kernel"] + params["bias"][None]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, data[1])
            return jnp.sum(data[2] * losses) + 0.05 * sum(jnp.sum(leaf**2) for leaf in params.values())

        def single(data):
            start = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
            params = minimizer(lambda params: objective(params, data), start)
            return optax.tree.norm(jax.grad(objective)(params, data))

        return jax.jit(jax.vmap(single)), ((x, y, weights),)

    dense, data = gradient_norms(mi.adaptation.newton(num_steps=8))
    iterative, _ = gradient_norms(mi.adaptation.newton_cg())
    assert np.max(dense(*data)) <= min(np.max(iterative(*data)), 1e-12)
    # What an accelerator would wait for: one loop of eight turns, against loops inside of another.
    loops = [
        each.trace(*data).lower(lowering_platforms=("cuda",)).as_text().count("stablehlo.while")
        for each in (dense, iterative)
    ]
    assert loops[0] == 1 < loops[1]


def test_dense_newton_where_the_objective_is_not_convex():
    minimize = jax.jit(lambda start: mi.adaptation.newton(num_steps=20)(lambda x: jnp.sum((x**2 - 1) ** 2), start))
    # At the first the curvature is negative.
    np.testing.assert_allclose(minimize(jnp.asarray([0.1, -3.0])), [1.0, -1.0], atol=1e-9)
    assert np.all(np.isnan(minimize(jnp.asarray([jnp.nan, 1.0]))))
    with pytest.raises(ValueError, match="num_steps: expected"):
        mi.adaptation.newton(num_steps=0)


def test_an_accelerators_linear_solver_takes_flat_directions():
    """Where there is no Cholesky factor conjugate gradients solve, from nothing."""
    solver = usual_linear_solver(jnp.zeros(3), "gpu")
    for diagonal in ([1.0, 2.0, 0.0], [1.0, 2.0, 5.0]):
        scale = jax.tree_util.Partial(jnp.multiply, jnp.asarray(diagonal))
        operator = mi.operators.from_matvec(scale, jnp.zeros(3))
        solution = solver.solve(operator, solver.init(operator), jnp.asarray([1.0, 1.0, 0.0]))[0]
        np.testing.assert_allclose(solution, [1.0, 0.5, 0.0], atol=1e-12)
    names = [repr(usual_linear_solver(jnp.zeros(size), backend)) for size, backend in ((3, "cpu"), (513, "gpu"))]
    assert all(name.startswith("cg(") for name in names)


@pytest.mark.parametrize("along", [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 0.0, 0.0, -1.0]])
def test_a_saddle_is_seen_whichever_way_it_falls(along):
    """The probe has a part along every direction, and so along those without a mean."""
    unit = jnp.asarray(along) / np.linalg.norm(along)
    product = lambda v: v - 1.5 * unit * jnp.vdot(unit, v)  # noqa: E731
    zero = jnp.zeros(4)
    assert jnp.isinf(minimizers.gradient_norm(zero, product, zero))
    assert minimizers.gradient_norm(zero, lambda v: v - 0.5 * unit * jnp.vdot(unit, v), zero) == 0
