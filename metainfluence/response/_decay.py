"""exp(−τ A) b and (1 − exp(−τ A)) A⁻¹ b of a symmetric operator, by Lanczos' method."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from metainfluence import _lapack, subspace
from metainfluence.operators import Operator


class Decay(NamedTuple):
    """Both functions of one vector, with negative eigenvalues treated as 0, and what is known about them.

    Attributes:
      decayed: exp(−τ A) b.
      integrated: φ(A) b, with φ(h) = (1 − exp(−τ h)) / h, and τ at 0.
      error: estimate of the error of φ(A) b, and of that of τ exp(−τ A) b, both relative to ‖φ(A) b‖.
      smallest: the smallest Ritz value.
      num_matvecs: products.
    """

    decayed: Float[Array, " n"]
    integrated: Float[Array, " n"]
    error: Float[Array, ""]
    smallest: Float[Array, ""]
    num_matvecs: Int[Array, ""]


class _Krylov(NamedTuple):
    """A Krylov space as it grows, with both functions in its coordinates."""

    subspace: subspace.Subspace
    direction: Float[Array, " n"]
    decayed: Float[Array, " m"]
    integrated: Float[Array, " m"]
    error: Float[Array, ""]
    smallest: Float[Array, ""]
    num_matvecs: Int[Array, ""]


def decay(operator: Operator, start: Float[Array, " n"], time: Float[Array, ""], rank: int, tol: float) -> Decay:
    """Both functions in one Krylov space, which grows to `rank` vectors, or until the error is at most `tol`.

    The error of exp(−t A) b is that of an ODE whose residual is β_m |e_mᵀ exp(−t T) e₁| ‖b‖ (Saad, SIAM J. Numer. Anal.
    29, 1992). For a tridiagonal T the entry keeps its sign, so that its integral is |e_mᵀ φ(T) e₁|. For A ⪰ 0 no error
    grows, which bounds that of exp(−τ A) b by β_m |e_mᵀ φ(T) e₁| ‖b‖, and that of φ(A) b by τ times as much. Below 0,
    where the functions of A have a kink, this is only an estimate; what the last product changed is another, and the
    larger counts.
    """
    rank = min(rank, operator.size)
    dtype = start.dtype
    tiny = float(jnp.finfo(dtype).tiny)

    def step(state: _Krylov) -> _Krylov:
        at = state.num_matvecs
        grown = subspace.extend(operator, state.subspace, at, state.direction[None])
        # Where the space has closed, or is complete, the result is exact.
        closed = ~grown.filled[at]
        whole = at + 1 >= operator.size
        border = 2 * jnp.max(jnp.abs(grown.gram)) + 1
        values, rotation = _lapack.eigh(grown.gram + jnp.diag(jnp.where(grown.filled, 0, border)))
        decayed, integrated = _damp(values, time)
        components = _matmul(rotation.T, _matmul(grown.basis, start))
        components = jnp.stack([decayed * components, integrated * components])
        decayed, integrated = _matmul(components, rotation.T)
        product = grown.products[at]
        beta = jnp.linalg.norm(product - _matmul(_matmul(grown.basis, product), grown.basis))
        error = time * beta * jnp.abs(integrated[at])
        change = jnp.where(values[0] < 0, jnp.linalg.norm(integrated - state.integrated), 0)
        error = jnp.maximum(error, change) / jnp.maximum(jnp.linalg.norm(integrated), tiny)
        return _Krylov(
            grown,
            product,
            decayed,
            integrated,
            jnp.where(closed | whole, 0, error),
            values[0],
            at + jnp.where(closed, 0, 1).astype(at.dtype),
        )

    def running(state: _Krylov) -> Array:
        more = (state.error > tol) | (state.num_matvecs == 0)
        return more & (state.num_matvecs < rank) & (state.error > 0)

    zeros = jnp.zeros(rank, dtype)
    first = _Krylov(
        subspace.empty(operator, rank), start, zeros, zeros, jnp.full((), jnp.inf, dtype), zeros[0], jnp.int32(0)
    )
    last = jax.lax.while_loop(running, step, first)
    integrated, decayed = (_matmul(each, last.subspace.basis) for each in (last.integrated, last.decayed))
    error = jnp.where(jnp.all(jnp.isfinite(integrated) & jnp.isfinite(decayed)), last.error, jnp.nan)
    return Decay(decayed, integrated, error, last.smallest, last.num_matvecs)


def _damp(values: Float[Array, " m"], time: Float[Array, ""]) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    """exp(−τ h) and (1 − exp(−τ h)) / h, with negative h treated as 0."""
    exponents = time * jnp.maximum(values, 0)
    small = exponents < float(jnp.finfo(values.dtype).eps)
    ratio = jnp.where(small, 1, -jnp.expm1(-exponents) / jnp.where(small, 1, exponents))
    return jnp.exp(-exponents), time * ratio


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
