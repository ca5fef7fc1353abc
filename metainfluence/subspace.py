"""A subspace together with what the operator makes of it, from which solves, spectra and dampings are all read.

With an orthonormal basis V and its products W = A V kept side by side, every residual of a solution or of an eigenpair
in the subspace is a combination of real products, whatever the damping: nothing is read off a recurrence. Grown from
residuals the subspace is Krylov's, and the Galerkin solution that of conjugate gradients, or, with several right-hand
sides, of block conjugate gradients (O'Leary, Linear Algebra Appl. 29, 1980).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

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


class Growth(NamedTuple):
    """How far a subspace was grown for right-hand sides.

    Attributes:
      subspace: the subspace.
      coordinates: of the solutions, `[k, m]`.
      residuals: b − A x, `[k, n]`.
      num_products: vectors multiplied.
      indefinite: whether the projected operator was not positive definite.
      turned: whether the solutions are those of |A| + shift.
      finite: whether all directions and products were.
      whitener: U with U (V A Vᵀ + shift) Uᵀ = I, where that is positive definite.
    """

    subspace: Subspace
    coordinates: Float[Array, "k m"]
    residuals: Float[Array, "k n"]
    num_products: Int[Array, ""]
    indefinite: Bool[Array, ""]
    turned: Bool[Array, ""]
    finite: Bool[Array, ""]
    whitener: Float[Array, "m m"]


def empty(operator: Operator, capacity: int) -> Subspace:
    """A subspace without vectors that has room for `capacity`."""
    rows = jnp.zeros((capacity, operator.size), operator.domain.dtype)
    return Subspace(rows, rows, jnp.zeros((capacity, capacity), rows.dtype), jnp.zeros(capacity, bool))


def unshifted(operator: Operator) -> Operator:
    """The operator without its shift."""
    return dataclasses.replace(operator, shift=jnp.zeros_like(operator.shift))


def extend(operator: Operator, subspace: Subspace, at: Int[Array, ""], directions: Float[Array, "p n"]) -> Subspace:
    """Adds directions, made orthonormal, as rows `at`, `at + 1`, …; those that add nothing are left out, at the end."""
    rows, kept = _orthonormal(subspace.basis, directions)
    products = jnp.where(kept[:, None], jax.vmap(unshifted(operator).flat_matvec)(rows), 0)
    zero = jnp.zeros_like(at)
    basis = jax.lax.dynamic_update_slice(subspace.basis, rows, (at, zero))
    block = _matmul(basis, products.T)
    gram = jax.lax.dynamic_update_slice(subspace.gram, block, (zero, at))
    gram = jax.lax.dynamic_update_slice(gram, block.T, (at, zero))
    own = jax.lax.dynamic_slice(block, (at, zero), (len(rows), len(rows)))
    gram = jax.lax.dynamic_update_slice(gram, 0.5 * (own + own.T), (at, at))
    return Subspace(
        basis,
        jax.lax.dynamic_update_slice(subspace.products, products, (at, zero)),
        gram,
        jax.lax.dynamic_update_slice(subspace.filled, kept, (at,)),
    )


def ritz(subspace: Subspace) -> Ritz:
    """Ritz pairs with their residuals."""
    values, rotation = _lapack.eigh(_bordered(subspace, 2 * jnp.max(jnp.abs(subspace.gram)) + 1))
    vectors = _matmul(rotation.T, subspace.basis)
    products = _matmul(rotation.T, subspace.products)
    residuals = jnp.linalg.norm(products - values[:, None] * vectors, axis=1)
    valid = jnp.arange(len(values)) < jnp.sum(subspace.filled)
    return Ritz(jnp.where(valid, values, 0), vectors, jnp.where(valid, residuals, 0), valid)


def low_rank_inverse(
    ritz: Ritz, vector: Float[Array, " n"], shift: Array, absolute: bool, complement: float = 1.0
) -> Float[Array, " n"]:
    """The product with Σ_i y_i y_iᵀ / (θ_i + shift) + (I − Σ_i y_i y_iᵀ) / (complement · shift), |θ_i| if `absolute`.

    Without shift the smallest |θ_i| stands in its place.
    """
    size = jnp.abs(ritz.values)
    values = jnp.where(ritz.valid, (size if absolute else ritz.values) + shift, 1)
    zero = jnp.abs(values) <= jnp.finfo(values.dtype).eps * jnp.max(size)
    smallest = jnp.min(jnp.where(ritz.valid & ~zero, size, jnp.inf))
    rest = complement * jnp.where(shift > 0, shift, smallest)
    inside = _matmul(ritz.vectors, vector)
    outside = vector - _matmul(inside, ritz.vectors)
    return _matmul(jnp.where(zero, 0, inside / jnp.where(zero, 1, values)), ritz.vectors) + outside / rest


def turned(operator: Operator, ritz: Ritz) -> Operator:
    """The operator with the signs of the given negative Ritz values turned round: A + 2 Σ_{θ<0} |θ| y yᵀ."""
    extra = jnp.where(ritz.valid, jnp.maximum(-2 * ritz.values, 0), 0)
    product = jax.tree_util.Partial(_turned_product, operator.product, extra, ritz.vectors)
    return dataclasses.replace(operator, product=product, losses=None, sample=None)


def _turned_product(
    product: Callable[[PyTree], PyTree], extra: Float[Array, " m"], vectors: Float[Array, "m n"], vector: PyTree
) -> PyTree:
    domain = Domain.of(vector)
    added = _matmul(extra * _matmul(vectors, domain.ravel(vector)), vectors)
    return jax.tree.map(jnp.add, product(vector), domain.unravel(added))


def nystrom(operator: Operator, rank: int, key: Array) -> Ritz:
    """Eigenpairs of the randomised Nyström approximation (A Ω)(Ωᵀ A Ω)⁺(A Ω)ᵀ; `rank` products, all in one batch.

    Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023, Algorithm 2.1. Directions along which A is not
    positive are left out; `residuals` are not known here, and infinite.
    """
    directions = jax.random.normal(key, (rank, operator.size), operator.domain.dtype)
    sketch = extend(operator, empty(operator, rank), jnp.int32(0), directions)
    noise = operator.size**0.5 * jnp.finfo(directions.dtype).eps * jnp.linalg.norm(sketch.products)
    values, rotation = _lapack.eigh(_bordered(sketch, 0) + noise * jnp.eye(rank, dtype=directions.dtype))
    positive = values > noise
    rows = _matmul(rotation.T, sketch.products + noise * sketch.basis)
    rows = rows * jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, values, 1)), 0)[:, None]
    squares, rotation = _lapack.eigh(_matmul(rows, rows.T))
    valid = squares > jnp.finfo(squares.dtype).eps * jnp.max(squares)
    vectors = _matmul(rotation.T, rows) * jnp.where(valid, jax.lax.rsqrt(jnp.where(valid, squares, 1)), 0)[:, None]
    found = jnp.where(valid, jnp.maximum(squares - noise, 0), 0)
    return Ritz(found, vectors, jnp.full_like(squares, jnp.inf), valid)


def galerkin(
    subspace: Subspace, rhs: Float[Array, "k n"], shift: Float[Array, ""], absolute: bool
) -> tuple[Float[Array, "k m"], Float[Array, "k n"], Bool[Array, ""]]:
    """Solves (A + shift) x = b, or (|A| + shift) x = b, in the subspace.

    |A| is A with the signs of the subspace's negative Ritz values turned round, so that its residual, too, is a
    combination of products.

    Returns:
      Coordinates of x, residuals b − A x, and whether the projected operator was not positive definite (where it was
      not, the coordinates are 0).
    """
    inside = _matmul(rhs, subspace.basis.T)
    if absolute:
        values, rotation = _lapack.eigh(_bordered(subspace, 1))
        turned = jnp.abs(values) + shift
        components = _matmul(inside, rotation)
        solved = components / jnp.where(turned > 0, turned, 1)[None]
        coordinates = jnp.where(subspace.filled[None], _matmul(solved, rotation.T), 0)
        singular = ~jnp.all((turned > 0) & jnp.isfinite(turned))
        coordinates = jnp.where(singular, 0, coordinates)
        # (|A| − A) x = 2 Σ_{θ<0} |θ| y yᵀ x, in coordinates.
        extra = _matmul(_matmul(coordinates, rotation) * (jnp.abs(values) - values)[None], rotation.T)
    else:
        matrix = _bordered(subspace, 1) + shift * jnp.diag(subspace.filled.astype(rhs.dtype))
        factor = _lapack.cholesky(matrix)
        singular = ~jnp.all(jnp.isfinite(factor))
        coordinates = _lapack.cho_solve(jnp.where(singular, jnp.eye(len(matrix), dtype=rhs.dtype), factor), inside.T).T
        coordinates = jnp.where(singular, 0, coordinates)
        extra = jnp.zeros_like(coordinates)
    product = _matmul(coordinates, subspace.products) + _matmul(shift * coordinates + extra, subspace.basis)
    return coordinates, rhs - product, singular


def combine(subspace: Subspace, coordinates: Float[Array, "k m"]) -> Float[Array, "k n"]:
    """The vectors of the given coordinates."""
    return _matmul(coordinates, subspace.basis)


def grow(
    operator: Operator,
    rhs: Float[Array, "k n"],
    *,
    tol: Float[Array, ""],
    capacity: int,
    block_size: int,
    absolute: bool,
    turn: bool = False,
    guesses: Float[Array, "q n"] | None = None,
    precondition: Callable[[Float[Array, " n"]], Float[Array, " n"]] | None = None,
) -> Growth:
    """Grows a subspace until every right-hand side has a solution of relative residual `tol` in it.

    `guesses` at solutions come first into the subspace. Then each step adds the `block_size` directions that carry most
    of the residuals that are still too large. It ends early where there is no more room, where no residual adds a
    direction, and where the projected operator is not positive definite; unless `absolute`, which solves with |A| +
    shift, or `turn`, which does so from there on.
    """
    scale = jnp.linalg.norm(rhs, axis=1)
    weight = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    block = min(block_size, len(rhs))

    def add(growth: Growth, wanted: Array) -> Growth:
        extended = extend(operator, growth.subspace, growth.num_products, wanted)
        whitener, turned = growth.whitener, growth.turned
        if absolute:
            coordinates, residuals, stuck = galerkin(extended, rhs, operator.shift, True)
        else:
            whitener, stuck = _whiten(whitener, extended, operator.shift, growth.num_products, len(wanted))
            coordinates, residuals = _whitened_solution(whitener, extended, rhs, operator.shift)
        if turn and not absolute:
            turned = turned | stuck
            coordinates, residuals, stuck = jax.lax.cond(
                turned,
                lambda: galerkin(extended, rhs, operator.shift, True),
                lambda: (coordinates, residuals, stuck),
            )
        return Growth(
            extended,
            jnp.where(stuck, growth.coordinates, coordinates),
            jnp.where(stuck, growth.residuals, residuals),
            jnp.sum(extended.filled, dtype=jnp.int32),
            stuck,
            turned,
            growth.finite & jnp.all(jnp.isfinite(wanted)) & jnp.all(jnp.isfinite(extended.gram)),
            whitener,
        )

    def sizes(growth: Growth) -> Array:
        return jnp.linalg.norm(growth.residuals, axis=1) * weight

    def step(carry: tuple[Growth, Array]) -> tuple[Growth, Array]:
        growth, _ = carry
        wanted = growth.residuals * jnp.where(sizes(growth) > tol, weight, 0)[:, None]
        if block < len(rhs):
            _, mixing = _lapack.eigh(_matmul(wanted, wanted.T))
            wanted = _matmul(mixing[:, -block:].T, wanted)
        if precondition is not None:
            wanted = jax.vmap(precondition)(wanted)
        grown = add(growth, wanted)
        return grown, grown.num_products > growth.num_products

    def running(carry: tuple[Growth, Array]) -> Array:
        growth, more = carry
        size = sizes(growth)
        unsolved = jnp.any(size > tol) & jnp.all(jnp.isfinite(size))
        return unsolved & (growth.num_products < capacity) & more & ~growth.indefinite & growth.finite

    # The last block may need more rows than it has room for to be tried.
    rows = capacity + block
    coordinates = jnp.zeros((len(rhs), rows), rhs.dtype)
    nothing = empty(operator, rows)
    no, yes = jnp.bool_(False), jnp.bool_(True)
    whitener = jnp.zeros((rows, rows), rhs.dtype)
    growth = Growth(nothing, coordinates, rhs, jnp.int32(0), no, jnp.bool_(absolute), yes, whitener)
    if guesses is not None:
        growth = add(growth, guesses)
    return jax.lax.while_loop(running, step, (growth, yes))[0]


def lanczos(operator: Operator, rank: int, start: Float[Array, " n"], key: Array) -> Subspace:
    """The Krylov subspace of a start vector, by Lanczos' method with full reorthogonalisation.

    Where it closes early, it goes on from a random vector, so that eigenvalues of any multiplicity are met and no ghost
    or spurious value takes a row. `rank` products.
    """
    noise = jax.random.normal(key, (rank, operator.size), operator.domain.dtype)

    def step(carry: tuple[Subspace, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Subspace, Array], None]:
        subspace, direction = carry
        at, spare = inputs
        closed = ~_orthonormal(subspace.basis, direction[None])[1][0]
        subspace = extend(operator, subspace, at, jnp.where(closed, spare, direction)[None])
        return (subspace, subspace.products[at]), None

    return jax.lax.scan(step, (empty(operator, rank), start), (jnp.arange(rank), noise))[0][0]


def _whiten(whitener: Array, subspace: Subspace, shift: Array, at: Array, count: int) -> tuple[Array, Bool[Array, ""]]:
    """Adds the rows from `at` on to the whitener, and tells whether the projected operator is not positive definite.

    Matrix products only: a factorisation by LAPACK in every step would have its threads wait for XLA's.
    """

    def row(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        whitener, indefinite = carry
        here = at + jnp.asarray(index, at.dtype)
        unit = jnp.arange(len(whitener), dtype=here.dtype) == here
        filled = subspace.filled[here]
        column = jnp.where(unit, subspace.gram[here] + shift, subspace.gram[here])
        inside = _matmul(whitener, column)
        square = column[here] - jnp.sum(inside**2)
        positive = square > 10 * float(jnp.finfo(column.dtype).eps) * jnp.abs(column[here])
        new = (unit.astype(column.dtype) - _matmul(inside, whitener)) / jnp.sqrt(jnp.where(positive, square, 1))
        whitener = whitener.at[here].set(jnp.where(filled & positive, new, 0))
        return whitener, indefinite | (filled & ~positive)

    return jax.lax.fori_loop(0, count, row, (whitener, jnp.bool_(False)))


def _whitened_solution(
    whitener: Array, subspace: Subspace, rhs: Float[Array, "k n"], shift: Array
) -> tuple[Float[Array, "k m"], Float[Array, "k n"]]:
    """Galerkin coordinates and residuals, with one step of iterative refinement."""
    inside = _matmul(rhs, subspace.basis.T)

    def solve(inside: Array) -> Array:
        return _matmul(_matmul(inside, whitener.T), whitener)

    coordinates = solve(inside)
    remainder = inside - _matmul(coordinates, subspace.gram) - shift * coordinates
    coordinates = coordinates + solve(remainder)
    product = _matmul(coordinates, subspace.products) + shift * _matmul(coordinates, subspace.basis)
    return coordinates, rhs - product


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=_PRECISION)


def _bordered(subspace: Subspace, value: Array | float) -> Array:
    """The projected operator, with `value` on the diagonal where no row is filled."""
    return subspace.gram + jnp.diag(jnp.where(subspace.filled, 0, jnp.asarray(value, subspace.gram.dtype)))


def _orthonormal(basis: Array, directions: Array) -> tuple[Array, Array]:
    """Directions made orthonormal to the basis and to each other, and which rows hold one: the first ones.

    Two rounds of projection and of SVQB (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002).
    """
    noise = 1000 * float(jnp.finfo(directions.dtype).eps)
    rows, _ = _normalized(directions, 0)
    for _ in range(2):
        rows, kept = _normalized(rows - _matmul(_matmul(rows, basis.T), basis), noise)
        if len(rows) > 1:
            values, mixing = _lapack.eigh(_matmul(rows, rows.T))
            values, mixing = values[::-1], mixing[:, ::-1]
            # A Gram matrix knows directions down to the root of its rounding.
            kept = values > noise
            rows = _matmul(mixing.T, rows) * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)[:, None]
    rows, _ = _normalized(rows - _matmul(_matmul(rows, basis.T), basis), 0)
    return rows, kept


def _normalized(rows: Array, least: Array | float) -> tuple[Array, Array]:
    """Rows of norm 1, or 0 where the norm is not above `least` or not finite, and which ones these are not."""
    size = jnp.linalg.norm(rows, axis=1)
    kept = (size > least) & jnp.isfinite(size)
    return jnp.where(kept[:, None], rows / jnp.where(kept, size, 1)[:, None], 0), kept
