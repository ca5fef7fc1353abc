"""What `check` and `error_budget` tell of numbers that do not hold, and of those that do: each cause by its name."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi


def normal(size, seed=0):
    """The same numbers whichever tests ran before."""
    return np.random.default_rng([seed, *np.atleast_1d(size)]).normal(size=size)


def tasks_of(*shape, dtype=float):
    return mi.Task((), jnp.asarray(normal(size=shape), dtype))


def report(**fields):
    known = {
        "status": np.int32(0),
        "num_matvecs": np.int32(7),
        "relative_residual": np.float64(1e-12),
        "min_curvature": np.float64(1),
        "outer_gradient_norm": np.float64(0),
        "inner_gradient_norm": np.float64(0),
        "effective_curvature": np.float64(1),
    }
    return mi.SolveInfo(**(known | fields))


def ridge_head(meta_params, support, weights):
    """That of the front page, whose loss does not change where features are rotated."""
    x = support["x"] @ meta_params
    gram = x.T @ (weights[:, None] * x) + 0.1 * jnp.eye(2)
    return mi.adaptation.linear_solve(gram, x.T @ (weights * support["y"]))


def test_a_symmetry_is_a_flat_direction_and_not_a_lack_of_training():
    def loss(params, meta_params, query):
        return (query["x"] @ meta_params @ params - query["y"]) ** 2

    problem = mi.bilevel(loss, mi.adaptation.closed_form(ridge_head), meta_regularizer=mi.l2(0.01))
    x = jnp.asarray(normal(size=(20, 12, 3)))
    y = x[..., 0] + jnp.asarray(normal(size=(20, 1))) * x[..., 1]
    tasks = mi.Task({"x": x[:, :6], "y": y[:, :6]}, {"x": x[:, 6:], "y": y[:, 6:]})
    objective = mi.total_objective(problem)
    minimize = mi.adaptation.newton_cg(tol=1e-13)
    optimum = jax.jit(lambda m: minimize(lambda m: objective(m, tasks), m))(jnp.eye(3, 2))

    @jax.jit
    def derivatives(m):
        flat = lambda v: objective(v.reshape(3, 2), tasks)  # noqa: E731
        per_task = jax.vmap(lambda task: jax.grad(mi.task_loss(problem))(m, task).ravel())(tasks)
        return jax.hessian(flat)(m.ravel()), per_task

    # Where λ is a little longer than the optimum, a rotation's curvature is ⟨D_λF, λ⟩ / ‖λ‖²: not 0, and rounding's.
    hessian = np.asarray(derivatives(optimum)[0])
    length = np.linalg.norm(optimum)
    along = np.ravel(optimum) / length
    meta_params = optimum * (1 + 5e-15 / (along @ hessian @ along))
    # The mean square of the features is invariant, too.
    found = jax.jit(mi.influence_scores(problem, lambda m: jnp.sum((m @ m.T)[0] ** 2)))(meta_params, tasks)
    slope = np.ravel(jax.grad(lambda m: jnp.sum((m @ m.T)[0] ** 2))(meta_params))
    hessian, per_task = map(np.asarray, derivatives(meta_params))
    expected = per_task @ np.linalg.pinv(hessian, rcond=1e-10, hermitian=True) @ slope / 20
    np.testing.assert_allclose(found.task, expected, rtol=1e-9, atol=1e-12)
    assert mi.check(found, tol=1e-3) is found
    assert int(found.info.flat_directions) == 1
    assert "flat directions: 1, not seen by the target" in mi.error_budget(found).advice
    assert "not stationary" not in mi.error_budget(found).advice


@pytest.fixture(scope="module")
def embedding():
    """Rows of which no task uses the last thirty, in a loss whose Hessian is known: how often a row is used."""
    used = jnp.asarray(np.random.default_rng(1).integers(0, 30, size=(40, 5)))
    values = jnp.asarray(normal(size=(40, 5, 4)))

    def loss(m, task, w):
        seen = jax.lax.stop_gradient(m["fixed"]) + m["rows"][task.query["id"]]
        return 0.5 * jnp.sum(w.query[:, None] * (seen - task.query["value"]) ** 2)

    problem = mi.from_task_loss(loss)
    tasks = mi.Task((), {"id": used, "value": values})
    counts = np.bincount(np.ravel(used), minlength=60)[:, None] / 40
    start = np.zeros((60, 4))
    np.add.at(start, np.ravel(used), np.reshape(values, (-1, 4)) / 40)
    optimum = {"rows": jnp.asarray(start / np.where(counts > 0, counts, 1)), "fixed": jnp.zeros(())}
    pull = normal(size=(60, 4)) * (counts > 0)

    def scores(pull, solver=None):
        target = lambda m, pull: jnp.sum(m["rows"] * pull)  # noqa: E731
        return mi.influence_scores(problem, target, solver=solver)(optimum, tasks, jnp.asarray(pull))

    def right(pull):
        solution = pull / np.where(counts > 0, counts, np.inf)
        off = optimum["rows"][used] - values
        return np.sum(off * solution[used], axis=(1, 2)) / 40

    return scores, right, pull


@pytest.mark.parametrize("solver", [None, mi.solvers.auto(dense_size=300), mi.solvers.cg()], ids=repr)
def test_rows_that_no_task_uses_are_flat_directions(embedding, solver):
    scores, right, pull = embedding
    found = scores(pull, solver)
    np.testing.assert_allclose(found.task, right(pull), rtol=1e-5, atol=1e-8)
    assert mi.check(found, tol=1e-3) is found
    # A target that sees such a row asks for what the tasks do not tell.
    seeing = pull.copy()
    seeing[59] = 0.5 * np.linalg.norm(pull) * np.eye(4)[0]
    found = scores(seeing, solver)
    with pytest.raises(mi.SolveError, match=r"(45%|a part) of the right-hand side lies along flat dir") as told:
        mi.check(found)
    assert "INDEFINITE" in str(told.value) or "MAX_STEPS" in str(told.value)
    assert "rounding" not in str(told.value)
    assert found.info.flat_directions >= 1
    if solver != mi.solvers.cg():
        assert "45%" in str(told.value)
        # The answer of least norm is that without the row.
        np.testing.assert_allclose(found.task, right(pull), rtol=1e-5, atol=1e-8)
        assert found.info.choice in (mi.solvers.Choice.DENSE, mi.solvers.Choice.KRYLOV)


@pytest.fixture(scope="module")
def inexact():
    @jax.custom_vjp
    def theta(m):
        return jnp.tanh(m)

    def pull(m, ct):
        return ((1 - jnp.tanh(m) ** 2) * ct + 1e-3 * jnp.asarray([m[1], -m[0]]) * jnp.sum(ct),)

    theta.defvjp(lambda m: (jnp.tanh(m), m), pull)
    problem = mi.from_task_loss(
        lambda m, task, w: jnp.sum(w.query * (task.query @ theta(m) - 0.5) ** 2),
        meta_regularizer=mi.l2(0.1),
        hvp="reverse_over_reverse",
    )
    tasks, at = tasks_of(6, 4, 2), jnp.asarray([0.3, -0.4])
    rows = np.asarray(mi.total_hessian(problem)(at, tasks).rows())
    return problem, tasks, at, rows.T


@pytest.mark.parametrize(
    "solver", [None, mi.solvers.auto(dense_size=0), mi.solvers.cg(), mi.solvers.minres()], ids=repr
)
def test_a_derivative_that_is_not_exact_is_told_by_its_asymmetry(inexact, solver):
    problem, tasks, at, matrix = inexact
    found = mi.influence_scores(problem, lambda m: m[0] - 2 * m[1], solver=solver)(at, tasks)
    solution = np.linalg.solve((matrix + matrix.T) / 2, [1.0, -2.0])
    size = np.linalg.norm((matrix - matrix.T) @ solution) / np.linalg.norm(matrix @ solution)
    assert 1e-5 < size < 1e-2
    assert 0.2 * size < float(found.info.asymmetry) < 1.2 * size
    if solver is None:
        np.testing.assert_allclose(found.info.asymmetry, size, rtol=1e-2)
        with pytest.raises(mi.SolveError, match=rf"your custom derivative is inexact by {size:.0e}: solve its") as told:
            mi.check(found)
        assert "float64" not in str(told.value)
    budget = mi.error_budget(found._replace(info=found.info._replace(outer_gradient_norm=np.float64(0))))
    error = np.linalg.norm(np.linalg.solve(matrix.T, [1.0, -2.0]) - solution) / np.linalg.norm(solution)
    assert error < 5 * budget.asymmetry < 50 * error
    assert "your custom derivative is inexact" in budget.advice


@pytest.mark.parametrize("solver", [None, mi.solvers.cg()], ids=repr)
def test_a_stream_tells_that_a_derivative_is_not_exact(inexact, solver, tmp_path):
    problem, tasks, at, _ = inexact
    source = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), tasks) for k in range(6)]
    target = lambda m: m[0] - 2 * m[1]  # noqa: E731
    there = mi.influence_scores(problem, target, solver=solver)(at, tasks)
    here = mi.scoring.score(problem, target, at, source, out=tmp_path / "s", progress=False, solver=solver)
    np.testing.assert_allclose(here.info.asymmetry, there.info.asymmetry, rtol=1e-6)


def test_exact_derivatives_have_no_asymmetry_but_roundings(embedding):
    scores, _, pull = embedding
    assert float(scores(pull).info.asymmetry) < 1e-14


@pytest.mark.parametrize("measured", [False, True])
def test_an_inner_problem_of_the_users_is_measured_where_its_loss_is_given(measured):
    def inner_loss(params, meta_params, support):
        return (params - support) ** 2

    def regularizer(params, meta_params):
        return meta_params * params**2

    def descend(meta_params, support, coefficients):
        def step(params, _):
            return params - 0.2 * (2 * coefficients @ (params - support) + 2 * meta_params * params), None

        return jax.lax.scan(step, jnp.zeros(()), length=8)[0]

    given = {"inner_loss": inner_loss, "regularizer": regularizer} if measured else {}
    adapt = mi.adaptation.closed_form(descend, **given)
    problem = mi.bilevel(lambda params, m, query: (params - query) ** 2, adapt, meta_regularizer=mi.l2(10.0))
    tasks, at = mi.Task(jnp.asarray(normal(size=(5, 3))), jnp.asarray(normal(size=(5, 3), seed=1))), jnp.asarray(0.4)
    found = mi.influence_scores(problem, lambda m: m)(at, tasks)
    budget = mi.error_budget(found)
    if not measured:
        assert found.info.inner_gradient_norm is None
        assert np.isnan(budget.inner_residual)
        assert "unknown" in budget.advice
        return
    thetas = np.asarray(jax.vmap(lambda s: descend(at, s, jnp.full(3, 1 / 3)))(tasks.support))
    norms = np.abs(2 * (thetas - np.mean(tasks.support, axis=1)) + 2 * 0.4 * thetas)
    np.testing.assert_allclose(found.info.inner_gradient_norm, np.max(norms), rtol=1e-9)
    assert budget.inner_residual > 1e-3
    assert "unknown" not in budget.advice


def test_a_regularizer_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="regularizer: expected None without inner_loss"):
        mi.adaptation.closed_form(lambda m, s, c: m, regularizer=lambda params, m: params**2)


def test_advice_fits_what_was_done():
    assert mi.error_budget(report()).advice.startswith("all is well")
    turned = report(min_curvature=np.float64(-0.5), choice=np.int32(mi.solvers.Choice.KRYLOV_ABSOLUTE))
    assert "solve with |H|" not in mi.error_budget(turned).advice
    assert "solve with |H|" not in mi.error_budget(turned._replace(choice=None)).advice
    assert "solve with |H|" in mi.error_budget(turned._replace(choice=np.int32(mi.solvers.Choice.CG))).advice
    for dtype in (np.float64, np.float32):
        rounded = report(relative_residual=dtype(1e-9), min_curvature=dtype(1e-13), choice=np.int32(0))
        assert ("compute in float64" in mi.error_budget(rounded).advice) == (dtype == np.float32)
        failed = report(status=np.int32(1), relative_residual=dtype(0.1))
        with pytest.raises(mi.SolveError, match="MAX_STEPS") as told:
            mi.check(failed)
        assert ("compute in float64" in str(told.value)) == (dtype == np.float32)
    # No training brings λ nearer than rounding does.
    with pytest.raises(mi.SolveError, match=r"at most 1\.0e-13: all is well.*outer_stationarity 4\.0e-12"):
        mi.check(report(outer_gradient_norm=np.float64(4e-12)), tol=1e-13)


@pytest.mark.parametrize("flat", [0, 3])
def test_in_single_precision_the_one_call_that_leads_to_an_answer_comes_first(flat):
    def told_of(dtype):
        failed = report(
            status=np.int32(mi.SolveStatus.MAX_STEPS),
            relative_residual=dtype(0.05),
            choice=np.int32(mi.solvers.Choice.KRYLOV_ABSOLUTE),
            min_curvature=dtype(-0.1),
            flat_directions=np.int32(flat),
        )
        with pytest.raises(mi.SolveError, match="MAX_STEPS") as told:
            mi.check(failed)
        return str(told.value)

    call = 'solver=metainfluence.solvers.auto(tol=1e-3) with damping="auto"'
    single = told_of(np.float32)
    assert call in single
    assert "flat" not in single.split(call)[0]
    assert call not in told_of(np.float64)


def test_a_curvature_that_a_symmetry_may_have_is_not_only_laid_to_training():
    left = report(outer_gradient_norm=np.float64(1e-5), meta_params_norm=np.float64(2.0))
    for curvature, told in ((3e-6, True), (-3e-6, True), (1e-3, False)):
        advice = mi.error_budget(left._replace(min_curvature=np.float64(curvature))).advice
        assert ("or the direction is flat, as a symmetry" in advice) == told, advice


def test_what_comes_first_is_told_first():
    lost = report(
        status=np.int32(mi.SolveStatus.INDEFINITE), inner_gradient_norm=np.inf, min_curvature=np.float64(1e-9)
    )
    with pytest.raises(mi.SolveError, match=r"^an inner problem has no minimum .*; with that, 1 of 1 solves ended IND"):
        mi.check(lost)
    # Solved or not, derivatives at an inner problem that is not solved are inexact.
    skew = report(asymmetry=np.float64(1e-2), inner_gradient_norm=np.float64(1e-3), min_curvature=np.float64(1e-2))
    assert mi.error_budget(skew).advice.startswith("inner problems are solved to a gradient of 1e-03 only")
    both = skew._replace(min_curvature=np.float64(-1e-2), inner_gradient_norm=np.float64(0))
    assert mi.error_budget(both).advice.startswith("your custom derivative is inexact by 1e-02: solve its inner")


def test_plain_check_warns_where_no_digit_is_sure():
    hilly = mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * jnp.cos(m - task.query)))
    found = mi.influence_scores(hilly, lambda m: m)(jnp.asarray(0.4), mi.Task((), jnp.asarray([[0.0], [1.0]])))
    assert found.info.status == mi.SolveStatus.CONVERGED
    with pytest.warns(mi.BudgetWarning, match=r"not one digit is sure: the curvature is -[\d.e-]+ along a direction"):
        assert mi.check(found) is found
    with pytest.raises(mi.SolveError, match="expected every term of the error budget to be at most"):
        mi.check(found, tol=0.1)
    with pytest.warns(mi.BudgetWarning, match="λ is not stationary"):
        mi.check(report(outer_gradient_norm=np.float64(2.0), min_curvature=np.float64(0.1)))
    with pytest.warns(
        mi.BudgetWarning, match=r"the solve is finished, to 1e-06, which along .* may still be 1e\+01 of"
    ):
        mi.check(report(relative_residual=np.float64(1e-6), min_curvature=np.float64(1e-7)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mi.check(report(outer_gradient_norm=np.float64(0.5)))


def test_a_loss_that_divides_by_the_sum_of_its_weights_is_told():
    def problem(count):
        return mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * (m - task.query) ** 2) / count(w.query))

    tasks = tasks_of(5, 4)
    at, first = jnp.mean(tasks.query), jax.tree.map(lambda leaf: leaf[0], tasks)
    quotient, plain = problem(jnp.sum), problem(len)
    found = mi.influence_scores(quotient, lambda m: m**3)(at, tasks)
    np.testing.assert_allclose(np.sum(found.query, axis=1), 0, atol=1e-15)
    with pytest.warns(mi.CouplingWarning, match=r"not linear in the query weights: the scores of task \d"):
        mi.check(found)
    with pytest.warns(mi.CouplingWarning, match="not linear in the query weights"):
        assert float(mi.coupling(quotient)(at, first).nonlinear) == pytest.approx(1.0)
    found = mi.influence_scores(plain, lambda m: m**3)(at, tasks)
    np.testing.assert_allclose(np.sum(found.query, axis=1), found.task, rtol=1e-12)
    mi.check(found)
    assert float(mi.coupling(plain)(at, first).nonlinear) < 1e-12


def test_a_part_of_the_loss_that_no_query_weight_reaches_is_told():
    problem = mi.from_task_loss(lambda m, task, w: jnp.sum(w.query * (m - task.query) ** 2) + m**2 * task.query[0] ** 2)
    found = mi.influence_scores(problem, lambda m: m)(jnp.asarray(0.1), tasks_of(5, 4))
    with pytest.warns(mi.CouplingWarning, match="part of the task loss does not hang on the query weights"):
        mi.check(found._replace(info=found.info._replace(outer_gradient_norm=np.float64(0))))


@pytest.mark.parametrize(("bend", "kinked"), [(jax.nn.relu, True), (jnp.tanh, False)])
def test_kinks_are_named(bend, kinked):
    """The page on limits has the ReLU network's number."""
    rng = np.random.default_rng(5)
    tasks = mi.Task((), jnp.asarray(rng.normal(size=(10, 6, 8))))
    at = {"in": jnp.asarray(rng.normal(size=(8, 16)) * 0.5), "out": jnp.asarray(rng.normal(size=16) * 0.5)}
    problem = mi.from_task_loss(
        lambda m, task, w: jnp.sum(w.query * (bend(task.query @ m["in"]) @ m["out"] - 1) ** 2),
        meta_regularizer=mi.l2(0.1),
    )
    info = report()
    assert np.isnan(mi.error_budget(info).kinks)
    budget = mi.error_budget(info, at, problem=problem, tasks=tasks)
    assert budget.kinks == (pytest.approx(0.57, abs=0.1) if kinked else 0)
    assert ("ReLU" in budget.advice) == kinked
    assert (budget.dominant == "kinks") == kinked
    with pytest.raises(ValueError, match="problem: expected meta_params and tasks beside it"):
        mi.error_budget(info, problem=problem)


@pytest.mark.parametrize("nested", [False, True])
def test_the_precision_that_losses_are_computed_in_is_told(nested):
    """Of λ and data in float32 and a network in bfloat16, inside whatever JAX puts around it."""

    def network(m, x):
        layer = lambda x: jnp.tanh(x.astype(jnp.bfloat16) @ m.astype(jnp.bfloat16))  # noqa: E731
        if not nested:
            return layer(x)
        return jax.lax.scan(lambda carry, _: (carry, jax.checkpoint(jax.jit(layer))(x)), 0, length=1)[1][0]

    def problem(network):
        return mi.from_task_loss(
            lambda m, task, w: jnp.sum(
                w.query.astype(jnp.float32) * (network(m, task.query).astype(jnp.float32) - 1) ** 2
            ),
            meta_regularizer=mi.l2(1.0),
        )

    tasks, at = tasks_of(6, 4, 5, dtype=jnp.float32), jnp.asarray(normal(size=5), jnp.float32)
    options = {"damping": 10.0}
    found = mi.influence_scores(problem(network), lambda m: m[0], **options)(at, tasks)
    assert float(found.info.working_eps) == 2**-7
    budget = mi.error_budget(found._replace(info=found.info._replace(outer_gradient_norm=np.float32(0))))
    assert budget.dominant == "precision"
    assert "the losses are computed in bfloat16, though λ is held in float32" in budget.advice
    if not nested:
        full = mi.influence_scores(problem(lambda m, x: jnp.tanh(x @ m)), lambda m: m[0], **options)(at, tasks)
        assert float(full.info.working_eps) == 2**-23
        error = np.linalg.norm(found.task - full.task) / np.linalg.norm(full.task)
        assert 1e-4 < error < 10 * budget.precision
