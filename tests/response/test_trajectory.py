"""The derivative of a run's end, against central differences of the run itself."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
import tiny
from metainfluence.response import _sweeps, problems_of_run
from oracles import problems
from oracles.parts import lenient

STEPS = 7


def _adamw() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.05, 3, STEPS)
    return optax.chain(
        optax.clip_by_global_norm(0.2), optax.adamw(schedule, eps=1e-4, eps_root=1e-4, weight_decay=1e-2)
    )


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.02, eps_root=1e-4),
    "adamw": _adamw,
}

# Every problem, every optimiser and both batchings, once at least.
COVER = [
    ("implicit_head", "adamw", None),
    ("imaml", "momentum", 3),
    ("maml_sgd", "adam", 2),
    ("ridge_head", "adamw", 3),
    ("prototypes", "sgd", None),
    ("task_loss", "adam", 2),
]
ALL = [
    (name, optimizer, size)
    for name in ("implicit_head", "imaml", "maml_sgd", "ridge_head", "prototypes", "task_loss")
    for optimizer in OPTIMIZERS
    for size in (None, 2)
]


@functools.cache
def stated(name: str) -> tuple[mi.Bilevel, Any, mi.Task]:
    """A problem, its start and its tasks."""
    if name != "task_loss":
        spec = problems.spec(name)
        return spec.problem(), spec.meta_params, spec.tasks
    spec = problems.spec("maml_sgd")

    def mean(losses: Any, weights: Any, mask: Any) -> Any:
        return jnp.sum(losses * weights) / jnp.sum(mask, dtype=losses.dtype)

    def loss(meta_params: Any, task: mi.Task, weights: mi.Weights) -> Any:
        """One step of gradient descent, written by hand."""

        def inner(params: Any) -> Any:
            return mean(spec.outer_loss(params, None, task.support), weights.support, task.support_mask)

        params = jax.tree.map(lambda p, g: p - 0.2 * g, meta_params, jax.grad(inner)(meta_params))
        return mean(spec.outer_loss(params, None, task.query), weights.query, task.query_mask)

    return mi.from_task_loss(loss, meta_regularizer=mi.l2(0.03)), spec.meta_params, spec.tasks


def directions(weights: mi.Weights) -> list[mi.Weights]:
    """One task's, one support example's, one query example's weight, and all at random."""
    rng = np.random.default_rng(5)
    zero = jax.tree.map(jnp.zeros_like, weights)
    return [
        zero._replace(task=zero.task.at[1].set(1.0)),
        zero._replace(support=zero.support.at[0, 1].set(1.0)),
        zero._replace(query=zero.query.at[2, 0].set(1.0)),
        jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), weights),
    ]


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def normal(like: Any, seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), like)


def difference(end: Any, weights: mi.Weights, direction: mi.Weights, step: float = 2e-3) -> Any:
    """The end's derivative by central differences of fourth order, whose error is some step⁴."""

    def at(factor: float) -> Any:
        return end(jax.tree.map(lambda w, d: w + factor * step * d, weights, direction))

    return jax.tree.map(lambda a, b, c, d: (8 * (a - b) - (c - d)) / (12 * step), at(1.0), at(-1.0), at(2.0), at(-2.0))


def distance(ours: Any, theirs: Any) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, ours, theirs)) / optax.tree.norm(theirs))


def check_derivative(run: mi.Run, start: Any, tasks: mi.Task, weights: mi.Weights, **options: Any) -> None:
    make = mi.trajectory(run, **options)
    at = make(start, tasks, weights)
    slope = normal(at.meta_params)
    scores, _ = at.vjp(slope)
    ways = directions(weights)
    deltas = at.jvp(stacked(ways)).delta
    for k, way in enumerate(ways):
        oracle = difference(lambda w: make(start, tasks, w).meta_params, weights, way)
        delta = jax.tree.map(lambda leaf, k=k: leaf[k], deltas)
        assert distance(delta, oracle) < 1e-6, k
        expected = optax.tree.vdot(slope, oracle)
        assert abs(optax.tree.vdot(scores, way) - expected) < 1e-6 * abs(expected) + 1e-9 * optax.tree.norm(scores), k
        size = optax.tree.norm(slope) * optax.tree.norm(delta)
        assert abs(optax.tree.vdot(scores, way) - optax.tree.vdot(slope, delta)) < 1e-10 * size, k


@pytest.mark.parametrize(("problem_name", "optimizer", "size"), COVER)
def test_derivative_is_that_of_the_run(problem_name: str, optimizer: str, size: int | None) -> None:
    problem, start, tasks = stated(problem_name)
    run = mi.training(problem, lenient(OPTIMIZERS[optimizer]()), STEPS, tasks_per_step=size, seed=1)
    weights = jax.tree.map(lambda w: w + 0.1 * normal(w), mi.unit_weights(tasks))
    check_derivative(run, start, tasks, weights, keep=3)


@pytest.mark.slow
@pytest.mark.parametrize(("problem_name", "optimizer", "size"), ALL)
def test_derivative_is_that_of_the_run_everywhere(problem_name: str, optimizer: str, size: int | None) -> None:
    problem, start, tasks = stated(problem_name)
    run = mi.training(problem, lenient(OPTIMIZERS[optimizer]()), STEPS, tasks_per_step=size, seed=2)
    check_derivative(run, start, tasks, mi.unit_weights(tasks))


# What does not depend on the problem is tried on one that compiles in no time.

TASKS = normal(tiny.TASKS)
WEIGHTS = mi.unit_weights(TASKS)
SLOPE = {"scale": jnp.asarray(2.0)}
ADAM = lenient(optax.adam(0.02, eps_root=1e-4))
RUN = mi.training(tiny.PROBLEM, ADAM, STEPS, tasks_per_step=2)


def loop(num_steps: int = STEPS, **options: Any) -> tuple[mi.Run, Any]:
    """A hand-written loop with a schedule by its own counter, noise, a second average of λ and a key in its state."""
    gradient = jax.grad(mi.total_objective(tiny.PROBLEM))

    def step(state: Any, tasks: mi.Task, weights: mi.Weights, key: Any) -> Any:
        slope = gradient(state["params"], tasks, weights)
        updates, inner = ADAM.update(slope, state["inner"], state["params"])
        noise = 0.01 * jax.random.normal(key) * jnp.where(state["count"] < 4, 1.0, 0.5)
        params = jax.tree.map(lambda p, u: p + u + noise * p, state["params"], updates)
        average = jax.tree.map(lambda a, p: 0.7 * a + 0.3 * p, state["average"], params)
        own = jax.random.fold_in(state["key"], 1)
        return {"params": params, "inner": inner, "average": average, "count": state["count"] + 1, "key": own}

    start = {
        "params": tiny.LAMBDA,
        "inner": ADAM.init(tiny.LAMBDA),
        "average": tiny.LAMBDA,
        "count": jnp.asarray(0, jnp.int32),
        "key": jax.random.key(4),
    }
    made = mi.training_loop(
        step,
        num_steps,
        meta_params=lambda state: state["average"],
        batch=lambda k: np.asarray([k % 3, (k + 1) % 3]),
        **options,
    )
    return made, start


def test_loop_of_the_users_own_is_differentiated_with_all_of_its_state() -> None:
    run, start = loop()
    check_derivative(run, start, TASKS, WEIGHTS, keep=3)


@functools.cache
def reference() -> tuple[Any, Any, Any]:
    at = mi.trajectory(RUN, keep="all")(tiny.LAMBDA, TASKS)
    return (at.meta_params, *at.vjp(SLOPE))


@pytest.mark.parametrize("options", [{"keep": "sqrt"}, {"keep": 2}, {"keep": 7}, {"store": "host"}, {"store": "disk"}])
def test_where_and_how_many_states_are_kept_does_not_matter(options: dict[str, Any], tmp_path: Path) -> None:
    options = {name: tmp_path if value == "disk" else value for name, value in options.items()}
    at = mi.trajectory(RUN, progress=False, **options)(tiny.LAMBDA, TASKS)
    end, scores, info = reference()
    found, told = at.vjp(SLOPE)
    for ours, theirs in ((at.meta_params, end), (found, scores), (told.cotangent_norms, info.cotangent_norms)):
        assert distance(ours, theirs) < 1e-13
    many, of_many = at.vjp({"scale": jnp.asarray([2.0, -1.0, 0.5])})
    assert distance(jax.tree.map(lambda leaf: -2 * leaf[1], many), scores) < 1e-13
    assert of_many.growth.shape == (3,)
    np.testing.assert_allclose(of_many.growth, np.full(3, float(info.growth)), rtol=1e-12)


def test_loop_in_host_memory_and_on_disk(tmp_path: Path) -> None:
    run, start = loop()
    expected = mi.trajectory(run)(start, TASKS).vjp(SLOPE)[0]
    for store in ("host", tmp_path):
        at = mi.trajectory(run, store=store, progress=False)(start, TASKS)
        assert distance(at.vjp(SLOPE)[0], expected) < 1e-13


def test_crosses_jit_and_maps() -> None:
    _, scores, info = reference()
    at = jax.jit(lambda start: mi.trajectory(RUN, keep=3)(start, TASKS))(tiny.LAMBDA)
    ask = jax.jit(lambda at, slope: at.vjp(slope))
    found, told = ask(at, SLOPE)
    assert distance(found, scores) < 1e-13
    np.testing.assert_allclose(told.growth, info.growth, rtol=1e-12)
    mapped = jax.vmap(lambda slope: at.vjp(slope)[0])({"scale": jnp.asarray([2.0, 4.0])})
    assert distance(jax.tree.map(lambda leaf: leaf[1] / 2, mapped), scores) < 1e-13
    host = mi.trajectory(RUN, store="host", progress=False)(tiny.LAMBDA, TASKS)
    assert distance(ask(host, SLOPE)[0], scores) < 1e-13


@jax.custom_vjp
def _tanh(x: Any) -> Any:
    return jnp.tanh(x)


_tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))


@pytest.mark.parametrize("size", [None, 2])
def test_problems_with_a_custom_vjp_go_in_reverse_mode_alone(size: int | None) -> None:
    def problem(tanh: Any, hvp: str) -> mi.Bilevel:
        def outer_loss(params: Any, meta_params: Any, batch: Any) -> Any:
            return tanh(tiny.outer_loss(params, meta_params, batch))

        return mi.bilevel(outer_loss, mi.adaptation.closed_form(tiny.ridge), hvp=hvp)

    def answers(problem: mi.Bilevel) -> tuple[Any, Any]:
        at = mi.trajectory(mi.training(problem, ADAM, STEPS, tasks_per_step=size))(tiny.LAMBDA, TASKS)
        return at.vjp(SLOPE)[0], at.jvp(directions(WEIGHTS)[-1]).delta

    reverse = answers(problem(_tanh, "reverse_over_reverse"))
    assert distance(reverse, answers(problem(jnp.tanh, "forward_over_reverse"))) < 1e-12
    with pytest.raises(TypeError, match=r"pass hvp=.reverse_over_reverse"):
        answers(problem(_tanh, "forward_over_reverse"))


def test_scores_are_summed_over_a_task_that_comes_twice_in_a_batch() -> None:
    gradient = jax.grad(mi.total_objective(tiny.PROBLEM))

    def step(state: Any, tasks: mi.Task, weights: mi.Weights, key: Any) -> Any:
        del key
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradient(state, tasks, weights))

    run = mi.training_loop(step, 3, meta_params=lambda state: state, batch=lambda k: [k, (k + 1) % 3, (k + 1) % 3])
    check_derivative(run, tiny.LAMBDA, TASKS, WEIGHTS)


def test_info_of_a_run() -> None:
    at = mi.trajectory(RUN)(tiny.LAMBDA, TASKS)
    gradient = jax.grad(mi.total_objective(tiny.PROBLEM))(at.meta_params, TASKS)
    np.testing.assert_allclose(at.info.outer_gradient_norm, optax.tree.norm(gradient), rtol=1e-12)
    assert (at.info.num_steps, at.info.first_nonfinite_step, at.info.replay_difference) == (STEPS, -1, None)
    assert problems_of_run(at.vjp(SLOPE)[1]) == []
    run, start = loop()
    assert mi.trajectory(run)(start, TASKS).info.outer_gradient_norm is None


def test_end_that_was_recorded_is_compared_with() -> None:
    make = mi.trajectory(RUN)
    end = make(tiny.LAMBDA, TASKS).meta_params
    assert problems_of_run(make(tiny.LAMBDA, TASKS, end=end).info) == []
    other = jax.tree.map(lambda leaf: 1.01 * leaf, end)
    info = make(tiny.LAMBDA, TASKS, end=other).info
    np.testing.assert_allclose(info.replay_difference, 0.01 / 1.01, rtol=1e-10)
    (told,) = problems_of_run(info)
    assert "does not end at the λ that was recorded, but 9.9e-03" in told
    with pytest.raises(ValueError, match=r"end\['scale'\]: expected shape \(\)"):
        make(tiny.LAMBDA, TASKS, end={"scale": jnp.ones(2)})


@pytest.mark.parametrize("options", [{"keep": "all"}, {"keep": 3}, {"store": "host", "progress": False}])
def test_step_that_is_not_finite_is_named(options: dict[str, Any]) -> None:
    def step(state: Any, tasks: mi.Task, weights: mi.Weights, key: Any) -> Any:
        del tasks, weights, key
        return {"scale": state["scale"] - 0.25}

    def logarithm(state: Any) -> Any:
        # 1, 0.75, … 0 after the fourth step.
        return {"scale": jnp.log(state["scale"])}

    run = mi.training_loop(step, 6, meta_params=logarithm, batch=None)
    info = mi.trajectory(run, **options)({"scale": jnp.asarray(1.0)}, TASKS).info
    assert info.first_nonfinite_step == 3
    (told,) = problems_of_run(info)
    assert "not finite after step 3 of 6" in told


def test_derivative_that_is_not_finite_is_named() -> None:
    def step(state: Any, tasks: mi.Task, weights: mi.Weights, key: Any) -> Any:
        del tasks, key
        count, value = state
        # Of a square root at 0 the value is finite and the derivative is not.
        root = jnp.sqrt(jnp.where(count == 2, 0.0 * value, 1.0 + value**2))
        return count + 1, value + root * jnp.sum(weights.task)

    run = mi.training_loop(step, 5, meta_params=lambda state: {"scale": state[1]}, batch=None)
    at = mi.trajectory(run)((jnp.asarray(0, jnp.int32), jnp.asarray(1.0)), TASKS)
    info = at.vjp(SLOPE)[1]
    assert info.first_nonfinite_step == -1
    (told,) = problems_of_run(info)
    assert "not finite at step 2 of 5" in told


@pytest.mark.parametrize(
    ("optimizer", "num_steps", "dtype"),
    [(optax.sgd(8.0), 200, jnp.float64), (optax.adam(0.02), 400, jnp.float32)],
)
def test_growth_that_leaves_no_digits_is_told(optimizer: Any, num_steps: int, dtype: Any) -> None:
    """Unrolled MAML at too large a rate, and under Adam without an eps_root."""

    def loss(params: Any, meta_params: Any, batch: Any) -> Any:
        del meta_params
        return (jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2

    inner = mi.adaptation.unrolled(loss, lambda meta_params, support: meta_params, optax.sgd(0.3), 3)
    rng = np.random.default_rng(0)
    start = {"a": jnp.asarray(rng.normal(size=(2, 3)), dtype), "b": jnp.asarray(rng.normal(size=3), dtype)}
    tasks = jax.tree.map(lambda leaf: leaf.astype(dtype), TASKS)
    at = mi.trajectory(mi.training(mi.bilevel(loss, inner), lenient(optimizer), num_steps))(start, tasks)
    scores, info = at.vjp(at.meta_params)
    # All finite, and not a digit of it true.
    assert bool(jnp.all(jnp.isfinite(scores.task)))
    assert info.growth * jnp.finfo(dtype).eps > 1e-2
    (told,) = problems_of_run(info)
    assert f"cotangents grow by {float(info.growth):.1e}" in told
    assert f"the most at step {int(jnp.argmax(info.cotangent_norms))} of {num_steps}" in told


MANY_STEPS = (100, 1600)


def wide(num_steps: int, keep: str) -> tuple[Any, Any]:
    """A run whose states are all the memory that it needs, made but not gone through; and a slope."""
    size = 500

    def outer_loss(params: Any, meta_params: Any, batch: Any) -> Any:
        return jnp.mean(meta_params**2) * batch["y"] + params

    problem = mi.bilevel(outer_loss, lambda meta_params, support, coefficients: jnp.sum(meta_params[:2]))
    run = mi.training(problem, optax.sgd(0.1, momentum=0.9), num_steps)
    start = jax.ShapeDtypeStruct((size,), jnp.float64)
    make = mi.trajectory(run, keep=keep)
    return jax.eval_shape(lambda start: make(start, TASKS), start), start


def memory(num_steps: int, keep: str) -> tuple[int, int]:
    """Bytes that are kept after the run, and that the sweep back takes besides."""
    at, slope = wide(num_steps, keep)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(at.kept))
    compiled = jax.jit(lambda at, slope: at.vjp(slope)).lower(at, slope).compile()
    return kept, compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_as_the_root_of_the_number_of_steps() -> None:
    (short, short_temporary), (long, long_temporary) = (memory(count, "sqrt") for count in MANY_STEPS)
    state = 2 * 500 * 8
    assert (short, long) == (10 * state, 40 * state)
    # A segment's states and gradients, and what one step takes, whatever the number of steps.
    assert short_temporary < 10 * 1.5 * state + 20 * state
    assert long_temporary < 40 * 1.5 * state + 20 * state
    assert memory(MANY_STEPS[1], "all")[0] == 1600 * 1.5 * state


def compiled_cost(fn: Any, *args: Any) -> tuple[float, int]:
    """Floating-point operations and lines of a program."""
    lowered = jax.jit(fn).lower(*args)
    return lowered.compile().cost_analysis()["flops"], len(lowered.as_text().splitlines())


def test_cost_of_a_step_back() -> None:
    problem, start, tasks = stated("task_loss")
    run = mi.training(problem, optax.sgd(0.1), 16)
    weights, number = mi.unit_weights(tasks), jnp.asarray(0, jnp.int32)
    state = run.begin(start)
    forward, lines_forward = compiled_cost(run.step, state, number, tasks, weights)
    cotangent = jax.tree.leaves(start)
    data = (state, start, number, tasks, weights)
    back, lines_back = compiled_cost(run.pull, *data, cotangent)
    # With all states kept, and with a step computed again.
    assert back < 3.0 * forward
    assert back + forward < 4.0 * forward

    # Of many targets each takes the linear part alone.
    made, _ = compiled_cost(run.pullback, *data)
    each, _ = compiled_cost(lambda pullback, c: pullback(c), jax.eval_shape(run.pullback, *data), cotangent)
    assert forward + made + 64 * each < 0.5 * 64 * (back + forward)

    for keep, copies in (("all", lines_back), (4, lines_back + lines_forward)):
        at = jax.eval_shape(lambda start, keep=keep: mi.trajectory(run, keep=keep)(start, tasks), start)
        lines = len(jax.jit(lambda at, slope: at.vjp(slope)).lower(at, start).as_text().splitlines())
        assert lines < 1.1 * copies + 150


def test_many_targets_take_the_memory_of_one_and_their_own() -> None:
    rng = np.random.default_rng(1)
    data = jnp.asarray(rng.normal(size=(4, 200, 16)))

    def loss(meta_params: Any, task: mi.Task, weights: mi.Weights) -> Any:
        return jnp.mean(weights.query * jnp.tanh(task.query @ meta_params).sum(1))

    run = mi.training(mi.from_task_loss(loss), optax.sgd(0.1), 4)
    start, tasks = jnp.zeros((16, 16)), mi.Task((), data)
    at = jax.eval_shape(lambda start: mi.trajectory(run, keep=2)(start, tasks), start)

    def temporary(*lead: int) -> int:
        slope = jax.ShapeDtypeStruct((*lead, 16, 16), jnp.float64)
        compiled = jax.jit(lambda at, slope: at.vjp(slope)).lower(at, slope).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    own = 8 * (start.size + 4 + 4 * 200)
    assert temporary(64) < 2 * temporary() + 4 * 64 * own


def test_many_targets_in_groups_that_do_not_come_out_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweeps, "vectors_at_once", lambda *args: 2)
    at = mi.trajectory(RUN, keep=3)(tiny.LAMBDA, TASKS)
    many, told = at.vjp({"scale": jnp.asarray([2.0, -1.0, 0.5])})
    _, scores, info = reference()
    for k, factor in enumerate((1.0, -0.5, 0.25)):
        assert distance(jax.tree.map(lambda leaf, k=k: leaf[k], many), optax.tree.scale(factor, scores)) < 1e-13
    np.testing.assert_allclose(told.cotangent_norms[1], 0.5 * info.cotangent_norms, rtol=1e-12)


SCRIPT = """
import os, signal, sys
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
import metainfluence as mi
from response import test_trajectory as setting
import tiny

phase, at, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def killed(now):
    if now.phase == phase and now.done == at:
        os.kill(os.getpid(), signal.SIGKILL)

from pathlib import Path
trained = mi.trajectory(setting.RUN, store=Path(folder), keep=2, progress=killed)(tiny.LAMBDA, setting.TASKS)
trained.vjp(setting.SLOPE)
"""


def test_goes_on_after_a_kill_at_any_moment(tmp_path: Path) -> None:
    """Killed while training, and once more while coming back; the third call does what is left."""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    for phase, done in (("training", 2), ("sweep", 1)):
        script = [sys.executable, "-c", SCRIPT, phase, str(done), str(tmp_path)]
        ended = subprocess.run(script, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    seen: list[tuple[str, int, int]] = []
    make = mi.trajectory(
        RUN, store=tmp_path, keep=2, progress=lambda now: seen.append((now.phase, now.done, now.total))
    )
    at = make(tiny.LAMBDA, TASKS)
    assert seen == []
    scores, info = at.vjp(SLOPE)
    assert seen == [("sweep", 1, 3), ("sweep", 2, 3), ("sweep", 3, 3)]
    end, expected, told = reference()
    assert distance(at.meta_params, end) < 1e-12
    assert distance(scores, expected) < 1e-12
    assert distance(info.cotangent_norms, told.cotangent_norms) < 1e-12
    # Another target starts its own sweep.
    other, _ = at.vjp({"scale": jnp.asarray(-1.0)})
    assert distance(jax.tree.map(lambda leaf: -2 * leaf, other), expected) < 1e-12


def test_another_run_in_the_folder_is_refused_with_the_difference(tmp_path: Path) -> None:
    options: dict[str, Any] = {"store": tmp_path, "progress": False}
    at = mi.trajectory(RUN, **options)(tiny.LAMBDA, TASKS)
    at.vjp(SLOPE)
    other = {"scale": jnp.asarray(0.6)}
    with pytest.raises(ValueError, match=r"store: .* holds another run: start: this run has"):
        mi.trajectory(RUN, **options)(other, TASKS)
    changed = jax.tree.map(lambda leaf: 1.1 * leaf, TASKS)
    with pytest.raises(ValueError, match=r"holds another run: tasks: this run has"):
        mi.trajectory(RUN, **options)(tiny.LAMBDA, changed)
    slower = mi.training(tiny.PROBLEM, lenient(optax.adam(0.01, eps_root=1e-4)), STEPS, tasks_per_step=2)
    with pytest.raises(ValueError, match=r"holds another run: step: this run has"):
        mi.trajectory(slower, **options)(tiny.LAMBDA, TASKS)
    shuffled = mi.training(tiny.PROBLEM, ADAM, STEPS, tasks_per_step=2, seed=9)
    with pytest.raises(ValueError, match=r"holds another run: order of the tasks: this run has"):
        mi.trajectory(shuffled, **options)(tiny.LAMBDA, TASKS)
    again = mi.trajectory(RUN, resume=False, **options)(other, TASKS)
    assert distance(again.meta_params, mi.trajectory(RUN)(other, TASKS).meta_params) < 1e-12
    with pytest.raises(ValueError, match=r"holds another run: start"):
        at.vjp(SLOPE)


def test_damaged_state_is_told_and_computed_again(tmp_path: Path) -> None:
    make = mi.trajectory(RUN, store=tmp_path, keep=2, progress=False)
    at = make(tiny.LAMBDA, TASKS)
    (file,) = tmp_path.glob("state-00000001-*.npz")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"state 1 is missing or damaged"):
        at.vjp(SLOPE)
    assert distance(make(tiny.LAMBDA, TASKS).vjp(SLOPE)[0], reference()[1]) < 1e-12


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"precision": "full"},
            "precision: expected None or one of jax.default_matmul_precision, as 'highest', got 'full'",
        ),
        ({"store": "gpu"}, 'store: expected "device", "host" or a folder as a pathlib.Path, got \'gpu\''),
        ({"store": 3}, 'store: expected "device", "host" or a folder'),
        ({"keep": 0}, 'keep: expected "auto", "all", "sqrt" or a positive integer, got 0'),
        ({"keep": "none"}, "keep: expected"),
        ({"keep": "all", "store": "host"}, 'keep: expected "auto", "sqrt" or a positive integer, since "all" is for'),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mi.trajectory(RUN, **options)


def test_arguments_that_cannot_be() -> None:
    with pytest.raises(TypeError, match=r"run: expected one made by metainfluence.training or training_loop, got Bile"):
        mi.trajectory(tiny.PROBLEM)  # type: ignore[arg-type]
    make = mi.trajectory(RUN)
    with pytest.raises(ValueError, match=r"start\['scale'\]: expected finite numbers, got NaN or infinity"):
        make({"scale": jnp.asarray(jnp.nan)}, TASKS)
    with pytest.raises(TypeError, match=r"tasks: expected a metainfluence.Task, got dict"):
        make(tiny.LAMBDA, {"query": tiny.TASK.query})  # type: ignore[call-overload]
    at = make(tiny.LAMBDA, TASKS)
    for slope, match in (
        ({"other": jnp.asarray(1.0)}, "slope: expected a pytree of structure"),
        ({"scale": jnp.ones((2, 2))}, r"slope\['scale'\]: expected shape \(\)"),
        ({"scale": jnp.asarray(jnp.inf)}, r"slope\['scale'\]: expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            at.vjp(slope)
    with pytest.raises(TypeError, match=r"direction: expected metainfluence.Weights, got Array"):
        at.jvp(jnp.ones(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"direction.query: expected shape \(3, 5\), got \(3, 4\)"):
        at.jvp(WEIGHTS._replace(query=jnp.ones((3, 4))))
    with pytest.raises(ValueError, match=r"direction: expected one number on the leading axis"):
        at.jvp(stacked([WEIGHTS, WEIGHTS])._replace(query=jnp.ones((3, 3, 5))))
    run, start = loop()
    with pytest.raises(TypeError, match=r"mesh: expected None for a training_loop"):
        mi.trajectory(run, mesh=jax.sharding.Mesh(np.asarray(jax.devices()), "d"))
    del start


def test_states_out_of_the_device_stay_outside_jit(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'host' works outside jit"):
        jax.jit(lambda start: mi.trajectory(RUN, store="host")(start, TASKS))(tiny.LAMBDA)
    at = mi.trajectory(RUN, store=tmp_path, progress=False)(tiny.LAMBDA, TASKS)
    with pytest.raises(TypeError, match=r"on disk is gone back through outside jit"):
        jax.jit(at.vjp)(SLOPE)


def test_data_that_are_not_finite_are_named() -> None:
    broken = TASKS._replace(query={**TASKS.query, "y": TASKS.query["y"].at[1, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match=r"tasks.query\['y'\]: expected finite numbers, got NaN or infinity in task 1"):
        mi.trajectory(RUN)(tiny.LAMBDA, broken)
