"""Every strategy either solves to the accuracy it states or says, by its status or an error, that it did not."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
from metainfluence.solvers import SolveStatus
from reliability import cases

SIZE = 6
TOL = 1e-8
LAYER = mi.ekfac.Dense("w")
BUDGET = 60


class Strategy(NamedTuple):
    """A solver, the relative residual at which it may say CONVERGED, and whether it may turn eigenvalues round."""

    make: object
    tol: float = TOL
    may_turn: bool = False


# A solver that is exported and not here fails `test_the_walk_knows_every_exported_strategy`.
SOLVERS = {
    "auto": [
        Strategy(lambda: mi.solvers.auto(tol=TOL), may_turn=True),
        Strategy(lambda: mi.solvers.auto(tol=TOL, dense_size=0), may_turn=True),
        Strategy(lambda: mi.solvers.auto(tol=TOL, dense_size=0, absolute=False)),
    ],
    "block_cg": [Strategy(lambda: mi.solvers.block_cg(tol=TOL))],
    "cg": [
        Strategy(lambda: mi.solvers.cg(tol=TOL)),
        Strategy(lambda: mi.solvers.cg(tol=TOL, preconditioner=mi.solvers.nystrom(3))),
    ],
    "dense": [
        Strategy(lambda: mi.solvers.dense()),
        Strategy(lambda: mi.solvers.dense(method="cholesky")),
    ],
    "ekfac": [Strategy(lambda: mi.solvers.ekfac(tol=TOL))],
    "identity": [Strategy(lambda: mi.solvers.identity(), 2e-8)],
    "lanczos": [
        Strategy(lambda: mi.solvers.lanczos(SIZE, tol=TOL)),
        Strategy(lambda: mi.solvers.lanczos(2, tol=TOL)),
        Strategy(lambda: mi.solvers.lanczos(SIZE, absolute=True, tol=TOL), may_turn=True),
    ],
    "minres": [Strategy(lambda: mi.solvers.minres(tol=TOL))],
    "neumann": [
        Strategy(lambda: mi.solvers.neumann(BUDGET, tol=TOL)),
        Strategy(lambda: mi.solvers.neumann(BUDGET, scale=0.4, tol=TOL)),
    ],
    "nystrom": [Strategy(lambda: mi.solvers.nystrom(SIZE, tol=TOL)), Strategy(lambda: mi.solvers.nystrom(2, tol=TOL))],
    "sampled": [Strategy(lambda: mi.solvers.sampled(tol=TOL)), Strategy(lambda: mi.solvers.sampled(1, tol=TOL))],
}
NO_SOLVERS = {"anytime", "from_map", "from_steps", "solution_of"}
CURVATURES = ("exact", "linearized", "gamma", "gauss_newton", "direct")
ADAPTATIONS = {"closed_form", "implicit", "unrolled"}
MINIMIZERS = {
    "newton": lambda: mi.adaptation.newton(),
    "newton_cg": lambda: mi.adaptation.newton_cg(),
    "optax_minimizer": lambda: mi.adaptation.optax_minimizer(optax.sgd(0.2), 400, tol=1e-13),
    "given": lambda: mi.adaptation.given(),
}
SPECTRA = {
    "well conditioned": np.linspace(0.5, 4, SIZE),
    "the identity": np.ones(SIZE),
    "all small": 1e-12 * np.linspace(0.5, 4, SIZE),
    "all large": 1e12 * np.linspace(0.5, 4, SIZE),
    "badly scaled down": np.geomspace(1e-12, 1, SIZE),
    "badly scaled up": np.geomspace(1, 1e12, SIZE),
    "indefinite": np.concatenate([[-1], np.linspace(0.5, 4, SIZE - 1)]),
    "barely indefinite": np.concatenate([[-1e-9], np.linspace(0.5, 4, SIZE - 1)]),
    "negative": -np.linspace(0.5, 4, SIZE),
    "singular": np.concatenate([[0], np.linspace(0.5, 4, SIZE - 1)]),
    "of rank one": np.concatenate([np.zeros(SIZE - 1), [2]]),
    "zero": np.zeros(SIZE),
    "not a number": np.full(SIZE, np.nan),
}
INSTANCES = [(name, k) for name, instances in SOLVERS.items() for k in range(len(instances))]


def exported(module, kind):
    """Public functions of a module that are annotated to return `kind`."""
    found = {name: value for name, value in vars(module).items() if inspect.isfunction(value) and name[0] != "_"}
    return {name for name, value in found.items() if inspect.signature(value).return_annotation == kind}


def test_the_walk_knows_every_exported_strategy():
    functions = {name for name in mi.solvers.__all__ if inspect.isfunction(getattr(mi.solvers, name))}
    assert functions == set(SOLVERS) | NO_SOLVERS
    assert exported(mi.solvers, "Solver") - NO_SOLVERS == set(SOLVERS)
    assert exported(mi.curvature, "Curvature") == set(CURVATURES)
    assert exported(mi.adaptation, "Adaptation") == ADAPTATIONS
    assert exported(mi.adaptation, "Minimizer") == set(MINIMIZERS)


def quadratics(factors):
    """Tasks with losses ½ λᵀ (f_k A) λ through a layer, which EK-FAC needs: H is A where Σf_k = T.

    A = Σ_j s_j x_j x_jᵀ, by one example for each eigenvector: its label is the eigenvalue, which may be negative.
    """

    def loss(params, meta_params, batch):
        del params
        return 0.5 * batch["value"] * LAYER(meta_params, batch["x"])[:, 0] ** 2

    problem = mi.bilevel(loss, mi.adaptation.closed_form(lambda m, s, c: jnp.zeros(())))

    def operator(vectors, spectrum):
        ones = jnp.ones((len(factors), 1))
        x = jnp.broadcast_to(vectors.T, (len(factors), SIZE, SIZE))
        # The loss is a mean over examples.
        batch = {"x": x, "value": SIZE * jnp.asarray(factors)[:, None] * spectrum[None]}
        return mi.total_hessian(problem)({"w": jnp.ones((SIZE, 1))}, mi.Task(ones, batch))

    return operator


@functools.cache
def solving(name, k):
    """(vectors, spectrum, rhs) -> solution and report, compiled once for all spectra."""
    solver, operator = SOLVERS[name][k].make(), quadratics((0.5, 1.5, 1.0, 1.0, 1.0))

    def run(vectors, spectrum, rhs):
        built = operator(vectors, spectrum)
        solution, info = solver.solve(built, solver.init(built), {"w": rhs[:, None]})
        return solution["w"][:, 0], info

    return jax.jit(run)


@pytest.mark.parametrize(("name", "k"), INSTANCES)
def test_a_solver_meets_its_accuracy_or_says_that_it_does_not(name, k):
    strategy, rng = SOLVERS[name][k], np.random.default_rng(7)
    vectors = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    for label, spectrum in SPECTRA.items():
        rhs = rng.normal(size=SIZE)
        solution, info = solving(name, k)(vectors, spectrum, rhs)
        status, said = SolveStatus(int(info.status)), float(info.relative_residual)
        if label == "not a number":
            assert status == SolveStatus.NONFINITE
            continue
        # A Cholesky factor of an indefinite matrix is not finite, and says why.
        failed = status in (SolveStatus.NONFINITE, SolveStatus.INDEFINITE)
        assert failed or np.all(np.isfinite(solution)), label
        if status != SolveStatus.CONVERGED:
            with pytest.raises(mi.SolveError, match=status.name):
                mi.check(info)
            continue
        # The oracle: eigenvalues and eigenvectors are known. What is turned round, says so.
        turned = strategy.may_turn and spectrum.min() <= 0
        known = np.abs(spectrum) if turned else spectrum
        product = vectors @ (known * (vectors.T @ np.asarray(solution)))
        rounding = 50 * np.finfo(float).eps * np.max(np.abs(known)) * np.linalg.norm(solution) / np.linalg.norm(rhs)
        residual = np.linalg.norm(rhs - product) / np.linalg.norm(rhs)
        assert residual <= strategy.tol + rounding, (label, residual)
        assert abs(said - residual) <= 1e-3 * strategy.tol + rounding, (label, said, residual)
        if turned and name == "auto":
            assert int(info.choice) in (mi.solvers.Choice.DENSE_ABSOLUTE, mi.solvers.Choice.KRYLOV_ABSOLUTE), label
        if spectrum.min() < 0:
            assert float(info.min_curvature) < 0 or not turned, label
        smallest = np.min(np.abs(known))
        expected = vectors @ ((vectors.T @ rhs) / known)
        bound = (strategy.tol + rounding) * np.linalg.norm(rhs) / smallest
        assert np.linalg.norm(np.asarray(solution) - expected) <= bound, label


@pytest.mark.parametrize("name", ["auto", "block_cg", "cg", "dense", "lanczos", "minres"])
@pytest.mark.parametrize("label", ["well conditioned", "all small", "all large"])
def test_a_solver_does_not_mind_the_unit_of_the_loss(name, label):
    """1e±12 times a well-conditioned matrix is as well conditioned."""
    rng = np.random.default_rng(3)
    vectors = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
    _, info = solving(name, 0)(vectors, SPECTRA[label], rng.normal(size=SIZE))
    assert int(info.status) == SolveStatus.CONVERGED


NUMBERS = cases.Drawn(
    data=np.random.default_rng(11).normal(size=(cases.T, cases.SUPPORT + cases.QUERY, 3)),
    test=np.random.default_rng(12).normal(size=(1, cases.SUPPORT + cases.QUERY, 3)),
    lam=np.asarray([0.7, -0.4, 0.3, -0.2, 0.5, -0.6]),
    vectors=np.random.default_rng(13).normal(size=(2, 6)),
    weights=np.random.default_rng(14).uniform(0.5, 1.5, size=(cases.T, 1 + cases.SUPPORT + cases.QUERY)),
    counts=np.asarray([[3, 2], [2, 1], [3, 2]]),
    damping=0.0,
    order=(0, 1, 2),
)
INPUTS = cases.inputs_of(cases.Structure("closed_form", "exact", True), NUMBERS)


def oracle_adapt(kind):
    """θ(λ) by formulas of its own: the normal equations, and gradient descent spelled out."""

    def normal_equations(meta_params, support, c):
        z, (strength, anchor) = cases.features(support["x"], meta_params), meta_params["head"][1]
        gram = jnp.exp(strength) * jnp.eye(2)
        right = jnp.exp(strength) * anchor
        for row, label, share in zip(z, support["y"], c, strict=True):
            gram, right = gram + share * jnp.outer(row, row), right + share * label * row
        return jnp.linalg.inv(gram) @ right

    def descent(meta_params, support, c):
        z, (strength, anchor) = cases.features(support["x"], meta_params), meta_params["head"][1]
        params = anchor
        for _ in range(cases.STEPS):
            slope = z.T @ (c * (z @ params - support["y"])) + jnp.exp(strength) * (params - anchor)
            params = params - cases.RATE * slope
        return params

    return descent if kind == "unrolled" else normal_equations


@functools.cache
def oracle(kind):
    """The dense matrices of all curvatures at INPUTS, from dense Jacobians, without the library."""
    flat, unravel = jax.flatten_util.ravel_pytree(INPUTS.meta_params)

    def dense(flat):
        size, totals = flat.shape[0], dict.fromkeys(CURVATURES, 0.0)
        for k in range(cases.T):
            task, weights = jax.tree.map(lambda leaf, k=k: leaf[k], (INPUTS.tasks, INPUTS.weights))
            shares = [
                jnp.where(mask, w, 0) / jnp.sum(mask, dtype=w.dtype)
                for w, mask in ((weights.support, task.support_mask), (weights.query, task.query_mask))
            ]

            def theta(at, task=task, c=shares[0]):
                return oracle_adapt(kind)(unravel(at), task.support, c)

            def outputs(params, at, task=task):
                return cases.model(params, unravel(at), task.query)

            def of_outputs(outputs, task=task, c=shares[1]):
                return jnp.sum(c * cases.head(outputs, task.query))

            def loss(params, at, outputs=outputs, of_outputs=of_outputs):
                return of_outputs(outputs(params, at))

            params, slope = theta(flat), jax.jacfwd(theta)(flat)
            both = jnp.concatenate([slope, jnp.eye(size)])
            joint = jax.jacfwd(jax.grad(lambda point, loss=loss: loss(point[:2], point[2:])))(
                jnp.concatenate([params, flat])
            )
            by_theta = jax.grad(loss)(params, flat)
            third = jnp.einsum("m,mab->ab", by_theta, jax.jacfwd(jax.jacfwd(theta))(flat))
            motion = jax.jacfwd(lambda at, theta=theta, outputs=outputs: outputs(theta(at), at))(flat)
            linearized = both.T @ joint @ both
            matrices = {
                "exact": linearized + third,
                "linearized": linearized,
                "gamma": linearized + jnp.sum(jnp.abs(by_theta)) * jnp.eye(size),
                "gauss_newton": motion.T @ jax.hessian(of_outputs)(outputs(params, flat)) @ motion,
                "direct": joint[2:, 2:],
            }
            share = weights.task / cases.T
            totals = {name: total + share * matrices[name] for name, total in totals.items()}
        return {name: total + INPUTS.delta * jnp.eye(size) for name, total in totals.items()}

    return jax.tree.map(np.asarray, jax.jit(dense)(flat))


@functools.cache
def dense_matrices(kind, minimizer, curvatures):
    """The library's own, all curvatures in one program."""
    options = {"minimizer": MINIMIZERS[minimizer]()} if kind == "implicit" else {}
    problem = cases.problem(kind, INPUTS.delta, **options)
    if minimizer == "given":
        # A user's loop knows θ at unit weights; here it knows the weights too.
        def program(meta_params, support, coefficients):
            adapt = mi.adaptation.implicit(
                cases.inner_loss,
                lambda m, s: cases.ridge(m, s, coefficients),
                regularizer=cases.inner_regularizer,
                minimizer=mi.adaptation.given(),
            )
            return adapt(meta_params, support, coefficients)

        problem = mi.bilevel(
            cases.model, mi.adaptation.closed_form(program), meta_regularizer=mi.l2(INPUTS.delta), outer_head=cases.head
        )

    def run(inputs):
        return {
            name: mi.total_hessian(problem, getattr(mi.curvature, name)())(
                inputs.meta_params, inputs.tasks, inputs.weights
            ).dense()
            for name in curvatures
        }

    return jax.jit(run)(INPUTS)


@pytest.mark.parametrize("kind", ["closed_form", "unrolled"])
def test_every_curvature_is_the_matrix_that_it_stands_for(kind):
    found, expected = dense_matrices(kind, None, CURVATURES), oracle(kind)
    for name in CURVATURES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("minimizer", MINIMIZERS)
def test_every_minimizer_leads_to_the_exact_total_hessian(minimizer):
    found, expected = dense_matrices("implicit", minimizer, ("exact",)), oracle("implicit")
    np.testing.assert_allclose(found["exact"], expected["exact"], rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", sorted(ADAPTATIONS))
@pytest.mark.parametrize("curvature", CURVATURES)
def test_scores_of_every_combination_are_the_oracles_or_say_otherwise(curvature, kind, name):
    matrix = oracle(kind)[curvature] + 0.3 * np.eye(6)
    problem = cases.problem(kind, INPUTS.delta)
    for strategy in SOLVERS[name]:
        maker = mi.influence_scores(
            problem,
            cases.target,
            solver=strategy.make(),
            curvature=getattr(mi.curvature, curvature)(),
            damping=0.3,
        )
        run = jax.jit(lambda i, maker=maker: maker(i.meta_params, i.tasks, i.test_tasks, i.factor, weights=i.weights))
        if name == "ekfac":
            # There is no layer that it knows, which it says when it is traced.
            with pytest.raises(ValueError, match=r"(?i)ekfac|layer"):
                run(INPUTS)
            continue
        found = run(INPUTS)
        if int(found.info.status) != SolveStatus.CONVERGED:
            with pytest.raises(mi.SolveError):
                mi.check(found)
            continue
        slope = cases.ravel(jax.grad(cases.target)(INPUTS.meta_params, INPUTS.test_tasks, INPUTS.factor))
        turned = strategy.may_turn and np.linalg.eigvalsh(matrix)[0] <= 0
        values, vectors = np.linalg.eigh(matrix)
        solution = vectors @ (vectors.T @ slope / (np.abs(values) if turned else values))
        gradient = mi.total_gradient(problem)
        for k in range(cases.T):
            task, weights = jax.tree.map(lambda leaf, k=k: leaf[k], (INPUTS.tasks, INPUTS.weights))
            own = cases.ravel(gradient(INPUTS.meta_params, task, weights))
            expected = float(weights.task) / cases.T * own @ solution
            slack = strategy.tol * np.linalg.norm(slope) * np.linalg.norm(own) / np.min(np.abs(values))
            assert abs(float(found.task[k]) - expected) <= slack + 1e-10
