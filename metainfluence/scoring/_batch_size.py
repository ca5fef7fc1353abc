"""How many tasks a batch holds, and what is kept of each: from shapes alone, so that nothing need be compiled."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from metainfluence._source import stack
from metainfluence.curvature import Curvature
from metainfluence.data import Task
from metainfluence.problem import Bilevel
from metainfluence.response import CACHE_BYTES, LEAST_CHUNK, evenly, linearised_bytes, tree_bytes
from metainfluence.trust import halving, in_words

# More gain nothing on an accelerator.
_MOST = 4096

# Linearisations of a batch that must fit at once: two batches are worked on at a time, and a program holds about as
# much again in temporary values.
_AT_ONCE = 4

# Vectors of λ's size that a solve holds.
_VECTORS = 12


class Room(NamedTuple):
    """Bytes, by shapes.

    Attributes:
      whole: of one task's linearisation.
      lean: of the part of it that is expensive to compute.
      data: of one task itself.
      vectors: that a solve holds.
    """

    whole: float
    lean: float
    data: float
    vectors: float


def room_of(problem: Bilevel, curvature: Curvature, meta_params: PyTree, template: Task) -> Room:
    """What a task like this one takes."""
    one = stack([template], template).tasks
    whole, lean = (linearised_bytes(problem, curvature, meta_params, one, lean=lean) for lean in (False, True))
    return Room(whole, lean, tree_bytes(one), _VECTORS * tree_bytes(meta_params))


def batch_size_for(room: Room, count: int, memory: float, meta_params: PyTree, mesh: Mesh | None) -> int:
    """Tasks in a batch: on a CPU as many as have a linearisation that fits its cache, on an accelerator all that fit.

    Args:
      room: what a task takes.
      count: of all tasks.
      memory: bytes that may be used, on all devices together.
      meta_params: λ.
      mesh: devices that share each batch; None for one.

    Raises:
      MemoryError: not one task fits; the message says what is missing, and what takes half.
    """
    each = room.whole + room.data
    fitting = int((memory - room.vectors) / (_AT_ONCE * each))
    if fitting < 1:
        least = room.vectors + _AT_ONCE * each
        raise MemoryError(
            f"memory: expected at least {in_words(least)} ({_AT_ONCE} times the {in_words(each)} of one task and its "
            f"linearisation, by shapes, and {in_words(room.vectors)} for vectors like meta_params), got "
            f"{in_words(memory)}: {in_words(least - memory)} are missing; {halving(meta_params, 1)}"
        )
    devices = 1 if mesh is None else mesh.size
    useful = _MOST
    if jax.default_backend() == "cpu":
        useful = min(max(int(CACHE_BYTES / room.whole), LEAST_CHUNK), _MOST)
    # Batches of equal size, so that little padding is needed.
    return evenly(count, min(fitting, useful * devices))


def keeps_lean(room: Room, count: int, kept_bytes: float) -> bool:
    """Whether to keep only what is expensive to compute: if not all linearisations fit, and more fit that way."""
    return count * room.whole > kept_bytes and 2 * room.lean < room.whole
