"""Ground truth by retraining: the user's own training function, run for all interventions side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from metainfluence._checks import check_batch_size, concrete, is_array, leaf_name
from metainfluence._disk import of_arrays, of_texts
from metainfluence.data import Weights
from metainfluence.evaluation._cache import Cache


def retrain(
    train: Callable[..., PyTree], *, batch_size: int | None = None, cache: str | Path | None = None
) -> Callable[..., PyTree]:
    """Makes (interventions, *args, keys=None) -> trained meta-parameters of every intervention, `[m, ...]`.

    All runs of a chunk are trained at once by `vmap`, and every chunk by the same compiled program.

    Args:
      train: (weights, *args) -> meta_params: a pure function. The initial λ in `args` decides whether it starts from
        scratch or warm. With keys it is called with one more keyword, `key`.
      batch_size: runs trained at once, which bounds the memory; None takes all.
      cache: folder for the results, written chunk by chunk as .npz files, each complete or absent, so that a killed run
        continues where it stopped. The folder belongs to one program with its interventions, arguments, keys and batch
        size, and holds their SHA-256 hashes. Damaged files are computed again.

    Returns:
      Function of `interventions`, which are `Weights` with a leading axis `[m]`; the training's own arguments, passed
      on as they are; and `keys`, None or a pytree of arrays `[seeds, ...]`, such as random keys or starting points,
      whose entries `train` gets as `key`. With keys, every intervention is trained for every key: the results are
      `[seeds, m, ...]`, and their scatter over the seeds is the noise floor.

    Raises:
      TypeError: `train` is not a function, or interventions that are not `Weights`.
      ValueError: interventions or keys that are empty or without a common leading axis, or a cache of another
        computation; the message names what differs.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> def train(weights, tasks):
      ...     return jnp.vdot(weights.task, tasks.query) / jnp.sum(weights.task)
      >>> without = mi.evaluation.leave_one_out(mi.unit_weights(tasks), tasks=[0, 1, 2])
      >>> mi.evaluation.retrain(train)(without, tasks).tolist()
      [3.0, 2.5, 0.5]
    """
    if not callable(train):
        raise TypeError(f"train: expected a function (weights, *args) -> meta_params, got {train!r}")
    check_batch_size(batch_size)

    def chunk(runs: tuple[Weights, PyTree], args: tuple[Any, ...]) -> PyTree:
        def single(weights: Weights, key: PyTree) -> PyTree:
            return train(weights, *args) if key is None else train(weights, *args, key=key)

        return jax.vmap(single)(*runs)

    compiled = jax.jit(chunk)

    def run(interventions: Weights, *args: Any, keys: PyTree = None) -> PyTree:
        if not isinstance(interventions, Weights):
            raise TypeError(f"interventions: expected metainfluence.Weights, got {type(interventions).__name__}")
        count = _leading("interventions", interventions)
        num_keys = 1 if keys is None else _leading("keys", keys)
        total = num_keys * count
        size = total if batch_size is None else min(batch_size, total)

        def rows(start: int) -> tuple[Weights, PyTree]:
            # The last chunk is filled up with the first runs, so that it has the shape of the others.
            index = np.arange(start, start + size) % total
            weights = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index % count], interventions)
            return weights, jax.tree.map(lambda leaf: jnp.asarray(leaf)[index // count], keys)

        starts = range(0, total, size)
        if cache is None:
            parts = [compiled(rows(start), args) for start in starts]
        else:
            parts = _cached(Path(cache), compiled, rows, starts, (interventions, args, keys))
        results = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:total], *parts)
        if keys is None:
            return results
        return jax.tree.map(lambda leaf: leaf.reshape(num_keys, count, *leaf.shape[1:]), results)

    return run


def _cached(
    folder: Path,
    compiled: Any,
    rows: Callable[[int], tuple[Weights, PyTree]],
    starts: Sequence[int],
    data: tuple[Weights, tuple[Any, ...], PyTree],
) -> list[PyTree]:
    interventions, args, keys = data
    if not concrete(data):
        raise TypeError("interventions: expected values where a cache is named, got traced arrays; call outside jit")
    lowered = compiled.lower(rows(0), args)
    parts = {
        # The program's text contains what training depends on: rates, numbers of steps, arrays that it closes over.
        "program": of_texts([lowered.as_text()]),
        "batch_size": str(len(rows(0)[0].task)),
        "interventions": of_arrays(interventions),
        **{f"args[{k}]": of_arrays(arg) for k, arg in enumerate(args)},
        "keys": of_arrays(keys),
    }
    stored = Cache.open(folder, parts)
    program = None
    shapes = jax.tree.leaves(lowered.out_info)
    structure = jax.tree.structure(lowered.out_info)
    results = []
    for number, start in enumerate(starts):
        leaves = stored.read(number, shapes)
        if leaves is None:
            # Nothing is compiled if all results are there.
            program = lowered.compile() if program is None else program
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(program(rows(start), args))]
            stored.write(number, leaves)
        results.append(jax.tree.unflatten(structure, leaves))
    return results


def _leading(name: str, tree: PyTree) -> int:
    """The leading axis that all leaves share."""
    lengths = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(leaf) or jnp.ndim(leaf) == 0:
            raise ValueError(f"{leaf_name(name, path)}: expected an array with a leading axis, got {leaf!r}")
        lengths.add(jnp.shape(leaf)[0])
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"{name}: expected one leading axis that is not empty, got lengths {sorted(lengths)}")
    return int(lengths.pop())
