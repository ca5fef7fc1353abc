"""The target φ: checked, called and differentiated in one way by all that score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from metainfluence._checks import calling, check_function, check_scalar
from metainfluence.data import name_not_finite


def target_gradient(target: Callable[..., Array], meta_params: PyTree, target_args: tuple[Any, ...]) -> PyTree:
    """∇φ.

    Raises:
      TypeError: `target` does not take meta_params and these arguments.
      ValueError: `target` gives no scalar, or NaN and infinity that can be laid to a leaf of held-out tasks.
    """
    passed = "(meta_params, *target_args), where the call passes them: scores(meta_params, tasks, *target_args)"
    check_function("target", target, passed, meta_params, *target_args)

    def value(meta_params: PyTree) -> Array:
        with calling("target", "(meta_params, *target_args)"):
            return check_scalar(target(meta_params, *target_args), "target")

    slope = jax.grad(value)(meta_params)
    name_target_not_finite(slope, target_args)
    return slope


def name_target_not_finite(slope: PyTree, target_args: tuple[Any, ...]) -> None:
    """As `name_not_finite`, for ∇φ and held-out tasks among the target's arguments."""
    for k, data in enumerate(target_args):
        name_not_finite(slope, data, f"target_args[{k}]")
