"""In which floating-point format a function really computes, read off its traced program."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from metainfluence.differentiation import inner_jaxprs


def working_eps(jaxpr: Any) -> float:
    """The largest machine epsilon among the values that depend on a program's arguments; 0 where none is a float.

    What is computed from constants alone, such as data that are cast and scaled, is considered exact and does not
    count.
    """
    return _eps(jaxpr, [True] * len(jaxpr.invars))[0]


def _eps(jaxpr: Any, reached: list[bool]) -> tuple[float, list[bool]]:
    """The largest epsilon of what depends on the reached arguments, and which results depend on them."""
    known = {var for var, is_reached in zip(jaxpr.invars, reached, strict=True) if is_reached}
    largest = 0.0
    for equation in jaxpr.eqns:
        inputs = [not hasattr(atom, "val") and atom in known for atom in equation.invars]
        if not any(inputs):
            continue
        outputs = [True] * len(equation.outvars)
        for inner in inner_jaxprs(equation.params):
            # Loops and branches take their arguments in an order of their own; there all count as reached.
            alone = equation.primitive.name not in ("while", "cond") and len(inner.invars) == len(inputs)
            found, ends = _eps(inner, inputs if alone else [True] * len(inner.invars))
            largest = max(largest, found)
            if alone and len(ends) == len(outputs) and equation.primitive.name != "scan":
                outputs = ends
        for var, is_reached in zip(equation.outvars, outputs, strict=True):
            if is_reached:
                known.add(var)
                if jnp.issubdtype(var.aval.dtype, jnp.floating):
                    # The result of a product of rounded numbers has more digits than are accurate.
                    dtype = equation.params.get("compute_dtype", var.aval.dtype)
                    largest = max(largest, float(jnp.finfo(dtype).eps))
    return largest, [hasattr(atom, "aval") and not hasattr(atom, "val") and atom in known for atom in jaxpr.outvars]
