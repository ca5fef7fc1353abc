"""EK-FAC put to work: alone, within an implicit adaptation, as a preconditioner, as a baseline; and how it fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.flatten_util import ravel_pytree

import metainfluence as mi
from ekfac import nets
from oracles.reference import ravel, relative_error, row
from spectra import solve

FUNCTION = nets.losses_of(nets.mlp, nets.cross_entropy)


def net_operator(net, coefficients=None):
    return nets.operator(FUNCTION, net.params, net.data, net.coefficients if coefficients is None else coefficients)


def test_eager_jit_and_vmap_agree():
    net, solver = nets.build("mlp"), mi.solvers.ekfac()
    params = {"w1": net.params["w1"][:, :3]}
    layer = nets.losses_of(mi.ekfac.Dense("w1"), nets.cross_entropy)
    # Not along logits that grow together, which the loss does not see.
    rhs = params

    def run(operator):
        return solve(solver, operator, rhs)

    operator = nets.operator(layer, params, net.data, net.coefficients).damped(0.1)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2.0 * leaf]), operator)
    results = [run(operator), jax.jit(run)(operator), row(jax.jit(jax.vmap(run))(stacked), 0)]
    for solution, info in results[1:]:
        assert relative_error(ravel(solution), ravel(results[0][0])) <= 1e-12
        assert info.status == results[0][1].status == mi.SolveStatus.MAX_STEPS
        np.testing.assert_allclose(info.relative_residual, results[0][1].relative_residual, rtol=1e-10)
    matrix = nets.hessian(layer, params, net.data, net.coefficients) + 0.1 * np.eye(9)
    residual = np.linalg.norm(ravel(rhs) - matrix @ ravel(results[0][0])) / np.linalg.norm(ravel(rhs))
    np.testing.assert_allclose(results[0][1].relative_residual, residual, rtol=1e-10)


def test_a_factor_that_is_not_invertible_is_told_in_its_own_lane():
    """Lanes: as they are, one example left, whose factors have rank one, NaN, none left."""
    net = nets.build("mlp", examples=40)
    solver = mi.solvers.ekfac()
    one = jnp.zeros(40).at[0].set(1.0)
    lanes = jnp.stack([net.coefficients, one, one * jnp.nan, one * 0.0])
    rhs = jax.tree.map(jnp.ones_like, net.params)

    @jax.jit
    @jax.vmap
    def run(coefficients):
        return solve(solver, net_operator(net, coefficients), rhs)

    solutions, info = run(lanes)
    alone, _ = jax.jit(lambda: solve(solver, net_operator(net), rhs))()
    status = mi.SolveStatus
    assert info.status.tolist() == [status.INDEFINITE] * 2 + [status.NONFINITE, status.INDEFINITE]
    for lane in (0, 1, 3):
        assert np.all(np.isfinite(ravel(row(solutions, lane))))
        assert all(np.isfinite(row(info, lane)[index]) for index in range(4))
    assert relative_error(ravel(row(solutions, 0)), ravel(alone)) <= 1e-9


@functools.cache
def fitted(scales, strength):
    """A two-layer net, minimised: its operator, and the losses' slopes for each training and test example.

    Args:
      scales: smallest and largest scale of the inputs.
      strength: of the proximal term.
    """
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4, 3))

    def draw(examples):
        x = rng.normal(size=(examples, 4)) * np.geomspace(*scales, 4)
        labels = np.argmax(np.tanh(x) @ truth + 0.5 * rng.gumbel(size=(examples, 3)), axis=1)
        return {"x": jnp.asarray(x), "y": jnp.eye(3)[labels]}

    data, test = draw(60), draw(40)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    start = {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}
    weights = jnp.full(60, 1 / 60)

    def regularizer(params):
        return 0.5 * strength * sum(jnp.sum((params[name] - start[name]) ** 2) for name in params)

    def objective(params):
        return jnp.sum(weights * FUNCTION(params, data)) + regularizer(params)

    def slopes(params, batch):
        single = jax.grad(lambda params, x, y: FUNCTION(params, {"x": x[None], "y": y[None]})[0])
        return jax.vmap(lambda x, y: ravel_pytree(single(params, x, y))[0])(batch["x"], batch["y"])

    @jax.jit
    def run():
        params = mi.adaptation.newton_cg(max_steps=300)(objective, start)
        return params, slopes(params, data), slopes(params, test)

    params, train, judged = run()
    return nets.operator(FUNCTION, params, data, weights, regularizer), np.asarray(train), np.asarray(judged)


def test_scores_correlate_with_those_of_the_direct_solve():
    operator, train, test = fitted((1.0, 1.0), 0.3)
    operator = operator.damped(1e-3)

    @jax.jit
    def run(operator):
        solver = mi.solvers.ekfac()
        state = solver.init(operator)
        inverse = jax.vmap(lambda v: ravel_pytree(solver.solve(operator, state, operator.domain.unravel(v))[0])[0])
        return inverse(jnp.asarray(np.concatenate([test.mean(axis=0)[None], test, train]))), operator.dense()

    solutions, matrix = run(operator)
    rhs = np.concatenate([test.mean(axis=0)[None], test, train])
    direct = np.linalg.solve(matrix, rhs.T).T
    kinds = {
        "on the test loss": lambda solved: train @ solved[0],
        "on each test example": lambda solved: (train @ solved[1:41].T).ravel(),
        "on themselves": lambda solved: np.sum(train * solved[41:], axis=1),
    }
    for kind, scores in kinds.items():
        pair = scores(np.asarray(solutions)), scores(direct)
        pearson, spearman = scipy.stats.pearsonr(*pair)[0], scipy.stats.spearmanr(*pair)[0]
        print(f"{kind}: Pearson {pearson:.3f}, Spearman {spearman:.3f}")
        assert min(pearson, spearman) >= 0.94, kind


def test_as_a_preconditioner_it_saves_products():
    operator, _, test = fitted((0.1, 10.0), 1e-3)
    rhs = operator.domain.unravel(jnp.asarray(test[0]))
    counts = {}
    for name, preconditioner in (("plain", None), ("ekfac", mi.solvers.ekfac())):
        solver = mi.solvers.cg(tol=1e-10, preconditioner=preconditioner)
        _, info = jax.jit(lambda operator, solver=solver: solve(solver, operator, rhs))(operator)
        assert info.status == mi.SolveStatus.CONVERGED
        counts[name] = int(info.num_matvecs)
    print("products:", counts)
    assert counts["ekfac"] <= 0.75 * counts["plain"]


def inner_tasks():
    rng = np.random.default_rng(3)
    shapes = [(2, 12, 3), (2, 5, 3)]
    support, query = (
        {"x": jnp.asarray(rng.normal(size=s)), "y": jnp.eye(3)[rng.integers(3, size=s[:2])]} for s in shapes
    )
    return mi.Task(support, query)


def proximal(params, meta_params):
    return 0.5 * sum(jnp.sum((params[name] - meta_params[name]) ** 2) for name in params)


def fine_tuned(linear_solver):
    """iMAML with a two-layer network in both levels."""

    def inner_loss(params, meta_params, batch):
        return FUNCTION(params, batch)

    adapt = mi.adaptation.implicit(
        inner_loss, lambda meta_params, support: meta_params, linear_solver=linear_solver, regularizer=proximal
    )
    return mi.bilevel(inner_loss, adapt)


def test_within_an_implicit_adaptation():
    """The total gradient: exact with EK-FAC as the preconditioner, close to it with EK-FAC alone."""
    params, tasks = nets.build("mlp").params, inner_tasks()

    def gradients(linear_solver):
        gradient = mi.total_gradient(fine_tuned(linear_solver))
        return jax.vmap(gradient, in_axes=(None, 0))(params, tasks)

    preconditioned = mi.solvers.cg(tol=1e-12, preconditioner=mi.solvers.ekfac())
    exact, same, close = jax.jit(
        lambda: tuple(map(gradients, (mi.solvers.dense(), preconditioned, mi.solvers.ekfac())))
    )()
    assert relative_error(ravel(same), ravel(exact)) <= 1e-9
    error = relative_error(ravel(close), ravel(exact))
    print(f"total gradient by EK-FAC alone: relative error {error:.3f}")
    assert 1e-3 < error < 0.3


class Scaled:
    """A two-layer network of the meta-parameters under a head of the task's own: λ is seen directly and through θ."""

    @staticmethod
    def loss(params, meta_params, batch):
        hidden = nets.mlp(meta_params, batch["x"])
        return nets.square(mi.ekfac.outputs(hidden * params[None]), batch["y"])

    @classmethod
    def problem(cls):
        def fit(meta_params, support, coefficients):
            hidden = nets.mlp(meta_params, support["x"])
            gram = jnp.einsum("n,nk->k", coefficients, hidden**2) + 1.0
            return jnp.einsum("n,nk->k", coefficients, hidden * support["y"]) / gram

        return mi.bilevel(cls.loss, mi.adaptation.closed_form(fit), meta_regularizer=mi.l2(0.05))


def test_preconditions_the_total_hessian():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 3))

    def draw(examples):
        x = rng.normal(size=(4, examples, 3)) * np.geomspace(0.1, 10.0, 3)
        y = np.tanh(x) @ truth * rng.uniform(0.5, 1.5, size=(4, 1, 3)) + 0.1 * rng.normal(size=x.shape)
        return {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    tasks, problem, start = mi.Task(draw(10), draw(20)), Scaled.problem(), nets.build("mlp").params
    rhs = jax.tree.map(jnp.ones_like, start)

    @jax.jit
    def run():
        objective = mi.total_objective(problem)
        params = mi.adaptation.newton_cg()(lambda params: objective(params, tasks), start)
        operator = mi.total_hessian(problem)(params, tasks)
        solvers = (mi.solvers.cg(tol=1e-10), mi.solvers.cg(tol=1e-10, preconditioner=mi.solvers.ekfac(batch_size=1)))
        return [solve(solver, operator, rhs)[1] for solver in solvers]

    plain, helped = run()
    print("products:", int(plain.num_matvecs), int(helped.num_matvecs))
    assert plain.status == helped.status == mi.SolveStatus.CONVERGED
    assert int(helped.num_matvecs) <= 0.85 * int(plain.num_matvecs)


def test_the_baseline_is_direct_if_with_ekfac_for_its_hessian():
    params, tasks = nets.build("mlp").params, inner_tasks()
    problem = Scaled.problem()

    def target(meta_params):
        return jnp.sum(jnp.sin(ravel_pytree(meta_params)[0]))

    @jax.jit
    def run():
        scores = mi.baselines.ekfac_if(problem, target, damping=0.3)(params, tasks)
        operator = mi.total_hessian(problem, damping=0.3)(params, tasks)
        state = mi.solvers.ekfac().init(operator)
        held = jax.vmap(lambda task: problem.adapt(params, task, row(mi.unit_weights(tasks), 0)))(tasks)

        def losses(meta_params):
            return jax.vmap(lambda theta, query: jnp.mean(Scaled.loss(theta, meta_params, query)))(held, tasks.query)

        solution = state.factors.scale(jax.grad(target)(params), state.inverses)
        return scores, jax.jvp(losses, (params,), (solution,))[1] / 2

    scores, expected = run()
    assert relative_error(scores.task, expected) <= 1e-10


def test_operators_without_losses_are_refused():
    operator = mi.operators.from_matvec(lambda vector: vector, jnp.ones(2))
    with pytest.raises(ValueError, match="operator: ekfac expected one that shows its losses"):
        mi.solvers.ekfac().init(operator)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tol": 0.0}, "tol: expected a positive number"), ({"batch_size": 0}, "batch_size: expected None or a positive")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mi.solvers.ekfac(**options)
