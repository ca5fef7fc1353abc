"""The compiled functions behind passes over batches, and the devices that they run on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from metainfluence._chunks import task_sharding
from metainfluence._source import Batch
from metainfluence._spoilt import finite_gradients
from metainfluence.curvature import Curvature, exact
from metainfluence.problem import Bilevel
from metainfluence.response import (
    Pull,
    batch_gradient,
    batch_pull,
    batch_sensitivities,
    batch_shift,
    regularizer_gradient,
    regularizer_product,
)


class Part(NamedTuple):
    """What a pass computes for one batch: pytrees to be added up, and ones to take the maximum of."""

    sums: PyTree
    peaks: PyTree = ()


def holds_nan(tree: PyTree) -> bool:
    """Whether a floating-point leaf holds NaN.

    In one of about fifty compilations of a program, XLA's CPU backend made an executable that returns NaN (jaxlib
    0.10.2; openxla/xla issue 8471 reports something similar). This must not spoil a run of hours: a program that
    returns NaN is compiled anew, once.
    """
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return any(bool(np.isnan(np.asarray(leaf)).any()) for leaf in floats)


class Program:
    """A function that is compiled when it is prepared, so that any thread can run it.

    JAX's settings belong to the thread that made them, and another thread would compile with other settings.
    """

    def __init__(self, fn: Callable[..., Any], sharding: NamedSharding | None):
        self._jitted: Any = jax.jit(fn, out_shardings=sharding)
        self._compiled: dict[Any, Any] = {}

    def prepare(self, *args: Any) -> Callable[[], Any]:
        """The call with these arguments, which waits for its results."""
        leaves, structure = jax.tree.flatten(args)
        settings: Any = jax.config
        avals = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        key = (structure, avals, jnp.result_type(float), settings.jax_default_matmul_precision)
        if key not in self._compiled:
            self._compiled[key] = self._jitted.lower(*args).compile()
        executable = self._compiled[key]
        return lambda: jax.block_until_ready(executable(*args))

    def bytes_of_result(self, *args: Any) -> int:
        """Bytes that the results for such arguments take."""
        leaves = jax.tree.leaves(jax.eval_shape(self._jitted, *args))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class Programs:
    """The compiled functions of passes, made once for a problem.

    Args:
      problem: the problem.
      curvature: of the products.
      mesh: devices over which each batch is sharded; None for the default device.
      lean: whether only the expensive part of linearisations is kept.
    """

    def __init__(self, problem: Bilevel, curvature: Curvature, mesh: Mesh | None, lean: bool = False):
        self.mesh, self._lean = mesh, lean
        self._problem, self._curvature = problem, curvature
        self.renew()

    def renew(self) -> None:
        """Makes all functions anew, so that everything is compiled again."""
        problem, curvature, mesh = self._problem, self._curvature, self.mesh

        # Results are complete on every device, so that every process can read them.
        whole = None if mesh is None else task_sharding(mesh, replicated=True)

        def gradient(at: PyTree, batch: Batch) -> Part:
            total, seen = batch_gradient(problem, exact(), at, at, *batch)
            shift = batch_shift(problem, curvature, at, *batch)
            return Part((total, shift, jnp.sum(batch.weights.task)), jnp.max(seen.inner_gradient_norm))

        def scores(at: PyTree, direction: PyTree, count: Array, batch: Batch) -> tuple[Array, ...]:
            sensitivities = batch_sensitivities(problem, at, direction, *batch)
            found = jax.tree.map(lambda w, s: w * s / count.astype(s.dtype), batch.weights, sensitivities)
            masks = [
                jnp.ones(weights.shape, bool) if mask is None else jnp.asarray(mask)
                for weights, mask in (
                    (batch.weights.support, batch.tasks.support_mask),
                    (batch.weights.query, batch.tasks.query_mask),
                )
            ]
            return batch.weights.task, *found, *masks

        def merge(total: Part, part: Part) -> Part:
            peaks = jax.tree.map(jnp.maximum, total.peaks, part.peaks)
            return Part(jax.tree.map(jnp.add, total.sums, part.sums), peaks)

        def finite(at: PyTree, batch: Batch) -> Array:
            # What could not be read has weight 0.
            return finite_gradients(problem, at, *batch) | (batch.weights.task == 0)

        self.gradient = Program(gradient, whole)
        self.finite = Program(finite, whole)
        self.product = Program(
            lambda at, vectors, batch: _products(batch_pull(problem, curvature, at, *batch), vectors),
            whole,
        )
        # A linearisation stays on the devices where its tasks are.
        self.linearise = Program(lambda at, batch: batch_pull(problem, curvature, at, *batch, lean=self._lean), None)
        self.apply = Program(_products, whole)
        self.scores = Program(scores, whole)
        # The old sum is of no more use once a batch is added to it.
        self.merge = jax.jit(merge, out_shardings=whole, donate_argnums=0)
        self.regularizer = jax.jit(functools.partial(regularizer_gradient, problem), out_shardings=whole)
        self.regularizer_product = jax.jit(
            lambda at, vectors: _lanes(functools.partial(regularizer_product, problem, at), vectors),
            out_shardings=whole,
        )

    def put(self, batch: Batch) -> Batch:
        """A batch, or this process's rows of it, on the devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        sharding = task_sharding(self.mesh)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)

    def replicated(self, tree: PyTree) -> PyTree:
        """The same values on all devices."""
        if self.mesh is None:
            return tree
        sharding = task_sharding(self.mesh, replicated=True)
        if jax.process_count() == 1:
            return jax.device_put(tree, sharding)

        def spread(leaf: Array) -> Array:
            value = np.asarray(leaf)
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

        return jax.tree.map(spread, tree)

    def local(self, tree: PyTree) -> PyTree:
        """Replicated values on the one device that the solver works on."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), tree)


def _products(pull: Pull, vectors: PyTree) -> PyTree:
    return _lanes(lambda vector: pull(vector)[0], vectors)


def _lanes(fn: Callable[[PyTree], PyTree], vectors: PyTree) -> PyTree:
    """`fn` of each vector on the leading axis."""
    if jax.tree.leaves(vectors)[0].shape[0] > 1:
        return jax.vmap(fn)(vectors)
    # Without an axis of length 1, XLA's programs are the ones that were measured.
    return jax.tree.map(lambda leaf: leaf[None], fn(jax.tree.map(lambda leaf: leaf[0], vectors)))


@functools.lru_cache(maxsize=4)
def programs_of(problem: Bilevel, curvature: Curvature, mesh: Mesh | None, lean: bool = False) -> Programs:
    """The programs of a problem, compiled once for all runs."""
    return Programs(problem, curvature, mesh, lean)
