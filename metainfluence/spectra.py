"""The spectrum of an operator: Ritz values with their residuals, and a density of eigenvalues."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from metainfluence import krylov, subspace
from metainfluence._checks import check_positive
from metainfluence.operators import Operator

__all__ = ["Spectrum", "of_operator"]


class Spectrum(NamedTuple):
    """Eigenvalues as a Krylov subspace sees them, damping not included.

    Attributes:
      values: Ritz values θ, ascending, `[rank]`.
      residuals: ‖H y − θ y‖ for the unit Ritz vector y, `[rank]`, computed from products, not from a recurrence. An
        eigenvalue lies within that distance of θ.
      valid: `[rank]`, False after the last Ritz value, where the operator has fewer dimensions than `rank`.
      nodes: Ritz values of each random probe, `[num_probes, rank]`.
      weights: the nodes' weights in their probe, `[num_probes, rank]`; 0 where not valid.
    """

    values: Float[Array, " rank"]
    residuals: Float[Array, " rank"]
    valid: Bool[Array, " rank"]
    nodes: Float[Array, "num_probes rank"]
    weights: Float[Array, "num_probes rank"]

    @property
    def smallest(self) -> Float[Array, ""]:
        """The smallest Ritz value; the smallest eigenvalue is not above it."""
        return self.values[0]

    @property
    def largest(self) -> Float[Array, ""]:
        """The largest Ritz value; the largest eigenvalue is not below it."""
        return jnp.max(jnp.where(self.valid, self.values, -jnp.inf))

    def density(self, points: Float[Array, " k"], width: Any) -> Float[Array, " k"]:
        """Density of eigenvalues at some points, smoothed by a Gaussian of the given width; it integrates to 1.

        Raises:
          ValueError: no probes were asked for, or `width` is not positive.
        """
        check_positive("width", width)
        if self.nodes.shape[0] == 0:
            raise ValueError("num_probes: expected at least 1 for a density, got a spectrum without probes")
        distance = (points[:, None, None] - self.nodes[None]) / width
        bumps = jnp.exp(-0.5 * distance**2) / (width * jnp.sqrt(2 * jnp.pi))
        return jnp.mean(jnp.sum(bumps * self.weights[None], axis=2), axis=1)


def of_operator(operator: Operator, *, rank: int = 50, num_probes: int = 0, seed: int = 0) -> Spectrum:
    """The spectrum of any operator, its shift included.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> operator = mi.operators.from_matvec(lambda v: jnp.asarray([4.0, 1.0, 2.0]) * v, jnp.zeros(3))
      >>> jax.jit(mi.spectra.of_operator)(operator).values.round(3).tolist()
      [1.0, 2.0, 4.0]
    """
    check_positive("rank", rank, integer=True)
    if isinstance(num_probes, bool) or not isinstance(num_probes, int) or num_probes < 0:
        raise ValueError(f"num_probes: expected a non-negative integer, got {num_probes!r}")
    size, dtype = min(rank, operator.size), operator.domain.dtype
    first, *keys = jax.random.split(jax.random.key(seed), 2 + num_probes)
    start = jax.random.normal(first, (operator.size,), dtype)
    found = subspace.ritz(krylov.lanczos(operator, size, start))

    def probe(key: Array) -> tuple[Array, Array]:
        direction = jax.random.rademacher(key, (operator.size,), dtype) / jnp.sqrt(jnp.asarray(operator.size, dtype))
        ritz = subspace.ritz(krylov.lanczos(operator, size, direction))
        return ritz.values + operator.shift, jnp.where(ritz.valid, jnp.vecdot(ritz.vectors, direction[None]) ** 2, 0)

    nodes, weights = jnp.zeros((0, size), dtype), jnp.zeros((0, size), dtype)
    if num_probes:
        nodes, weights = jax.lax.map(probe, jnp.stack(keys[1:]))
    values = jnp.where(found.valid, found.values + operator.shift, jnp.nan)
    return Spectrum(values, jnp.where(found.valid, found.residuals, jnp.nan), found.valid, nodes, weights)
