"""Operators whose product is computed on the host, outside of compiled functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from metainfluence.operators import Operator, from_matvec

_Products = Callable[[PyTree], PyTree]

# A primitive, and not a plain function, since it gets the vectors' values under `vmap`.
_product_p = Primitive("metainfluence_host_product")
_product_p.multiple_results = True


def host_operator(products: _Products, like: PyTree) -> Operator:
    """An operator that can be called and mapped, but not compiled.

    Args:
      products: vectors on a leading axis -> their products, on values.
      like: pytree with the structure, shapes and dtypes of a vector.
    """
    structure: Any = jax.tree.structure(like)

    def flat(*leaves: Array) -> list[Array]:
        # Solvers around it may run uncompiled; what is compiled in a pass stays compiled.
        with jax.disable_jit(False):
            return jax.tree.leaves(products(jax.tree.unflatten(structure, leaves)))

    def product(vector: PyTree) -> PyTree:
        leaves = [leaf[None] for leaf in jax.tree.leaves(vector)]
        found = _product_p.bind(*leaves, products=flat)
        return jax.tree.unflatten(structure, [leaf[0] for leaf in found])

    return from_matvec(Partial(product), like)


def _run(*leaves: Array, products: Callable[..., list[Array]]) -> list[Array]:
    return products(*leaves)


def _refuse(*leaves: Any, products: Any) -> Any:
    raise TypeError("operator: a product that reads its tasks in batches can be called and mapped, but not compiled")


def _batch(leaves: Any, axes: Any, *, products: Any) -> Any:
    """Folds the mapped axis into the leading one."""
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    count = moved[0].shape[1]
    found = _product_p.bind(*(leaf.reshape(size * count, *leaf.shape[2:]) for leaf in moved), products=products)
    return [leaf.reshape(size, count, *leaf.shape[1:]) for leaf in found], [0] * len(found)


_product_p.def_impl(_run)
_product_p.def_abstract_eval(_refuse)
batching.primitive_batchers[_product_p] = _batch
