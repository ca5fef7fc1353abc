"""Checkpoints: what `segments` must know about a training run, and how to read it from the states that a run kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import check_floating, concrete, described, is_array, leaf_name
from metainfluence.operators import Domain
from metainfluence.problem import check_meta_params

__all__ = ["Checkpoint", "checkpoints"]

PLACES = ("end", "middle")


class Checkpoint(NamedTuple):
    """One segment of a training run: λ, and how far the optimiser went with the curvature that F has there.

    Attributes:
      meta_params: λ, at the segment's end or anywhere in it.
      time: τ, the sum of the segment's learning rates, divided by 1 − momentum where the optimiser has heavy-ball
        momentum.
      preconditioner: P, a pytree like λ: a step of the optimiser is − rate · P⁻¹ D_λF. Adam's is √v̂ + eps. None for 1.
      weight_decay: decoupled decay, such as AdamW's: a step also adds − rate · weight_decay · λ.
      step: number of the step after which λ was kept; None where it is not known. It is only used to check the order.
    """

    meta_params: PyTree
    time: Any
    preconditioner: PyTree | None = None
    weight_decay: Any = 0.0
    step: int | None = None


def checkpoints(
    states: Sequence[tuple[PyTree, PyTree]],
    *,
    learning_rate: float | Callable[[Any], Any] | Float[Array, " N"],
    num_steps: int | None = None,
    steps: Sequence[int] | None = None,
    momentum: float = 0.0,
    second_moments: bool = False,
    decay: float | None = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    weight_decay: float = 0.0,
    place: str = "end",
) -> tuple[Checkpoint, ...]:
    """Reads checkpoints from pairs (λ, optimiser state) that a run kept, in their order.

    The optimiser state is optax's, or what orbax makes of it when it restores without a template. Fields are found by
    name, wherever a chain has put them.

        checkpoints(kept, num_steps=100, learning_rate=0.01, second_moments=True, eps_root=1e-5)

    Args:
      states: (meta_params, optimiser state) of each checkpoint; the last one is the end of the run. The optimiser state
        may be None where neither steps nor moments are read from it.
      learning_rate: number, schedule (step) -> rate, or the rates of all steps.
      num_steps: N of the whole run, where the checkpoints divide it evenly.
      steps: numbers of steps after which the checkpoints were kept; None divides `num_steps` evenly, or, without it,
        reads the `count` in each optimiser state.
      momentum: of heavy-ball momentum (`optax.sgd`, `optax.trace`), whose steps add up to 1/(1 − momentum) times the
        rate. Adam's averages do not: leave it 0.
      second_moments: whether to read `nu` from the optimiser's states, for P = √(nu/(1 − decayᶜᵒᵘⁿᵗ) + eps_root) + eps.
      decay: Adam's b2; None for moments that are not corrected for their start, such as `optax.rmsprop`'s.
      eps: the optimiser's.
      eps_root: the optimiser's.
      weight_decay: decoupled decay, such as `optax.adamw`'s.
      place: "end": a checkpoint represents the steps since the one before it, and with K checkpoints the scores are off
        by O(1/K). "middle": it represents the steps that are nearest to it, and the scores are off by O(1/K²) if the
        run's start is also among the states (as step 0).

    Raises:
      ValueError: steps that do not rise, are not known, or do not divide evenly; rates that are not positive numbers;
        an optimiser state without the moments asked for, or with several.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> kept = [(jnp.asarray(1.5), None), (jnp.asarray(2.0), None)]
      >>> found = mi.checkpoints(kept, num_steps=10, learning_rate=0.1, momentum=0.5)
      >>> [(each.step, round(each.time, 3)) for each in found]  # 5 steps of 0.1 / (1 - 0.5)
      [(5, 1.0), (10, 1.0)]
    """
    states = list(states)
    if not states or not all(isinstance(state, tuple) and len(state) == 2 for state in states):
        raise ValueError("states: expected a sequence of pairs (meta_params, optimizer state), at least one")
    if place not in PLACES:
        raise ValueError(f"place: expected one of {PLACES}, got {place!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number from 0 to below 1, got {momentum!r}")
    kept = _steps(states, num_steps, steps, place)
    borders = [0.0, *kept]
    if place == "middle":
        # A border may cut a step in two.
        borders = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(kept)), kept[-1]]
    elapsed = np.interp(
        borders, np.arange(kept[-1] + 1), np.concatenate([[0.0], np.cumsum(_rates(learning_rate, kept[-1]))])
    )
    times = np.diff(elapsed) / (1 - momentum)
    found = []
    for index, ((meta_params, state), time, step) in enumerate(zip(states, times, kept, strict=True)):
        preconditioner = None
        if second_moments:
            preconditioner = _preconditioner(meta_params, state, decay, eps, eps_root, f"states[{index}]")
        found.append(Checkpoint(meta_params, float(time), preconditioner, weight_decay, step))
    return tuple(found)


def check_checkpoints(checkpoints: Any) -> list[Checkpoint]:
    """Checks checkpoints one by one and against each other.

    Raises:
      TypeError: not a sequence of `Checkpoint`, or a λ without floating-point numbers.
      ValueError: no checkpoint; a time that is not positive, or steps that do not rise; λ or a preconditioner that is
        not finite, or whose structure or shapes differ.
    """
    if isinstance(checkpoints, Checkpoint) or not isinstance(checkpoints, Sequence):
        raise TypeError(f"checkpoints: expected a sequence of Checkpoint, got {type(checkpoints).__name__}")
    checkpoints = list(checkpoints)
    if not checkpoints:
        raise ValueError("checkpoints: expected at least one, got none")
    for index, each in enumerate(checkpoints):
        name = f"checkpoints[{index}]"
        if not isinstance(each, Checkpoint):
            raise TypeError(f"{name}: expected a metainfluence.Checkpoint, got {type(each).__name__}")
        check_floating(each.meta_params, f"{name}.meta_params")
        _check_leaves(f"{name}.meta_params", each.meta_params, checkpoints[0].meta_params)
        _check_number(f"{name}.time", each.time, "a positive number", lambda value: value > 0)
        _check_number(f"{name}.weight_decay", each.weight_decay, "a number from 0 on", lambda value: value >= 0)
        if (each.preconditioner is None) != (checkpoints[0].preconditioner is None):
            raise ValueError(f"{name}.preconditioner: expected one in every checkpoint or in none")
        if each.preconditioner is not None:
            _check_leaves(f"{name}.preconditioner", each.preconditioner, checkpoints[0].meta_params)
            if concrete(each.preconditioner) and not all(
                np.all(np.asarray(leaf) > 0) for leaf in jax.tree.leaves(each.preconditioner)
            ):
                raise ValueError(
                    f"{name}.preconditioner: expected positive numbers, got one that is not; Adam's has eps"
                )
    known = [(index, each.step) for index, each in enumerate(checkpoints) if concrete(each.step)]
    known = [(index, step) for index, step in known if step is not None]
    for (_, earlier), (index, later) in itertools.pairwise(known):
        if not later > earlier:
            raise ValueError(
                f"checkpoints[{index}].step: expected more than the {earlier} of an earlier checkpoint, got {later}; "
                "checkpoints come in the order of training"
            )
    return checkpoints


def _check_leaves(name: str, tree: PyTree, like: PyTree) -> None:
    Domain.of(like).check(name, tree)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{leaf_name(name, path)}: expected floating-point numbers, got {jnp.result_type(leaf)}")
        if concrete(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(f"{leaf_name(name, path)}: expected finite numbers, got NaN or infinity")


def _check_number(name: str, value: Any, expected: str, valid: Callable[[float], bool]) -> None:
    if not is_array(value) or jnp.ndim(value) != 0:
        raise ValueError(f"{name}: expected {expected}, got {described(value)}")
    if concrete(value) and not (np.isfinite(float(value)) and valid(float(value))):
        raise ValueError(f"{name}: expected {expected}, got {float(value)!r}")


def _steps(
    states: list[tuple[PyTree, PyTree]], num_steps: int | None, steps: Sequence[int] | None, place: str
) -> list[int]:
    """The numbers of steps after which the states were kept."""
    if steps is not None:
        kept = [int(step) for step in steps]
        if len(kept) != len(states):
            raise ValueError(f"steps: expected one for each of the {len(states)} states, got {len(kept)}")
        if num_steps is not None and kept[-1] != num_steps:
            raise ValueError(f"steps: expected the last to be num_steps = {num_steps}, got {kept[-1]}")
        name = "steps"
    elif num_steps is not None:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1 or num_steps % len(states):
            raise ValueError(
                f"num_steps: expected a multiple of the {len(states)} states, got {num_steps!r}; of segments that "
                "differ in length say the steps"
            )
        kept = [num_steps // len(states) * (index + 1) for index in range(len(states))]
        name = "num_steps"
    else:
        counts = [_counts(state) for _, state in states]
        if not all(counts):
            missing = next(index for index, count in enumerate(counts) if not count)
            raise ValueError(
                f"states[{missing}]: expected an optimizer state with a count, got one without; give steps"
            )
        kept = [max(count) for count in counts]
        name = "states"
    least = 0 if place == "middle" and len(kept) > 1 else 1
    if kept[0] < least or not all(earlier < later for earlier, later in itertools.pairwise(kept)):
        raise ValueError(f"{name}: expected steps that rise from {least} or more, in the order of training, got {kept}")
    return kept


def _counts(state: PyTree) -> list[int]:
    found = optax.tree_utils.tree_get_all_with_path(state, "count")
    return [int(count) for _, count in found if jnp.ndim(count) == 0]


def _rates(learning_rate: Any, num_steps: int) -> np.ndarray:
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(num_steps)), float)
    else:
        rates = np.asarray(learning_rate, float)
    if rates.ndim == 0:
        rates = np.full(num_steps, float(rates))
    if rates.shape != (num_steps,):
        raise ValueError(f"learning_rate: expected a number, a schedule or {num_steps} rates, got shape {rates.shape}")
    if not (np.all(np.isfinite(rates)) and np.all(rates >= 0)):
        raise ValueError("learning_rate: expected finite numbers from 0 on, got others")
    return rates


def _preconditioner(
    meta_params: PyTree, state: PyTree, decay: float | None, eps: float, eps_root: float, name: str
) -> PyTree:
    """√v̂ + eps, of the one `nu` in an optimiser's state that looks like λ."""
    check_meta_params(meta_params)
    structure: Any = jax.tree.structure(meta_params)
    found = [
        (path, value)
        for path, value in optax.tree_utils.tree_get_all_with_path(state, "nu")
        if jax.tree.structure(value) == structure
    ]
    if len(found) != 1:
        kind = "none" if not found else f"{len(found)}"
        raise ValueError(
            f"{name}: expected an optimizer state with second moments, one `nu` like meta_params, as optax.adam's, got "
            f"{kind}; for an optimizer without them say second_moments=False, for others make Checkpoint(…, "
            "preconditioner=…) yourself"
        )
    path, nu = found[0]
    correction = 1.0
    if decay is not None:
        counts = [
            value for place, value in optax.tree_utils.tree_get_all_with_path(state, "count") if place[:-1] == path[:-1]
        ]
        if len(counts) != 1:
            raise ValueError(f"{name}: expected a count beside `nu`, got none; say decay=None for moments without it")
        correction = 1 - decay ** int(counts[0])
        if not correction > 0:
            raise ValueError(f"{name}: expected moments after at least one step, got a count of {int(counts[0])}")
    return jax.tree.map(lambda leaf: jnp.sqrt(jnp.asarray(leaf) / correction + eps_root) + eps, nu)
