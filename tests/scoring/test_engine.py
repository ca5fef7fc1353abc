"""What the engine computes is what `influence_scores` computes, from any source, by any route."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from scoring import setting


def largest_error(result, expected):
    """Relative, over tasks, support and query examples."""
    pairs = [(np.asarray(getattr(result, name)), np.asarray(getattr(expected, name))) for name in mi.Weights._fields]
    return max(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)) for got, wanted in pairs)


@pytest.fixture(scope="module")
def expected():
    return {ragged: setting.in_memory(setting.tasks(11, ragged=ragged)) for ragged in (False, True)}


@pytest.mark.parametrize(
    ("ragged", "options"),
    [
        (False, {"batch_size": 4, "memory": 1e9}),  # linearisations and data kept
        (False, {"batch_size": 4, "memory": 3e4}),  # half of it is for what is kept: data, and one linearisation
        (False, {"batch_size": 4, "memory": 1.0}),  # nothing kept
        (False, {"batch_size": 11, "memory": 1.0}),
        (True, {"batch_size": 3, "memory": 1.0}),
    ],
)
def test_scores_are_those_of_one_call(ragged, options, expected, tmp_path):
    result = setting.score(setting.tasks(11, ragged=ragged), tmp_path / "scores.parquet", **options)
    assert largest_error(result, expected[ragged]) <= 1e-12
    assert result.info.status == mi.SolveStatus.CONVERGED
    np.testing.assert_allclose(result.info.outer_gradient_norm, expected[ragged].info.outer_gradient_norm, rtol=1e-12)
    assert result.ids.tolist() == list(range(11))
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


@pytest.mark.parametrize(
    ("memory", "linear", "data"), [(1.2e4, {0}, {1, 2}), (1.6e4, {0}, {0, 1, 2}), (1e3, set(), set())]
)
def test_what_fits_is_kept(memory, linear, data):
    """A linearisation takes 7 kB, a batch's data 1.5 kB."""
    passes = setting.passes(setting.programs(), setting.reader(setting.tasks(11), 4), memory)
    passes.operator(passes.slope()).matvec(jax.tree.map(np.asarray, setting.LAMBDA))
    assert set(passes._linear) == linear
    assert set(passes._data) == data


@pytest.mark.parametrize(
    "solver",
    [
        mi.solvers.block_cg(tol=1e-12),
        mi.solvers.cg(tol=1e-12, preconditioner=mi.solvers.nystrom(2)),
        mi.solvers.cg(tol=1e-12, preconditioner=mi.solvers.sampled(5, rank=2)),
    ],
    ids=["block_cg", "cg + nystrom", "cg + sampled"],
)
def test_solvers_that_loop_over_products_work_on_batches(solver, operator):
    found, info = setting.solve(operator, solver)
    wanted, _ = setting.solve(operator, mi.solvers.dense())
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert info.status == mi.SolveStatus.CONVERGED


@pytest.fixture(scope="module")
def operator():
    passes = setting.passes(setting.programs(), setting.reader(setting.tasks(11), 4), 1e9)
    return passes.operator(passes.slope()).damped(1.0)


def test_the_operator_is_the_total_hessian(operator):
    tasks = mi.stack_tasks(setting.tasks(11))
    meta_params = jax.tree.map(jax.numpy.asarray, setting.LAMBDA)
    wanted = jax.jit(lambda *args: mi.total_hessian(setting.PROBLEM, damping=1.0)(*args).dense())(meta_params, tasks)
    np.testing.assert_allclose(operator.dense(), wanted, rtol=1e-12, atol=1e-14)


def test_a_product_on_the_host_cannot_be_compiled(operator):
    with pytest.raises(TypeError, match="called and mapped, but not compiled"):
        jax.jit(operator.matvec)(setting.LAMBDA)


def test_a_held_out_number_that_is_not_finite_is_named(tmp_path):
    held_out = mi.stack_tasks(setting.tasks(3, seed=1))
    values = np.asarray(held_out.query["y"]).copy()
    values[1, 0] = np.nan
    bad = held_out._replace(query={**held_out.query, "y": values})
    given = {"target": mi.query_loss(setting.PROBLEM), "target_args": (bad,)}
    with pytest.raises(ValueError, match=r"target_args\[0\]\.query\['y'\]: expected finite numbers.* in task 1$"):
        setting.score(setting.tasks(5), tmp_path / "scores.parquet", **given)


def test_a_curvature_that_shifts_the_diagonal(tmp_path):
    curvature = mi.curvature.gamma()
    result = setting.score(setting.tasks(11), tmp_path / "scores.parquet", curvature=curvature)
    assert largest_error(result, setting.in_memory(setting.tasks(11), curvature=curvature)) <= 1e-12


def test_automatic_damping(tmp_path):
    result = setting.score(setting.tasks(11), tmp_path / "scores.parquet", damping="auto")
    rule = jax.jit(mi.damping.auto(setting.PROBLEM))
    expected = rule(jax.tree.map(jax.numpy.asarray, setting.LAMBDA), mi.stack_tasks(setting.tasks(11)))
    np.testing.assert_allclose(result.info.damping, expected.value, rtol=1e-10)


def test_other_iterative_solvers(expected, tmp_path):
    result = setting.score(setting.tasks(11), tmp_path / "minres.parquet", solver=mi.solvers.minres(tol=1e-12))
    assert largest_error(result, expected[False]) <= 1e-12
    truncated = setting.score(setting.tasks(11), tmp_path / "neumann.parquet", solver=mi.solvers.neumann(3, scale=0.5))
    assert truncated.info.status == mi.SolveStatus.MAX_STEPS
    assert truncated.info.num_matvecs == 4


def test_half_precision_is_computed_in_float32(tmp_path):
    half = setting.tasks(6, dtype=np.float16)
    wide = [jax.tree.map(lambda leaf: leaf.astype(np.float32), task) for task in half]
    meta_params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, jax.numpy.bfloat16), setting.LAMBDA)
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), meta_params)
    arguments = (*setting.TARGET_ARGS,)
    with jax.enable_x64(False):
        found, wanted = (
            mi.scoring.score(
                setting.PROBLEM,
                setting.target,
                at,
                source,
                *jax.tree.map(np.float32, arguments),
                out=tmp_path / name,
                damping=1.0,
                batch_size=6,
                memory=1.0,
                progress=False,
            )
            for name, at, source in (("half", meta_params, half), ("single", single, wide))
        )
    assert found.task.dtype == np.float32
    for name in mi.Weights._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def test_matrix_products_run_at_highest_precision_unless_asked_otherwise(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "metainfluence.scoring._engine._Run.__call__",
        lambda *args: seen.append(jax.config.jax_default_matmul_precision),
    )
    setting.score(setting.tasks(2), tmp_path / "scores.parquet")
    setting.score(setting.tasks(2), tmp_path / "scores.parquet", precision="tensorfloat32")
    assert seen == ["highest", "tensorfloat32"]


def test_progress_tells_the_phase_and_the_residual(tmp_path):
    told = []
    setting.score(setting.tasks(11), tmp_path / "scores.parquet", progress=told.append, memory=1.0)
    assert list(dict.fromkeys(now.phase for now in told)) == ["gradient", "solve", "scores"]
    assert {now.total for now in told} == {3}
    residuals = [now.residual for now in told if now.residual is not None]
    assert residuals[-1] <= 1e-12
    assert min(now.min_curvature for now in told if now.min_curvature is not None) > 0
    assert max(now.product for now in told if now.phase == "solve") >= 4
    assert "residual" in str(told[-4]) or "scores" in str(told[-4])


def test_an_executable_that_returns_nan_is_compiled_anew(monkeypatch):
    """XLA's CPU backend makes one now and then; the first program here stands for such a one."""
    programs = setting.programs()
    prepare = programs.gradient.prepare

    def bad(*args):
        call = prepare(*args)
        return lambda: jax.tree.map(lambda leaf: leaf * np.nan, call())

    monkeypatch.setattr(programs.gradient, "prepare", bad)
    passes = setting.passes(programs, setting.reader(setting.tasks(5), 4), 0.0)
    assert np.all(np.isfinite(passes.slope().gradient["scale"]))


def test_nan_in_the_data_stays_nan():
    tasks = setting.tasks(5)
    tasks[3].query["y"][0] = np.nan
    programs = setting.programs()
    assert np.all(np.isnan(setting.passes(programs, setting.reader(tasks, 4), 0.0).slope().gradient["scale"]))


def test_tasks_whose_program_gives_nan_are_named(tmp_path):
    """The norm of a zero vector has no derivative, and the data are finite."""
    problem = mi.from_task_loss(
        lambda m, task, w: jnp.sum(w.query * (m - task.query) ** 2) + jnp.linalg.norm(m * task.query[:1])
    )
    source = [mi.Task((), np.full(1, float(k))) for k in (2, 1, 0, 3)]
    with pytest.raises(ValueError, match=r"source: expected finite gradients, got NaN or infinity from tasks 2:"):
        mi.scoring.score(
            problem,
            lambda m: m,
            jnp.asarray(1.0),
            source,
            out=tmp_path / "scores.parquet",
            batch_size=2,
            progress=False,
        )
