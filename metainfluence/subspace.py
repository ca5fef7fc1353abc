"""A subspace together with its products with the operator, from which solves, spectra and dampings are all read.

With an orthonormal basis V and its products W = A V kept side by side, every residual of a solution or of an eigenpair
in the subspace is a combination of real products, whatever the damping: nothing is read off a recurrence. Grown from
residuals, the subspace is a Krylov space, and the Galerkin solution is that of conjugate gradients, or, with several
right-hand sides, of block conjugate gradients (O'Leary, Linear Algebra Appl. 29, 1980).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from metainfluence import _lapack
from metainfluence.operators import Domain, Operator

_PRECISION = jax.lax.Precision.HIGHEST


class Subspace(NamedTuple):
    """Orthonormal vectors and their products with the operator, without its shift; rows not filled are 0.

    Attributes:
      basis: V, `[m, n]`.
      products: A V, `[m, n]`.
      gram: V A Vᵀ, `[m, m]`.
      filled: `[m]`.
    """

    basis: Float[Array, "m n"]
    products: Float[Array, "m n"]
    gram: Float[Array, "m m"]
    filled: Bool[Array, " m"]


class Ritz(NamedTuple):
    """Ritz pairs of the operator without its shift, ascending, those of rows not filled last.

    Attributes:
      values: θ, `[m]`.
      vectors: y, `[m, n]`, of norm 1.
      residuals: ‖A y − θ y‖, `[m]`: an eigenvalue lies within that distance of θ.
      valid: `[m]`.
    """

    values: Float[Array, " m"]
    vectors: Float[Array, "m n"]
    residuals: Float[Array, " m"]
    valid: Bool[Array, " m"]


class RitzValues(NamedTuple):
    """Eigenvalues as a subspace sees them, the operator's shift included.

    Attributes:
      values: Ritz values θ, ascending, `[m]`; NaN where not valid.
      residuals: ‖A y − θ y‖ for the unit Ritz vector y, `[m]`.
      valid: `[m]`.
    """

    values: Float[Array, " m"]
    residuals: Float[Array, " m"]
    valid: Bool[Array, " m"]

    @property
    def smallest(self) -> Float[Array, ""]:
        """The smallest Ritz value; the smallest eigenvalue is not above it."""
        return self.values[0]

    @property
    def largest(self) -> Float[Array, ""]:
        """The largest Ritz value; the largest eigenvalue is not below it."""
        return jnp.max(jnp.where(self.valid, self.values, -jnp.inf))


def empty(operator: Operator, capacity: int) -> Subspace:
    """A subspace without vectors that has room for `capacity`."""
    rows = jnp.zeros((capacity, operator.size), operator.domain.dtype)
    return Subspace(rows, rows, jnp.zeros((capacity, capacity), rows.dtype), jnp.zeros(capacity, bool))


def unshifted(operator: Operator) -> Operator:
    """The operator without its shift."""
    return dataclasses.replace(operator, shift=jnp.zeros_like(operator.shift))


def extend(operator: Operator, subspace: Subspace, at: Int[Array, ""], directions: Float[Array, "p n"]) -> Subspace:
    """Adds directions, made orthonormal, as rows `at`, `at + 1`, …; those that add nothing are left out, at the end."""
    return insert(operator, subspace, at, *_orthonormal(subspace.basis, directions))


def insert(operator: Operator, subspace: Subspace, at: Array, rows: Array, kept: Array) -> Subspace:
    """Adds orthonormal rows as rows `at`, `at + 1`, …; those that are kept get their products."""
    products = select(kept[:, None], unshifted(operator).flat_matvecs(rows), jnp.zeros_like(rows))
    # An unsigned index is not checked for being negative, which takes lines of program.
    at = jnp.asarray(at, jnp.uint32)
    basis = jax.lax.dynamic_update_slice_in_dim(subspace.basis, rows, at, 0)
    block = matmul(basis, products.T)
    gram = jax.lax.dynamic_update_slice_in_dim(subspace.gram, block, at, 1)
    gram = jax.lax.dynamic_update_slice_in_dim(gram, block.T, at, 0)
    if len(rows) > 1:
        own = jax.lax.dynamic_slice_in_dim(block, at, len(rows), 0)
        gram = jax.lax.dynamic_update_slice(gram, 0.5 * (own + own.T), (at, at))
    return Subspace(
        basis,
        jax.lax.dynamic_update_slice_in_dim(subspace.products, products, at, 0),
        gram,
        jax.lax.dynamic_update_slice_in_dim(subspace.filled, kept, at, 0),
    )


def ritz(subspace: Subspace) -> Ritz:
    """Ritz pairs with their residuals."""
    values, rotation = _lapack.eigh(_bordered(subspace, 2 * jnp.max(jnp.abs(subspace.gram)) + 1))
    vectors = matmul(rotation.T, subspace.basis)
    products = matmul(rotation.T, subspace.products)
    residuals = jnp.linalg.norm(products - values[:, None] * vectors, axis=1)
    valid = jnp.arange(len(values)) < jnp.sum(subspace.filled)
    return Ritz(jnp.where(valid, values, 0), vectors, jnp.where(valid, residuals, 0), valid)


def ritz_values(subspace: Subspace, shift: Float[Array, ""]) -> RitzValues:
    """Ritz values with their residuals, the shift added."""
    found = ritz(subspace)
    values = jnp.where(found.valid, found.values + shift, jnp.nan)
    return RitzValues(values, jnp.where(found.valid, found.residuals, jnp.nan), found.valid)


def smallest_value(subspace: Subspace, shift: Float[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The smallest Ritz value, shift included, that is not zero to rounding, infinite if none; and how many zeros."""
    bordered = _bordered(subspace, 2 * jnp.max(jnp.abs(subspace.gram)) + 1)
    values = _lapack.eigh(bordered)[0] + shift
    valid = jnp.arange(len(values)) < jnp.sum(subspace.filled)
    zero = flat(jnp.where(valid, values, 0), valid)
    least = jnp.min(jnp.where(valid & ~zero, values, jnp.inf))
    return select(jnp.isinf(least) & jnp.any(zero), jnp.zeros_like(least), least), jnp.sum(zero, dtype=jnp.int32)


def flat(values: Float[Array, " m"], valid: Bool[Array, " m"] | None = None, dtype: Any = None) -> Bool[Array, " m"]:
    """Which eigenvalues rounding, in a dtype or in their own, cannot tell from zero, among those that are valid."""
    size = jnp.abs(values)
    zero = size <= rounding(len(values), values.dtype if dtype is None else dtype) * jnp.max(size)
    return zero if valid is None else zero & valid


def rounding(size: int, dtype: Any) -> float:
    """The share of the largest eigenvalue up to which another may be rounding, for a matrix of that size."""
    return max(size, 10 * size**0.5) * float(jnp.finfo(dtype).eps)


def low_rank_inverse(
    ritz: Ritz, vector: Float[Array, " n"], shift: Array, absolute: bool, complement: float = 1.0
) -> Float[Array, " n"]:
    """The product with Σ_i y_i y_iᵀ / (θ_i + shift) + (I − Σ_i y_i y_iᵀ) / (complement · shift), |θ_i| if `absolute`.

    Without a shift the smallest |θ_i| takes its place.
    """
    size = jnp.abs(ritz.values)
    values = jnp.where(ritz.valid, (size if absolute else ritz.values) + shift, 1)
    zero = jnp.abs(values) <= jnp.finfo(values.dtype).eps * jnp.max(size)
    smallest = jnp.min(jnp.where(ritz.valid & ~zero, size, jnp.inf))
    rest = complement * jnp.where(shift > 0, shift, smallest)
    inside = matmul(ritz.vectors, vector)
    outside = vector - matmul(inside, ritz.vectors)
    return matmul(jnp.where(zero, 0, inside / jnp.where(zero, 1, values)), ritz.vectors) + outside / rest


def turned(operator: Operator, ritz: Ritz) -> Operator:
    """The operator with the signs of the given negative Ritz values flipped: A + 2 Σ_{θ<0} |θ| y yᵀ."""
    extra = jnp.where(ritz.valid, jnp.maximum(-2 * ritz.values, 0), 0)
    product = jax.tree_util.Partial(_turned_product, operator.product, extra, ritz.vectors)
    return dataclasses.replace(operator, product=product, losses=None, sample=None)


def _turned_product(
    product: Callable[[PyTree], PyTree], extra: Float[Array, " m"], vectors: Float[Array, "m n"], vector: PyTree
) -> PyTree:
    domain = Domain.of(vector)
    added = matmul(extra * matmul(vectors, domain.ravel(vector)), vectors)
    return jax.tree.map(jnp.add, product(vector), domain.unravel(added))


def nystrom(operator: Operator, rank: int, key: Array) -> Ritz:
    """Eigenpairs of the randomised Nyström approximation (A Ω)(Ωᵀ A Ω)⁺(A Ω)ᵀ; `rank` products, all in one batch.

    Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023, Algorithm 2.1. Directions along which A is not
    positive are left out; `residuals` are unknown here, and infinite.
    """
    directions = jax.random.normal(key, (rank, operator.size), operator.domain.dtype)
    sketch = extend(operator, empty(operator, rank), jnp.int32(0), directions)
    noise = operator.size**0.5 * jnp.finfo(directions.dtype).eps * jnp.linalg.norm(sketch.products)
    values, rotation = _lapack.eigh(_bordered(sketch, 0) + noise * jnp.eye(rank, dtype=directions.dtype))
    positive = values > noise
    rows = matmul(rotation.T, sketch.products + noise * sketch.basis)
    rows = rows * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, values, 1)), 0)[:, None]
    squares, rotation = _lapack.eigh(matmul(rows, rows.T))
    valid = squares > jnp.finfo(squares.dtype).eps * jnp.max(squares)
    vectors = matmul(rotation.T, rows) * jnp.where(valid, jax.lax.rsqrt(jnp.where(valid, squares, 1)), 0)[:, None]
    found = jnp.where(valid, jnp.maximum(squares - noise, 0), 0)
    return Ritz(found, vectors, jnp.full_like(squares, jnp.inf), valid)


def galerkin(
    subspace: Subspace,
    rhs: Float[Array, "k n"],
    shift: Float[Array, ""],
    absolute: bool,
    others: Float[Array, "k m"] | None = None,
) -> tuple[Float[Array, "k m"], Float[Array, "k n"], Bool[Array, ""]]:
    """Solves (A + shift) x = b, or (|A| + shift) x = b, in the subspace.

    |A| is A with the signs of the subspace's negative Ritz values flipped, so that its residual is also a combination
    of products.

    Along Ritz values that are zero to rounding the solution with |A| is 0.

    Returns:
      Coordinates of x; residuals b − A x, followed by those of `others` where these are given; and whether the
      projected operator was not positive definite or, with |A|, not finite (the coordinates are then 0).
    """
    inside = matmul(rhs, subspace.basis.T)
    if absolute:
        values, rotation = _lapack.eigh(_bordered(subspace, jnp.max(jnp.abs(subspace.gram))))
        turned = jnp.abs(values) + shift
        components = matmul(inside, rotation)
        zero = flat(turned)
        solved = jnp.where(zero[None], 0, components / jnp.where(zero, 1, turned)[None])
        coordinates = jnp.where(subspace.filled[None], matmul(solved, rotation.T), 0)
        singular = ~jnp.all(jnp.isfinite(turned))
        coordinates = jnp.where(singular, 0, coordinates)
        judged = coordinates if others is None else jnp.concatenate([coordinates, others])
        # (|A| − A) x = 2 Σ_{θ<0} |θ| y yᵀ x, in coordinates.
        extra = matmul(matmul(judged, rotation) * (jnp.abs(values) - values)[None], rotation.T)
    else:
        matrix = _bordered(subspace, 1) + shift * jnp.diag(subspace.filled.astype(rhs.dtype))
        factor = _lapack.cholesky(matrix)
        singular = ~jnp.all(jnp.isfinite(factor))
        coordinates = _lapack.cho_solve(jnp.where(singular, jnp.eye(len(matrix), dtype=rhs.dtype), factor), inside.T).T
        coordinates = jnp.where(singular, 0, coordinates)
        judged = coordinates if others is None else jnp.concatenate([coordinates, others])
        extra = jnp.zeros_like(judged)
    product = matmul(judged, subspace.products) + matmul(shift * judged + extra, subspace.basis)
    asked = rhs if others is None else jnp.concatenate([rhs, rhs])
    return coordinates, asked - product, singular


def asymmetry(
    subspace: Subspace, coordinates: Float[Array, "k m"], solutions: Float[Array, "k n"], shift: Float[Array, ""]
) -> Float[Array, " k"]:
    """‖V (Ax − Aᵀx)‖ / ‖(A + shift) x‖ for solutions x in the subspace, 0 for x = 0."""
    products = matmul(coordinates, subspace.products)
    # The basis's products give the projection of Aᵀx, too.
    difference = jnp.linalg.norm(matmul(products, subspace.basis.T) - matmul(solutions, subspace.products.T), axis=1)
    size = jnp.linalg.norm(products + shift * solutions, axis=1)
    # For an x that has run off along a flat direction, Ax and Aᵀx hold nothing but rounding.
    noise = 10 * float(jnp.finfo(size.dtype).eps) * jnp.linalg.norm(subspace.products)
    rounded = difference <= noise * jnp.linalg.norm(solutions, axis=1)
    return select(rounded, 0, difference / select(size > 0, size, 1))


def asymmetry_between(
    left: Float[Array, " n"], product: Float[Array, " n"], right: Float[Array, " n"], other: Float[Array, " n"]
) -> Float[Array, ""]:
    """By how much ⟨left, H right⟩ and ⟨H left, right⟩ differ, over ‖left‖ ‖H right‖; 0 for zero vectors."""

    def dot(one: Array, two: Array) -> Array:
        return jnp.vdot(one, two, precision=_PRECISION)

    size = jnp.sqrt(dot(left, left)) * jnp.sqrt(dot(other, other))
    return jnp.abs(dot(left, other) - dot(product, right)) / select(size > 0, size, 1)


def combine(subspace: Subspace, coordinates: Float[Array, "k m"]) -> Float[Array, "k n"]:
    """The vectors of the given coordinates."""
    return matmul(coordinates, subspace.basis)


def matmul(left: Array, right: Array) -> Array:
    """A product at full precision."""
    return jnp.matmul(left, right, precision=_PRECISION)


def select(condition: Array, value: Any, other: Any) -> Array:
    """`jnp.where` without its separate function for each shape; a condition with axes has the result's axes."""
    dtype = jnp.result_type(value, other)
    shape = jnp.broadcast_shapes(jnp.shape(value), jnp.shape(other))
    if condition.ndim:
        condition = jnp.broadcast_to(condition, shape)
    value, other = (jnp.broadcast_to(jnp.asarray(each, dtype), shape) for each in (value, other))
    return jax.lax.select(condition, value, other)


def _bordered(subspace: Subspace, value: Array | float) -> Array:
    """The projected operator, with `value` on the diagonal where no row is filled."""
    border = jnp.eye(len(subspace.gram), dtype=bool) & ~subspace.filled[None]
    return select(border, jnp.asarray(value, subspace.gram.dtype), subspace.gram)


def _orthonormal(basis: Array, directions: Array) -> tuple[Array, Array]:
    """Directions made orthonormal to the basis and to each other, and which rows hold one: the first ones.

    Two rounds of projection and of SVQB (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002).
    """
    if len(directions) == 1:
        return orthogonal(basis, directions)
    noise = _noise(directions)
    rows, _ = _normalized(directions, 0)
    for _ in range(2):
        rows, _ = _projected(basis, rows, noise)
        values, mixing = _lapack.eigh(matmul(rows, rows.T))
        values, mixing = values[::-1], mixing[:, ::-1]
        # A Gram matrix resolves directions down to the square root of its rounding.
        kept = values > noise
        rows = matmul(mixing.T, rows) * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)[:, None]
    return _projected(basis, rows, 0.0)[0], kept


def orthogonal(basis: Array, directions: Array) -> tuple[Array, Array]:
    """Directions made orthonormal to the basis, each by itself, and which of them hold more than rounding."""
    noise = _noise(directions)
    rows, _ = _normalized(directions, 0)
    for _ in range(2):
        rows, kept = _projected(basis, rows, noise)
    return _projected(basis, rows, 0.0)[0], kept


def _noise(directions: Array) -> float:
    return 1000 * float(jnp.finfo(directions.dtype).eps)


# Compiled as one, so that a program spells it out once.
@jax.jit
def _projected(basis: Array, rows: Array, least: Array | float) -> tuple[Array, Array]:
    return _normalized(rows - matmul(matmul(rows, basis.T), basis), least)


def _normalized(rows: Array, least: Array | float) -> tuple[Array, Array]:
    """Rows of norm 1, or 0 where the norm is not above `least` or not finite; and which rows are not 0."""
    size = jnp.linalg.norm(rows, axis=1)
    kept = (size > least) & jnp.isfinite(size)
    unit = rows / select(kept, size, jnp.ones_like(size))[:, None]
    return select(kept[:, None], unit, jnp.zeros_like(rows)), kept
