"""Adaptation: (meta-parameters λ, support set, coefficients) → task parameters θ.

The inner objective is Σ_j c_j ℓ_in(θ, λ; support_j) + r(θ, λ), where the coefficients c_j = a_j u_j hold the data
weights and the normaliser 1/n, and are 0 on padding. θ and λ are any two pytrees: a head, a context vector, a full copy
of the network, learned learning rates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from metainfluence import _lapack, operators, solvers
from metainfluence._checks import calling, check_floating, check_function, check_losses, check_scalar
from metainfluence._outline import closes_over_traced, outline, refuse_differentiated
from metainfluence.data import weighted_sum
from metainfluence.minimizers import (
    Minimizer,
    accurate_tol,
    given,
    gradient_norm,
    newton,
    newton_cg,
    optax_minimizer,
)

__all__ = [
    "Adaptation",
    "Minimizer",
    "closed_form",
    "given",
    "implicit",
    "linear_solve",
    "newton",
    "newton_cg",
    "optax_minimizer",
    "unrolled",
]

Loss = Callable[[PyTree, PyTree, PyTree], Float[Array, " n"]]
Init = Callable[[PyTree, PyTree], PyTree]
Regularizer = Callable[[PyTree, PyTree], Float[Array, ""]]

linear_solve = _lapack.linear_solve

# Parameters of a task up to which an accelerator factorises their Hessian.
DENSE_SIZE = 512


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """A way to adapt, callable as (meta_params, support, coefficients `[n_support]`) -> params.

    Attributes:
      adapt: the map itself, differentiable in meta_params and coefficients.
      inner_gradient_norm: (params, meta_params, support, coefficients) -> ‖∂_θ L_in‖, or infinity where params are
        found to be near no minimum; None where they are not meant to be a minimum.
      measure: (meta_params, support, coefficients) -> (params, that norm), by one linearisation for both; None computes
        one after the other.
      step_norms: (meta_params, support, coefficients) -> ‖∂_θ L_in‖ before each step of an unrolled loop; else None.
      known: whether it is known what params are meant to be; False for a program that may or may not solve an inner
        problem.
    """

    adapt: Callable[[PyTree, PyTree, Array], PyTree]
    inner_gradient_norm: Callable[[PyTree, PyTree, PyTree, Array], Array] | None = None
    measure: Callable[[PyTree, PyTree, Array], tuple[PyTree, Array]] | None = None
    step_norms: Callable[[PyTree, PyTree, Array], Array] | None = None
    known: bool = True

    def __call__(self, meta_params: PyTree, support: PyTree, coefficients: Float[Array, " n_support"]) -> PyTree:
        """Adapts."""
        return self.adapt(meta_params, support, coefficients)

    def measured(self, meta_params: PyTree, support: PyTree, coefficients: Array) -> tuple[PyTree, Array | None]:
        """Adapts, and measures how far the result is from an inner minimum; None where it is not meant to be one.

        The norm is not differentiated.
        """
        if self.measure is not None:
            return self.measure(meta_params, support, coefficients)
        params = self.adapt(meta_params, support, coefficients)
        if self.inner_gradient_norm is None:
            return params, None
        frozen = jax.lax.stop_gradient((params, meta_params))
        return params, self.inner_gradient_norm(*frozen, support, jax.lax.stop_gradient(coefficients))


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

    return outline(inner_loss, regularizer)(objective)


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
        (Meta-SGD, Li et al., 2017). Adam divides by √(v + eps_root): give it eps_root > 0, or its derivative is
        infinite where a gradient is exactly 0.
      num_steps: steps, at least 0.
      regularizer: (params, meta_params) -> scalar, added to the inner objective.
      remat: recompute each step's intermediates in reverse mode instead of storing them.

    Raises:
      TypeError: a function that does not take these arguments.
      ValueError: `num_steps` is negative or not an integer; at trace time, losses that are not one per example.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> import optax
      >>> squares = lambda params, meta_params, support: (params - support) ** 2
      >>> start = lambda meta_params, support: meta_params
      >>> adapt = mi.adaptation.unrolled(squares, start, optax.sgd(0.25), num_steps=2)
      >>> data = jnp.asarray([0.0, 2.0]), jnp.asarray([0.5, 0.5])  # each step halves the distance from the mean, 1
      >>> float(adapt(jnp.asarray(5.0), *data)), float(jax.grad(adapt)(5.0, *data))
      (2.0, 0.25)
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_steps: expected a non-negative integer, got {num_steps!r}")
    _check_functions(inner_loss, init, regularizer)
    objective = _inner_objective(inner_loss, regularizer)

    def steps(meta_params: PyTree, support: PyTree, coefficients: Array, *, norms: bool) -> tuple[PyTree, Any]:
        chosen: Any = optimizer(meta_params) if callable(optimizer) else optimizer
        transform = optax.with_extra_args_support(chosen)

        def step(carry: Any, _: None) -> tuple[Any, Any]:
            params, state = carry

            def value_fn(params: PyTree) -> Array:
                return objective(params, meta_params, support, coefficients)

            value, grad = jax.value_and_grad(value_fn)(params)
            updates, state = transform.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), optax.tree.norm(grad) if norms else None

        params = init(meta_params, support)
        check_floating(params, "init(meta_params, support)")
        carry = (params, transform.init(params))
        (params, _), found = jax.lax.scan(jax.checkpoint(step) if remat else step, carry, length=num_steps)
        return params, found

    def adapt(meta_params: PyTree, support: PyTree, coefficients: Array) -> PyTree:
        return steps(meta_params, support, coefficients, norms=False)[0]

    def step_norms(meta_params: PyTree, support: PyTree, coefficients: Array) -> Array:
        found: Array = steps(meta_params, support, coefficients, norms=True)[1]
        return found

    return Adaptation(adapt, step_norms=step_norms)


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
      minimizer: (objective, params) -> params, as made by `newton_cg` (the default), `newton`, `optax_minimizer` or
        `given`.
      linear_solver: any of `metainfluence.solvers`, for systems with H_in. Its `init` runs once per task and λ,
        whatever the number of systems. None uses conjugate gradients to a relative residual of eps^(3/4), 1.8e-12 in
        float64. On an accelerator, for up to 512 parameters, they start from the solution by
        `dense(method="cholesky")`: a few large operations instead of many small ones.
      regularizer: (params, meta_params) -> scalar, added to the inner objective, such as iMAML's proximal term.

    The losses may close over values that are traced and differentiated, as where a problem is made inside a function.

    Raises:
      TypeError: a function that does not take these arguments; a minimiser or solver that closes over a value that is
        being differentiated, on which the minimum does not depend.
      ValueError: at trace time, losses that are not one per example, or an `init` that depends on meta_params where the
        inner objective does not, so that dθ/dλ is exactly zero.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> squares = lambda params, meta_params, support: (params - support) ** 2
      >>> pull = lambda params, meta_params: (params - meta_params) ** 2
      >>> adapt = mi.adaptation.implicit(squares, lambda meta_params, support: meta_params, regularizer=pull)
      >>> data = jnp.asarray([0.0, 2.0]), jnp.asarray([0.5, 0.5])  # the minimum is halfway from λ to the mean, 1
      >>> round(float(adapt(5.0, *data)), 3), round(float(jax.grad(adapt)(5.0, *data)), 3)
      (3.0, 0.5)
    """
    _check_functions(inner_loss, init, regularizer)
    refuse_differentiated("minimizer", minimizer)
    refuse_differentiated("linear_solver", linear_solver)
    minimize = newton_cg() if minimizer is None else minimizer
    objective = _inner_objective(inner_loss, regularizer)
    lifted = closes_over_traced((inner_loss, regularizer), set())

    def inner_losses(params: PyTree, operands: tuple[PyTree, PyTree, Array]) -> operators.Losses:
        meta_params, support, coefficients = operands
        return operators.Losses(
            function=lambda params, data: inner_loss(params, meta_params, data),
            point=params,
            data=jax.tree.map(lambda leaf: leaf[None], support),
            coefficients=coefficients[None],
            regularizer=None if regularizer is None else lambda params: regularizer(params, meta_params),
        )

    outlined = outline(inner_loss, init, regularizer, minimize, linear_solver)
    minima = None if lifted else _Minima(objective, minimize, linear_solver, outlined, inner_losses)

    def prepared(params: PyTree, *operands: Any) -> tuple[_Minima, tuple[Any, ...]]:
        """The minima of the inner objective, and all they depend on, including traced values that it closes over."""
        if minima is not None:
            return minima, operands
        # A function with a custom derivative may not close over a value that is differentiated.
        converted, values = jax.closure_convert(objective, params, *operands)
        return _Minima(converted, minimize, linear_solver, outlined, None), (*operands, *values)

    def start(meta_params: PyTree, support: PyTree, coefficients: Array) -> PyTree:
        params = init(meta_params, support)
        check_floating(params, "init(meta_params, support)")
        if _depends(lambda m: init(m, support), meta_params) and not _depends(
            lambda m: jax.grad(objective)(jax.lax.stop_gradient(params), m, support, coefficients), meta_params
        ):
            raise ValueError(
                "init: depends on meta_params where the inner objective does not; an implicit minimum does not depend "
                "on where it was started from, so its derivative in meta_params is exactly zero. Expected a term of "
                "the inner objective with meta_params (for a learned initialisation, a proximal regularizer as in "
                "iMAML), or adaptation.unrolled"
            )
        return jax.lax.stop_gradient(params)

    def adapt(meta_params: PyTree, support: PyTree, coefficients: Array) -> PyTree:
        first = start(meta_params, support, coefficients)
        found, operands = prepared(first, meta_params, support, coefficients)
        return found.minimum(first, *operands)

    def measure(meta_params: PyTree, support: PyTree, coefficients: Array) -> tuple[PyTree, Array]:
        first = start(meta_params, support, coefficients)
        found, operands = prepared(first, meta_params, support, coefficients)
        return found.measured_minimum(first, *operands)

    def inner_gradient_norm(params: PyTree, meta_params: PyTree, support: PyTree, coefficients: Array) -> Array:
        found, operands = prepared(params, meta_params, support, coefficients)
        slope, product = found.linearised(params, operands)
        return gradient_norm(slope, product, params)

    return Adaptation(adapt, inner_gradient_norm, measure)


class _Minima:
    """The minimum of (params, *operands) -> scalar as a function of the operands, by the implicit function theorem.

    Args:
      objective: the function.
      minimize: its minimiser.
      linear_solver: as in `implicit`.
      outlined: decorator that keeps a function separate in the program.
      losses: (params, operands) -> `Losses` behind the objective, for preconditioners; None where not known.
    """

    def __init__(
        self,
        objective: Callable[..., Array],
        minimize: Minimizer,
        linear_solver: solvers.Solver | None,
        outlined: Callable[[Any], Any],
        losses: Callable[[PyTree, Any], operators.Losses] | None,
    ):
        gradient = outlined(jax.grad(objective))

        @outlined
        def linearised(params: PyTree, operands: Any) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
            """The gradient, and its derivative in params as a pytree; neither is differentiated further."""
            params, operands = jax.lax.stop_gradient((params, operands))
            return jax.linearize(lambda params: gradient(params, *operands), params)

        @jax.custom_jvp
        def minimum(start: PyTree, *operands: Any) -> PyTree:
            return minimize(lambda params: objective(params, *operands), start)

        @jax.custom_jvp
        def measured_minimum(start: PyTree, *operands: Any) -> tuple[PyTree, Array]:
            params = minimum(start, *operands)
            slope, product = linearised(params, operands)
            return params, gradient_norm(slope, product, params)

        def rate(params: PyTree, product: Callable[[PyTree], PyTree], operands: Any, tangents: Any) -> PyTree:
            """The minimum's derivative along tangents of the operands."""
            mixed = jax.jvp(lambda *operands: gradient(params, *operands), operands, tangents)[1]

            def matvec(vector: PyTree) -> PyTree:
                return jax.jvp(lambda params: gradient(params, *operands), (params,), (vector,))[1]

            operator = operators.from_matvec(Partial(_apply, product), params)
            if losses is not None:
                fixed = jax.lax.stop_gradient((params, operands))
                operator = dataclasses.replace(operator, losses=Partial(losses, *fixed))
            solver = usual_linear_solver(params, jax.default_backend()) if linear_solver is None else linear_solver
            state = solver.init(operator)

            def solve(_: Any, rhs: PyTree) -> PyTree:
                return solvers.solution_of(solver, operator, state, rhs)

            return jax.lax.custom_linear_solve(matvec, jax.tree.map(jnp.negative, mixed), solve, symmetric=True)

        @minimum.defjvp
        def _(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
            params, operands = minimum(*primals), primals[1:]
            return params, rate(params, linearised(params, operands)[1], operands, tangents[1:])

        @measured_minimum.defjvp
        def _(primals: Any, tangents: Any) -> tuple[tuple[PyTree, Array], tuple[PyTree, Array]]:
            params, operands = minimum(*primals), primals[1:]
            slope, product = linearised(params, operands)
            norm = gradient_norm(slope, product, jax.lax.stop_gradient(params))
            return (params, norm), (rate(params, product, operands, tangents[1:]), jnp.zeros_like(norm))

        self.linearised, self.minimum, self.measured_minimum = linearised, minimum, measured_minimum


def usual_linear_solver(params: PyTree, backend: str) -> solvers.Solver:
    """The solver for systems with the inner Hessian where the user names none."""
    iterative = solvers.cg(tol=accurate_tol(params))
    if backend == "cpu" or operators.Domain.of(params).size > DENSE_SIZE:
        return iterative
    direct = solvers.dense(method="cholesky")

    def solve(operator: operators.Operator, state: Any, rhs: PyTree, x0: PyTree | None = None) -> tuple[PyTree, Any]:
        found = direct.solve(operator, state, rhs)[0] if x0 is None else x0
        # Where the Hessian has flat directions there is no factor, and conjugate gradients start from 0.
        known = jnp.all(jnp.isfinite(operator.domain.ravel(found)))
        guess = jax.tree.map(lambda leaf: jnp.where(known, leaf, 0), found)
        return iterative.solve(operator, None, rhs, guess)

    return solvers.Solver(direct.init, solve)


# Partial(linear) of a linear map that is itself a Partial would treat its arrays as constants.
def _apply(linear: Callable[[PyTree], PyTree], vector: PyTree) -> PyTree:
    return linear(vector)


def closed_form(
    fn: Callable[[PyTree, PyTree, Array], PyTree],
    *,
    inner_loss: Loss | None = None,
    regularizer: Regularizer | None = None,
) -> Adaptation:
    """Any differentiable function: ridge heads (R2D2), prototypes (ProtoNet), a user's own program or solver.

    Systems of equations in it are best solved by `linear_solve`.

    Args:
      fn: (meta_params, support, coefficients `[n_support]`) -> params. Removal of support examples works through the
        coefficients, so `fn` must weight each example by its coefficient. They sum to 1 at unit weights.
      inner_loss: (params, meta_params, support) -> losses `[n_support]`; `fn` is meant to return the minimum of their
        weighted sum. How near it comes is reported as `SolveInfo.inner_gradient_norm`. None where `fn` returns no
        minimum; the norm is then None, unknown.
      regularizer: (params, meta_params) -> scalar, added to the inner objective.

    Raises:
      TypeError: a function that does not take these arguments.
      ValueError: a `regularizer` without `inner_loss`; at trace time, losses that are not one per example.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: m * (coefficients @ support))
      >>> support = jnp.asarray([1.0, 3.0])
      >>> float(adapt(5.0, support, jnp.asarray([0.5, 0.5]))), float(adapt(5.0, support, jnp.asarray([0.5, 0.0])))
      (10.0, 2.5)
    """
    check_function("fn", fn, "(meta_params, support, coefficients) -> params", *"msc")
    adapt = outline(fn)(lambda *operands: fn(*operands))
    if inner_loss is None:
        if regularizer is not None:
            raise ValueError("regularizer: expected None without inner_loss, to which it is added")
        return Adaptation(adapt, known=False)
    _check_functions(inner_loss, lambda meta_params, support: None, regularizer)
    gradient = jax.grad(_inner_objective(inner_loss, regularizer))

    def inner_gradient_norm(params: PyTree, *operands: Any) -> Array:
        slope, product = jax.linearize(lambda params: gradient(params, *operands), params)
        return gradient_norm(slope, product, params)

    return Adaptation(adapt, inner_gradient_norm)


def _depends(fn: Callable[[PyTree], PyTree], point: PyTree) -> bool:
    """Whether the derivative of `fn` can be other than zero, judged by the structure of its program."""

    def directional(tangent: PyTree) -> PyTree:
        return jax.jvp(fn, (point,), (tangent,))[1]

    jaxpr = jax.make_jaxpr(directional)(point).jaxpr
    reached = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(atom, "val") and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return any(not hasattr(atom, "val") and atom in reached for atom in jaxpr.outvars)
