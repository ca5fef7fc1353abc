"""Kronecker factors of the generalised Gauss–Newton matrix, their eigenbases, and the eigenvalues in these bases.

A layer with inputs a (and 1, if it has a bias) and gradients g of its outputs has per-example gradients Σ_p a_p g_pᵀ,
summed over the positions p at which its weights are used. Its block of the matrix is approximated by a Kronecker
product, and blocks between layers by 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from metainfluence import _lapack
from metainfluence._chunks import reduce_tasks
from metainfluence.ekfac._layers import Layer, size
from metainfluence.ekfac._program import Program, run, trace
from metainfluence.operators import Domain, Losses

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layer's parameters are among the leaves, and the marks of its calls."""

    layer: Layer
    kernel: int
    bias: int | None
    kernel_shape: tuple[int, ...]
    calls: tuple[int, ...]


class Block(NamedTuple):
    """One layer's curvature, Q diag(values) Qᵀ with Q = inputs ⊗ outputs; `in` counts the bias as one more input.

    Attributes:
      inputs: eigenvectors of the second moment of the layer's inputs, in columns.
      outputs: eigenvectors of the second moment of its outputs' gradients, in columns.
      values: eigenvalues in this basis, damping not included.
    """

    inputs: Float[Array, "in in"]
    outputs: Float[Array, "out out"]
    values: Float[Array, "in out"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """A block for every layer; a registered pytree.

    Attributes:
      blocks: the layers' curvatures.
      places: the layers, with their parameters' indices among the leaves of the operator's domain.
    """

    blocks: tuple[Block, ...]
    places: tuple[_Place, ...] = dataclasses.field(metadata={"static": True})

    def scale(self, tree: PyTree, scales: Sequence[Float[Array, "in out"]]) -> PyTree:
        """Multiplies a pytree of the operator's domain by Q diag(scales) Qᵀ, layer by layer."""
        leaves, structure = jax.tree.flatten(tree)
        for place, block, scale in zip(self.places, self.blocks, scales, strict=True):
            components = _product(block.inputs.T, _matrix(place, leaves, scale.dtype), block.outputs)
            matrix = _product(block.inputs, scale * components, block.outputs.T)
            if place.bias is not None:
                leaves[place.bias] = matrix[-1].astype(leaves[place.bias].dtype)
                matrix = matrix[:-1]
            kernel = place.layer.from_matrix(matrix, place.kernel_shape)
            leaves[place.kernel] = kernel.astype(leaves[place.kernel].dtype)
        return jax.tree.unflatten(structure, leaves)


class _Seen(NamedTuple):
    """One group as its layers see it.

    Attributes:
      inputs: for each layer `[n, positions, in]`.
      gradients: for each layer `[n, columns, positions, out]`, the columns of the outputs' Hessian's square root
        propagated back to the layer's outputs.
      coefficients: `[n]`.
    """

    inputs: tuple[Array, ...]
    gradients: tuple[Array, ...]
    coefficients: Array


class _Moments(NamedTuple):
    """Sums for one layer over examples and positions, weighted by the coefficients: of aaᵀ, of ggᵀ and of 1."""

    inputs: Float[Array, "in in"]
    outputs: Float[Array, "out out"]
    weight: Float[Array, ""]


def estimate(losses: Losses, domain: Domain, *, reestimate: bool = True, batch_size: int | None = None) -> Factors:
    """Approximates Σ_g Σ_j c_gj Jᵀ ∂²ℓ_gj J + ∂²r, layer by layer, where J is the Jacobian of the model's outputs.

    With A = Σ c Σ_p a_p a_pᵀ and G = Σ c Σ_p g_p g_pᵀ, a block is A ⊗ G / Σ c P in K-FAC (Martens and Grosse, ICML
    2015; for P positions that share weights, Grosse and Martens, ICML 2016). EK-FAC (George et al., NeurIPS 2018) keeps
    the eigenvectors, and uses as eigenvalues the second moments of the per-example gradients along them,
    Σ c (Q_Aᵀ (Σ_p a_p g_pᵀ) Q_G)²; no other diagonal in this basis is better. The gradients g are not sampled but
    exact: they are the columns of the square root of the losses' Hessian in the outputs (its positive semidefinite
    part), propagated back.

    The regulariser enters by its Hessian's diagonal, z ⊙ ∂²r z with random signs z, of which the diagonal in the basis
    is taken. This is exact for l2 and proximal terms with one weight per layer, and the best diagonal for one weight
    per parameter.

    Examples must not see each other, as they do through batch normalisation, and must lie on the leading axis of the
    layers' inputs and outputs.

    Args:
      losses: the losses whose Hessian the operator represents.
      domain: the operator's domain.
      reestimate: whether the eigenvalues are re-estimated in the basis (EK-FAC); False for K-FAC.
      batch_size: groups per chunk, which bounds the memory at the cost of a second pass; None takes all at once.

    Raises:
      ValueError: a parameter that no layer covers, or anything else in the losses' program that EK-FAC cannot treat.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> layer, params = mi.ekfac.Dense(kernel="w"), {"w": jnp.zeros((2, 1))}
      >>> losses = mi.operators.Losses(
      ...     lambda params, x: 0.5 * layer(params, x)[:, 0] ** 2, params, jnp.asarray([[[2.0, 0.0], [0.0, 1.0]]]),
      ...     coefficients=jnp.asarray([[0.5, 0.5]]), regularizer=None,
      ... )
      >>> (block,) = mi.ekfac.estimate(losses, mi.operators.Domain.of(params)).blocks
      >>> sorted(round(x, 3) for x in block.values.ravel().tolist())  # of (x_1 x_1ᵀ + x_2 x_2ᵀ) / 2
      [0.5, 2.0]
    """
    program, dtype = trace(losses), domain.dtype
    places = _places(program, [leaf.shape for leaf in domain.leaves])
    point = jax.tree.leaves(losses.point)

    def see(group: tuple[PyTree, Array]) -> _Seen:
        data, coefficients = group
        return _see(program, places, [*point, *jax.tree.leaves(data)], coefficients.astype(dtype), dtype)

    groups = (losses.data, losses.coefficients)
    total = _summed(see, groups, batch_size)
    blocks = []
    for moments in total(_moments):
        weight = jnp.where(moments.weight == 0, 1, moments.weight)
        values, inputs = _lapack.eigh(moments.inputs / weight)
        scales, outputs = _lapack.eigh(moments.outputs)
        blocks.append(Block(inputs, outputs, values[:, None] * scales[None, :]))
    if reestimate:
        values = total(functools.partial(_second_moments, tuple(blocks)))
        blocks = [block._replace(values=new) for block, new in zip(blocks, values, strict=True)]
    if losses.regularizer is not None:
        diagonal = _hessian_diagonal(losses.regularizer, losses.point)
        for index, (place, block) in enumerate(zip(places, blocks, strict=True)):
            extra = _product(block.inputs.T**2, _matrix(place, diagonal, dtype), block.outputs**2)
            blocks[index] = block._replace(values=block.values + extra)
    return Factors(tuple(blocks), places)


def _summed(see: Callable[..., _Seen], groups: Any, batch_size: int | None) -> Callable[[Callable[..., Any]], Any]:
    """Makes (fn of what one group's layers see) -> its sum over groups."""
    number = groups[1].shape[0]
    chunked = batch_size is not None and batch_size < number
    seen = None if chunked else jax.vmap(see)(groups)

    if chunked:
        # Groups without weight fill up the last chunk.
        assert batch_size is not None
        rows = np.arange(-(-number // batch_size) * batch_size)
        data, coefficients = jax.tree.map(lambda leaf: jnp.asarray(leaf)[np.minimum(rows, number - 1)], groups)
        groups = (data, jnp.where(rows[:, None] < number, coefficients, 0))

    def add(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), tree)

    def total(fn: Callable[[_Seen], Any]) -> Any:
        if seen is not None:
            return add(jax.vmap(fn)(seen))

        def chunk(part: Any) -> tuple[PyTree, tuple[()]]:
            return add(jax.vmap(lambda group: fn(see(group)))(part)), ()

        return reduce_tasks(chunk, groups, batch_size)[0]

    return total


def _places(program: Program, shapes: Sequence[tuple[int, ...]]) -> tuple[_Place, ...]:
    calls: dict[int, list[int]] = {}
    for position, call in program.calls.items():
        calls.setdefault(call.kernel, []).append(position)
    firsts = {kernel: program.calls[positions[0]] for kernel, positions in calls.items()}
    return tuple(
        _Place(call.layer, kernel, call.bias, tuple(shapes[kernel]), tuple(calls[kernel]))
        for kernel, call in firsts.items()
    )


def _see(program: Program, places: Sequence[_Place], arguments: list[Any], coefficients: Array, dtype: Any) -> _Seen:
    examples, columns = coefficients.shape[0], program.num_outputs
    no_shift = jnp.zeros((examples, columns), dtype)
    no_probes = {position: jnp.zeros(call.outputs.shape, dtype) for position, call in program.calls.items()}

    def evaluate(probes: dict[int, Array], shift: Array) -> tuple[Array, tuple[Array, dict[int, Array]]]:
        inputs: dict[int, Array] = {}
        seen: list[Array] = []

        def at_mark(position: int, operands: list[Any]) -> list[Any]:
            marked = operands[: len(program.outputs)] if position == program.out else operands[:1]
            if position in program.calls:
                inputs[position] = operands[1]
                marked = [operands[0] + probes[position].astype(operands[0].dtype)]
            if position == program.out:
                flat = [x.reshape(examples, -1).astype(dtype) for x in marked]
                seen.append(jnp.concatenate(flat, axis=1))
                moved = _split(shift, [x.shape for x in marked])
                marked = [x + step.astype(x.dtype) for x, step in zip(marked, moved, strict=True)]
            return marked

        losses = run(program, arguments, at_mark)
        return jnp.sum(losses.astype(dtype)), (seen[0], inputs)

    # A unit direction in the outputs of all examples at once, since no example sees another's.
    def curvature(direction: Array) -> Array:
        slope = jax.grad(lambda shift: evaluate(no_probes, shift)[0])
        return jax.jvp(slope, (no_shift,), (jnp.broadcast_to(direction[None], no_shift.shape),))[1]

    hessian = jax.vmap(curvature, out_axes=2)(jnp.eye(columns, dtype=dtype))
    values, vectors = jax.vmap(_lapack.eigh)((hessian + jnp.swapaxes(hessian, 1, 2)) / 2)
    # A zero eigenvalue, such as softmax has, that rounding makes non-zero would hide that the factors are singular.
    rounding = columns * jnp.finfo(dtype).eps * jnp.max(jnp.abs(values), axis=1, keepdims=True)
    # Not `values > rounding`, which would turn NaN into 0.
    root = vectors * jnp.sqrt(jnp.where(values <= rounding, 0, values))[:, None, :]

    _, pull_back, inputs = jax.vjp(lambda probes: evaluate(probes, no_shift)[1], no_probes, has_aux=True)
    (gradients,) = jax.vmap(pull_back, in_axes=2, out_axes=1)(root)

    def joined(place: _Place) -> tuple[Array, Array]:
        features = [place.layer.features(inputs[k].astype(dtype), place.kernel_shape) for k in place.calls]
        joint = jnp.concatenate(features, axis=1)
        if place.bias is not None:
            joint = jnp.concatenate([joint, jnp.ones((*joint.shape[:2], 1), dtype)], axis=2)
        slopes = [gradients[k].reshape(examples, columns, -1, gradients[k].shape[-1]) for k in place.calls]
        return joint, jnp.concatenate(slopes, axis=2)

    pairs = [joined(place) for place in places]
    return _Seen(tuple(first for first, _ in pairs), tuple(second for _, second in pairs), coefficients)


def _split(flat: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Undoes the concatenation of arrays `[n, ...]` that were flattened to `[n, k]`."""
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + size(shape[1:]))
    return [flat[:, start:end].reshape(shape) for start, end, shape in zip(ends, ends[1:], shapes, strict=False)]


def _moments(seen: _Seen) -> tuple[_Moments, ...]:
    def one(inputs: Array, gradients: Array) -> _Moments:
        first = jnp.einsum("n,npi,npj->ij", seen.coefficients, inputs, inputs, precision=_HIGHEST)
        second = jnp.einsum("n,nkpo,nkpq->oq", seen.coefficients, gradients, gradients, precision=_HIGHEST)
        return _Moments(first, second, inputs.shape[1] * jnp.sum(seen.coefficients))

    return tuple(map(one, seen.inputs, seen.gradients))


def _second_moments(blocks: tuple[Block, ...], seen: _Seen) -> tuple[Array, ...]:
    def one(block: Block, inputs: Array, gradients: Array) -> Array:
        left = jnp.matmul(inputs, block.inputs, precision=_HIGHEST)
        right = jnp.matmul(gradients, block.outputs, precision=_HIGHEST)
        if inputs.shape[1] == 1:
            squares = jnp.sum(right[:, :, 0] ** 2, axis=1)
            return jnp.einsum("n,ni,no->io", seen.coefficients, left[:, 0] ** 2, squares, precision=_HIGHEST)

        # One example's gradients at a time, since each is as large as the layer.
        def add(total: Array, example: tuple[Array, Array, Array]) -> tuple[Array, None]:
            left, right, coefficient = example
            gradient = jnp.einsum("pi,kpo->kio", left, right, precision=_HIGHEST)
            return total + coefficient * jnp.sum(gradient**2, axis=0), None

        return jax.lax.scan(add, jnp.zeros_like(block.values), (left, right, seen.coefficients))[0]

    return tuple(map(one, blocks, seen.inputs, seen.gradients))


def _hessian_diagonal(function: Callable[[PyTree], Array], point: PyTree) -> list[Array]:
    """The diagonal of a diagonal Hessian H, and an unbiased estimate of any other's: z ⊙ H z with z of random signs."""
    leaves, structure = jax.tree.flatten(point)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    signs = [jax.random.rademacher(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    product = jax.jvp(jax.grad(function), (point,), (jax.tree.unflatten(structure, signs),))[1]
    return [sign * entry for sign, entry in zip(signs, jax.tree.leaves(product), strict=True)]


def _matrix(place: _Place, leaves: Sequence[Array], dtype: Any) -> Float[Array, "in out"]:
    """A layer's kernel and, in the last row, bias."""
    matrix = place.layer.matrix(leaves[place.kernel]).astype(dtype)
    if place.bias is None:
        return matrix
    return jnp.concatenate([matrix, leaves[place.bias].astype(dtype)[None]])


def _product(first: Array, second: Array, third: Array) -> Array:
    return jnp.matmul(jnp.matmul(first, second, precision=_HIGHEST), third, precision=_HIGHEST)
