"""The target φ: checked, called and differentiated in one way for all scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from metainfluence._checks import calling, check_function, check_scalar
from metainfluence.data import Weights, name_not_finite


def target_gradient(target: Callable[..., Array], meta_params: PyTree, target_args: tuple[Any, ...]) -> PyTree:
    """∇φ.

    Raises:
      TypeError: `target` does not take meta_params and these arguments.
      ValueError: `target` does not give a scalar, or its gradient is NaN or infinite because of a leaf of held-out
        tasks.
    """
    passed = "(meta_params, *target_args), where the call passes them: scores(meta_params, tasks, *target_args)"
    check_function("target", target, passed, meta_params, *target_args)

    def value(meta_params: PyTree) -> Array:
        with calling("target", "(meta_params, *target_args)"):
            return check_scalar(target(meta_params, *target_args), "target")

    slope = jax.grad(value)(meta_params)
    name_target_not_finite(slope, target_args)
    return slope


def target_gradients(
    target: Callable[..., Array], meta_params: PyTree, target_args: tuple[Any, ...], weights: Weights
) -> tuple[PyTree, Weights]:
    """∂_λφ and ∂_wφ of a target φ(λ, w), which is called with `weights=`.

    Raises:
      TypeError: `target` takes no such keyword.
      ValueError: as `target_gradient`.
    """
    passed = "(meta_params, *target_args, weights=) -> scalar, since total_effect=True passes the training weights on"
    check_function("target", target, passed, meta_params, *target_args, weights=weights)

    def value(meta_params: PyTree, weights: Weights) -> Array:
        with calling("target", "(meta_params, *target_args, weights=weights)"):
            return check_scalar(target(meta_params, *target_args, weights=weights), "target")

    slopes: tuple[PyTree, Weights] = jax.grad(value, argnums=(0, 1))(meta_params, weights)
    name_target_not_finite(slopes, target_args)
    return slopes


def slopes_of(
    target: Callable[..., Array],
    meta_params: PyTree,
    target_args: tuple[Any, ...],
    weights: Weights,
    total_effect: bool,
) -> tuple[PyTree, Weights | None]:
    """∂_λφ, and ∂_wφ where `total_effect` is set."""
    if total_effect:
        return target_gradients(target, meta_params, target_args, weights)
    return target_gradient(target, meta_params, target_args), None


def name_target_not_finite(slope: PyTree, target_args: tuple[Any, ...]) -> None:
    """As `name_not_finite`, for ∇φ and held-out tasks among the target's arguments."""
    for k, data in enumerate(target_args):
        name_not_finite(slope, data, f"target_args[{k}]")


def check_target_slope(slope: PyTree, target_args: tuple[Any, ...]) -> None:
    """Raises ValueError where ∇φ is not finite, naming the held-out tasks where these are at fault."""
    name_target_not_finite(slope, target_args)
    if not all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(slope)):
        raise ValueError(
            "target: expected a finite gradient at meta_params, got NaN or infinity: of a norm, root, log or quotient "
            "at 0, or of a number too large"
        )
