"""What a linearisation keeps where all of it would not fit: what is expensive to compute, and nothing cheap.

Matrix products, convolutions, factorisations and solves are kept. Normalisation, activation, pooling, image windows and
whatever else goes once through its arguments are recomputed in every product.
"""

from __future__ import annotations

import math
from typing import Any

from metainfluence._rounded import rounded_p
from metainfluence.differentiation import inner_jaxprs

# Each makes one pass over its arguments, or none.
_NAMES = (
    "abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh broadcast_in_dim cbrt ceil clamp "
    "concatenate convert_element_type copy copy_p cos cosh cumlogsumexp cummax cummin cumprod cumsum div dynamic_slice "
    "dynamic_update_slice eq erf erfc erf_inv exp exp2 expand_dims expm1 floor gather ge gt integer_pow iota is_finite "
    "le lgamma log log1p logistic lt max min mul name ne neg nextafter not optimization_barrier or pad pow "
    "reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_window_max reduce_window_sum rem reshape "
    "rev round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt "
    "square squeeze stack stop_gradient sub tan tanh transpose unstack xor"
)
_CHEAP = frozenset(_NAMES.split())

# A matrix product whose result is more than this many times its larger argument costs little per entry: for example the
# gradient of a convolution's windows, which is summed to that of the image.
_SPREAD = 2


def dear(primitive: Any, *avals: Any, **params: Any) -> bool:
    """Whether the result of an operation is kept, for the `policy` of `jax.checkpoint`."""
    if primitive is rounded_p:
        return dear(params["product"], *avals, **dict(params["options"]))
    if primitive.name == "dot_general":
        return _spread(avals, *params["dimension_numbers"]) <= _SPREAD
    if primitive.name in _CHEAP:
        return False
    bodies = inner_jaxprs(params)
    # A function with a custom derivative may be as cheap as `relu`, or a minimiser.
    return not bodies or any(
        dear(each.primitive, *_avals(each), **each.params) for body in bodies for each in body.eqns
    )


def _spread(avals: Any, contracted: Any, batched: Any) -> float:
    """Entries of a product over those of its larger argument."""
    one, other = (aval.shape for aval in avals[:2])
    inside = math.prod(one[axis] for axis in contracted[0])
    shared = math.prod(one[axis] for axis in batched[0])
    # Each entry of one argument meets those of the other that share its batch and its place in the sum.
    result = math.prod(one) * math.prod(other) / max(inside**2 * shared, 1)
    return result / max(math.prod(one), math.prod(other), 1)


def _avals(equation: Any) -> list[Any]:
    return [atom.aval for atom in equation.invars]
