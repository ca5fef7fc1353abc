"""Krylov subspaces, and how they are grown until they hold the solutions of systems.

Grown from a random vector they show the spectrum (Lanczos' method); grown from residuals they solve (conjugate
gradients). One loop does both, one after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from metainfluence import _lapack
from metainfluence.operators import Operator
from metainfluence.subspace import (
    RitzValues,
    Subspace,
    empty,
    extend,
    galerkin,
    insert,
    matmul,
    orthogonal,
    ritz_values,
    select,
)


class Exploration(NamedTuple):
    """Lanczos turns to be taken before a subspace is grown for right-hand sides.

    Attributes:
      rank: their number.
      choose: (RitzValues) -> damping to be added for the solve.
    """

    rank: int
    choose: Callable[[RitzValues], Array]


class Growth(NamedTuple):
    """How far a subspace was grown for right-hand sides.

    Attributes:
      subspace: the subspace.
      coordinates: coordinates of the solutions with the smallest residuals so far, `[k, m]`.
      sizes: relative residuals of these, `[k]`.
      open: which right-hand sides are not solved yet, `[k]`.
      residuals: b − A x of the solutions in the whole subspace, `[k, n]`.
      num_products: vectors multiplied.
      indefinite: whether the projected operator was not positive definite.
      turned: whether the solutions are those of |A| + shift.
      finite: whether all directions and products were finite.
      whitener: U with U (V A Vᵀ + shift) Uᵀ = I, where that is positive definite.
      whitened: number of the whitener's rows.
      damping: what an exploration has chosen, else 0.
      turns: number of turns so far.
    """

    subspace: Subspace
    coordinates: Float[Array, "k m"]
    sizes: Float[Array, " k"]
    open: Bool[Array, " k"]
    residuals: Float[Array, "k n"]
    num_products: Int[Array, ""]
    indefinite: Bool[Array, ""]
    turned: Bool[Array, ""]
    finite: Bool[Array, ""]
    whitener: Float[Array, "m m"]
    whitened: Int[Array, ""]
    damping: Float[Array, ""]
    turns: Int[Array, ""]


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

    Each turn adds the `block_size` directions that carry most of the residuals that are still too large. The first turn
    adds the `guesses` at solutions instead, where there are any, no more than a block. Growth ends early after
    `capacity` new vectors, where no residual adds a direction, and where the projected operator is not positive
    definite. `absolute` solves with |A| + shift instead, and `turn` does so from there on.

    Growth starts from the subspace `known`, where there is one. An `exploration`, for one right-hand side, comes first:
    `rank` turns of Lanczos' method, after which the damping is chosen. All turns share one loop, which holds the
    product once.
    """
    scale = jnp.linalg.norm(rhs, axis=1)
    weight = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    block = min(block_size, len(rhs))
    explored = 0 if exploration is None else exploration.rank
    before = explored if known is None else len(known.basis)
    # The last block may go beyond `capacity`, and needs rows to be tried.
    rows = before + capacity + block
    fresh = guesses is None and before == 0
    # A block of one row is whitened without a loop, where no earlier rows are left to whiten.
    alone = block == 1 and before == 0
    start = start_of(operator) if explored else rhs[0]

    def directions(growth: Growth) -> Array:
        wanted = growth.residuals * jnp.where(growth.open, weight, 0)[:, None]
        if block < len(rhs):
            _, mixing = _lapack.eigh(matmul(wanted, wanted.T))
            wanted = matmul(mixing[:, -block:].T, wanted)
        if precondition is not None:
            wanted = jax.vmap(precondition)(wanted)
        if guesses is not None:
            padded = jnp.zeros_like(wanted).at[: len(guesses)].set(guesses)
            wanted = select(growth.turns == 0, padded, wanted)
        return wanted

    def extended_by(growth: Growth, wanted: Array) -> Subspace:
        at = growth.num_products
        if exploration is None:
            return extend(operator, growth.subspace, at, wanted)
        exploring = growth.turns < explored
        direction = select(exploring, _krylov(growth.subspace, start, growth.turns), wanted[0])
        rows, kept = _continued(growth.subspace.basis, direction, _spare(start, growth.turns), exploring)
        return insert(operator, growth.subspace, at, rows, kept)

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
        held = growth.sizes

        def with_absolute() -> tuple[Array, Array, Array, Array]:
            coordinates, residuals, singular = galerkin(extended, rhs, shift, True, growth.coordinates)
            return coordinates, residuals[: len(rhs)], singular, relative(residuals[len(rhs) :])

        if absolute:
            coordinates, residuals, stuck, held = with_absolute()
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
            coordinates, residuals, stuck, held = jax.lax.cond(
                turned, with_absolute, lambda: (coordinates, residuals, stuck, held)
            )
        finite = growth.finite & jnp.all(jnp.isfinite(wanted)) & jnp.all(jnp.isfinite(extended.gram))
        size = relative(residuals)
        # Residuals rise and fall once the operator is replaced by |A|.
        better = ~stuck & ~((growth.turns > explored) & (size > held))
        best = select(better, size, held)
        # |A| is known only in the subspace: a solution counts once it is still one after the next direction.
        still = (best > tol) | (turned & (held > tol))
        more = count > growth.num_products
        if not fresh:
            # What is known or guessed may already hold the solution, and then adds no direction.
            more = more | (growth.turns <= explored)
        grown = Growth(
            extended,
            select(better[:, None], coordinates, growth.coordinates),
            best,
            still,
            select(stuck, growth.residuals, residuals),
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

    def relative(residuals: Array) -> Array:
        return jnp.linalg.norm(residuals, axis=1) * weight

    def running(carry: tuple[Growth, Array]) -> Array:
        growth, more = carry
        unsolved = jnp.any(growth.open) & jnp.all(jnp.isfinite(growth.sizes))
        going = unsolved & (growth.num_products < before + capacity) & more & ~growth.indefinite
        if explored:
            going = going | (growth.turns < explored)
        return going & growth.finite

    nothing = empty(operator, rows) if known is None else _with_room(known, rows)
    no, yes, zero = jnp.bool_(False), jnp.bool_(True), jnp.int32(0)
    growth = Growth(
        nothing,
        jnp.zeros((len(rhs), rows), rhs.dtype),
        scale * weight,
        scale * weight > tol,
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


def explore(operator: Operator, rank: int) -> tuple[Subspace, RitzValues]:
    """The Krylov subspace of a random vector, and what it tells of the spectrum; `rank` products."""
    found = lanczos(operator, min(rank, operator.size), start_of(operator))
    return found, ritz_values(found, operator.shift)


def lanczos(operator: Operator, rank: int, start: Float[Array, " n"]) -> Subspace:
    """The Krylov subspace of a random start vector, by Lanczos' method with full reorthogonalisation.

    Where the space closes early, it goes on from another vector, the start with its entries shifted. So eigenvalues of
    any multiplicity are found, and no ghost or spurious value takes a row. `rank` products.
    """

    def step(turn: Array, subspace: Subspace) -> Subspace:
        turn = jnp.asarray(turn, jnp.int32)
        direction, spare = _krylov(subspace, start, turn), _spare(start, turn)
        return insert(operator, subspace, turn, *_continued(subspace.basis, direction, spare, jnp.bool_(True)))

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(rank), step, empty(operator, rank))


def start_of(operator: Operator) -> Float[Array, " n"]:
    """The random vector that an exploration starts from."""
    # This is `jax.random.split(jax.random.key(0))[0]`: splitting a key takes as many lines of program as many a solver.
    key = jax.random.wrap_key_data(jnp.asarray([1797259609, 2579123966], jnp.uint32), impl="threefry2x32")
    return jax.random.normal(key, (operator.size,), operator.domain.dtype)


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


def _krylov(subspace: Subspace, start: Array, turn: Array) -> Array:
    """The direction of a turn of Lanczos' method: the last product."""
    last = jax.lax.dynamic_index_in_dim(subspace.products, jnp.asarray(turn, jnp.uint32) - 1, 0, keepdims=False)
    return select(turn == 0, start, last)


def _spare(start: Array, turn: Array) -> Array:
    twice = jnp.concatenate([start, start])
    return jax.lax.dynamic_slice_in_dim(twice, jnp.asarray(turn, jnp.uint32), len(start))


def _continued(basis: Array, direction: Array, spare: Array, allowed: Array) -> tuple[Array, Array]:
    """A row from a direction, or, if that adds nothing and it is allowed, from the spare one; and whether it exists."""
    rows, kept = orthogonal(basis, jnp.stack([direction, spare]))
    other = allowed & ~kept[0]
    return select(other, rows[1:], rows[:1]), select(other, kept[1:], kept[:1])


def _whiten(subspace: Subspace, shift: Array, index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds a row to the whitener, and tells whether the projected operator is not positive definite.

    Matrix products only: a factorisation by LAPACK in every step would have its threads wait for XLA's.
    """
    whitener, indefinite = carry
    # Rows and entries are read by products with the unit vector: indexing takes more lines of program.
    here = jnp.arange(len(whitener), dtype=jnp.int32) == jnp.asarray(index, jnp.int32)
    unit = here.astype(whitener.dtype)
    column = matmul(unit, subspace.gram) + shift * unit
    inside = matmul(whitener, column)
    diagonal = jnp.sum(column * unit)
    square = diagonal - jnp.sum(inside**2)
    positive = square > 10 * float(jnp.finfo(column.dtype).eps) * jnp.abs(diagonal)
    new = (unit - matmul(inside, whitener)) / jnp.sqrt(select(positive, square, jnp.ones_like(square)))
    filled = jnp.any(here & subspace.filled)
    whitener = select((here & filled & positive)[:, None], new[None], whitener)
    return whitener, indefinite | (filled & ~positive)


def _whitened_solution(
    whitener: Array, subspace: Subspace, rhs: Float[Array, "k n"], shift: Array
) -> tuple[Float[Array, "k m"], Float[Array, "k n"]]:
    """Galerkin coordinates and residuals, with one step of iterative refinement."""
    inside = matmul(rhs, subspace.basis.T)

    def solve(inside: Array) -> Array:
        return matmul(matmul(inside, whitener.T), whitener)

    coordinates = solve(inside)
    remainder = inside - matmul(coordinates, subspace.gram) - shift * coordinates
    coordinates = coordinates + solve(remainder)
    product = matmul(coordinates, subspace.products) + shift * matmul(coordinates, subspace.basis)
    return coordinates, rhs - product
