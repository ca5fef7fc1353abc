"""A subspace together with what the operator makes of it, from which solves, spectra and dampings are all read.

With an orthonormal basis V and its products W = A V kept side by side, every residual of a solution or of an eigenpair
in the subspace is a combination of real products, whatever the damping: nothing is read off a recurrence. Grown from
residuals the subspace is Krylov's, and the Galerkin solution that of conjugate gradients, or, with several right-hand
sides, of block conjugate gradients (O'Leary, Linear Algebra Appl. 29, 1980).
"""

from __future__ import annotations

import dataclasses
import functools
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
      whitened: its rows.
      damping: what an exploration has chosen, else 0.
      turns: how many there were.
    """

    subspace: Subspace
    coordinates: Float[Array, "k m"]
    residuals: Float[Array, "k n"]
    num_products: Int[Array, ""]
    indefinite: Bool[Array, ""]
    turned: Bool[Array, ""]
    finite: Bool[Array, ""]
    whitener: Float[Array, "m m"]
    whitened: Int[Array, ""]
    damping: Float[Array, ""]
    turns: Int[Array, ""]


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


class Exploration(NamedTuple):
    """Lanczos turns to be taken before a subspace is grown for right-hand sides.

    Attributes:
      rank: their number.
      choose: (RitzValues) -> damping to be added for the solve.
    """

    rank: int
    choose: Callable[[RitzValues], Array]


def empty(operator: Operator, capacity: int) -> Subspace:
    """A subspace without vectors that has room for `capacity`."""
    rows = jnp.zeros((capacity, operator.size), operator.domain.dtype)
    return Subspace(rows, rows, jnp.zeros((capacity, capacity), rows.dtype), jnp.zeros(capacity, bool))


def unshifted(operator: Operator) -> Operator:
    """The operator without its shift."""
    return dataclasses.replace(operator, shift=jnp.zeros_like(operator.shift))


def extend(operator: Operator, subspace: Subspace, at: Int[Array, ""], directions: Float[Array, "p n"]) -> Subspace:
    """Adds directions, made orthonormal, as rows `at`, `at + 1`, …; those that add nothing are left out, at the end."""
    return _insert(operator, subspace, at, *_orthonormal(subspace.basis, directions))


def _insert(operator: Operator, subspace: Subspace, at: Array, rows: Array, kept: Array) -> Subspace:
    products = _select(kept[:, None], unshifted(operator).flat_matvecs(rows), jnp.zeros_like(rows))
    # An unsigned index is not looked at for being negative, which takes lines of a program.
    at = jnp.asarray(at, jnp.uint32)
    basis = jax.lax.dynamic_update_slice_in_dim(subspace.basis, rows, at, 0)
    block = _matmul(basis, products.T)
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
    vectors = _matmul(rotation.T, subspace.basis)
    products = _matmul(rotation.T, subspace.products)
    residuals = jnp.linalg.norm(products - values[:, None] * vectors, axis=1)
    valid = jnp.arange(len(values)) < jnp.sum(subspace.filled)
    return Ritz(jnp.where(valid, values, 0), vectors, jnp.where(valid, residuals, 0), valid)


def ritz_values(subspace: Subspace, shift: Float[Array, ""]) -> RitzValues:
    """Ritz values with their residuals, the shift added."""
    found = ritz(subspace)
    values = jnp.where(found.valid, found.values + shift, jnp.nan)
    return RitzValues(values, jnp.where(found.valid, found.residuals, jnp.nan), found.valid)


def smallest_value(subspace: Subspace) -> Float[Array, ""]:
    """The smallest Ritz value, without shift; infinite where there is none."""
    smallest = _lapack.eigh(_bordered(subspace, 2 * jnp.max(jnp.abs(subspace.gram)) + 1))[0][0]
    return jnp.where(jnp.any(subspace.filled), smallest, jnp.inf)


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
    known: Subspace | None = None,
    exploration: Exploration | None = None,
) -> Growth:
    """Grows a subspace until every right-hand side has a solution of relative residual `tol` in it.

    Each turn adds the `block_size` directions that carry most of the residuals that are still too large; the first one
    the `guesses` at solutions, where there are any, no more than a block. It ends early where there is room for no more
    than `capacity` new vectors, where no residual adds a direction, and where the projected operator is not positive
    definite; unless `absolute`, which solves with |A| + shift, or `turn`, which does so from there on.

    A subspace that is `known` is grown from. An `exploration`, for one right-hand side, comes first: as many turns of
    Lanczos' method, after which the damping is chosen. All are turns of one loop, which holds the product once.
    """
    scale = jnp.linalg.norm(rhs, axis=1)
    weight = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    block = min(block_size, len(rhs))
    explored = 0 if exploration is None else exploration.rank
    before = explored if known is None else len(known.basis)
    # The last block may need more rows than it has room for to be tried.
    rows = before + capacity + block
    fresh = guesses is None and before == 0
    # A block of one row is whitened without a loop, where no rows wait for it.
    alone = block == 1 and before == 0
    start = start_of(operator) if explored else rhs[0]

    def directions(growth: Growth) -> Array:
        wanted = growth.residuals * jnp.where(sizes(growth) > tol, weight, 0)[:, None]
        if block < len(rhs):
            _, mixing = _lapack.eigh(_matmul(wanted, wanted.T))
            wanted = _matmul(mixing[:, -block:].T, wanted)
        if precondition is not None:
            wanted = jax.vmap(precondition)(wanted)
        if guesses is not None:
            padded = jnp.zeros_like(wanted).at[: len(guesses)].set(guesses)
            wanted = _select(growth.turns == 0, padded, wanted)
        return wanted

    def extended_by(growth: Growth, wanted: Array) -> Subspace:
        at = growth.num_products
        if exploration is None:
            return extend(operator, growth.subspace, at, wanted)
        exploring = growth.turns < explored
        direction = _select(exploring, _krylov(growth.subspace, start, growth.turns), wanted[0])
        rows, kept = _continued(growth.subspace.basis, direction, _spare(start, growth.turns), exploring)
        return _insert(operator, growth.subspace, at, rows, kept)

    def chosen(growth: Growth, extended: Subspace) -> Array:
        if exploration is None:
            return growth.damping
        first = Subspace(*(field[:explored] for field in extended))._replace(gram=extended.gram[:explored, :explored])
        return jax.lax.cond(
            growth.turns == explored - 1,
            lambda: exploration.choose(ritz_values(first, operator.shift)).astype(operator.shift.dtype),
            lambda: growth.damping,
        )

    def step(carry: tuple[Growth, Array]) -> tuple[Growth, Array]:
        growth, _ = carry
        wanted = directions(growth)
        extended = extended_by(growth, wanted)
        damping = chosen(growth, extended)
        shift = operator.shift + damping
        count = jnp.sum(extended.filled, dtype=jnp.int32)
        whitener, whitened, turned = growth.whitener, growth.whitened, growth.turned
        if absolute:
            coordinates, residuals, stuck = galerkin(extended, rhs, shift, True)
        else:
            whitened = count if exploration is None else jnp.where(growth.turns < explored, 0, count)
            if alone:
                whitener, stuck = _whiten(extended, shift, growth.num_products, (whitener, jnp.bool_(False)))
            else:
                whitener, stuck = jax.lax.fori_loop(
                    growth.whitened,
                    whitened,
                    functools.partial(_whiten, extended, shift),
                    (whitener, jnp.bool_(False)),
                )
            coordinates, residuals = _whitened_solution(whitener, extended, rhs, shift)
        if turn and not absolute:
            turned = turned | stuck
            coordinates, residuals, stuck = jax.lax.cond(
                turned,
                lambda: galerkin(extended, rhs, shift, True),
                lambda: (coordinates, residuals, stuck),
            )
        finite = growth.finite & jnp.all(jnp.isfinite(wanted)) & jnp.all(jnp.isfinite(extended.gram))
        more = count > growth.num_products
        if not fresh:
            # What is known or guessed may hold the solution, and give nothing to grow by.
            more = more | (growth.turns <= explored)
        grown = Growth(
            extended,
            _select(stuck, growth.coordinates, coordinates),
            _select(stuck, growth.residuals, residuals),
            count,
            stuck,
            turned,
            finite,
            whitener,
            whitened,
            damping,
            growth.turns + 1,
        )
        return grown, more

    def sizes(growth: Growth) -> Array:
        return jnp.linalg.norm(growth.residuals, axis=1) * weight

    def running(carry: tuple[Growth, Array]) -> Array:
        growth, more = carry
        size = sizes(growth)
        unsolved = jnp.any(size > tol) & jnp.all(jnp.isfinite(size))
        going = unsolved & (growth.num_products < before + capacity) & more & ~growth.indefinite
        if explored:
            going = going | (growth.turns < explored)
        return going & growth.finite

    nothing = empty(operator, rows) if known is None else _with_room(known, rows)
    no, yes, zero = jnp.bool_(False), jnp.bool_(True), jnp.int32(0)
    growth = Growth(
        nothing,
        jnp.zeros((len(rhs), rows), rhs.dtype),
        rhs,
        zero if known is None else jnp.sum(known.filled, dtype=jnp.int32),
        no,
        jnp.bool_(absolute),
        yes,
        jnp.zeros((rows, rows), rhs.dtype),
        zero,
        jnp.zeros_like(operator.shift),
        zero,
    )
    return jax.lax.while_loop(running, step, (growth, yes))[0]


def _with_room(known: Subspace, rows: int) -> Subspace:
    """The same subspace with room for `rows` rows."""

    def padded(field: Array, like: tuple[int, ...]) -> Array:
        return jax.lax.dynamic_update_slice(jnp.zeros(like, field.dtype), field, (0,) * field.ndim)

    size = known.basis.shape[1]
    return Subspace(
        padded(known.basis, (rows, size)),
        padded(known.products, (rows, size)),
        padded(known.gram, (rows, rows)),
        padded(known.filled, (rows,)),
    )


def start_of(operator: Operator) -> Float[Array, " n"]:
    """The random vector that an exploration starts from."""
    # `jax.random.split(jax.random.key(0))[0]`, since to split a key takes as many lines as many a solver.
    key = jax.random.wrap_key_data(jnp.asarray([1797259609, 2579123966], jnp.uint32), impl="threefry2x32")
    return jax.random.normal(key, (operator.size,), operator.domain.dtype)


def explore(operator: Operator, rank: int) -> tuple[Subspace, RitzValues]:
    """The Krylov subspace of a random vector, and what it tells of the spectrum; `rank` products."""
    found = lanczos(operator, min(rank, operator.size), start_of(operator))
    return found, ritz_values(found, operator.shift)


def lanczos(operator: Operator, rank: int, start: Float[Array, " n"]) -> Subspace:
    """The Krylov subspace of a random start vector, by Lanczos' method with full reorthogonalisation.

    Where it closes early, it goes on from another vector, the start with its entries moved on, so that eigenvalues of
    any multiplicity are met and no ghost or spurious value takes a row. `rank` products.
    """

    def step(turn: Array, subspace: Subspace) -> Subspace:
        turn = jnp.asarray(turn, jnp.int32)
        direction, spare = _krylov(subspace, start, turn), _spare(start, turn)
        return _insert(operator, subspace, turn, *_continued(subspace.basis, direction, spare, jnp.bool_(True)))

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rank), step, empty(operator, rank))


def _krylov(subspace: Subspace, start: Array, turn: Array) -> Array:
    """The direction of a turn of Lanczos' method: the last product."""
    last = jax.lax.dynamic_index_in_dim(subspace.products, jnp.asarray(turn, jnp.uint32) - 1, 0, keepdims=False)
    return _select(turn == 0, start, last)


def _spare(start: Array, turn: Array) -> Array:
    twice = jnp.concatenate([start, start])
    return jax.lax.dynamic_slice_in_dim(twice, jnp.asarray(turn, jnp.uint32), len(start))


def _continued(basis: Array, direction: Array, spare: Array, allowed: Array) -> tuple[Array, Array]:
    """A row by a direction, or, where that adds nothing and it is allowed, by the spare one; and if there is one."""
    rows, kept = _orthogonal(basis, jnp.stack([direction, spare]))
    other = allowed & ~kept[0]
    return _select(other, rows[1:], rows[:1]), _select(other, kept[1:], kept[:1])


def _whiten(subspace: Subspace, shift: Array, index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds a row to the whitener, and tells whether the projected operator is not positive definite.

    Matrix products only: a factorisation by LAPACK in every step would have its threads wait for XLA's.
    """
    whitener, indefinite = carry
    # Rows and entries by products with the unit vector: to index takes more lines.
    here = jnp.arange(len(whitener), dtype=jnp.int32) == jnp.asarray(index, jnp.int32)
    unit = here.astype(whitener.dtype)
    column = _matmul(unit, subspace.gram) + shift * unit
    inside = _matmul(whitener, column)
    diagonal = jnp.sum(column * unit)
    square = diagonal - jnp.sum(inside**2)
    positive = square > 10 * float(jnp.finfo(column.dtype).eps) * jnp.abs(diagonal)
    new = (unit - _matmul(inside, whitener)) / jnp.sqrt(_select(positive, square, jnp.ones_like(square)))
    filled = jnp.any(here & subspace.filled)
    whitener = _select((here & filled & positive)[:, None], new[None], whitener)
    return whitener, indefinite | (filled & ~positive)


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


def _select(condition: Array, value: Array, other: Array) -> Array:
    """`jnp.where`, which lowers to a function of its own for each shape."""
    if condition.ndim:
        condition = jnp.broadcast_to(condition, other.shape)
    return jax.lax.select(condition, jnp.broadcast_to(value, other.shape), other)


def _bordered(subspace: Subspace, value: Array | float) -> Array:
    """The projected operator, with `value` on the diagonal where no row is filled."""
    border = jnp.eye(len(subspace.gram), dtype=bool) & ~subspace.filled[None]
    return _select(border, jnp.asarray(value, subspace.gram.dtype), subspace.gram)


def _orthonormal(basis: Array, directions: Array) -> tuple[Array, Array]:
    """Directions made orthonormal to the basis and to each other, and which rows hold one: the first ones.

    Two rounds of projection and of SVQB (Stathopoulos and Wu, SIAM J. Sci. Comput. 23, 2002).
    """
    if len(directions) == 1:
        return _orthogonal(basis, directions)
    noise = _noise(directions)
    rows, _ = _normalized(directions, 0)
    for _ in range(2):
        rows, _ = _projected(basis, rows, noise)
        values, mixing = _lapack.eigh(_matmul(rows, rows.T))
        values, mixing = values[::-1], mixing[:, ::-1]
        # A Gram matrix knows directions down to the root of its rounding.
        kept = values > noise
        rows = _matmul(mixing.T, rows) * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, values, 1)), 0)[:, None]
    return _projected(basis, rows, 0.0)[0], kept


def _orthogonal(basis: Array, directions: Array) -> tuple[Array, Array]:
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
    return _normalized(rows - _matmul(_matmul(rows, basis.T), basis), least)


def _normalized(rows: Array, least: Array | float) -> tuple[Array, Array]:
    """Rows of norm 1, or 0 where the norm is not above `least` or not finite, and which ones these are not."""
    size = jnp.linalg.norm(rows, axis=1)
    kept = (size > least) & jnp.isfinite(size)
    unit = rows / _select(kept, size, jnp.ones_like(size))[:, None]
    return _select(kept[:, None], unit, jnp.zeros_like(rows)), kept
