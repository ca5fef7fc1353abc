"""The rule behind `damping="auto"`."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from metainfluence.operators import Operator, flat_norm
from metainfluence.spectra import Spectrum, of_operator
from metainfluence.subspace import RitzValues

RANK = 40
_MARGIN = 2.0
_SHIFT = 0.1


class Damping(NamedTuple):
    """A damping, and what decided it.

    Attributes:
      value: the damping δ, the largest of the three below.
      by_curvature: what negative curvature asks for.
      by_stationarity: what the distance from a stationary point asks for.
      by_precision: what the floating-point format asks for.
      smallest: the smallest Ritz value of H.
      residual: its residual.
      largest: the largest Ritz value.
      outer_gradient_norm: ‖D_λF‖.
    """

    value: Float[Array, ""]
    by_curvature: Float[Array, ""]
    by_stationarity: Float[Array, ""]
    by_precision: Float[Array, ""]
    smallest: Float[Array, ""]
    residual: Float[Array, ""]
    largest: Float[Array, ""]
    outer_gradient_norm: Float[Array, ""]


def rule(operator: Operator, gradient: PyTree, meta_params: PyTree, rank: int = RANK) -> Damping:
    """The rule of `auto` at a point; the caller checks the arguments.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([-0.5, 1.0]) * v, jnp.zeros(2))
      >>> found = jax.jit(mi.damping.rule)(operator, gradient=jnp.zeros(2), meta_params=jnp.ones(2))
      >>> round(float(found.smallest), 3), round(float(found.value), 3)
      (-0.5, 1.0)
    """
    return rule_of(of_operator(operator, rank=rank), gradient, meta_params)


def rule_of(found: RitzValues | Spectrum, gradient: PyTree, meta_params: PyTree) -> Damping:
    """The rule, from what a Krylov subspace has found of the spectrum."""
    gradient_norm, length = flat_norm(gradient), flat_norm(meta_params)
    smallest, residual = found.values[0], found.residuals[0]
    eps = float(jnp.finfo(smallest.dtype).eps)
    needs = (
        _MARGIN * jnp.maximum(residual - smallest, 0),
        (gradient_norm / (_SHIFT * jnp.where(length > 0, length, 1))).astype(smallest.dtype),
        100 * eps * jnp.abs(found.largest),
    )
    value = jnp.maximum(jnp.maximum(needs[0], needs[1]), needs[2])
    return Damping(value, *needs, smallest, residual, found.largest, gradient_norm)
