"""What a training run is: its steps, the order of its tasks, and what cannot be one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metainfluence as mi
import tiny
from oracles.parts import lenient

RNG = np.random.default_rng(2)
TASKS = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=(5, *leaf.shape[1:]))), tiny.TASKS)
WEIGHTS = mi.Weights(*(jnp.asarray(RNG.uniform(0.5, 1.5, size=leaf.shape)) for leaf in mi.unit_weights(TASKS)))
ADAMW = lenient(optax.adamw(optax.linear_schedule(0.0, 0.1, 4), eps_root=1e-6))


@pytest.mark.parametrize("size", [None, 2])
def test_steps_are_those_of_a_hand_written_loop(size: int | None) -> None:
    run = mi.training(tiny.PROBLEM, ADAMW, 6, tasks_per_step=size, seed=3)
    table = run.batches(5)
    gradient = jax.jit(jax.grad(mi.total_objective(tiny.PROBLEM)))
    meta_params, state = tiny.LAMBDA, ADAMW.init(tiny.LAMBDA)
    for k in range(6):
        row = np.arange(5) if table is None else np.asarray(table[k])
        tasks, weights = jax.tree.map(lambda leaf, row=row: leaf[row], (TASKS, WEIGHTS))
        updates, state = ADAMW.update(gradient(meta_params, tasks, weights), state, meta_params)
        meta_params = optax.apply_updates(meta_params, updates)
    for trained in (run(tiny.LAMBDA, TASKS, WEIGHTS), mi.trajectory(run)(tiny.LAMBDA, TASKS, WEIGHTS).meta_params):
        np.testing.assert_allclose(trained["scale"], meta_params["scale"], rtol=1e-13)


def test_order_of_the_tasks() -> None:
    run = mi.training(tiny.PROBLEM, ADAMW, 7, tasks_per_step=2, seed=3)
    table = np.asarray(run.batches(5))
    assert table.shape == (7, 2)
    epochs = [table[k : k + 2].ravel() for k in (0, 2, 4)]
    # Four of five tasks in each epoch, each at most once, in another order every time.
    assert all(len(set(epoch.tolist())) == 4 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    # Threefry gives the same on every machine.
    assert table[:3].tolist() == FIRST_BATCHES
    other = mi.training(tiny.PROBLEM, ADAMW, 7, tasks_per_step=2, seed=4)
    assert np.asarray(other.batches(5)).tolist() != table.tolist()
    assert mi.training(tiny.PROBLEM, ADAMW, 7).batches(5) is None


FIRST_BATCHES: list[list[int]] = []


def test_keys_of_a_loop_follow_from_seed_and_step() -> None:
    def step(state: Any, tasks: mi.Task, weights: mi.Weights, key: Any) -> Any:
        del tasks, weights
        return {"scale": state["scale"] + jax.random.normal(key)}

    def end(**options: Any) -> float:
        run = mi.training_loop(step, 3, meta_params=lambda state: state, batch=None, **options)
        return float(run({"scale": jnp.asarray(0.0)}, TASKS)["scale"])

    keys = [jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), k) for k in range(3)]
    np.testing.assert_allclose(end(), float(sum(jax.random.normal(key) for key in keys)), rtol=1e-12)
    assert end(seed=1) != end()


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "many"])
def test_numbers_of_steps_that_cannot_be(count: Any) -> None:
    with pytest.raises(ValueError, match=r"num_steps: expected a positive integer, got"):
        mi.training(tiny.PROBLEM, ADAMW, count)
    with pytest.raises(ValueError, match=r"num_steps: expected a positive integer, got"):
        mi.training_loop(lambda s, t, w, k: s, count, meta_params=lambda s: s, batch=None)
    with pytest.raises(ValueError, match=r"tasks_per_step: expected a positive integer, got"):
        mi.training(tiny.PROBLEM, ADAMW, 3, tasks_per_step=count)


def test_trainings_that_cannot_be() -> None:
    with pytest.raises(TypeError, match=r"problem: expected one made by metainfluence.bilevel"):
        mi.training(tiny.outer_loss, ADAMW, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer: expected one of optax"):
        mi.training(tiny.PROBLEM, 0.1, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"seed: expected an integer, got 0.5"):
        mi.training(tiny.PROBLEM, ADAMW, 3, seed=0.5)  # type: ignore[arg-type]
    run = mi.training(tiny.PROBLEM, ADAMW, 3, tasks_per_step=6)
    with pytest.raises(ValueError, match=r"tasks_per_step: expected at most the 5 tasks, got 6"):
        run(tiny.LAMBDA, TASKS)
    line_search = mi.training(tiny.PROBLEM, optax.lbfgs(), 3)
    with pytest.raises(TypeError, match=r"optimizer: expected one whose update takes .* training_loop"):
        mi.trajectory(line_search)(tiny.LAMBDA, TASKS)


def made(step: Any = None, **options: Any) -> mi.Run:
    given: dict[str, Any] = {"meta_params": lambda state: state, "batch": None, **options}
    return mi.training_loop(step or (lambda state, tasks, weights, key: state), 3, **given)


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (lambda s, t, w, k: [s], ValueError, "step: expected a state of the structure"),
        (
            lambda s, t, w, k: {"scale": s["scale"].astype(jnp.float32)},
            ValueError,
            r"step: state\['scale'\]: expected shape \(\) and dtype float64 as before the step, got \(\) and float32",
        ),
        (lambda s, t, w, k: {"scale": jnp.ones(2)}, ValueError, r"expected shape \(\) and dtype float64"),
    ],
)
def test_step_that_changes_what_its_state_is(step: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mi.trajectory(made(step))(tiny.LAMBDA, TASKS)


@pytest.mark.parametrize(
    ("read", "error", "match"),
    [
        (lambda state: {}, ValueError, r"meta_params\(state\): expected at least one array"),
        (lambda state: jnp.asarray(1, jnp.int32), TypeError, r"meta_params\(state\): expected floating-point numbers"),
        (lambda state: state["scale"] / 0, ValueError, r"meta_params\(start\): expected finite numbers"),
    ],
)
def test_meta_params_that_are_none(read: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        mi.trajectory(made(meta_params=read))(tiny.LAMBDA, TASKS)


def test_indices_that_cannot_be() -> None:
    asked = iter(range(100))
    for batch, match in (
        (lambda k: [k, 5], r"batch: expected indices from 0 to 4, got \[0, 5\] at step 0"),
        (lambda k: [-1], "batch: expected indices from 0 to 4"),
        (lambda k: [0.5], "batch: expected indices of tasks, integers"),
        (lambda k: 1, "batch: expected indices of tasks, integers"),
        (lambda k: [0] * (k + 1), "batch: expected as many tasks in every step, 1 as in step 0, got 2 at step 1"),
        (lambda k: [next(asked) % 5], r"batch: expected the same indices whenever it is asked, got \[0\] and then"),
    ):
        with pytest.raises(ValueError, match=match):
            mi.trajectory(made(batch=batch))(tiny.LAMBDA, TASKS)


def test_functions_that_cannot_be_called_so() -> None:
    with pytest.raises(TypeError, match=r"step: expected a function"):
        made(lambda state: state)
    with pytest.raises(TypeError, match=r"meta_params: expected a function"):
        made(meta_params=tiny.LAMBDA)
    with pytest.raises(TypeError, match=r"batch: expected a function"):
        made(batch=[0, 1])
