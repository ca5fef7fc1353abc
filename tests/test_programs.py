"""Programs stay small: lines of the lowered program, calls of the user's functions, precision of matrix products."""

import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import metainfluence as mi
from metainfluence.lab.bench import programs


@pytest.fixture(scope="module")
def cases():
    return programs.cases()


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="lines are those of the newest JAX; older ones take more")
@pytest.mark.parametrize("program", programs.BARS)
@pytest.mark.parametrize("name", ["implicit head", "unrolled SGD"])
def test_lines_over_those_of_one_product(cases, name, program):
    case = cases[name]
    ratio = programs.lines(*programs.programs(case)[program]) / programs.lines(*programs.product(case))
    assert 1.5 < ratio <= programs.BARS[program]


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="lines are those of the newest JAX; older ones take more")
def test_where_cg_comes_before_a_basis_both_have_the_same_product(cases, monkeypatch):
    """As for a convolutional network's many meta-parameters."""
    monkeypatch.setattr("metainfluence.solvers._auto._QUICK", 0)
    case = cases["unrolled SGD"]
    function, args = programs.programs(case)["influence_scores, default solver"]
    text = jax.jit(function).lower(*args).as_text()
    assert len(re.findall(r"func.func private @_pulled_in_place\w*\(", text)) == 1


@pytest.mark.parametrize("name", ["implicit head", "unrolled SGD"])
@pytest.mark.parametrize(("program", "most"), [("influence_scores, default solver", 10), ("edit, damping auto", 10)])
def test_calls_of_the_inner_loss(name, program, most):
    calls = []
    case = programs.cases(lambda: calls.append(1))[name]
    function, args = programs.programs(case)[program]
    jax.jit(function).lower(*args)
    # The outer loss is the same function here.
    assert 1 <= len(calls) <= most


@pytest.mark.parametrize("name", ["implicit head", "unrolled SGD"])
def test_calls_of_the_inner_loss_by_task_losses(name):
    calls = []
    case = programs.cases(lambda: calls.append(1))[name]
    jax.jit(jax.vmap(mi.task_loss(case.problem), in_axes=(None, 0))).lower(case.meta_params, case.tasks)
    assert 1 <= len(calls) <= 3


def precisions(text):
    found = re.findall(r"stablehlo\.dot_general[^\n]*", text)
    assert found
    return {re.search(r"precision = \[(\w+)", line + "precision = [DEFAULT")[1] for line in found}


@pytest.mark.parametrize("name", ["implicit head", "unrolled SGD"])
@pytest.mark.parametrize("solver", [None, mi.solvers.cg()])
def test_matrix_products_are_at_full_precision(cases, name, solver):
    case = cases[name]
    data = (case.meta_params, case.tasks, case.held_out)
    target = mi.query_loss(case.problem)
    highest = mi.influence_scores(case.problem, target, solver=solver, damping=0.01)
    assert precisions(jax.jit(highest).lower(*data).as_text()) == {"HIGHEST"}
    left = mi.influence_scores(case.problem, target, solver=solver, damping=0.01, precision=None)
    assert "DEFAULT" in precisions(jax.jit(left).lower(*data).as_text())


def test_makers_trace_at_full_precision(cases):
    case = cases["implicit head"]
    data, weights = (case.meta_params, case.tasks), mi.unit_weights(case.tasks)
    task = jax.tree.map(lambda leaf: leaf[0], case.tasks)
    for function, args in (
        (mi.task_loss(case.problem), (case.meta_params, task)),
        (mi.total_gradient(case.problem), (case.meta_params, task)),
        (mi.total_objective(case.problem), data),
        (mi.query_loss(case.problem), data),
        (mi.edit(case.problem, damping=0.1), (*data, weights)),
        (mi.damping.auto(case.problem), data),
        (mi.spectrum(case.problem, rank=3), data),
        (lambda m, t: mi.total_hessian(case.problem)(m, t).matvec(m), data),
        (lambda m, t: mi.optimum(case.problem, damping=0.1)(m, t).vjp(m), data),
    ):
        assert precisions(jax.jit(function).lower(*args).as_text()) == {"HIGHEST"}, function


def test_an_unknown_precision_is_refused(cases):
    with pytest.raises(ValueError, match=r"precision: expected None or one of .*, got 'exact'"):
        mi.optimum(cases["implicit head"].problem, precision="exact")


def test_nothing_is_compiled_while_tracing(cases, monkeypatch):
    case = cases["unrolled SGD"]
    function = mi.influence_scores(case.problem, mi.query_loss(case.problem))

    def refuse(*args, **kwargs):
        raise AssertionError("compiled while tracing")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    large = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((5000, *leaf.shape[1:]), leaf.dtype), case.tasks)
    text = jax.jit(function).lower(case.meta_params, large, case.held_out).as_text()
    # So many tasks are taken in chunks.
    assert "stablehlo.while" in text
    assert jnp.ndim(case.meta_params["bias"]) == 1


@pytest.mark.parametrize(
    "kind", [pytest.param("implicit", marks=pytest.mark.slow), "unrolled", "closed form", "task loss"]
)
def test_problems_may_close_over_traced_values(kind):
    """A problem that is made inside a function that is differentiated, mapped or compiled."""
    task = mi.Task(jnp.asarray([[0.5], [2.0], [1.0]]), jnp.asarray([[1.0], [3.0], [2.0]]))

    def loss(params, meta_params, batch):
        return (params - batch) ** 2 + meta_params**2

    def scores(strength):
        start = {"regularizer": lambda params, meta_params: strength * (params - meta_params) ** 2}
        adapt = {
            "implicit": lambda: mi.adaptation.implicit(loss, lambda m, s: jnp.zeros(()), **start),
            "unrolled": lambda: mi.adaptation.unrolled(loss, lambda m, s: m, optax.sgd(0.1), 3, **start),
            "closed form": lambda: mi.adaptation.closed_form(lambda m, s, c: (c @ s + strength * m) / (1 + strength)),
        }
        if kind == "task loss":
            problem = mi.from_task_loss(lambda m, t, w: jnp.mean(w.query * (m - strength * t.query) ** 2))
        else:
            problem = mi.bilevel(loss, adapt[kind]())
        found = mi.influence_scores(problem, lambda m: m**2, damping=0.1)(jnp.asarray(0.3), task)
        return found.task

    strengths = jnp.asarray([0.5, 2.0])
    expected = jnp.stack([scores(float(each)) for each in strengths])
    chex.assert_trees_all_close(jax.jit(jax.vmap(scores))(strengths), expected, rtol=1e-6)
    slope = jax.jit(jax.jacfwd(scores))(strengths[0])
    step = 1e-5
    numeric = (scores(0.5 + step) - scores(0.5 - step)) / (2 * step)
    chex.assert_trees_all_close(slope, numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("argument", ["minimizer", "linear_solver", "solver"])
def test_what_is_no_part_of_an_answer_may_not_close_over_what_is_differentiated(argument):
    make = {
        "minimizer": lambda x: mi.adaptation.optax_minimizer(optax.sgd(0.1 * x), 60),
        "linear_solver": lambda x: mi.solvers.cg(tol=1e-9 * x),
        "solver": lambda x: mi.solvers.cg(tol=1e-9 * x),
    }[argument]

    def loss(params, meta_params, batch):
        return (params - batch - meta_params) ** 2

    def made(x):
        if argument == "solver":
            return mi.optimum(mi.from_task_loss(lambda m, t, w: m**2), solver=make(x))
        return mi.adaptation.implicit(loss, lambda m, s: jnp.zeros(()), **{argument: make(x)})

    def use(x):
        made(x)
        return x

    jax.vmap(use)(jnp.ones(2))
    jax.grad(lambda x: x * use(jax.lax.stop_gradient(x)))(1.0)
    for differentiate in (jax.grad, jax.jacfwd):
        with pytest.raises(TypeError, match=rf"^{argument}: expected a function that closes over no value .* float64"):
            differentiate(use)(1.0)


@pytest.mark.parametrize(
    ("curvature", "hvp"),
    [
        (mi.curvature.exact(), "forward_over_reverse"),
        (mi.curvature.linearized(), "reverse_over_reverse"),
        pytest.param(mi.curvature.exact(), "reverse_over_reverse", marks=pytest.mark.slow),
        pytest.param(mi.curvature.linearized(), "forward_over_reverse", marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_a_response_answers_at_the_precision_that_it_was_made_with(cases, curvature, hvp):
    """Whoever asks it, and in whatever setting of JAX."""
    case = cases["implicit head"]
    at = mi.optimum(case.problem, curvature=curvature, damping=2.0, hvp=hvp)(case.meta_params, case.tasks)
    target = lambda m: jnp.sum((m["first"] @ m["second"]) ** 2)  # noqa: E731
    for ask, args in (
        (lambda at, slope: at.vjp(slope), (at, case.meta_params)),
        (lambda at, direction: at.jvp(direction), (at, mi.unit_weights(case.tasks))),
        (lambda at: mi.scores(at, target)(), (at,)),
    ):
        assert precisions(jax.jit(ask).lower(*args).as_text()) == {"HIGHEST"}


@pytest.mark.parametrize(("precision", "expected"), [("highest", "HIGHEST"), (None, "HIGH")])
def test_a_run_is_gone_through_at_its_precision_or_at_that_of_jax(precision, expected):
    run = mi.training(mi.from_task_loss(lambda m, t, w: jnp.sum(w.query * (t.query @ m)[:, 0])), optax.sgd(0.1), 2)
    tasks = mi.Task((), jnp.ones((3, 4, 2)))
    there_and_back = lambda m: mi.trajectory(run, precision=precision)(m, tasks).vjp(m)[0]  # noqa: E731
    with jax.default_matmul_precision("high"):
        for program in (there_and_back, lambda m: run(m, tasks, precision=precision)):
            assert precisions(jax.jit(program).lower(jnp.ones((2, 1))).as_text()) == {expected}
