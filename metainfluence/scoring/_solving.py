"""Solves whose products are passes over a source: what was done is saved, and a resumed run finds it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from metainfluence._disk import Store
from metainfluence._progress import Reporter
from metainfluence.operators import Domain, Operator, flat_norm
from metainfluence.solvers import SolveInfo, Solver
from metainfluence.subspace import asymmetry_between


class Memo:
    """Keeps products in the store, so that a run that was stopped finds them again.

    Any solver that asks for the same products in the same order gets them back.
    """

    def __init__(self, domain: Domain, store: Store):
        self._domain, self._store, self._numbers = domain, store, itertools.count()

    def around(self, products: Callable[[PyTree], PyTree]) -> Callable[[PyTree], PyTree]:
        """The same products of vectors on a leading axis, read from the store if they are in it."""

        def remembered(vectors: PyTree) -> PyTree:
            number = next(self._numbers)
            asked = np.asarray(jax.vmap(self._domain.ravel)(vectors))
            saved = self._store.arrays("product", number)
            if saved is not None and np.array_equal(saved["vectors"], asked):
                return jax.vmap(self._domain.unravel)(jnp.asarray(saved["products"]))
            found = products(vectors)
            flat = np.asarray(jax.vmap(self._domain.ravel)(found))
            self._store.write("product", number, {"vectors": asked, "products": flat})
            return found

        return remembered


def stepped(
    solver: Solver, operator: Operator, memorised: Operator, rhs: Array, store: Store, report: Reporter
) -> tuple[Array, SolveInfo]:
    """Solves H x = b by the solver's steps, and saves their state."""
    iteration = solver.iteration
    assert iteration is not None
    assert solver.report is not None
    # Loops around products then run in Python.
    with jax.disable_jit():
        state = solver.init(memorised)
    watched = _Watched(operator)
    operator = dataclasses.replace(operator, product=watched)
    carry = iteration.start(operator, state, rhs, None)
    number, saved = store.latest("solve") or (0, None)
    if saved is not None:
        leaves = [jnp.asarray(saved[str(place)]) for place in range(len(jax.tree.leaves(carry)))]
        carry = jax.tree.unflatten(jax.tree.structure(carry), leaves)
        watched.seen = {name: saved[name] for name in watched.seen}
    while bool(iteration.running(carry)):
        carry = iteration.step(operator, state, carry)
        number += 1
        leaves = jax.tree.leaves(carry)
        kept = {str(place): np.asarray(leaf) for place, leaf in enumerate(leaves)}
        store.replace("solve", number, kept | watched.seen)
        report.solved(_relative_residual(carry, rhs), float(iteration.finish(carry).min_curvature))
    outcome = iteration.finish(carry)
    info = solver.report(operator, rhs, outcome)
    return outcome.solution, info._replace(asymmetry=jnp.asarray(watched.seen["asymmetry"], rhs.dtype))


class _Watched:
    """Products, and the largest asymmetry that two consecutive ones have shown."""

    def __init__(self, operator: Operator):
        self._operator = operator
        nothing = np.zeros(operator.size, operator.domain.dtype)
        self.seen: dict[str, Any] = {"vector": nothing, "product": nothing, "asymmetry": np.zeros((), nothing.dtype)}

    def __call__(self, vector: PyTree) -> PyTree:
        product = self._operator.product(vector)
        ravel, shift = self._operator.domain.ravel, self._operator.shift
        now = ravel(vector), ravel(product) + shift * ravel(vector)
        asymmetry = asymmetry_between(jnp.asarray(self.seen["vector"]), jnp.asarray(self.seen["product"]), *now)
        asymmetry = jnp.maximum(self.seen["asymmetry"], asymmetry)
        self.seen = {"vector": np.asarray(now[0]), "product": np.asarray(now[1]), "asymmetry": np.asarray(asymmetry)}
        return product


def _relative_residual(carry: Any, rhs: Array) -> float | None:
    """What the solver's own recursion says, where it has one."""
    residual = getattr(carry, "residual_norm", None)
    if residual is None and hasattr(carry, "residual"):
        residual = flat_norm(carry.residual)
    scale = float(flat_norm(rhs))
    return None if residual is None or scale == 0 else abs(float(residual)) / scale
