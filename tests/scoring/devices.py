"""Compares one device with a mesh of four host-platform devices, in a process that has them; prints the errors."""

import json
import os
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_enable_x64", True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import metainfluence as mi  # noqa: E402
import tiny  # noqa: E402
from scoring import setting  # noqa: E402

COUNT = 11


def error(got, wanted):
    """The largest relative error of a leaf."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))) for a, b in pairs)


def in_memory(mesh, batch_size):
    """Objective and its gradient, a Hessian product, scores and task-IF."""

    def run(meta_params, tasks, *args):
        objective = mi.total_objective(setting.PROBLEM, batch_size=batch_size, mesh=mesh)
        options = {"damping": 1.0, "batch_size": batch_size, "mesh": mesh}
        cg = mi.solvers.cg(tol=1e-13)
        scores = mi.influence_scores(setting.PROBLEM, setting.target, solver=cg, **options)
        return {
            "training": jax.value_and_grad(objective)(meta_params, tasks),
            "product": mi.total_hessian(setting.PROBLEM, **options)(meta_params, tasks).matvec(meta_params),
            "scores": scores(meta_params, tasks, *args)[:3],
            "task-IF": mi.task_if(setting.PROBLEM, solver=cg, **options)(meta_params, tasks).delta,
        }

    meta_params = jax.tree.map(jnp.asarray, setting.LAMBDA)
    return jax.jit(run)(meta_params, mi.stack_tasks(setting.tasks(COUNT)), *setting.TARGET_ARGS)


def of_a_run(mesh, size, source=False):
    """The end of a run, the scores of two targets and the change along a direction."""
    rng = np.random.default_rng(4)
    tasks = jax.tree.map(lambda leaf: rng.normal(size=(COUNT, *leaf.shape[1:])), tiny.TASKS)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), mi.unit_weights(tasks))
    given = [jax.tree.map(lambda leaf, k=k: leaf[k], tasks) for k in range(COUNT)] if source else tasks
    run = mi.training(tiny.PROBLEM, optax.adam(0.02, eps_root=1e-4), 4, tasks_per_step=size)
    at = mi.trajectory(run, mesh=mesh, progress=False)(tiny.LAMBDA, given)
    scores, info = at.vjp({"scale": jnp.asarray([2.0, -1.0])})
    norms = (info.outer_gradient_norm, info.cotangent_norms)
    return at.meta_params, at.vjp({"scale": jnp.asarray(1.0)})[0], scores, at.jvp(direction).delta, norms


def main():
    mesh = jax.make_mesh((4,), ("tasks",))
    errors = {}
    wanted = in_memory(None, None)
    for batch_size in (None, 6):
        got = in_memory(mesh, batch_size)
        errors |= {f"{name} {batch_size}": error(got[name], wanted[name]) for name in wanted}
    for size in (None, 3):
        alone = of_a_run(None, size)
        errors[f"run {size}"] = error(of_a_run(mesh, size), alone)
    errors["run of a source"] = error(of_a_run(mesh, 3, source=True), alone)
    with tempfile.TemporaryDirectory() as folder:
        one = setting.score(setting.tasks(COUNT), Path(folder) / "one.parquet", memory=1.0)
        for memory in (1.0, 1e9):
            out = Path(folder) / f"{memory}.parquet"
            several = setting.score(setting.tasks(COUNT), out, mesh=mesh, memory=memory, batch_size=5)
            errors[f"engine {memory}"] = error(several[:3], one[:3])
        assert mi.read_scores(out).metadata["manifest"]["batch_size"] == 8
    compiled = jax.jit(mi.total_objective(setting.PROBLEM, mesh=mesh))
    hlo = compiled.lower(setting.LAMBDA, mi.stack_tasks(setting.tasks(8))).compile().as_text()
    print(json.dumps({"errors": errors, "partitions": hlo.count("num_partitions=4"), "reduces": "all-reduce" in hlo}))


if __name__ == "__main__":
    main()
