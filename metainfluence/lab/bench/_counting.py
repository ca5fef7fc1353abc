"""Counts what a program does from its jaxpr: floating-point operations, loops, and the matrix products inside loops."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from metainfluence.differentiation import inner_jaxprs


class Count(NamedTuple):
    """What a program holds and does.

    Attributes:
      flops: in total; the body of a scan counts as often as it runs, that of a `while` once, and of a `cond` the most
        expensive branch.
      products: matrix products and convolutions in the program's text.
      loops: `while` and `scan` loops.
      looped_products: those of `products` inside a loop, which therefore wait for one another.
      nesting: the deepest nesting of loops.
    """

    flops: float = 0.0
    products: int = 0
    loops: int = 0
    looped_products: int = 0
    nesting: int = 0


def count(function: Callable[..., Any], *args: Any) -> Count:
    """Counts for a function of arrays, or of their shapes; nothing is compiled."""
    return _counted(jax.make_jaxpr(function)(*args).jaxpr)


def _counted(jaxpr: Any) -> Count:
    total = Count()
    for equation in jaxpr.eqns:
        total = _sum(total, _of_equation(equation))
    return total


def _of_equation(equation: Any) -> Count:
    name, params = equation.primitive.name, equation.params
    if name == "rounded_product":
        name, params = params["product"].name, dict(params["options"])
    inner = [_counted(body) for body in inner_jaxprs(params)]
    if name in ("scan", "while"):
        found = Count()
        for each in inner:
            found = _sum(found, each)
        times = params["length"] if name == "scan" else 1
        return Count(found.flops * times, found.products, found.loops + 1, found.products, found.nesting + 1)
    if name == "cond":
        return Count(*(max(field) for field in zip(*inner, strict=True)))
    if inner:
        found = Count()
        for each in inner:
            found = _sum(found, each)
        return found
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inside = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return Count(2.0 * inside * _size(equation.outvars), products=1)
    if name == "conv_general_dilated":
        shape, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        # Each output sums over the window and over the inputs of its own group.
        inside = math.prod(shape) // shape[numbers.rhs_spec[0]]
        return Count(2.0 * inside * _size(equation.outvars), products=1)
    return Count(float(_size(equation.outvars)) if name not in _MOVES else 0.0)


# Primitives that move numbers and compute none.
_NAMES = (
    "broadcast_in_dim concatenate convert_element_type copy dynamic_slice dynamic_update_slice gather iota name pad "
    "reshape rev slice squeeze stop_gradient transpose"
)
_MOVES = frozenset(_NAMES.split())


def _sum(one: Count, other: Count) -> Count:
    return Count(
        one.flops + other.flops,
        one.products + other.products,
        one.loops + other.loops,
        one.looped_products + other.looped_products,
        max(one.nesting, other.nesting),
    )


def _size(atoms: Any) -> int:
    return sum(math.prod(atom.aval.shape) for atom in atoms)
