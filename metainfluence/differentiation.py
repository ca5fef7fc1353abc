"""How derivatives of gradients are taken: forward over reverse, or reverse over reverse.

Forward over reverse is cheaper. Functions whose derivative is a `custom_vjp`, as jaxopt's solvers, have none in forward
mode. What is differentiated here is always a gradient, so that its derivative is symmetric and one pullback,
v ↦ ∇⟨gradient, v⟩, is the same product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import PyTree

FORWARD = "forward_over_reverse"
REVERSE = "reverse_over_reverse"


def check_hvp(hvp: Any) -> None:
    """Raises ValueError unless `hvp` is one of the two ways."""
    if hvp not in (FORWARD, REVERSE):
        raise ValueError(f"hvp: expected {FORWARD!r} or {REVERSE!r}, got {hvp!r}")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says which argument to change where JAX cannot differentiate a `custom_vjp` forward."""
    try:
        yield
    except TypeError as error:
        if "custom_vjp" not in str(error) or "hvp=" in str(error):
            raise
        raise TypeError(
            f"hvp: {FORWARD!r} differentiates the problem's functions in forward mode too, and one of them has a "
            f"custom_vjp, which gives reverse mode only (as jaxopt's solvers do); pass hvp={REVERSE!r}"
        ) from error


def hessian_product(gradient: Callable[[PyTree], PyTree], at: PyTree, vector: PyTree, hvp: str) -> PyTree:
    """The derivative of a gradient along a vector like its argument."""
    if hvp == REVERSE:
        return jax.vjp(gradient, at)[1](vector)[0]
    with explained():
        return jax.jvp(gradient, (at,), (vector,))[1]


def hessian_map(
    gradient: Callable[[PyTree], Any], at: PyTree, hvp: str
) -> tuple[PyTree, Callable[[PyTree], PyTree], Any]:
    """The gradient with its aux, and v ↦ its derivative along v as a pytree, with all that does not depend on v done.

    Args:
      gradient: (point) -> (gradient, aux).
      at: the point.
      hvp: the way.

    Returns:
      Gradient, map, aux.
    """
    if hvp == REVERSE:
        slope, pullback, aux = jax.vjp(gradient, at, has_aux=True)
        return slope, Partial(_first, pullback), aux
    with explained():
        slope, linear, aux = jax.linearize(gradient, at, has_aux=True)
    return slope, linear, aux


def taylor(fn: Callable[[PyTree], PyTree], at: PyTree, hvp: str) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """The value of `fn` at a point, and its first-order Taylor polynomial there."""
    if hvp == REVERSE:
        value, pullback = jax.vjp(fn, at)
        # A linear map's own pullback is its transpose, wherever it is taken.
        transposed = jax.vjp(pullback, jax.tree.map(jnp.zeros_like, value))[1]

        def rate(change: PyTree) -> PyTree:
            return transposed((change,))[0]

    else:
        with explained():
            value, rate = jax.linearize(fn, at)

    def polynomial(point: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, value, rate(jax.tree.map(jnp.subtract, point, at)))

    return value, polynomial


def _first(pullback: Callable[[PyTree], Any], vector: PyTree) -> PyTree:
    return pullback(vector)[0]
