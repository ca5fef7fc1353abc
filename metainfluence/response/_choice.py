"""How many tasks and vectors are worked on at once: a choice by shapes alone, the same under jit and outside."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from metainfluence._chunks import Chunks
from metainfluence.curvature import Curvature
from metainfluence.data import Task, resolve_weights, sizes
from metainfluence.problem import Bilevel
from metainfluence.response._sums import batch_pull

# Bytes of the linearisation of a chunk that stays in a core's cache. With 100 MB in all, a product took 52 ms in chunks
# of 8 MB, 46 ms in 11 to 13, 50 ms in 25 and 64 ms at once (jaxlib 0.12, two cores).
CACHE_BYTES = 13e6

# Bytes of all linearisations below which chunks are no faster on a CPU, and only take longer to compile: with 50 MB in
# all, a product took as long at once as in chunks of any size.
AT_ONCE_BYTES = 64e6

# Fewer tasks than this are never worth two chunks.
LEAST_CHUNK = 16

# Bytes that may be kept from product to product on a CPU, whatever else runs there; on an accelerator, this share of
# all its memory.
HOST_BYTES = 4e9
DEVICE_SHARE = 0.6

# Bytes of the linearisations that several vectors go through together on a CPU. Beyond, one after the other is faster:
# 64 vectors through 10 MB took 96 ms one by one, 140 in groups of eight, 370 all together.
TOGETHER_BYTES = 1e6

# What `linearised_bytes` has found, by each problem's own loss: it traces what is later traced again, and takes a third
# of the time.
_BYTES: weakref.WeakKeyDictionary[Callable[..., Any], dict[Any, float]] = weakref.WeakKeyDictionary()

# As many vectors as the default solver multiplies at once.
FEW_VECTORS = 16


def fitting_chunks(
    problem: Bilevel,
    curvature: Curvature,
    meta_params: PyTree,
    tasks: Task,
    vectors: int,
    mesh: Mesh | None,
    batch_size: int | None = None,
) -> Chunks:
    """Chunks for a function that is given all tasks.

    On a CPU a chunk is what stays in its cache, or all tasks where they are small; on an accelerator, or a mesh, all
    tasks that fit. What the products need from all chunks is kept where it fits: all of it, or else only what is
    expensive to compute. Where that does not fit either, it is recomputed in every product. The choice depends neither
    on what else runs on the machine nor on any measurement.

    Args:
      problem: the problem.
      curvature: of the products.
      meta_params: λ.
      tasks: stacked tasks.
      vectors: right-hand sides.
      mesh: devices that share each chunk; None for one.
      batch_size: tasks per chunk, where the user has set it.
    """
    count = sizes(tasks).lead[0]
    room = usable_bytes() * (1 if mesh is None else mesh.size)
    if batch_size is None and count <= LEAST_CHUNK and count * _data_bytes(tasks, meta_params) <= room / 1e4:
        return Chunks(None)
    each = kept = linearised_bytes(problem, curvature, meta_params, tasks)
    lean = count * each > room
    if lean:
        kept = linearised_bytes(problem, curvature, meta_params, tasks, lean=True)
    keep = count * kept <= room
    chunk = batch_size
    if chunk is None:
        most = room / 4
        if mesh is None and jax.default_backend() == "cpu":
            most = AT_ONCE_BYTES if count * each <= AT_ONCE_BYTES else CACHE_BYTES
        # What a product recomputes is in memory all at once, for a chunk.
        chunk = evenly(count, max(int(most / each), 1 if lean else LEAST_CHUNK))
    # A vector's tangents take no more than the linearisation that they go through, a chunk at a time.
    at_once = max(int((room - (count * kept if keep else 0)) / (chunk * each + 1)), 1)
    at_once = max(at_once, min(vectors, FEW_VECTORS)) if keep else at_once
    return Chunks(None if chunk >= count else chunk, None if at_once >= vectors else at_once, keep, lean)


def vectors_at_once(linearisation: float, mesh: Mesh | None) -> int:
    """How many vectors go together through a linearisation of this many bytes.

    On a CPU those whose tangents stay in the cache; on an accelerator, or a mesh, those that fit.
    """
    if mesh is None and jax.default_backend() == "cpu":
        return max(int(TOGETHER_BYTES / linearisation), 1)
    room = usable_bytes() * (1 if mesh is None else mesh.size)
    return max(int(room / 4 / linearisation), 1)


def mapped(fn: Callable[[Any], PyTree], vectors: PyTree, most: int) -> PyTree:
    """`fn` of vectors on a leading axis, at most `most` at once; zeros fill up, so that one program serves all."""
    count = jnp.shape(jax.tree.leaves(vectors)[0])[0]
    size = evenly(count, most)
    if size == count:
        return jax.vmap(fn)(vectors)
    groups = -(-count // size)

    def grouped(leaf: Array) -> Array:
        filled = jnp.concatenate([leaf, jnp.zeros((groups * size - count, *leaf.shape[1:]), leaf.dtype)])
        return filled.reshape(groups, size, *leaf.shape[1:])

    found = jax.lax.map(jax.vmap(fn), jax.tree.map(grouped, vectors))
    return jax.tree.map(lambda leaf: leaf.reshape(groups * size, *leaf.shape[2:])[:count], found)


def evenly(count: int, most: int) -> int:
    """The size of equal chunks of at most `most`, with as few chunks as possible."""
    return -(-count // -(-count // most))


def usable_bytes() -> float:
    """Bytes that the default device may be asked for: a property of the machine, not of its load."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics and jax.default_backend() != "cpu":
        return DEVICE_SHARE * float(statistics["bytes_limit"])
    return HOST_BYTES


def linearised_bytes(
    problem: Bilevel, curvature: Curvature, meta_params: PyTree, tasks: Task, *, lean: bool = False
) -> float:
    """Bytes of one task's linearisation, from the shapes of what it is made of; nothing is computed or compiled.

    Args:
      problem: the problem.
      curvature: of the products.
      meta_params: λ.
      tasks: stacked tasks.
      lean: counts only what is expensive to compute.
    """
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *jnp.shape(leaf)[1:]), jnp.result_type(leaf)), tasks)
    at = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), meta_params)
    try:
        known = _BYTES.setdefault(problem.outer, {}) if curvature.is_exact else {}
    except TypeError:  # No weak reference to it can be made.
        known = {}
    leaves, structure = jax.tree.flatten((at, one))
    key = (problem.hvp, lean, structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    if key not in known:
        weights = jax.eval_shape(lambda: resolve_weights(None, one))
        pull = jax.eval_shape(lambda at, *data: batch_pull(problem, curvature, at, *data, lean=lean), at, one, weights)
        known[key] = max(tree_bytes(pull), 1.0)
    return known[key]


def tree_bytes(tree: PyTree) -> float:
    """Bytes of arrays, or of what has their shapes."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(jnp.shape(leaf)) * jnp.result_type(leaf).itemsize for leaf in leaves))


def _data_bytes(tasks: Task, meta_params: PyTree) -> float:
    return tree_bytes(tasks) / sizes(tasks).lead[0] + tree_bytes(meta_params)
