"""Sums over tasks that come in batches: the gradient, Hessian products, and scores, each a pass over the source."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PyTree

from metainfluence._chunks import task_sharding
from metainfluence._source import Batch, Reader, Source, Subset, stack, total_bytes
from metainfluence.operators import Domain, Operator
from metainfluence.response import mean, shares_support
from metainfluence.scoring._host import host_operator
from metainfluence.scoring._programs import Part, Programs, holds_nan

# Batches that are worked on at once: a batch that stays in a core's cache keeps one core busy.
_WORKERS = 2

# Vectors that are multiplied at once; each takes its share of memory.
_LANES = 8

_DATA_SHARE = 0.25


class Slope(NamedTuple):
    """The outer objective to first order at λ.

    Attributes:
      gradient: D_λF.
      shift: what the curvature adds to the diagonal.
      num_tasks: T, those that could be read.
      inner_gradient_norm: max over tasks of ‖∂_θ L_in‖.
    """

    gradient: PyTree
    shift: Float[Array, ""]
    num_tasks: Float[Array, ""]
    inner_gradient_norm: Float[Array, ""]


class BatchScores(NamedTuple):
    """Scores of one batch in host memory; what was not read has weight 0.

    Attributes:
      weights: `[b]`.
      task: `[b]`.
      support: `[b, n_support]`.
      query: `[b, n_query]`.
      support_mask: `[b, n_support]`, False on padding.
      query_mask: `[b, n_query]`.
      shared: whether some of the target's tasks adapt to a support set of the batch.
    """

    weights: Float[np.ndarray, " b"]
    task: Float[np.ndarray, " b"]
    support: Float[np.ndarray, "b n_support"]
    query: Float[np.ndarray, "b n_query"]
    support_mask: Bool[np.ndarray, "b n_support"]
    query_mask: Bool[np.ndarray, "b n_query"]
    shared: bool = False


def reader_of(source: Source, batch_size: int, on_error: str, mesh: Mesh | None) -> Reader:
    """A reader of this process's share; the batch size is rounded up to a multiple of the mesh's size."""
    if mesh is None:
        return Reader(source, batch_size, on_error)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    return Reader(source, batch_size, on_error, local_rows(mesh, batch_size))


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " r"]:
    """Rows of a batch that lie on this process's devices."""
    sharding = task_sharding(mesh)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in slices if part is not None]))


class Passes:
    """Passes over a source at one λ.

    What fits is kept on the devices from one pass to the next: a batch's linearisation, so that a product runs only its
    linear part, or else its data, so that they need not be read again.

    Args:
      programs: of the problem.
      meta_params: λ.
      reader: of the source.
      memory: bytes that may be kept, on all devices together.
      on_batch: called after each batch with the number of batches done and of all batches.
      of_one_size: name of the argument that requires all tasks to have the same number of examples; None for any
        number.
    """

    def __init__(
        self,
        programs: Programs,
        meta_params: PyTree,
        reader: Reader,
        *,
        memory: float = 0.0,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
        of_one_size: str | None = None,
    ):
        self.reader, self.on_batch, self._of_one_size = reader, on_batch, of_one_size
        self._programs, self._meta_params = programs, meta_params
        self._at = programs.replicated(meta_params)
        self._count: Array | None = None
        self._renewed = False
        self._data: dict[int, Batch] = {}
        self._linear: dict[int, Any] = {}
        data = total_bytes(reader.template(), len(reader.ids))
        self._keeps_all = data <= _DATA_SHARE * memory
        self._data_room = self._whole_data_room = _DATA_SHARE * memory
        self._linear_room = memory - (data if self._keeps_all else self._data_room)
        self.linear_bytes = self._bytes_of_linearisation() if memory > 0 else 0
        self._num_linear = int(self._linear_room // self.linear_bytes) if memory > 0 else 0

    @property
    def domain(self) -> Domain:
        """Of vectors like λ."""
        return Domain.of(self._meta_params)

    def slope(self) -> Slope:
        """The gradient pass, which also determines T."""

        def prepare(number: int, batch: Batch) -> Callable[[], Part]:
            return self._programs.gradient.prepare(self._at, batch)

        (gradient, shift, count), norm = self._programs.local(self._sum(prepare, lambda number: True))
        if not count > 0:
            raise ValueError(f"source: expected a task that can be read, got none in {len(self.reader.ids)}")
        regularizer = self._programs.local(self._programs.regularizer(self._at))
        gradient = mean(gradient, count, regularizer)
        return Slope(gradient, shift / count.astype(shift.dtype), count, norm)

    def spoilt(self) -> list[int]:
        """Positions of the tasks whose own gradients are not finite, found in a separate pass."""

        def prepare(number: int, batch: Batch) -> Callable[[], Any]:
            return self._programs.finite.prepare(self._at, batch)

        found: list[int] = []
        numbers = range(self.reader.num_batches)
        with contextlib.closing(self._mapped(prepare, numbers, lambda number: True)) as results:
            for number, _, finite in results:
                rows = number * self.reader.batch_size + np.flatnonzero(~np.asarray(finite))
                found += [row for row in rows.tolist() if row < len(self.reader.ids)]
        return found

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Treats tasks, given by position, as ones that cannot be read."""
        self.reader.leave_out(reasons)
        self._data.clear()
        self._linear.clear()
        self._data_room = self._whole_data_room

    def operator(
        self, slope: Slope, around: Callable[[Callable[[PyTree], PyTree]], Callable[[PyTree], PyTree]] = lambda fn: fn
    ) -> Operator:
        """The total Hessian with what the curvature adds to it; each product is a pass.

        Args:
          slope: of the same passes.
          around: wraps the function that multiplies vectors on a leading axis.
        """
        self._count = slope.num_tasks
        operator = host_operator(around(self._products), self._meta_params).damped(slope.shift)
        return dataclasses.replace(operator, sample=Partial(self._sample), num_groups=int(slope.num_tasks))

    def scores(
        self, direction: PyTree, which: Sequence[int], target_args: tuple[Any, ...] = ()
    ) -> Generator[tuple[int, BatchScores]]:
        """Scores of the data in some batches, given the solution of H s = ∇φ for the target at these arguments."""
        assert self._count is not None
        direction, count = self._programs.replicated((direction, self._count))
        # The linearisations are no longer needed, and the scores need room.
        self._linear.clear()

        def prepare(number: int, batch: Batch) -> Callable[[], tuple[Array, ...]]:
            return self._programs.scores.prepare(self._at, direction, count, batch)

        with contextlib.closing(self._mapped(prepare, which, lambda number: True)) as results:
            for number, batch, found in results:
                good = prepare(number, batch)() if self._is_suspect(found) else found
                arrays: Any = map(np.asarray, good)
                yield number, BatchScores(*arrays)._replace(shared=self._shares(batch, target_args))

    def _shares(self, batch: Batch, target_args: tuple[Any, ...]) -> bool:
        """Whether the target adapts to a support set of the batch, as far as one process sees all of it."""
        if not target_args or jax.process_count() > 1:
            return False
        support = self._programs.local((batch.tasks.support, batch.tasks.support_mask))
        found = shares_support(batch.tasks._replace(support=support[0], support_mask=support[1]), target_args)
        return found is not None and bool(found)

    def _products(self, vectors: PyTree) -> PyTree:
        """H v for vectors on a leading axis, which share a pass."""
        assert self._count is not None
        count = self._count
        total = jax.tree.leaves(vectors)[0].shape[0]
        groups = [
            self._programs.replicated(jax.tree.map(lambda leaf, first=first: leaf[first : first + _LANES], vectors))
            for first in range(0, total, _LANES)
        ]

        def prepare(number: int, batch: Batch) -> Callable[[], Part]:
            if number in self._linear:
                calls = [self._programs.apply.prepare(self._linear[number], group) for group in groups]
            else:
                calls = [self._programs.product.prepare(self._at, group, batch) for group in groups]
            return lambda: Part(tuple(call() for call in calls))

        self._linearise()
        sums = self._programs.local(self._sum(prepare, lambda number: number not in self._linear).sums)
        regularizers = self._programs.local([self._programs.regularizer_product(self._at, group) for group in groups])
        parts = [mean(found, count, regularizer) for found, regularizer in zip(sums, regularizers, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def _linearise(self) -> None:
        """Linearises the first batches, as many as there is room for."""
        count = min(self._num_linear, self.reader.num_batches)
        missing = [number for number in range(count) if number not in self._linear]

        def prepare(number: int, batch: Batch) -> Callable[[], Any]:
            return self._programs.linearise.prepare(self._at, batch)

        used = sum(map(_bytes, self._linear.values()))
        with contextlib.closing(self._mapped(prepare, missing, lambda number: True)) as results:
            for number, _, linear in results:
                used += _bytes(linear)
                if used > self._linear_room:
                    # These tasks' sizes differ from the first one's.
                    self._num_linear = number
                    return
                self._linear[number] = linear

    def _sample(self, number: int) -> Operator:
        """The operator of some tasks, chosen at random."""
        readable = [k for k in range(len(self.reader.ids)) if k not in self.reader.skipped]
        # A fixed key: the same source gives the same operator.
        chosen = np.asarray(jax.random.permutation(jax.random.key(0), len(readable)))[:number]
        subset = Subset(self.reader.source, [readable[k] for k in sorted(chosen.tolist())])
        reader = reader_of(subset, min(self.reader.batch_size, number), "raise", self._programs.mesh)
        passes = Passes(self._programs, self._meta_params, reader, memory=self._linear_room)
        return passes.operator(passes.slope())

    def _sum(self, prepare: Callable[[int, Batch], Callable[[], Part]], needs: Callable[[int], bool]) -> Part:
        total = self._sum_once(prepare, needs)
        if self._is_suspect(total):
            self._linear.clear()
            total = self._sum_once(prepare, needs)
        return total

    def _is_suspect(self, found: PyTree) -> bool:
        """Whether a result holds NaN for the first time; the programs are then compiled anew."""
        if self._renewed or not holds_nan(found):
            return False
        self._renewed = True
        self._programs.renew()
        return True

    def _sum_once(self, prepare: Callable[[int, Batch], Callable[[], Part]], needs: Callable[[int], bool]) -> Part:
        numbers = range(self.reader.num_batches)
        total: Part | None = None
        with contextlib.closing(self._mapped(prepare, numbers, needs)) as results:
            for number, _, found in results:
                # Always in the source's order, so that a resumed run adds up in the same way.
                total = found if total is None else self._programs.merge(total, found)
                self.on_batch(number + 1, len(numbers))
        assert total is not None
        return total

    def _mapped(
        self, prepare: Callable[[int, Any], Callable[[], Any]], which: Sequence[int], needs: Callable[[int], bool]
    ) -> Generator[tuple[int, Any, Any]]:
        """Number, batch and what is made of it, for some batches in their order; several are worked on at once."""
        # Processes that share a mesh must start their collectives in the same order.
        workers = _WORKERS if self._programs.mesh is None else 1
        pending: collections.deque[tuple[int, Any, Future[Any]]] = collections.deque()
        with (
            ThreadPoolExecutor(workers, "metainfluence-batch") as pool,
            contextlib.closing(self._batches(which, needs)) as batches,
        ):
            for number, batch in batches:
                pending.append((number, batch, pool.submit(prepare(number, batch))))
                if len(pending) > workers:
                    number, batch, future = pending.popleft()
                    yield number, batch, future.result()
            while pending:
                number, batch, future = pending.popleft()
                yield number, batch, future.result()

    def _batches(self, which: Sequence[int], needs: Callable[[int], bool]) -> Generator[tuple[int, Any]]:
        """Batches on the devices; None for those whose data are not needed."""
        missing = [number for number in which if needs(number) and number not in self._data]
        with contextlib.closing(self.reader.batches(missing)) as stream:
            for number in which:
                if not needs(number):
                    yield number, None
                elif number in self._data:
                    yield number, self._data[number]
                else:
                    read = next(stream)[1]
                    masked = read.tasks.support_mask is not None or read.tasks.query_mask is not None
                    if self._of_one_size is not None and masked:
                        raise ValueError(
                            f"{self._of_one_size}: expected tasks of one size without masks, as the target's weights "
                            f"need them, got others in batch {number}; score them by size, or in memory"
                        )
                    batch = self._programs.put(read)
                    self._keep(number, batch)
                    yield number, batch

    def _keep(self, number: int, batch: Batch) -> None:
        if not self._keeps_all:
            if number < self._num_linear:
                return
            self._data_room -= _bytes(batch)
            if self._data_room < 0:
                return
        self._data[number] = batch

    def _bytes_of_linearisation(self) -> int:
        batch = stack([self.reader.template()] * self.reader.batch_size, self.reader.template())
        return self._programs.linearise.bytes_of_result(self._meta_params, batch)


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
