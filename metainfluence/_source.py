"""Where tasks come from: any random-access sequence, read in batches by a thread, and watched for changes."""

from __future__ import annotations

import collections
import hashlib
import zlib
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, PyTree, UInt32

from metainfluence._checks import is_half, leaf_name
from metainfluence.data import PIECE, Task, Weights, leaves_by_kind, sizes

_AHEAD = 2


class SourceError(RuntimeError):
    """A task that cannot be read, or that is no longer what it was."""


class Source(Protocol):
    """Any random-access sequence of single tasks: a list, a `tfds.data_source` or grain source behind a map to `Task`.

    Two further attributes are optional. `ids` holds one distinct integer or string for each task; without it, positions
    are used. `columns` is (position) -> mapping from a column's name to its values (of the task, `[n_support]`,
    `[n_query]`) in the score file, None for null: `{"harm": ("clean", ["clean"] * n_support, ["clean"] * n_query)}`.
    The column `example` holds the examples' ids; without it, their positions within the task are used.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Task: ...


class Batch(NamedTuple):
    """Stacked tasks in host memory, filled up with tasks of weight 0.

    Attributes:
      tasks: leaves `[b, ...]`.
      weights: 1 for a task that was read, 0 for what fills up.
    """

    tasks: Task
    weights: Weights


class Reader:
    """Reads a source, one thread ahead of the device, and compares what it reads with what it has read before.

    Args:
      source: the tasks.
      batch_size: tasks in each batch; batch i holds the source's items from i · batch_size on.
      on_error: "raise", or "skip" to leave out what cannot be read.
      local: which rows of a batch this process reads, where several share the work; None for all.

    Attributes:
      ids: of all tasks.
      skipped: position -> why it could not be read.
      known: which items have been read, `[T]`.
      checksums: CRC-32 of these.
    """

    def __init__(self, source: Source, batch_size: int, on_error: str, local: Int[np.ndarray, " r"] | None = None):
        self.source = source
        self.batch_size = batch_size
        self.ids = ids_of(source)
        self.skipped: dict[int, str] = {}
        self.known: Bool[np.ndarray, " T"] = np.zeros(len(self.ids), bool)
        self.checksums: UInt32[np.ndarray, " T"] = np.zeros(len(self.ids), np.uint32)
        self._skip = on_error == "skip"
        self._local = np.arange(batch_size) if local is None else local
        self._template: Task | None = None

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return -(-len(self.ids) // self.batch_size)

    def template(self) -> Task:
        """The first task that can be read, with which all others are compared.

        Raises:
          SourceError: there is none.
        """
        for index in range(len(self.ids)):
            if self._template is None:
                self._read(index)
        if self._template is None:
            raise SourceError(f"source: expected a task that can be read, got none in {len(self.ids)}")
        return self._template

    def batches(self, which: Sequence[int]) -> Generator[tuple[int, Batch]]:
        """Batches by their number, the next ones being read while one is worked on."""
        return self.ahead(self.batch, which)

    def ahead(self, read: Callable[[int], Batch], which: Sequence[int]) -> Generator[tuple[int, Batch]]:
        """What `read` makes of numbers, the next ones being read while one is worked on."""
        if len(self.source) != len(self.ids):
            raise SourceError(f"source: expected {len(self.ids)} tasks, as at first, got {len(self.source)}")
        self.template()
        pending: collections.deque[tuple[int, Future[Batch]]] = collections.deque()
        with ThreadPoolExecutor(1, thread_name_prefix="metainfluence-source") as pool:
            try:
                for number in which:
                    pending.append((number, pool.submit(read, number)))
                    if len(pending) > _AHEAD:
                        yield _done(pending)
                while pending:
                    yield _done(pending)
            finally:
                for _, future in pending:
                    future.cancel()

    def batch(self, number: int) -> Batch:
        """Reads one batch, or this process's rows of it."""
        rows = number * self.batch_size + self._local
        found = [self._read(int(row)) if row < len(self.ids) else None for row in rows]
        return stack(found, self.template())

    def task(self, index: int) -> Task | None:
        """Reads one task; None where it is skipped."""
        return self._read(index)

    def fingerprint(self, most: int = 64) -> str:
        """Digest of the structure and of some tasks, spread evenly."""
        positions = np.unique(np.linspace(0, len(self.ids) - 1, most).astype(int)).tolist()
        for position in positions:
            self._read(position)
        structure = str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), self.template()))
        digest = hashlib.sha256(structure.encode())
        for position in positions:
            digest.update(f"{position} {position in self.skipped} {self.checksums[position]}".encode())
        return digest.hexdigest()

    def leave_out(self, reasons: Mapping[int, str]) -> None:
        """Treats tasks, given by position, as ones that cannot be read."""
        if not reasons:
            return
        self.skipped.update(reasons)
        # What fills up batches at weight 0 must not be one of them: zero times NaN is NaN.
        self._template = None

    def memory(self) -> dict[str, Any]:
        """What has been read, as arrays."""
        positions = np.asarray(sorted(self.skipped), int)
        reasons = np.asarray([self.skipped[k] for k in positions.tolist()], str)
        return {"known": self.known, "checksums": self.checksums, "skipped": positions, "reasons": reasons}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Restores what has been read, to go on from there."""
        self.known, self.checksums = memory["known"], memory["checksums"]
        pairs = zip(memory["skipped"].tolist(), memory["reasons"].tolist(), strict=True)
        self.skipped = {}
        self.leave_out({int(position): str(reason) for position, reason in pairs})

    def _read(self, index: int) -> Task | None:
        if index in self.skipped:
            return None
        try:
            task = self._checked(self.source[index], index)
        except MemoryError:
            # This machine's fault and not the task's, which must not be left out for it.
            raise
        except Exception as error:
            message = f"task {self.ids[index]!r} (item {index}) could not be read: {type(error).__name__}: {error}"
            if self.known[index]:
                raise SourceError(f"source: {message}; it could be before") from error
            if not self._skip:
                raise SourceError(f'source: {message}; on_error="skip" leaves out such tasks') from error
            self.skipped[index] = message
            return None
        checksum = _checksum(task)
        if self.known[index] and checksum != self.checksums[index]:
            raise SourceError(
                f"source: task {self.ids[index]!r} (item {index}): expected what was read before, got other content; "
                "a source must not change during a run"
            )
        self.known[index], self.checksums[index] = True, checksum
        return task

    def _checked(self, task: Any, index: int) -> Task:
        """A task in host memory that may be stacked with the others."""
        # Most tasks are like the first one, and to check them must not take longer than to read them.
        if self._template is not None and _is_like(task, self._template):
            return task
        name = f"source[{self.ids[index]!r}]"
        task = _on_host(task, name)
        if self._template is None:
            self._template = task
        _check_alike(task, self._template, name)
        return task


def _done(pending: collections.deque[tuple[int, Future[Batch]]]) -> tuple[int, Batch]:
    number, future = pending.popleft()
    return number, future.result()


class Subset:
    """Some tasks of a source."""

    def __init__(self, source: Source, positions: Sequence[int]):
        self._source, self._positions = source, positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int, /) -> Task:
        return self._source[self._positions[index]]


def is_source(tasks: Any) -> bool:
    """Whether these are single tasks in a sequence, and not stacked ones."""
    return (
        not isinstance(tasks, (tuple, dict, str, bytes))
        and hasattr(tasks, "__len__")
        and hasattr(tasks, "__getitem__")
        and not hasattr(tasks, "shape")
    )


def ids_of(source: Source) -> Sequence[int] | Sequence[str]:
    """The tasks' ids, checked.

    Raises:
      TypeError: no sequence, or ids that are neither all integers nor all strings.
      ValueError: no tasks, not one id for each, or ids that repeat.
    """
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise TypeError(
            f"source: expected a sequence of tasks with len() and indexing, got {type(source).__name__}; {PIECE}"
        )
    if isinstance(source, (Task, str, bytes)):
        raise TypeError(f"source: expected a sequence of single tasks, got {type(source).__name__}")
    if len(source) == 0:
        raise ValueError("source: expected at least one task, got none")
    given = getattr(source, "ids", None)
    if given is None:
        return range(len(source))
    values = np.asarray(given)
    if values.shape != (len(source),):
        raise ValueError(f"source.ids: expected one id for each of {len(source)} tasks, got shape {values.shape}")
    if not (np.issubdtype(values.dtype, np.integer) or all(isinstance(value, str) for value in given)):
        raise TypeError(f"source.ids: expected all integers or all strings, got {values.dtype}")
    found, counts = np.unique(values, return_counts=True)
    if len(found) < len(values):
        raise ValueError(f"source.ids: expected distinct ids, got {found[counts > 1].tolist()[:5]} more than once")
    return values.tolist()


class Widths(NamedTuple):
    """Numbers of examples to which every batch is padded; None for a side that needs no padding."""

    support: int | None
    query: int | None


def stack(found: Sequence[Task | None], template: Task, widths: Widths | None = None) -> Batch:
    """Stacks tasks on a new leading axis in host memory; None becomes the template at weight 0.

    Tasks of other sizes than the template's are padded, to `widths` or else to the next power of two, so that few
    programs are compiled.
    """
    tasks = [template if task is None else task for task in found]
    counts = [sizes(task, stacked=False) for task in tasks]
    usual = sizes(template, stacked=False)

    def side(name: str) -> tuple[PyTree, Any, int]:
        batches = [getattr(task, name) for task in tasks]
        masks = [getattr(task, f"{name}_mask") for task in tasks]
        lengths = [getattr(count, name) for count in counts]
        whole = getattr(usual, name)
        width = None if widths is None else getattr(widths, name)
        if width is None and all(length == whole for length in lengths) and all(mask is None for mask in masks):
            return jax.tree.map(_stacked, *batches), None, whole
        of_examples = iter([kind[2] for kind in leaves_by_kind(batches[0])])
        longest = 1 << (max(lengths) - 1).bit_length() if width is None else width

        def padded(*leaves: Any) -> Any:
            if not next(of_examples):
                return _stacked(*leaves)
            rows = [np.minimum(np.arange(longest), length - 1) for length in lengths]
            return _stacked(*(leaf[row] for leaf, row in zip(leaves, rows, strict=True)))

        filled = np.zeros((len(tasks), longest), bool)
        for row, mask, length in zip(filled, masks, lengths, strict=True):
            row[:length] = True if mask is None else mask
        return jax.tree.map(padded, *batches), filled, longest

    (support, support_mask, n_support), (query, query_mask, n_query) = side("support"), side("query")
    dtype = np.dtype(jnp.result_type(float))
    real: Any = np.asarray([task is not None for task in found], dtype)
    ones: Any = [np.ones((len(tasks), length), dtype) for length in (n_support, n_query)]
    weights = Weights(real, *ones)
    return Batch(Task(support, query, support_mask, query_mask), weights)


def widened(tree: PyTree) -> PyTree:
    """Half-precision leaves in float32, so that nothing is computed in less."""
    return jax.tree.map(lambda leaf: leaf.astype(np.float32) if is_half(leaf) else leaf, tree)


def _stacked(*leaves: Any) -> Any:
    return jnp.stack(leaves) if isinstance(leaves[0], jax.Array) else np.stack(leaves)


def _on_host(task: Any, name: str) -> Task:
    def array(leaf: Any) -> Any:
        # Typed PRNG keys have no NumPy form.
        return leaf if _is_key(leaf) else np.asarray(leaf)

    wide = widened(jax.tree.map(array, task))
    sizes(wide, stacked=False, name=name)
    return wide


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_like(task: Any, template: Task) -> bool:
    """Whether all leaves are NumPy arrays of the template's shapes and dtypes, and there is no mask."""
    structure: Any = jax.tree.structure(task)
    masked = template.support_mask is not None or template.query_mask is not None
    if masked or structure != jax.tree.structure(template):
        return False
    return all(
        type(leaf) is np.ndarray and leaf.shape == like.shape and leaf.dtype == like.dtype
        for leaf, like in zip(jax.tree.leaves(task), jax.tree.leaves(template), strict=True)
    )


def _check_alike(task: Task, template: Task, name: str) -> None:
    """Raises ValueError unless the tasks differ only in their numbers of examples."""
    task, template = (each._replace(support_mask=None, query_mask=None) for each in (task, template))
    structure: Any = jax.tree.structure(task)
    if structure != jax.tree.structure(template):
        raise ValueError(
            f"{name}: expected the structure {jax.tree.structure(template)} of the first task, got {structure}"
        )
    for (path, leaf, of_examples), like in zip(leaves_by_kind(task), jax.tree.leaves(template), strict=True):
        got, expected = ((each.shape[int(of_examples) :], each.dtype) for each in (leaf, like))
        if got != expected:
            raise ValueError(
                f"{leaf_name(name, path)}: expected {'trailing ' if of_examples else ''}shape and dtype {expected} as "
                f"in the first task, got {got}"
            )


def _checksum(task: Task) -> int:
    checksum = 0
    for leaf in jax.tree.leaves(task):
        array: Any = np.asarray(jax.random.key_data(leaf)) if _is_key(leaf) else leaf
        content: Any = np.ascontiguousarray(array)
        checksum = zlib.crc32(content, zlib.crc32(repr(array.shape).encode(), checksum))
    return checksum


def total_bytes(template: Task, count: int) -> int:
    """Bytes that `count` tasks like this one take."""
    return count * sum(leaf.nbytes for leaf in jax.tree.leaves(template))
