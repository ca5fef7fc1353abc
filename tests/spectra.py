"""Operators with a chosen spectrum on a pytree of vectors, and the solvers that every test runs over."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metainfluence as mi
from oracles.reference import ravel

LIKE = {"a": jnp.zeros((3, 3)), "b": [jnp.zeros(2), jnp.zeros(())]}
SIZE = 12


class Built(NamedTuple):
    """An operator, its matrix in flat coordinates, and the eigenvectors in its columns."""

    operator: mi.Operator
    matrix: np.ndarray
    vectors: np.ndarray


def product(matrix: Any, vector: Any) -> Any:
    flat, unravel = jax.flatten_util.ravel_pytree(vector)
    return unravel(jnp.matmul(matrix, flat, precision=jax.lax.Precision.HIGHEST))


def build(spectrum: Any, seed: int = 0) -> Built:
    """A symmetric operator with these eigenvalues and random eigenvectors."""
    spectrum = np.asarray(spectrum, float)
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))[0]
    matrix = vectors * spectrum @ vectors.T
    matrix = (matrix + matrix.T) / 2
    return Built(mi.operators.from_matvec(jax.tree_util.Partial(product, jnp.asarray(matrix)), LIKE), matrix, vectors)


def flat(spectrum: Any, seed: int = 0) -> Built:
    """The same on plain vectors, of any size."""
    spectrum = np.asarray(spectrum, float)
    vectors = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))[0]
    matrix = vectors * spectrum @ vectors.T
    matrix = (matrix + matrix.T) / 2
    product = jax.tree_util.Partial(jnp.matmul, jnp.asarray(matrix))
    return Built(mi.operators.from_matvec(product, jnp.zeros(len(spectrum))), matrix, vectors)


def unravel(vector: Any) -> Any:
    """A flat vector as a pytree of the operator's domain."""
    return jax.flatten_util.ravel_pytree(LIKE)[1](jnp.asarray(vector))


def solve(solver: mi.Solver, operator: mi.Operator, rhs: Any, x0: Any = None) -> tuple[Any, mi.SolveInfo]:
    """`init` and `solve`."""
    return solver.solve(operator, solver.init(operator), rhs, x0)


def solve_jitted(solver: mi.Solver, operator: mi.Operator, rhs: Any, x0: Any = None) -> tuple[Any, mi.SolveInfo]:
    """The same as one program, which compiles faster than its pieces one by one."""
    return jax.jit(lambda *args: solve(solver, *args))(operator, rhs, x0)


def residual(matrix: np.ndarray, rhs: Any, solution: Any) -> float:
    """‖b − Hx‖ / ‖b‖."""
    right = ravel(rhs)
    return float(np.linalg.norm(right - matrix @ ravel(solution)) / np.linalg.norm(right))


def preconditioner() -> mi.Solver:
    """A user's own solver: the exact inverse of a nearby operator, given as the NamedTuple that the contract names."""
    return mi.solvers.dense()._replace(init=lambda operator: mi.solvers.dense().init(operator.damped(0.1)))


# Every solver that claims a solution, with the relative residual it promises on a spectrum in [0.5, 4].
SOLVERS = {
    "cg": (lambda: mi.solvers.cg(tol=1e-10), 1e-10),
    "cg_preconditioned": (lambda: mi.solvers.cg(tol=1e-10, preconditioner=preconditioner()), 1e-10),
    "minres": (lambda: mi.solvers.minres(tol=1e-10), 1e-10),
    "neumann": (lambda: mi.solvers.neumann(400, tol=1e-10), 1e-10),
    "neumann_scaled": (lambda: mi.solvers.neumann(400, scale=0.4, tol=1e-10), 1e-10),
    "neumann_preconditioned": (lambda: mi.solvers.neumann(400, preconditioner=preconditioner(), tol=1e-10), 1e-10),
    "block_cg": (lambda: mi.solvers.block_cg(tol=1e-10), 1e-10),
    "block_cg_preconditioned": (lambda: mi.solvers.block_cg(tol=1e-10, preconditioner=preconditioner()), 1e-10),
    "auto_krylov": (lambda: mi.solvers.auto(tol=1e-10, dense_size=0), 1e-10),
    "lanczos": (lambda: mi.solvers.lanczos(SIZE, tol=1e-10), 1e-10),
    "dense": (lambda: mi.solvers.dense(), 1e-13),
    "cholesky": (lambda: mi.solvers.dense(method="cholesky"), 1e-13),
}
