"""What a run will take, and chunks that follow from it."""

import jax
import jax.numpy as jnp
import pytest

import metainfluence as mi
from metainfluence.trust import free_memory
from scoring import setting

COUNT = 40


@pytest.fixture(scope="module")
def tasks():
    return mi.stack_tasks(setting.tasks(COUNT))


@pytest.fixture(scope="module")
def meta_params():
    return jax.tree.map(jnp.asarray, setting.LAMBDA)


@pytest.fixture(scope="module")
def plan(tasks, meta_params):
    return mi.preflight(setting.PROBLEM, memory=1e9, num_products=10)(meta_params, tasks)


def test_the_numbers_are_those_of_xla(plan, tasks, meta_params):
    few = jax.tree.map(lambda leaf: leaf[:32], tasks)

    def product(at, tasks):
        objective = mi.total_objective(setting.PROBLEM._replace(meta_regularizer=None))
        return jax.jvp(jax.grad(lambda m: objective(m, tasks)), (at,), (at,))[1]

    compiled = jax.jit(product).lower(meta_params, few).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 32
    data = sum(leaf.nbytes for leaf in jax.tree.leaves(few)) / 32
    assert plan.num_tasks == plan.batch_size == COUNT
    assert plan.num_meta_params == 4
    assert 0.5 * (temporary + data) <= plan.chunk_bytes / COUNT <= 2 * (temporary + data)
    assert 0.5 <= plan.flops / (13 * COUNT * compiled.cost_analysis()["flops"] / 32) <= 2
    assert plan.seconds > 0
    assert plan.kept_tasks == COUNT


def test_it_reads_as_a_table(plan):
    lines = str(plan).splitlines()
    assert lines[0].split() == ["tasks", "40"]
    assert any(line.startswith("tasks per chunk") for line in lines)
    assert any("operations of 10 products" in line for line in lines)
    assert lines[-1].startswith("time")
    assert "not measured" in str(plan._replace(seconds=None))


def test_less_memory_means_smaller_chunks(plan, tasks, meta_params):
    of_task = plan.chunk_bytes / COUNT
    shapes = jax.eval_shape(lambda: (meta_params, tasks))
    plans = [mi.preflight(setting.PROBLEM, memory=room * of_task)(*shapes) for room in (400, 60, 20)]
    assert all(each.seconds is None for each in plans)
    sizes, kept = [each.batch_size for each in plans], [each.kept_tasks for each in plans]
    assert sizes[0] == COUNT
    assert sizes[0] > sizes[1] > sizes[2] >= 1
    assert kept[0] > kept[1] >= kept[2]


def test_what_cannot_fit_is_refused_with_the_numbers(tasks, meta_params, tmp_path):
    halved = r"got 1 kB: .* kB are missing; float32 in place of float64 takes half"
    with pytest.raises(
        MemoryError, match=rf"memory: expected at least .* kB \(.* per task by XLA's analysis.*{halved}"
    ):
        mi.preflight(setting.PROBLEM, memory=1e3)(meta_params, tasks)
    with pytest.raises(MemoryError, match=r"memory: expected at least .* are missing; batch_size=20 takes half"):
        mi.preflight(setting.PROBLEM, memory=1e5, batch_size=40)(meta_params, setting.tasks(COUNT))
    with pytest.raises(MemoryError, match="memory: expected at least"):
        setting.score(setting.tasks(3), tmp_path / "never-written.parquet", memory=1e3, batch_size=None)


@pytest.mark.parametrize("options", [{"memory": 0}, {"batch_size": -1}, {"num_products": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        mi.preflight(setting.PROBLEM, **options)


def test_free_memory_is_what_the_system_says():
    assert 1e8 < free_memory() < 1e13


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_refused_by_name(dtype, tasks, meta_params):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), meta_params)
    with pytest.raises(TypeError, match=r"meta_params\['bias'\]: expected float32 or float64, got .*float16"):
        mi.total_objective(setting.PROBLEM)(half, tasks)
    query = {**tasks.query, "y": tasks.query["y"].astype(dtype)}
    with pytest.raises(TypeError, match=r"tasks\.query\['y'\]: expected float32 or float64, got .*float16"):
        mi.total_hessian(setting.PROBLEM)(meta_params, tasks._replace(query=query))
