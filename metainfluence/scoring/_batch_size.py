"""How many tasks a batch holds, and what is kept of each: by shapes alone, so that nothing is compiled to find out."""

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

# More bring an accelerator nothing.
_MOST = 4096

# Linearisations of a batch that there is room for at least: two batches are worked on at once, and a program holds
# about as much again of what it makes and lets go.
_AT_ONCE = 4

# Vectors like λ that a solve holds.
_VECTORS = 12


class Room(NamedTuple):
    """Bytes, by shapes.

    Attributes:
      whole: of one task's linearisation.
      lean: of what is dear to compute of it.
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
    """Tasks in a batch: on a CPU those whose linearisation stays in its cache, on an accelerator those that fit.

    Args:
      room: what a task takes.
      count: of all tasks.
      memory: bytes that may be used, on all devices together.
      meta_params: λ.
      mesh: devices that share each batch; None for one.

    Raises:
      MemoryError: not one task fits; with what is missing, and what takes half.
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
    # Batches of equal size, so that little is filled up.
    return evenly(count, min(fitting, useful * devices))


def keeps_lean(room: Room, count: int, kept_bytes: float) -> bool:
    """Whether only what is dear to compute is kept: where not all linearisations fit, and more fit so."""
    return count * room.whole > kept_bytes and 2 * room.lean < room.whole
