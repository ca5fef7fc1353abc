"""How much of a gradient's change comes from kinks, which second derivatives leave out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from metainfluence._checks import traced_at
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.differentiation import hessian_map
from metainfluence.problem import Bilevel, check_meta_params, total_objective

# Steps relative to ‖λ‖: small compared with the scale on which a loss bends, large compared with rounding.
_STEPS = (1e-2, 2.5e-3)
_LEAST = 1e-2
_NUM_DIRECTIONS = 2


def left_out_by_kinks(problem: Bilevel, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> float:
    """The share of D_λF's change along random directions that H's product misses because of kinks.

    Takes second differences of D_λF, (D_λF(λ + h d) − D_λF(λ − h d)) / 2h − H d, at two step sizes h. For a smooth F
    they fall with h², by a factor of 16 if h falls to a quarter. Kinks between the points keep them from falling, or
    make them vanish. Returns 0 where F is smooth, or kinks make less than a hundredth.

    Args:
      problem: the problem.
      meta_params: λ.
      tasks: stacked tasks.
      weights: their weights; None for unit weights.
    """
    check_meta_params(meta_params)
    resolved = resolve_weights(weights, tasks)
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, meta_params))
    length = float(np.linalg.norm(np.asarray(flat))) or 1.0
    objective = total_objective(problem)

    def measured(flat: Array, tasks: Task, weights: Weights) -> Array:
        """How far differences and product are apart, relative to the larger one, `[directions, steps]`."""

        def gradient(point: Array) -> Array:
            return ravel_pytree(jax.grad(lambda m: objective(m, tasks, weights))(unravel(point)))[0]

        rows = jax.random.normal(jax.random.key(0), (_NUM_DIRECTIONS, len(flat)), flat.dtype)
        rows = length * rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        product = hessian_map(lambda point: (gradient(point), None), flat, problem.hvp)[1]
        steps = jnp.asarray(_STEPS, flat.dtype)
        ends = jnp.stack([steps, -steps])

        def single(row: Array) -> Array:
            def slopes(step: Array) -> Array:
                return gradient(flat + step * row)

            ahead, behind = jax.lax.map(slopes, ends.reshape(-1)).reshape(2, len(steps), -1)
            found, linear = (ahead - behind) / (2 * steps[:, None]), product(row)[None]
            size = jnp.maximum(jnp.linalg.norm(found, axis=1), jnp.linalg.norm(linear, axis=1))
            return jnp.linalg.norm(found - linear, axis=1) / jnp.where(size > 0, size, 1)

        return jax.lax.map(single, rows)

    with traced_at("highest"):
        shares = np.asarray(jax.jit(measured)(flat, tasks, resolved))
    return max(_of_kinks(wide, narrow) for wide, narrow in shares.tolist())


def _of_kinks(wide: float, narrow: float) -> float:
    """The larger of the shares at the two steps; 0 where the share falls with h²."""
    if not (np.isfinite(wide) and np.isfinite(narrow)) or max(wide, narrow) < _LEAST:
        return 0.0
    smooth = 6 * narrow < wide < 64 * narrow
    return 0.0 if smooth else max(wide, narrow)
