"""Several processes in step: the first one writes, and all of them act on what it has read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from metainfluence._source import Reader


_LEAST_BYTES = 1 << 16


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def agree(content: bytes) -> bytes:
    """What the first process has, on all processes."""
    if jax.process_count() == 1:
        return content
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # A power of two, since each size is a program of its own.
    buffer = np.zeros(1 << max(length - 1, _LEAST_BYTES).bit_length(), np.uint8)
    if first():
        buffer[:length] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8)[:length].tobytes()


def meet() -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("metainfluence.scoring")


def share(reader: Reader) -> None:
    """Gives every process's reader what the others have read, each its own rows of every batch."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    skipped = np.zeros(len(reader.ids), np.uint8)
    skipped[sorted(reader.skipped)] = 1
    # Each task is read by one process, and 0 in the others.
    given = (reader.known.astype(np.uint8), reader.checksums, skipped)
    known, checksums, skipped = (np.asarray(multihost_utils.process_allgather(array)).max(axis=0) for array in given)
    reader.known, reader.checksums = known.astype(bool), checksums.astype(np.uint32)
    for position in np.flatnonzero(skipped).tolist():
        reader.skipped.setdefault(position, f"task {reader.ids[position]!r} could not be read by its process")
