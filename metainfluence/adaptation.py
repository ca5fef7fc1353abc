"""Adaptation: (meta-parameters λ, support set, coefficients) → task parameters θ.

The inner objective is Σ_j c_j ℓ_in(θ, λ; support_j) + r(θ, λ), where the coefficients c_j = a_j u_j hold the data
weights and the normaliser 1/n, and are 0 on padding. θ and λ are any two pytrees: a head, a context vector, a full copy
of the network, learned learning rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence import _lapack, operators, solvers
from metainfluence._calls import calling, check_function
from metainfluence.minimum import gradient_norm
from metainfluence.solvers._base import check_positive
from metainfluence.tasks import described, is_array, leaf_name

Loss = Callable[[PyTree, PyTree, PyTree], Float[Array, " n"]]
Init = Callable[[PyTree, PyTree], PyTree]
Regularizer = Callable[[PyTree, PyTree], Float[Array, ""]]
Objective = Callable[[PyTree], Float[Array, ""]]
Minimizer = Callable[[Objective, PyTree], PyTree]

linear_solve = _lapack.linear_solve


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A way to adapt, callable as (meta_params, support, coefficients `[n_support]`) -> params.

    Attributes:
      adapt: the map itself, differentiable in meta_params and coefficients.
      inner_gradient_norm: (params, meta_params, support, coefficients) -> ‖∂_θ L_in‖ where params are meant to be a
        minimum, infinity where they are seen to be near none; None where they are not meant to be one.
    """

    adapt: Callable[[PyTree, PyTree, Array], PyTree]
    inner_gradient_norm: Callable[[PyTree, PyTree, PyTree, Array], Array] | None = None

    def __call__(self, meta_params: PyTree, support: PyTree, coefficients: Float[Array, " n_support"]) -> PyTree:
        """Adapts."""
        return self.adapt(meta_params, support, coefficients)


def check_losses(losses: Any, count: int, name: str) -> Array:
    """Raises ValueError unless `losses` is one number per example."""
    if not is_array(losses) or jnp.shape(losses) != (count,):
        raise ValueError(
            f"{name}: expected one loss per example, shape ({count},), got {described(losses)}; "
            "metainfluence.per_example turns a mean-reduced loss into one per example"
        )
    return losses


def weighted_sum(losses: Array, coefficients: Array) -> Array:
    """Σ_j c_j ℓ_j in the dtype of the losses."""
    return jnp.sum(losses * coefficients.astype(losses.dtype))


def check_scalar(value: Any, name: str) -> Array:
    """Raises ValueError unless `value` is a real scalar."""
    if not is_array(value) or jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(f"{name}: expected a real scalar, got {described(value)}")
    return value


def check_floating(tree: PyTree, name: str) -> None:
    """Raises, naming the leaf, unless there are leaves and all of them are floating-point arrays."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"{name}: expected at least one array, got a pytree without leaves")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{leaf_name(name, path)}: expected floating-point numbers, got {jnp.result_type(leaf)}; leave what is "
                "not differentiated out of this pytree"
            )


def _check_functions(inner_loss: Loss, init: Init, regularizer: Regularizer | None) -> None:
    check_function("inner_loss", inner_loss, "(params, meta_params, support) -> losses [n_support]", *"pms")
    check_function("init", init, "(meta_params, support) -> params", *"ms")
    if regularizer is not None:
        check_function("regularizer", regularizer, "(params, meta_params) -> scalar", *"pm")


def _inner_objective(inner_loss: Loss, regularizer: Regularizer | None) -> Callable[..., Array]:
    def objective(params: PyTree, meta_params: PyTree, support: PyTree, coefficients: Array) -> Array:
        with calling("inner_loss", "(params, meta_params, support)"):
            losses = inner_loss(params, meta_params, support)
        total = weighted_sum(check_losses(losses, coefficients.shape[0], "inner_loss"), coefficients)
        if regularizer is None:
            return total
        return total + check_scalar(regularizer(params, meta_params), "regularizer")

    return objective


def unrolled(
    inner_loss: Loss,
    init: Init,
    optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
    num_steps: int,
    *,
    regularizer: Regularizer | None = None,
    remat: bool = False,
) -> Adaptation:
    """A fixed number of optimiser steps on the inner objective, as in MAML (Finn et al., ICML 2017).

    Args:
      inner_loss: (params, meta_params, support) -> losses `[n_support]`.
      init: (meta_params, support) -> params to start from.
      optimizer: an optax optimiser, or a function of meta_params that returns one, for learned learning rates
        (Meta-SGD, Li et al., 2017). Adam divides by √(v + eps_root): give it eps_root > 0, without which its derivative
        is infinite where a gradient is exactly 0.
      num_steps: steps, at least 0.
      regularizer: (params, meta_params) -> scalar, added to the inner objective.
      remat: recompute each step's intermediates in reverse mode instead of storing them.

    Raises:
      TypeError: a function that cannot be called so.
      ValueError: `num_steps` is negative or no integer; at trace time, losses that are not one per example.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_steps: expected a non-negative integer, got {num_steps!r}")
    _check_functions(inner_loss, init, regularizer)
    objective = _inner_objective(inner_loss, regularizer)

    def adapt(meta_params: PyTree, support: PyTree, coefficients: Array) -> PyTree:
        chosen: Any = optimizer(meta_params) if callable(optimizer) else optimizer
        transform = optax.with_extra_args_support(chosen)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, state = carry

            def value_fn(params: PyTree) -> Array:
                return objective(params, meta_params, support, coefficients)

            value, grad = jax.value_and_grad(value_fn)(params)
            updates, state = transform.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), None

        params = init(meta_params, support)
        check_floating(params, "init(meta_params, support)")
        carry = (params, transform.init(params))
        return jax.lax.scan(jax.checkpoint(step) if remat else step, carry, length=num_steps)[0][0]

    return Adaptation(adapt)


def implicit(
    inner_loss: Loss,
    init: Init,
    *,
    minimizer: Minimizer | None = None,
    linear_solver: solvers.Solver | None = None,
    regularizer: Regularizer | None = None,
) -> Adaptation:
    """The minimiser of the inner objective, differentiated by the implicit function theorem.

    dθ/dλ = − H_in⁻¹ ∂_λ∂_θ L_in with H_in = ∂²_θ L_in, to any order, in forward and reverse mode. Neither the
    minimiser's steps nor the linear solver's are differentiated, and θ does not depend on `init`.

    Args:
      inner_loss: (params, meta_params, support) -> losses `[n_support]`.
      init: (meta_params, support) -> params to start from.
      minimizer: (objective, params) -> params, as made by `newton_cg` (the default), `optax_minimizer` or `given`.
      linear_solver: any of `metainfluence.solvers`, for systems in H_in; its `init` runs once per task and λ, whatever
        the number of systems. None: conjugate gradients to a relative residual of eps^(3/4), 1.8e-12 in float64.
      regularizer: (params, meta_params) -> scalar, added to the inner objective, as iMAML's proximal term.

    Raises:
      TypeError: a function that cannot be called so.
      ValueError: at trace time, losses that are not one per example, or an `init` that depends on meta_params where the
        inner objective does not, so that dθ/dλ is exactly zero.
    """
    _check_functions(inner_loss, init, regularizer)
    minimize = newton_cg() if minimizer is None else minimizer
    objective = _inner_objective(inner_loss, regularizer)
    gradient = jax.grad(objective)

    def inner_losses(params: PyTree, operands: tuple[PyTree, PyTree, Array]) -> operators.Losses:
        meta_params, support, coefficients = operands
        return operators.Losses(
            function=lambda params, data: inner_loss(params, meta_params, data),
            point=params,
            data=jax.tree.map(lambda leaf: leaf[None], support),
            coefficients=coefficients[None],
            regularizer=None if regularizer is None else lambda params: regularizer(params, meta_params),
        )

    @jax.custom_jvp
    def minimum(params: PyTree, meta_params: PyTree, support: PyTree, coefficients: Array) -> PyTree:
        return minimize(lambda params: objective(params, meta_params, support, coefficients), params)

    @minimum.defjvp
    def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
        operands, operand_tangents = primals[1:], tangents[1:]
        params = minimum(*primals)
        _, rate = jax.jvp(lambda *operands: gradient(params, *operands), operands, operand_tangents)

        def matvec(vector: PyTree) -> PyTree:
            return jax.jvp(lambda params: gradient(params, *operands), (params,), (vector,))[1]

        # The factorisation is a fixed tool of the solve: no derivative runs through it.
        fixed = jax.lax.stop_gradient((params, operands))
        _, product = jax.linearize(lambda params: gradient(params, *fixed[1]), fixed[0])
        operator = dataclasses.replace(
            operators.from_matvec(product, params), losses=jax.tree_util.Partial(inner_losses, *fixed)
        )
        solver = solvers.cg(tol=accurate_tol(params)) if linear_solver is None else linear_solver
        state = solver.init(operator)

        def solve(_: Any, rhs: PyTree) -> PyTree:
            return solvers.solution_of(solver, operator, state, rhs)

        change = jax.lax.custom_linear_solve(matvec, jax.tree.map(jnp.negative, rate), solve, symmetric=True)
        return params, change

    def adapt(meta_params: PyTree, support: PyTree, coefficients: Array) -> PyTree:
        params = init(meta_params, support)
        check_floating(params, "init(meta_params, support)")
        if _depends(lambda m: init(m, support), meta_params) and not _depends(
            lambda m: gradient(jax.lax.stop_gradient(params), m, support, coefficients), meta_params
        ):
            raise ValueError(
                "init: depends on meta_params where the inner objective does not; an implicit minimum does not depend "
                "on where it was started from, so its derivative in meta_params is exactly zero. Expected a term of "
                "the inner objective with meta_params (for a learned initialisation, a proximal regularizer as in "
                "iMAML), or adaptation.unrolled"
            )
        return minimum(jax.lax.stop_gradient(params), meta_params, support, coefficients)

    def inner_gradient_norm(params: PyTree, meta_params: PyTree, support: PyTree, coefficients: Array) -> Array:
        return gradient_norm(lambda params: gradient(params, meta_params, support, coefficients), params)

    return Adaptation(adapt, inner_gradient_norm)


def closed_form(fn: Callable[[PyTree, PyTree, Array], PyTree]) -> Adaptation:
    """Any differentiable function: ridge heads (R2D2), prototypes (ProtoNet), a user's own program.

    Systems of equations in it are best solved by `linear_solve`, see there.

    Args:
      fn: (meta_params, support, coefficients `[n_support]`) -> params. Removal of support examples works through the
        coefficients, so `fn` must weigh each example by its own; they sum to 1 at unit weights.

    Raises:
      TypeError: `fn` cannot be called so.
    """
    check_function("fn", fn, "(meta_params, support, coefficients) -> params", *"msc")
    return Adaptation(fn)


def _depends(fn: Callable[[PyTree], PyTree], point: PyTree) -> bool:
    """Whether the derivative of `fn` is anything but zero by its very structure."""

    def directional(tangent: PyTree) -> PyTree:
        return jax.jvp(fn, (point,), (tangent,))[1]

    jaxpr = jax.make_jaxpr(directional)(point).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(atom, "val") and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return any(not hasattr(atom, "val") and atom in reached for atom in jaxpr.outvars)


def accurate_tol(tree: PyTree) -> float:
    """eps^(3/4) of the lowest precision in `tree`: what a well-conditioned solve can reach with room to spare."""
    return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(tree)) ** 0.75


class _Newton(NamedTuple):
    params: PyTree
    value: Array
    grad: PyTree
    norm: Array
    steps_left: Array
    stalled: Array


def newton_cg(*, tol: float | None = None, max_steps: int = 100) -> Minimizer:
    """Truncated Newton: directions by conjugate gradients, lengths by backtracking (Nocedal and Wright, 2006, ch. 7).

    Under vmap every task stops on its own.

    Args:
      tol: stops at ‖∇‖ ≤ tol · max(1, ‖∇ at the start‖); None for eps^(3/4), 1.8e-12 in float64.
      max_steps: Newton steps allowed.

    Raises:
      ValueError: `tol` or `max_steps` not positive.
    """
    if tol is not None:
        check_positive("tol", tol)
    check_positive("max_steps", max_steps, integer=True)

    def minimize(objective: Objective, params: PyTree) -> PyTree:
        evaluate = jax.value_and_grad(objective)
        domain = operators.Domain.of(params)
        eps = jnp.finfo(domain.dtype).eps
        goal = accurate_tol(params) if tol is None else tol

        def start() -> _Newton:
            value, grad = evaluate(params)
            return _Newton(params, value, grad, optax.tree.norm(grad), jnp.int32(max_steps), jnp.bool_(False))

        first = start()
        stop = goal * jnp.maximum(1, first.norm)

        def running(carry: _Newton) -> Array:
            active = (carry.norm > stop) & jnp.isfinite(carry.norm) & jnp.isfinite(carry.value)
            return active & (carry.steps_left > 0) & ~carry.stalled

        def step(carry: _Newton) -> _Newton:
            _, product = jax.linearize(jax.grad(objective), carry.params)
            operator = operators.from_matvec(product, carry.params)
            # The forcing term of Eisenstat and Walker makes the convergence superlinear.
            forcing = jnp.clip(jnp.sqrt(carry.norm / jnp.maximum(1, first.norm)), 1e-4, 0.1)
            downhill = jax.tree.map(jnp.negative, carry.grad)
            direction = solvers.solution_of(solvers.cg(tol=forcing), operator, None, downhill)
            length = optax.tree.norm(direction)
            unusable = ~jnp.isfinite(length) | (length == 0)
            direction = optax.tree.where(unusable, downhill, direction)
            slope = optax.tree.vdot(carry.grad, direction)
            # Near the minimum differences of values drown in rounding, which must not stop the last steps.
            rounding = 10 * eps * jnp.abs(carry.value)

            def at(length: Array) -> PyTree:
                return jax.tree.map(lambda p, d: p + length.astype(p.dtype) * d, carry.params, direction)

            def too_long(length: Array) -> Array:
                value = objective(at(length))
                enough = value <= carry.value + 1e-4 * length * slope + rounding
                return ~enough & (length > 1e-10)

            length = jax.lax.while_loop(too_long, lambda length: length / 2, jnp.ones((), carry.value.dtype))
            moved = at(length)
            value, grad = evaluate(moved)
            norm = optax.tree.norm(grad)
            stalled = ~(norm < carry.norm) & (value >= carry.value - rounding)
            kept, value, grad, norm = optax.tree.where(
                stalled, (carry.params, carry.value, carry.grad, carry.norm), (moved, value, grad, norm)
            )
            return _Newton(kept, value, grad, norm, carry.steps_left - 1, stalled)

        last = jax.lax.while_loop(running, step, first)
        # Where the objective is NaN there is no minimum, and the start must not pass for one.
        found = jnp.isfinite(last.value) & jnp.isfinite(last.norm)
        return jax.tree.map(lambda leaf: jnp.where(found, leaf, jnp.nan), last.params)

    return minimize


def optax_minimizer(optimizer: optax.GradientTransformation, num_steps: int, *, tol: float | None = None) -> Minimizer:
    """Up to `num_steps` steps of an optax optimiser, its L-BFGS included.

    Args:
      optimizer: an optax optimiser.
      num_steps: steps allowed.
      tol: stops earlier at ‖∇‖ ≤ tol; None runs all steps.

    Raises:
      ValueError: `num_steps` or `tol` not positive.
    """
    check_positive("num_steps", num_steps, integer=True)
    if tol is not None:
        check_positive("tol", tol)
    transform = optax.with_extra_args_support(optimizer)

    def minimize(objective: Objective, params: PyTree) -> PyTree:
        evaluate = jax.value_and_grad(objective)

        def running(carry: Any) -> Array:
            _, _, (_, grad), steps_left = carry
            # Not `>`, which NaN would end, with a start that passes for a minimum.
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
    """Takes what `init` returns for the minimum: parameters that the user's own loop has already adapted.

    How good a minimum they are is reported as `SolveInfo.inner_gradient_norm`. `init` sees no weights, so results at
    weights other than 1 on the support set are not re-adapted.
    """
    return lambda objective, params: params
