"""Reverse over reverse gives the numbers of forward over reverse, and works where a custom_vjp forbids the latter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metainfluence as mi
from oracles.problems import spec
from tiny import outer_loss, predict, ridge, square, target
from wrapping.page import quick_jit

FORWARD, REVERSE = "forward_over_reverse", "reverse_over_reverse"


@jax.custom_vjp
def reverse_only(meta_params, support, coefficients):
    return ridge(meta_params, support, coefficients)


def reverse_only_fwd(*args):
    # As solvers do, which are run again and not differentiated.
    return reverse_only(*args), args


reverse_only.defvjp(reverse_only_fwd, lambda args, cotangent: jax.vjp(ridge, *args)[1](cotangent))

PLAIN = mi.bilevel(predict, mi.adaptation.closed_form(ridge), meta_regularizer=mi.l2(1.0), outer_head=square)
CUSTOM = mi.bilevel(predict, mi.adaptation.closed_form(reverse_only), meta_regularizer=mi.l2(1.0), outer_head=square)
BACKWARD = CUSTOM._replace(hvp=REVERSE)
META_PARAMS = {"scale": jnp.asarray([[0.5, -0.8]])}


@pytest.fixture(scope="module")
def tasks():
    x, y = np.random.default_rng(3).normal(size=(2, 3, 9, 2))
    return mi.Task({"x": x[:, :4], "y": y[:, :4, 0]}, {"x": x[:, 4:], "y": y[:, 4:, 0]})


def assert_same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * max(np.max(np.abs(theirs)), 1e-3))


def product(problem, hvp, meta_params, tasks, **options):
    vector = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), meta_params)
    return quick_jit(mi.total_hessian(problem, hvp=hvp, **options))(meta_params, tasks).matvec(vector)


def influences(problem, hvp, meta_params, tasks, **options):
    """What the makers give, by one compiled program; damping makes the systems well conditioned."""
    chunked = "batch_size" in options
    options = {"solver": mi.solvers.cg(tol=1e-12), "damping": 5.0, "hvp": hvp, **options}
    new_weights = mi.drop(mi.unit_weights(tasks), tasks=[1], support=[(0, 2)])
    direction = jax.tree.map(jnp.subtract, new_weights, mi.unit_weights(tasks))

    def squares(meta_params):
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(meta_params))

    @quick_jit
    def run(meta_params, tasks):
        both_ways = (
            mi.influence_scores(problem, squares, **options)(meta_params, tasks)[:3],
            mi.group_influence(problem, **options)(meta_params, tasks, direction).delta,
        )
        if chunked:
            return both_ways
        return (
            *both_ways,
            mi.task_if(problem, **options)(meta_params, tasks).delta,
            mi.instance_if(problem, "support", **options)(meta_params, tasks, 0).delta,
            mi.self_influence(problem, **options)(meta_params, tasks)[:3],
        )

    return run(meta_params, tasks)


@pytest.fixture(scope="module")
def expected(tasks):
    return influences(PLAIN, FORWARD, META_PARAMS, tasks)


def test_influences_through_a_custom_vjp_are_those_of_forward_over_reverse(tasks, expected):
    assert_same(influences(CUSTOM, REVERSE, META_PARAMS, tasks), expected)


def test_influences_in_chunks_through_a_custom_vjp_are_those_of_forward_over_reverse(tasks, expected):
    assert_same(influences(CUSTOM, REVERSE, META_PARAMS, tasks, batch_size=2), expected[:2])


def test_products_are_those_of_forward_over_reverse_through_an_implicit_minimum():
    problem, point = spec("implicit_head").problem(), spec("implicit_head")
    found = [product(problem, hvp, point.meta_params, point.tasks) for hvp in (FORWARD, REVERSE)]
    assert_same(found[1], found[0])


@pytest.mark.parametrize("name", ["linearized", "gamma", "gauss_newton", "direct"])
def test_products_of_other_curvatures_are_those_of_forward_over_reverse(name, tasks):
    curvature = getattr(mi.curvature, name)()
    forward = product(PLAIN, FORWARD, META_PARAMS, tasks, curvature=curvature)
    assert_same(product(CUSTOM, REVERSE, META_PARAMS, tasks, curvature=curvature), forward)


def test_the_problems_own_choice_is_taken_and_an_argument_goes_before_it(tasks, expected):
    problem = mi.bilevel(outer_loss, mi.adaptation.closed_form(reverse_only), meta_regularizer=mi.l2(1.0), hvp=REVERSE)
    scores = mi.influence_scores(problem, lambda m: jnp.sum(jnp.square(m["scale"])), damping=5.0)
    assert_same(quick_jit(scores)(META_PARAMS, tasks)[:3], expected[0])
    with pytest.raises(TypeError, match=f"hvp='{REVERSE}'"):
        product(problem, FORWARD, META_PARAMS, tasks)


MAKERS = {
    "total_hessian": lambda **options: lambda *args: mi.total_hessian(CUSTOM, **options)(*args).matvec(META_PARAMS),
    "task_if": lambda **options: mi.task_if(CUSTOM, **options),
    "instance_if": lambda **options: lambda *args: mi.instance_if(CUSTOM, "support", **options)(*args, 0),
    "group_influence": lambda **options: lambda m, t: mi.group_influence(CUSTOM, **options)(m, t, mi.unit_weights(t)),
    "influence_scores": lambda **options: mi.influence_scores(CUSTOM, lambda m: jnp.sum(m["scale"]), **options),
    "self_influence": lambda **options: mi.self_influence(CUSTOM, **options),
    "edit": lambda **options: lambda m, t: mi.edit(CUSTOM, **options)(m, t, mi.unit_weights(t)),
}


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("maker", MAKERS)
def test_forward_mode_through_a_custom_vjp_says_what_to_change(maker, batch_size, tasks):
    with pytest.raises(TypeError, match=f"hvp: '{FORWARD}' .* pass hvp='{REVERSE}'") as raised:
        jax.eval_shape(MAKERS[maker](batch_size=batch_size), META_PARAMS, tasks)
    assert isinstance(raised.value.__cause__, TypeError)
    assert "custom_vjp" in str(raised.value.__cause__)


@pytest.mark.parametrize("name", ["linearized", "gamma", "gauss_newton"])
def test_forward_mode_inside_a_curvature_says_what_to_change(name, tasks):
    hessian = mi.total_hessian(CUSTOM, getattr(mi.curvature, name)())
    with pytest.raises(TypeError, match=f"pass hvp='{REVERSE}'"):
        jax.eval_shape(hessian, META_PARAMS, tasks)


@jax.custom_vjp
def once(x):
    return jnp.tanh(x)


# Of its derivative forward mode can be taken, and of itself not.
once.defvjp(lambda x: (jnp.tanh(x), x), lambda x, cotangent: (cotangent * (1 - jnp.tanh(x) ** 2),))


@pytest.mark.parametrize("name", ["linearized", "gamma", "gauss_newton"])
def test_forward_mode_of_an_adaptation_is_not_that_of_a_gradient(name, tasks):
    adapt = mi.adaptation.closed_form(lambda *args: once(ridge(*args)))
    problem = mi.bilevel(predict, adapt, meta_regularizer=mi.l2(1.0), outer_head=square)
    curvature = getattr(mi.curvature, name)()
    jax.eval_shape(lambda m, t: mi.total_hessian(problem)(m, t).matvec(m), META_PARAMS, tasks)
    with pytest.raises(TypeError, match=f"pass hvp='{REVERSE}'"):
        jax.eval_shape(mi.total_hessian(problem, curvature), META_PARAMS, tasks)
    with pytest.raises(TypeError, match=f"pass hvp='{REVERSE}'"):
        mi.preflight(problem, curvature=curvature)(META_PARAMS, tasks)


def test_engines_on_the_host_say_what_to_change_and_take_reverse_mode(tasks, expected, tmp_path):
    source = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf[k]), tasks) for k in range(3)]
    plan = mi.preflight(BACKWARD)(META_PARAMS, tasks)
    assert plan.batch_size == plan.kept_tasks == 3
    with pytest.raises(TypeError, match=f"pass hvp='{REVERSE}'"):
        mi.preflight(CUSTOM)(META_PARAMS, tasks)

    def score(problem, batch_size=None):
        options = {"solver": mi.solvers.cg(tol=1e-12), "damping": 5.0, "progress": False, "memory": 1e8}
        options["batch_size"] = batch_size
        return mi.scoring.score(
            problem,
            lambda m: jnp.sum(jnp.square(m["scale"])),
            META_PARAMS,
            source,
            out=tmp_path / "s.parquet",
            **options,
        )

    for batch_size in (None, 2):
        with pytest.raises(TypeError, match=f"pass hvp='{REVERSE}'"):
            score(CUSTOM, batch_size)
    assert not (tmp_path / "s.parquet").exists()
    assert_same(score(BACKWARD)[:3], expected[0])


def test_the_automatic_damping_takes_reverse_mode(tasks):
    chosen = [quick_jit(mi.damping.auto(problem))(META_PARAMS, tasks).value for problem in (PLAIN, BACKWARD)]
    np.testing.assert_allclose(*chosen, rtol=1e-9)


def test_other_type_errors_pass_unchanged(tasks):
    def broken(meta_params, task, weights):
        raise TypeError("of the user's own")

    with pytest.raises(TypeError, match="of the user's own"):
        mi.total_hessian(mi.from_task_loss(broken))(META_PARAMS, tasks)


@pytest.mark.parametrize("maker", [*MAKERS, "bilevel", "from_task_loss"])
@pytest.mark.parametrize("value", ["reverse", True])
def test_unknown_value_is_named(maker, value):
    makers = {
        **MAKERS,
        "bilevel": lambda **options: mi.bilevel(outer_loss, ridge, **options),
        "from_task_loss": lambda **options: mi.from_task_loss(target, **options),
    }
    with pytest.raises(ValueError, match=f"hvp: expected '{FORWARD}' or '{REVERSE}', got {value!r}"):
        makers[maker](hvp=value)(META_PARAMS, None)
