"""Products of matrices and convolutions of rounded numbers, summed at full precision, in derivatives of every order.

JAX's own casts round cotangents to the dtype of what was cast, and on a CPU its algorithms for products of less
precision silently run at full precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from metainfluence.differentiation import inner_jaxprs

PRODUCTS = ("dot_general", "conv_general_dilated")

# A product with its operands rounded: `product` is the primitive, `options` its parameters, `compute_dtype` the dtype
# that both operands are rounded to.
rounded_p = Primitive("rounded_product")


def rounded(function: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """The function, with both operands of every product of floats in it rounded to `dtype`.

    Raises:
      TypeError: when called, products inside something that cannot be entered, such as a `custom_vjp`.
    """

    def run(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        results = _walked(traced.jaxpr, traced.consts, jax.tree.leaves(args), dtype)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _walked(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], dtype: Any) -> list[Any]:
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        with equation.ctx.manager:
            results = _result(equation, [read(atom) for atom in equation.invars], dtype)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _result(equation: Any, operands: list[Any], dtype: Any) -> list[Any]:
    primitive, params = equation.primitive, equation.params
    name = primitive.name
    if name in PRODUCTS and _is_rounded(equation, dtype):
        options = tuple(sorted(params.items()))
        return [rounded_p.bind(*operands, product=primitive, options=options, compute_dtype=dtype)]
    if any(_holds_product(inner) for inner in inner_jaxprs(params)):
        return _result_inside(primitive, params, operands, dtype)
    bound = primitive.get_bind_params(params)
    functions, given = bound if isinstance(bound, tuple) else ((), bound)
    found = primitive.bind(*functions, *operands, **given)
    return found if primitive.multiple_results else [found]


def _result_inside(primitive: Any, params: Any, operands: list[Any], dtype: Any) -> list[Any]:
    """Results of an equation that holds products in a function of its own."""
    name = primitive.name
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()) if inner is not None else None

    def body(*values: Any) -> list[Any]:
        assert closed is not None
        return _walked(closed.jaxpr, closed.consts, values, dtype)

    if name in ("jit", "pjit", "closed_call", "core_call"):
        return body(*operands)
    if name in ("checkpoint", "remat2", "remat"):
        again = jax.checkpoint(body, policy=params["policy"], prevent_cse=params["prevent_cse"])
        return again(*operands)
    if name == "scan":
        assert closed is not None
        return primitive.bind(*operands, **dict(params) | {"jaxpr": jax.make_jaxpr(body)(*closed.in_avals)})
    raise TypeError(
        f"apply: expected products of matrices outside of loops of unknown length, branches and derivatives of its "
        f"own, got one inside {name}, which cannot be rounded; leave that part to a function outside"
    )


def _holds_product(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in PRODUCTS or any(map(_holds_product, inner_jaxprs(equation.params)))
        for equation in jaxpr.eqns
    )


def _is_rounded(equation: Any, dtype: Any) -> bool:
    """Whether a product is of floats, some with more digits than they should have."""
    operands = [atom.aval.dtype for atom in equation.invars]
    return all(jnp.issubdtype(own, jnp.floating) for own in operands) and any(
        jnp.finfo(own).eps < jnp.finfo(dtype).eps for own in operands
    )


def _plain(product: Any, options: Any) -> Callable[[Array, Array], Array]:
    return lambda one, other: product.bind(one, other, **dict(options))


def _computed(one: Array, other: Array, *, product: Any, options: Any, compute_dtype: Any) -> Array:
    """On devices whose matrix units take such operands and sum in float32."""
    given = dict(options) | {"precision": None, "preferred_element_type": jnp.dtype(jnp.float32)}
    found: Array = product.bind(one.astype(compute_dtype), other.astype(compute_dtype), **given)
    return found.astype(_shaped(one, other, product=product, options=options).dtype)


def _emulated(one: Array, other: Array, *, product: Any, options: Any, compute_dtype: Any) -> Array:
    """On a CPU, which lacks such products: rounded in a way that XLA, unlike pairs of casts, does not simplify away."""
    info = jnp.finfo(compute_dtype)

    def near(value: Array) -> Array:
        found = jax.lax.reduce_precision(value, info.nexp, info.nmant)
        # `reduce_precision` turns what is below the smallest normal number into 0.
        least = float(info.smallest_subnormal)
        small = jnp.abs(value) < float(info.smallest_normal)
        return jnp.where(small, jnp.round(value / least) * least, found) if info.nexp < 8 else found

    found: Array = product.bind(near(one), near(other), **dict(options))
    return found


@functools.cache
def _compiled(**params: Any) -> Any:
    return jax.jit(functools.partial(rounded_p.bind, **params))


def _shaped(one: Any, other: Any, *, product: Any, options: Any, compute_dtype: Any = None) -> Any:
    return product.abstract_eval(
        *(jax.typeof(each) if isinstance(each, jax.Array) else each for each in (one, other)), **dict(options)
    )[0]


def _mapped(operands: Any, axes: Any, *, product: Any, options: Any, compute_dtype: Any) -> tuple[Array, int]:
    mapped = jax.vmap(_plain(product, options), in_axes=tuple(axes))
    return rounded(mapped, compute_dtype)(*operands), 0


def _transposed(place: int) -> Callable[..., Array]:
    """The rule by which a cotangent of the product becomes one of the operand at a place."""

    def rule(cotangent: Array, *operands: Any, product: Any, options: Any, compute_dtype: Any) -> Array:
        wanted, fixed = operands[place].aval, operands[1 - place]
        shape = jax.ShapeDtypeStruct(wanted.shape, wanted.dtype)

        def pulled(cotangent: Array, fixed: Array) -> Array:
            def linear(operand: Array) -> Array:
                return _plain(product, options)(*((operand, fixed) if place == 0 else (fixed, operand)))

            found: Array = jax.linear_transpose(linear, shape)(cotangent)[0]
            return found

        found: Array = rounded(pulled, compute_dtype)(cotangent, fixed)
        return found

    return rule


rounded_p.def_impl(lambda *operands, **params: _compiled(**params)(*operands))
rounded_p.def_abstract_eval(_shaped)
mlir.register_lowering(rounded_p, mlir.lower_fun(_computed, multiple_results=False))
mlir.register_lowering(rounded_p, mlir.lower_fun(_emulated, multiple_results=False), platform="cpu")
batching.primitive_batchers[rounded_p] = _mapped
ad.defbilinear(rounded_p, _transposed(0), _transposed(1))
