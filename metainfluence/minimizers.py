"""Minimisers of a task's inner objective, and a check of whether a point is a minimum at all.

A minimiser is a function (objective, params) -> params. `adaptation.implicit` takes one, and differentiates the minimum
that it finds, not its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence import _lapack, operators, solvers
from metainfluence._checks import check_positive
from metainfluence.solvers import SolveStatus

__all__ = ["Minimizer", "Objective", "given", "newton", "newton_cg", "optax_minimizer"]

Objective = Callable[[PyTree], Float[Array, ""]]
Minimizer = Callable[[Objective, PyTree], PyTree]


class _Newton(NamedTuple):
    """The best point so far with its value and gradient norm, and the next point to try."""

    params: PyTree
    value: Array
    norm: Array
    candidate: PyTree
    scale: Array
    steps_left: Array
    active: Array


def newton_cg(*, tol: float | None = None, max_steps: int = 100) -> Minimizer:
    """Truncated Newton: directions by conjugate gradients, lengths by backtracking (Nocedal and Wright, 2006, ch. 7).

    Under vmap every task stops on its own. A step linearises the gradient once; value, gradient and Hessian products
    all come from that.

    Args:
      tol: stops at ‖∇‖ ≤ tol · max(1, ‖∇ at the start‖); None for eps^(3/4), 1.8e-12 in float64.
      max_steps: Newton steps allowed.

    Raises:
      ValueError: `tol` or `max_steps` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> mi.adaptation.newton_cg()(lambda x: jnp.sum((x - 2.0) ** 2), jnp.zeros(1)).tolist()
      [2.0]
    """
    if tol is not None:
        check_positive("tol", tol)
    check_positive("max_steps", max_steps, integer=True)

    def minimize(objective: Objective, params: PyTree) -> PyTree:
        domain = operators.Domain.of(params)
        eps = jnp.finfo(domain.dtype).eps
        goal = accurate_tol(params) if tol is None else tol
        swapped = jax.value_and_grad(objective)

        def gradient(params: PyTree) -> tuple[PyTree, Array]:
            value, grad = swapped(params)
            return grad, value

        def turn(carry: _Newton) -> _Newton:
            grad, product, value = jax.linearize(gradient, carry.candidate, has_aux=True)
            norm, first = optax.tree.norm(grad), carry.steps_left == max_steps
            scale = jnp.where(first, jnp.maximum(1, norm), carry.scale)
            # Near the minimum, differences of values drown in rounding, which must not stop the last steps.
            stalled = ~first & ~(norm < carry.norm) & (value >= carry.value - 10 * eps * jnp.abs(carry.value))
            here = _Newton(carry.candidate, value, norm, carry.candidate, scale, carry.steps_left, carry.active)
            here = optax.tree.where(stalled, carry, here)
            finite = jnp.isfinite(here.norm) & jnp.isfinite(here.value)
            active = ~stalled & finite & (here.norm > goal * scale) & (here.steps_left > 0)

            # The forcing term of Eisenstat and Walker makes the convergence superlinear. Once the search is done,
            # nothing is left to solve for.
            forcing = jnp.clip(jnp.sqrt(here.norm / scale), 1e-4, 0.1)
            downhill = jax.tree.map(lambda leaf: jnp.where(active, -leaf, 0), grad)
            operator = operators.from_matvec(product, params)
            direction = solvers.solution_of(solvers.cg(tol=forcing), operator, None, downhill)
            length = optax.tree.norm(direction)
            unusable = ~jnp.isfinite(length) | (length == 0)
            direction = optax.tree.where(unusable, downhill, direction)
            slope = -optax.tree.vdot(downhill, direction)
            rounding = 10 * eps * jnp.abs(here.value)

            def at(length: Array) -> PyTree:
                return jax.tree.map(lambda p, d: p + length.astype(p.dtype) * d, here.params, direction)

            def too_long(length: Array) -> Array:
                enough = objective(at(length)) <= here.value + 1e-4 * length * slope + rounding
                return active & ~enough & (length > 1e-10)

            length = jax.lax.while_loop(too_long, lambda length: length / 2, jnp.ones((), here.value.dtype))
            return here._replace(candidate=at(length), steps_left=carry.steps_left - 1, active=active)

        value = jax.eval_shape(objective, params)
        endless = jnp.full((), jnp.inf, value.dtype)
        nowhere = jax.tree.map(jnp.asarray, params)
        norm = jnp.full((), jnp.inf, optax.tree.norm(nowhere).dtype)
        start = _Newton(nowhere, endless, norm, nowhere, jnp.ones_like(norm), jnp.int32(max_steps), jnp.bool_(True))
        last = jax.lax.while_loop(lambda carry: carry.active, turn, start)
        # Where the objective is NaN there is no minimum, and the start must not pass for one.
        found = jnp.isfinite(last.value) & jnp.isfinite(last.norm)
        return jax.tree.map(lambda leaf: jnp.where(found, leaf, jnp.nan), last.params)

    return minimize


def newton(*, dense: bool = True, num_steps: int = 12) -> Minimizer:
    """Newton's method with the Hessian formed and factorised, for few parameters on an accelerator, such as a head.

    The number of steps is fixed. Each step is a few large operations, over all tasks at once under vmap, where
    `newton_cg` waits for hundreds of small ones. Lengths 1, 1/2, ..., 2⁻¹¹ are tried together, and the longest that
    lowers the objective enough is taken. Where the Hessian is not positive definite, twice what Gershgorin's theorem
    asks for is added to its diagonal. Strictly convex objectives, such as that of a logistic head with a penalty, reach
    their minimum to rounding after six to ten steps. How near others come is reported as
    `SolveInfo.inner_gradient_norm`.

    Args:
      dense: False for `newton_cg(max_steps=num_steps)`, where the parameters are too many to form the matrix.
      num_steps: steps taken.

    Raises:
      ValueError: `num_steps` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> mi.adaptation.newton()(lambda x: jnp.sum((x - 2.0) ** 4 + (x - 2.0) ** 2), jnp.zeros(1)).round(6).tolist()
      [2.0]
    """
    check_positive("num_steps", num_steps, integer=True)
    if not dense:
        return newton_cg(max_steps=num_steps)

    def minimize(objective: Objective, params: PyTree) -> PyTree:
        domain = operators.Domain.of(params)
        basis, lengths = jnp.eye(domain.size, dtype=domain.dtype), jnp.exp2(-jnp.arange(12, dtype=domain.dtype))

        def flat(point: Array) -> Array:
            return objective(domain.unravel(point))

        def slope_of(point: Array) -> tuple[Array, Array]:
            value, slope = jax.value_and_grad(flat)(point)
            return slope, value

        def step(_: Any, point: Array) -> Array:
            slope, product, value = jax.linearize(slope_of, point, has_aux=True)
            hessian = jax.vmap(product)(basis)
            hessian = (hessian + hessian.T) / 2
            diagonal = jnp.diagonal(hessian)
            around = jnp.sum(jnp.abs(hessian), axis=1) - jnp.abs(diagonal)
            size = jnp.max(jnp.abs(diagonal) + around)
            # Twice the bound on the lowest eigenvalue, so that no step along it is longer than its curvature allows.
            lift = jnp.maximum(-2 * jnp.min(diagonal - around), float(jnp.finfo(domain.dtype).eps) ** 0.5 * size)
            both = jnp.stack([hessian, hessian + lift * basis])
            plain, lifted = jax.vmap(_lapack.cholesky)(both)
            factor = jnp.where(jnp.all(jnp.isfinite(plain)), plain, lifted)
            direction = -_lapack.cho_solve(factor, slope)
            direction = jnp.where(jnp.all(jnp.isfinite(direction)), direction, -slope)
            # Near the minimum, differences of values drown in rounding, which must not stop the last steps.
            rounding = 10 * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)
            tried = point[None] + lengths[:, None] * direction[None]
            most = value + (1e-4 * lengths * jnp.vdot(slope, direction)).astype(value.dtype) + rounding
            enough = jax.vmap(flat)(tried) <= most
            return jnp.where(jnp.any(enough), tried[jnp.argmax(enough)], point)

        last = jax.lax.fori_loop(0, num_steps, step, domain.ravel(params))
        slope, value = slope_of(last)
        # Where the objective is NaN there is no minimum, and the start must not pass for one.
        found = jnp.isfinite(value) & jnp.all(jnp.isfinite(slope))
        return domain.unravel(jnp.where(found, last, jnp.nan))

    return minimize


def optax_minimizer(optimizer: optax.GradientTransformation, num_steps: int, *, tol: float | None = None) -> Minimizer:
    """Up to `num_steps` steps of an optax optimiser, L-BFGS included.

    Args:
      optimizer: an optax optimiser.
      num_steps: steps allowed.
      tol: stops earlier at ‖∇‖ ≤ tol; None runs all steps.

    Raises:
      ValueError: `num_steps` or `tol` not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> import optax
      >>> minimize = mi.adaptation.optax_minimizer(optax.sgd(0.5), num_steps=3)
      >>> minimize(lambda x: jnp.sum((x - 2.0) ** 2), jnp.zeros(1)).tolist()
      [2.0]
    """
    check_positive("num_steps", num_steps, integer=True)
    if tol is not None:
        check_positive("tol", tol)
    transform = optax.with_extra_args_support(optimizer)

    def minimize(objective: Objective, params: PyTree) -> PyTree:
        evaluate = jax.value_and_grad(objective)

        def running(carry: Any) -> Array:
            _, _, (_, grad), steps_left = carry
            # Not `>`: NaN would end the loop, and the start would pass for a minimum.
            active = jnp.bool_(True) if tol is None else ~(optax.tree.norm(grad) <= tol)
            return active & (steps_left > 0)

        def step(carry: Any) -> Any:
            params, state, (value, grad), steps_left = carry
            updates, state = transform.update(grad, state, params, value=value, grad=grad, value_fn=objective)
            params = optax.apply_updates(params, updates)
            return params, state, evaluate(params), steps_left - 1

        carry = (params, transform.init(params), evaluate(params), jnp.int32(num_steps))
        return jax.lax.while_loop(running, step, carry)[0]

    return minimize


def given() -> Minimizer:
    """Treats what `init` returns as the minimum: parameters that the user's own loop has already adapted.

    How good a minimum they are is reported as `SolveInfo.inner_gradient_norm`. `init` sees no weights, so parameters
    are not re-adapted to support weights other than 1.

    Examples:
      >>> import metainfluence as mi
      >>> mi.adaptation.given()(None, {"head": 1.0})
      {'head': 1.0}
    """
    return lambda objective, params: params


def accurate_tol(tree: PyTree) -> float:
    """eps^(3/4) of the lowest precision in `tree`: what a well-conditioned solve can reach with room to spare."""
    return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(tree)) ** 0.75


def gradient_norm(slope: PyTree, product: Callable[[PyTree], PyTree], params: PyTree) -> Float[Array, ""]:
    """‖∇f‖ at `params`, or infinity where these are found to be near no minimum of f.

    It is infinite where the Hessian H has a negative eigenvalue, or where the gradient is too long for the curvature
    along it: the step to the minimum along the gradient, ‖∇f‖³ / ∇fᵀH∇f, is longer than max(1, ‖params‖). An eigenvalue
    above −√eps times the root mean square of all eigenvalues counts as zero.

    Args:
      slope: ∇f at `params`.
      product: v ↦ H v there.
      params: the point.
    """
    operator = operators.from_matvec(product, params)
    domain = operator.domain
    steep, dtype = domain.ravel(slope), domain.dtype
    length = jnp.linalg.norm(steep)
    unit = steep / jnp.where(length > 0, length, 1)
    probe = _probe(domain.size, dtype)
    products = jax.vmap(operator.flat_matvec)(jnp.stack([probe, unit]))
    # The root mean square of the eigenvalues, on average over probes.
    size = jnp.linalg.norm(products[0]) / jnp.linalg.norm(probe)
    rounding = jnp.sqrt(jnp.finfo(dtype).eps) * size
    along = jnp.maximum(jnp.vdot(unit, products[1]), 0)
    endless = length > (along + rounding) * jnp.maximum(1, optax.tree.norm(params)).astype(dtype)

    # Residuals of conjugate gradients are Π(1 − A/θ_i) b with Ritz values θ_i, which are positive as long as all
    # curvatures met are. Along an eigenvector of a negative eigenvalue that product only grows, so a solve whose
    # residual is less than the probe's part along it has met a negative curvature.
    tol = 1e-3 / jnp.sqrt(jnp.asarray(domain.size, dtype))
    solver = solvers.cg(tol=tol, max_steps=min(2 * domain.size + 10, 100))
    shifted = operator.damped(jnp.where(size > 0, rounding, 1))
    _, info = solver.solve(shifted, None, domain.unravel(probe))
    indefinite = info.status == jnp.int32(SolveStatus.INDEFINITE)
    return jnp.where(endless | indefinite, jnp.inf, length)


def _probe(size: int, dtype: Any) -> Float[Array, " size"]:
    """Numbers between -1 and 1 without a pattern, by few operations; JAX's own generator takes a loop of many."""
    mixed = jnp.arange(1, size + 1, dtype=jnp.uint32) * jnp.uint32(2654435769)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed >> 8).astype(dtype) * 2.0**-23 - 1
