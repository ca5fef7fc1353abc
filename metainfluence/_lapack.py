"""LAPACK's factorisations under vmap: on a CPU one matrix at a time, on accelerators the batch together.

jaxlib 0.10.2 runs a batch of LAPACK calls on the thread pool that it runs on itself, and blocks one of its threads
meanwhile. If as many batches run at once as the pool has threads (two on two cores), all threads wait and none works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _one_by_one(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, mapped by a loop where the program is lowered for a CPU."""
    loop = jax.custom_batching.sequential_vmap(fn)
    mapped = jax.custom_batching.custom_vmap(fn)

    @mapped.def_vmap
    def _(axis_size: int, in_batched: Any, *args: Any) -> Any:
        axes = [0 if batched else None for batched in in_batched]
        one_by_one, together = (jax.vmap(each, axes, axis_size=axis_size) for each in (loop, fn))
        found = jax.lax.platform_dependent(*args, cpu=one_by_one, default=together)
        return found, jax.tree.map(lambda _: True, found)

    return mapped


eigh = _one_by_one(lambda matrix: tuple(jnp.linalg.eigh(matrix)))
cholesky = _one_by_one(jnp.linalg.cholesky)
cho_solve = _one_by_one(lambda factor, rhs: jax.scipy.linalg.cho_solve((factor, True), rhs))
_lu = _one_by_one(lambda matrix: tuple(jax.scipy.linalg.lu_factor(matrix)))
_lu_solve = _one_by_one(lambda lu, pivots, rhs: jax.scipy.linalg.lu_solve((lu, pivots), rhs))
_lu_solve_transposed = _one_by_one(lambda lu, pivots, rhs: jax.scipy.linalg.lu_solve((lu, pivots), rhs, trans=1))


def linear_solve(matrix: Float[Array, "n n"], rhs: Float[Array, "n *k"]) -> Float[Array, "n *k"]:
    """Solves A x = b, as `jnp.linalg.solve` does, but safely under vmap; meant for the closed forms of `closed_form`.

    Differentiable to any order. Under `jax.vmap` on a CPU, matrices are factorised one after the other.
    `jnp.linalg.solve` makes batched LAPACK calls there. On a CPU with two cores, two such calls at once, as in the
    derivatives of a task's closed form, can wait for each other forever (jaxlib 0.10.2).

    Args:
      matrix: A, invertible.
      rhs: b, one vector or k of them.

    Raises:
      ValueError: a matrix that is not square, or a right-hand side of another length.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> matrix = jnp.asarray([[2.0, 1.0], [0.0, 4.0]])
      >>> mi.adaptation.linear_solve(matrix, jnp.asarray([5.0, 4.0])).tolist()
      [2.0, 1.0]
    """
    matrix, rhs = jnp.asarray(matrix), jnp.asarray(rhs)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"matrix: expected a square matrix, got shape {matrix.shape}")
    if rhs.ndim not in (1, 2) or rhs.shape[0] != len(matrix):
        raise ValueError(f"rhs: expected shape ({len(matrix)},) or ({len(matrix)}, k), got {rhs.shape}")
    # `custom_linear_solve` gives the derivative with respect to the matrix, so that the factors need none.
    lu, pivots = _lu(jax.lax.stop_gradient(matrix))
    return jax.lax.custom_linear_solve(
        lambda x: matrix @ x,
        rhs,
        solve=lambda _, b: _lu_solve(lu, pivots, b),
        transpose_solve=lambda _, b: _lu_solve_transposed(lu, pivots, b),
    )
