"""How far a point is from a minimum: the gradient's norm, and whether the point is near any minimum at all."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence import operators, solvers
from metainfluence.solvers import SolveStatus
from metainfluence.solvers._base import dot, norm


def gradient_norm(gradient: Callable[[PyTree], PyTree], params: PyTree) -> Float[Array, ""]:
    """‖∇f‖ at `params`, or infinity where these are seen to be near no minimum of f.

    That is so where the Hessian H has a negative eigenvalue, or where the gradient is too long for the curvature along
    it to end it: the step to the minimum along the gradient, ‖∇f‖³ / ∇fᵀH∇f, is longer than max(1, ‖params‖). An
    eigenvalue above −√eps of the root mean square of all passes for zero.

    Args:
      gradient: ∇f.
      params: the point.
    """
    slope, product = jax.linearize(gradient, params)
    operator = operators.from_matvec(product, params)
    domain = operator.domain
    steep, dtype = domain.ravel(slope), domain.dtype
    length = norm(steep)
    unit = steep / jnp.where(length > 0, length, 1)
    probe = jax.random.normal(jax.random.key(0), (domain.size,), dtype)
    products = jax.vmap(operator.flat_matvec)(jnp.stack([probe, unit]))
    # The root mean square of the eigenvalues, on average over probes.
    size = norm(products[0]) / norm(probe)
    rounding = jnp.sqrt(jnp.finfo(dtype).eps) * size
    along = jnp.maximum(dot(unit, products[1]), 0)
    endless = length > (along + rounding) * jnp.maximum(1, optax.tree.norm(params)).astype(dtype)

    # Residuals of conjugate gradients are Π(1 − A/θ_i) b with Ritz values θ_i, which are positive as long as all
    # curvatures met are. Along an eigenvector of a negative eigenvalue that product only grows, so that a solve whose
    # residual is less than the probe's part there has met a negative curvature.
    tol = 1e-3 / jnp.sqrt(jnp.asarray(domain.size, dtype))
    iteration = solvers.cg(tol=tol, max_steps=min(2 * domain.size + 10, 100)).iteration
    assert iteration is not None
    shifted = operator.damped(jnp.where(size > 0, rounding, 1))
    last = jax.lax.while_loop(
        iteration.running,
        functools.partial(iteration.step, shifted, None),
        iteration.start(shifted, None, probe, None),
    )
    indefinite = iteration.finish(last).failure == jnp.int32(SolveStatus.INDEFINITE)
    return jnp.where(endless | indefinite, jnp.inf, length)
