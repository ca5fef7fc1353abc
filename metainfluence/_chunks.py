"""Sums over tasks in chunks, and devices over which a chunk's tasks are spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from metainfluence.data import Weights


class Chunks(NamedTuple):
    """How much is worked on at once.

    Attributes:
      tasks: per chunk; None for all.
      vectors: that are multiplied at once; None for all.
      keep: whether the linearisation of all chunks is kept, so that a product runs only its linear part; else every
        product makes it anew.
      lean: whether only the expensive part of a linearisation is stored.
    """

    tasks: int | None
    vectors: int | None = None
    keep: bool = True
    lean: bool = False


def reduce_tasks(
    fn: Callable[[Any], tuple[PyTree, PyTree]],
    data: PyTree,
    batch_size: int | None,
    mesh: Mesh | None = None,
    *,
    keep: bool = False,
) -> tuple[PyTree, PyTree]:
    """Runs `fn` over chunks of tasks, adding up its first result and concatenating its second.

    Chunks are of equal size: tasks of weight 0 fill up the last one, so that one program serves all.

    Args:
      fn: maps a chunk of `data`, leading axis b, to (pytree to be summed, pytree of arrays `[b, ...]`); tasks of weight
        0 must add nothing to the sum.
      data: pytree of arrays with the tasks on the leading axis, and `Weights` among them.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.
      mesh: devices over which each chunk's tasks are sharded, over all axes of the mesh. Where the tasks do not divide
        evenly, tasks of weight 0 are added.
      keep: whether derivatives keep what they need of every chunk, or run each chunk again.
    """
    given = jax.tree.leaves(data)[0].shape[0]
    per_device = 1 if mesh is None else mesh.size
    size = given if batch_size is None else min(batch_size, given)
    size = _rounded_up(size, per_device)
    data = pad_tasks(data, _rounded_up(given, size))
    if size >= given:
        total, each = fn(shard(data, mesh))
        return total, jax.tree.map(lambda x: x[:given], each)
    chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), data)
    shapes, _ = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total: PyTree, chunk: PyTree) -> tuple[PyTree, PyTree]:
        part, each = fn(shard(chunk, mesh))
        return jax.tree.map(jnp.add, total, part), each

    total, each = jax.lax.scan(body if keep else jax.checkpoint(body), zeros, chunks)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:given], each)


def _rounded_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def pad_tasks(data: PyTree, count: int) -> PyTree:
    """Fills up to `count` tasks by repeating the last one, at weight 0 in the `Weights` that the pytree holds."""
    given = jax.tree.leaves(data)[0].shape[0]
    if count == given:
        return data
    rows = np.minimum(np.arange(count), given - 1)

    def pad(node: PyTree) -> PyTree:
        padded = jax.tree.map(lambda leaf: leaf[rows], node)
        if isinstance(node, Weights):
            padded = padded._replace(task=jnp.where(np.arange(count) < given, padded.task, 0))
        return padded

    return jax.tree.map(pad, data, is_leaf=lambda node: isinstance(node, Weights))


def shard(data: PyTree, mesh: Mesh | None) -> PyTree:
    """Lays the leading axis, a multiple of the mesh's size, over all axes of the mesh; None leaves data where it is."""
    if mesh is None:
        return data
    sharding = task_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), data)


def task_sharding(mesh: Mesh, *, replicated: bool = False) -> NamedSharding:
    """Lays a leading axis of tasks over all axes of the mesh; or everything on every device."""
    # Axes over which XLA shards automatically, whatever the type of the user's own.
    automatic = Mesh(mesh.devices, mesh.axis_names)
    return NamedSharding(automatic, PartitionSpec() if replicated else PartitionSpec(mesh.axis_names))
