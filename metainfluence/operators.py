"""A symmetric linear operator on λ-shaped pytrees: its product, its damping, its shape."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import leaf_name

__all__ = ["Domain", "FlatProduct", "Losses", "Operator", "from_matvec"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Domain:
    """Structure, shapes and dtypes of the vectors on which an operator acts; a pytree without leaves."""

    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @staticmethod
    def of(tree: PyTree) -> Domain:
        """Domain of the pytrees that look like `tree`."""
        leaves, structure = jax.tree.flatten(tree)
        return Domain(structure, tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves))

    def zeros(self) -> PyTree:
        """The zero vector."""
        return jax.tree.unflatten(self.structure, [jnp.zeros(x.shape, x.dtype) for x in self.leaves])

    @property
    def size(self) -> int:
        """Number of scalars in a vector."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def dtype(self) -> Any:
        """The dtype in which all leaves can be held."""
        return jnp.result_type(*(leaf.dtype for leaf in self.leaves))

    @property
    def coarsest(self) -> Any:
        """The dtype of the least precise leaves; products have that precision, too."""
        return max((leaf.dtype for leaf in self.leaves), key=lambda dtype: jnp.finfo(dtype).eps)

    def ravel(self, tree: PyTree) -> Float[Array, " size"]:
        """Concatenates a pytree of this domain into one vector."""
        return ravel_pytree(tree)[0]

    def unravel(self, vector: Float[Array, " size"]) -> PyTree:
        """Inverse of `ravel`."""
        ends = itertools.accumulate(leaf.size for leaf in self.leaves)
        parts = [
            vector[end - leaf.size : end].reshape(leaf.shape).astype(leaf.dtype)
            for end, leaf in zip(ends, self.leaves, strict=True)
        ]
        return jax.tree.unflatten(self.structure, parts)

    def check(self, name: str, tree: PyTree) -> None:
        """Raises ValueError, naming the argument and the leaf, unless `tree` belongs to this domain."""
        if jax.tree.structure(tree) != self.structure:
            raise ValueError(f"{name}: expected a pytree of structure {self.structure}, got {jax.tree.structure(tree)}")
        for (path, leaf), expected in zip(jax.tree_util.tree_leaves_with_path(tree), self.leaves, strict=True):
            if jnp.shape(leaf) != expected.shape:
                raise ValueError(f"{leaf_name(name, path)}: expected shape {expected.shape}, got {jnp.shape(leaf)}")


class Losses(NamedTuple):
    """The losses whose summed Hessian an operator represents, or nearly: Σ_g Σ_j c_gj ℓ(point, data_g)_j + r(point).

    For factorisations that need the layers, not only products. Data come in groups: the tasks of the outer objective,
    or a single group for an inner objective.

    Attributes:
      function: ℓ, (point, data of one group) -> losses `[n]`.
      point: pytree of the operator's domain.
      data: pytree of arrays `[G, ...]`.
      coefficients: `[G, n]`.
      regularizer: r, (point) -> scalar; None for 0.
    """

    function: Callable[[PyTree, PyTree], Float[Array, " n"]]
    point: PyTree
    data: PyTree
    coefficients: Float[Array, "G n"]
    regularizer: Callable[[PyTree], Float[Array, ""]] | None


def flat_norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm of all leaves of a pytree, by a shorter program than one sum per leaf."""
    vector = ravel_pytree(tree)[0]
    return jnp.sqrt(jnp.vdot(vector, vector, precision=jax.lax.Precision.HIGHEST))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlatProduct:
    """A product computed in flat coordinates, for an operator that is applied to flat vectors; a pytree.

    Attributes:
      flat: v ↦ A v, both flat.
      domain: the vectors' domain.
    """

    flat: Callable[[Float[Array, " size"]], Float[Array, " size"]]
    domain: Domain = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> PyTree:
        """The product with a pytree of the domain."""
        return self.domain.unravel(self.flat(self.domain.ravel(vector)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operator:
    """Symmetric linear operator v ↦ A v + shift · v on pytrees; a registered pytree that crosses jit as an argument.

    Attributes:
      product: v ↦ A v, a callable that is itself a pytree (`jax.tree_util.Partial`).
      shift: scalar; damping, and whatever multiple of the identity the curvature adds.
      domain: structure, shapes and dtypes of v.
      losses: () -> `Losses`, for solvers that need more than products; None where the operator has none.
      sample: (number) -> the operator of that many groups, chosen at random: cheaper than this one and similar to it.
        None where this one is not a sum over groups.
      num_groups: how many groups it is a sum over; 1 where it is not a sum.
    """

    product: Callable[[PyTree], PyTree]
    shift: Float[Array, ""]
    domain: Domain = dataclasses.field(metadata={"static": True})
    losses: Callable[[], Losses] | None = None
    sample: Callable[[int], Operator] | None = None
    num_groups: int = dataclasses.field(default=1, metadata={"static": True})

    def matvec(self, vector: PyTree) -> PyTree:
        """Product with a pytree of the operator's domain; `vmap` it to multiply several at once."""
        self.domain.check("vector", vector)
        return jax.tree.map(lambda a, v: a + self.shift.astype(a.dtype) * v, self.product(vector), vector)

    def flat_matvec(self, vector: Float[Array, " size"]) -> Float[Array, " size"]:
        """Product with a vector in the flat coordinates of `domain.ravel`."""
        if isinstance(self.product, FlatProduct):
            product = self.product.flat(vector)
        else:
            product = self.domain.ravel(self.product(self.domain.unravel(vector)))
        return product + self.shift.astype(product.dtype) * vector

    def flat_matvecs(self, vectors: Float[Array, "k size"]) -> Float[Array, "k size"]:
        """Products with vectors on a leading axis, in one batch; a single vector takes a smaller program."""
        if len(vectors) == 1:
            return self.flat_matvec(vectors[0])[None]
        return jax.vmap(self.flat_matvec)(vectors)

    def damped(self, damping: Any) -> Operator:
        """The operator plus `damping` times the identity."""
        return dataclasses.replace(self, shift=self.shift + jnp.asarray(damping, self.shift.dtype))

    @property
    def size(self) -> int:
        """Number of scalars in a vector."""
        return self.domain.size

    def dense(self, batch_size: int = 64) -> Float[Array, "size size"]:
        """The matrix, symmetrised, in the flat coordinates of `domain.ravel`; `size` products."""
        rows = self.rows(batch_size)
        return 0.5 * (rows + rows.T)

    def rows(self, batch_size: int = 64) -> Float[Array, "size size"]:
        """The matrix as products with the unit vectors, one per row, symmetric but for rounding; `size` products."""
        chunks = -(-self.size // batch_size)
        each = -(-self.size // chunks)
        # Chunks of equal size: a remainder would be compiled separately.
        basis = jnp.eye(chunks * each, self.size, dtype=self.domain.dtype).reshape(chunks, each, self.size)
        if chunks == 1:
            return jax.vmap(self.flat_matvec)(basis[0])
        return jax.lax.map(jax.vmap(self.flat_matvec), basis).reshape(-1, self.size)[: self.size]


def from_matvec(matvec: Callable[[PyTree], PyTree], like: PyTree) -> Operator:
    """Makes an operator from a symmetric linear function.

    Args:
      matvec: v ↦ A v. Pass a `jax.tree_util.Partial` whose arguments are the arrays that A depends on, or a
        `FlatProduct`, so that these pass through jit as data. Arrays that a plain function closes over are compiled in
        as constants.
      like: pytree with the structure, shapes and dtypes of v.

    Returns:
      Operator without damping.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> scale = jnp.asarray([1.0, 2.0])
      >>> operator = mi.operators.from_matvec(jax.tree_util.Partial(jnp.multiply, scale), jnp.zeros(2))
      >>> operator.damped(0.5).matvec(jnp.ones(2)).tolist()
      [1.5, 2.5]
    """
    if not isinstance(matvec, (jax.tree_util.Partial, FlatProduct)):
        matvec = jax.tree_util.Partial(matvec)
    domain = Domain.of(like)
    return Operator(matvec, jnp.zeros((), domain.dtype), domain)
