"""λ*(w), the minimum of F at the weights w, by the implicit function theorem: dλ*/dw = − H⁻¹ ∂_w D_λF."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from metainfluence._checks import check_finite_floats, leaf_name, maker
from metainfluence._spoilt import Spoilt, solutions_of
from metainfluence.curvature import Curvature
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.operators import Domain, Operator, flat_norm
from metainfluence.problem import Bilevel, check_meta_params
from metainfluence.response._damping import RANK, rule, rule_of
from metainfluence.response._options import Options
from metainfluence.response._response import Influence, leading_axis
from metainfluence.response._sums import Expansion
from metainfluence.solvers import SolveInfo, Solver


class OptimumInfo(NamedTuple):
    """What was found when the response was made.

    Attributes:
      outer_gradient_norm: ‖D_λF‖, how far λ is from the stationary point that the formula assumes.
      inner_gradient_norm: max over tasks of ‖∂_θ L_in‖, see `SolveInfo`.
      damping: what was added to every eigenvalue of H.
      num_matvecs: products with H used to choose the damping.
      meta_params_norm: ‖λ‖.
      working_eps: machine epsilon of the lowest precision in which the losses are computed.
    """

    outer_gradient_norm: Float[Array, ""]
    inner_gradient_norm: Float[Array, ""] | None
    damping: Float[Array, ""]
    num_matvecs: Int[Array, ""]
    meta_params_norm: Float[Array, ""]
    working_eps: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Optimum:
    """The response of a stationary point; made by `optimum`, a pytree that can pass through jit.

    Attributes:
      meta_params: λ.
      weights: w.
      info: what was found when it was made.
    """

    expansion: Expansion
    info: OptimumInfo
    state: Any
    solver: Solver = dataclasses.field(metadata={"static": True})
    vectors_at_once: int | None = dataclasses.field(metadata={"static": True})

    @property
    def meta_params(self) -> PyTree:
        """λ."""
        return self.expansion.meta_params

    @property
    def weights(self) -> Weights:
        """The weights w at which λ is treated as the optimum."""
        return self.expansion.given_weights

    @property
    def tasks(self) -> Task:
        """The tasks."""
        return self.expansion.tasks

    @property
    def spoilt(self) -> Spoilt | None:
        """What has no derivative; None if nothing."""
        return self.expansion.spoilt

    @property
    def operator(self) -> Operator:
        """H, damping included."""
        return self.expansion.operator.damped(self.info.damping)

    def jvp(self, direction: Weights) -> Influence:
        """dλ*/dw along a direction in w: λ + delta predicts λ at w + direction.

        Args:
          direction: shaped like the weights, or with a leading axis for several.

        Raises:
          TypeError: a direction that is not a `Weights`.
          ValueError: shapes that are not the weights', or numbers that are not finite.
        """
        many = isinstance(direction, Weights) and jnp.ndim(direction.task) == jnp.ndim(self.weights.task) + 1
        direction = _direction(direction, self.weights, many)
        if not many:
            return Influence(*self.solve(jax.tree.map(jnp.negative, self.expansion.mixed(direction))))
        mixed = jax.vmap(self.expansion.mixed)(direction)
        return Influence(*self.solve_many(jax.tree.map(jnp.negative, mixed)))

    def vjp(self, slope: PyTree) -> tuple[Weights, SolveInfo]:
        """dφ/dw for ∇φ: one solve, then the transposed mixed derivative, for all data at once.

        Args:
          slope: ∇φ, a pytree like λ, or with a leading axis for several targets, which are solved together.

        Returns:
          dφ/dw, and a report on the solve.

        Raises:
          ValueError: a slope whose structure or shapes are not λ's.
          TypeError: a slope of another dtype than λ.
        """
        many = leading_axis(slope, self.meta_params) if _same_structure(slope, self.meta_params) else None
        _check_slope(slope, self.meta_params, many)
        if many is None:
            solution, info = self.solve(slope)
            found = self.expansion.mixed_transposed(solution)
        else:
            solution, info = self.solve_many(slope)
            found = jax.vmap(self.expansion.mixed_transposed)(solution)
        return jax.tree.map(jnp.negative, found), info

    def solve(self, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
        """H⁻¹ times a pytree like λ."""
        return self._solved(rhs, many=False)

    def solve_many(self, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
        """H⁻¹ times pytrees on a leading axis, solved together: one batched product per step."""
        if self.solver.solve_many is not None and self.solver.shares:
            return self._solved(rhs, many=True)
        if self.vectors_at_once is None:
            return jax.vmap(self.solve)(rhs)
        return jax.lax.map(self.solve, rhs, batch_size=self.vectors_at_once)

    def _solved(self, rhs: PyTree, *, many: bool) -> tuple[PyTree, SolveInfo]:
        solution, info = _solve(self.solver, many, self.operator, self.state, rhs)
        solution = solutions_of(self.expansion.spoilt, rhs, solution, many)
        return solution, _with_point(info, self.info)


def _with_point(info: SolveInfo, at: OptimumInfo) -> SolveInfo:
    """The report on solves, with what is known of the point."""
    shape, inner = info.status.shape, at.inner_gradient_norm
    return info._replace(
        num_matvecs=info.num_matvecs + at.num_matvecs,
        outer_gradient_norm=jnp.broadcast_to(at.outer_gradient_norm, shape),
        inner_gradient_norm=None if inner is None else jnp.broadcast_to(inner, shape),
        damping=jnp.broadcast_to(at.damping, shape),
        meta_params_norm=jnp.broadcast_to(at.meta_params_norm, shape),
        working_eps=jnp.broadcast_to(at.working_eps, shape),
    )


def _info_of(expansion: Expansion, damping: Array, matvecs: Any) -> OptimumInfo:
    """What is known of a point once it is expanded and its damping chosen."""
    norm, length = flat_norm(expansion.gradient), flat_norm(expansion.meta_params)
    eps = jnp.asarray(expansion.working_eps, norm.dtype)
    return OptimumInfo(norm, expansion.inner_gradient_norm, damping, jnp.int32(matvecs), length, eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solve(solver: Solver, many: bool, operator: Operator, state: Any, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
    """A solve that is differentiated as the solution of its system, not through the solver's steps."""
    solve = solver.solve_many if many else solver.solve
    assert solve is not None
    return solve(operator, state, rhs)


@_solve.defjvp
def _(solver: Solver, many: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    operator, state, _ = primals
    solution, info = _solve(solver, many, *primals)
    change = _change(solver, many, operator, state, solution, tangents[0], tangents[2])
    return (solution, info), (change, jax.tree.map(_no_change, info))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _explore_and_solve(solver: Solver, operator: Operator, about: Any, rhs: PyTree) -> tuple[PyTree, SolveInfo, Array]:
    """As `_solve`, with the damping that the rule chooses along the way, which is treated as a constant."""
    assert solver.explore_and_solve is not None
    return solver.explore_and_solve(operator, RANK, lambda found: rule_of(found, *about).value, rhs)


@_explore_and_solve.defjvp
def _(solver: Solver, primals: Any, tangents: Any) -> tuple[Any, Any]:
    operator = primals[0]
    solution, info, damping = _explore_and_solve(solver, *primals)
    damped = operator.damped(damping)
    state = solver.init(damped)
    change = _change(solver, False, damped, state, solution, tangents[0], tangents[2])
    return (solution, info, damping), (change, *jax.tree.map(_no_change, (info, damping)))


def _change(
    solver: Solver, many: bool, operator: Operator, state: Any, solution: PyTree, moved: Operator, rhs: PyTree
) -> PyTree:
    """The solution's derivative: that of the operator and of the right-hand side, by one more solve."""

    def product(operator: Operator) -> PyTree:
        return (jax.vmap(operator.matvec) if many else operator.matvec)(solution)

    by_operator = jax.jvp(product, (operator,), (moved,))[1]
    return jax.lax.custom_linear_solve(
        jax.vmap(operator.matvec) if many else operator.matvec,
        jax.tree.map(jnp.subtract, rhs, by_operator),
        lambda _, rhs: _solve(solver, many, operator, state, rhs)[0],
        symmetric=True,
    )


def _no_change(leaf: Array) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.inexact)
    return jnp.zeros_like(leaf) if floating else np.zeros(leaf.shape, jax.dtypes.float0)


class OptimumAt(Protocol):
    """What `optimum` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Optimum:
        """The response at λ."""


@maker
def optimum(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> OptimumAt:
    """Makes (meta_params, tasks, weights=None) -> the response of λ*(w), the minimum of F, assumed to lie at λ.

    dλ*/dw = − H⁻¹ ∂_w D_λF (arXiv 2501.15963, §4). Making the response linearises the gradient map, chooses the damping
    and prepares the solver, once for all later calls.

    Args:
      problem: the problem.
      solver: one of `metainfluence.solvers`; None for `auto()`.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      damping: non-negative number added to every eigenvalue of H, or "auto" for the rule of `damping.auto`.
      batch_size: tasks per chunk, which bounds the memory; None for a choice by shapes alone.
      mesh: devices over which tasks are sharded, along all axes of the mesh; None leaves tasks where they are.
      hvp: how derivatives of gradients are taken, "forward_over_reverse" or "reverse_over_reverse", see `bilevel`; None
        for the problem's own, which by default is the first.
      precision: of matrix products, also the problem's, see `jax.default_matmul_precision`; None for JAX's setting.

    Raises:
      ValueError: as `total_hessian`; and for tasks, weights or meta_params that are malformed or not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> at = jax.jit(mi.optimum(problem))(jnp.asarray(2.0), tasks)
      >>> without_last = mi.Weights(jnp.asarray([0.0, 0.0, -1.0]), jnp.zeros((3, 0)), jnp.zeros((3, 1)))
      >>> round(float(at.meta_params + at.jvp(without_last).delta), 3)  # 2 + (2 − 5) / 3
      1.0
    """
    options = Options.of(
        problem,
        solver=solver,
        curvature=curvature,
        damping=damping,
        batch_size=batch_size,
        mesh=mesh,
        hvp=hvp,
        precision=precision,
    )

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Optimum:
        with options.traced():
            return optimum_at(options, *checked(meta_params, tasks, weights))

    return run


def checked(meta_params: PyTree, tasks: Task, weights: Weights | None) -> tuple[PyTree, Task, Weights]:
    """A point's arguments, checked; weights of 1 for None."""
    check_meta_params(meta_params)
    resolved = resolve_weights(weights, tasks)
    return jax.tree.map(jnp.asarray, meta_params), tasks, resolved


def optimum_at(options: Options, meta_params: PyTree, tasks: Task, weights: Weights, vectors: int = 1) -> Optimum:
    """The response for checked arguments, with room for some right-hand sides at once."""
    chunks = options.chunks(meta_params, tasks, vectors)
    expansion = options.expanded(meta_params, tasks, weights, chunks)
    about = (expansion.gradient, meta_params)
    damping, state, matvecs = _prepared(options.solver, options.damping, expansion.operator, about)
    return Optimum(expansion, _info_of(expansion, damping, matvecs), state, options.solver, chunks.vectors)


def solve_once(options: Options, expansion: Expansion, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
    """H⁻¹ times a pytree like λ, for a response that is used once."""
    about = (expansion.gradient, expansion.meta_params)
    solution, info, damping, matvecs = solve_alone(options.solver, options.damping, expansion.operator, about, rhs)
    solution = solutions_of(expansion.spoilt, rhs, solution, many=False)
    return solution, _with_point(info, _info_of(expansion, damping, matvecs))


def solve_alone(
    solver: Solver, damping: Any, operator: Operator, about: tuple[PyTree, PyTree], rhs: PyTree
) -> tuple[PyTree, SolveInfo, Array, int]:
    """One solve with an undamped operator, for tasks in memory and for tasks that are read.

    Where the solver can, the vectors that choose the damping and those that solve come from one loop, so that the
    program holds the product once. The numbers are the same as from making a response and calling it.

    Args:
      solver: of the system.
      damping: a number, or "auto".
      operator: H.
      about: D_λF and λ, for the rule of `damping="auto"`.
      rhs: a pytree like λ.

    Returns:
      Solution, report, damping, and products that the report does not count.
    """
    about = jax.lax.stop_gradient(about)
    if isinstance(damping, str) and solver.explore_and_solve is not None:
        return *_explore_and_solve(solver, operator, about, rhs), 0
    value, state, matvecs = _prepared(solver, damping, operator, about)
    return *_solve(solver, False, operator.damped(value), state, rhs), value, matvecs


def _prepared(solver: Solver, damping: Any, operator: Operator, about: tuple[PyTree, PyTree]) -> tuple[Array, Any, int]:
    """The damping, the solver's state for the damped operator, and the products that neither counts."""
    operator, about = jax.lax.stop_gradient((operator, about))
    matvecs = 0
    if isinstance(damping, str) and solver.explore is not None:
        state, found = solver.explore(operator, RANK)
        return jnp.asarray(rule_of(found, *about).value, operator.shift.dtype), jax.lax.stop_gradient(state), 0
    if isinstance(damping, str):
        damping, matvecs = rule(operator, *about).value, RANK
    damping = jnp.asarray(damping, operator.shift.dtype)
    return damping, jax.lax.stop_gradient(solver.init(operator.damped(jax.lax.stop_gradient(damping)))), matvecs


def _direction(direction: Any, weights: Weights, many: bool) -> Weights:
    if not isinstance(direction, Weights):
        raise TypeError(f"direction: expected metainfluence.Weights, got {type(direction).__name__}")
    lead = jnp.shape(direction.task)[:1] if many else ()
    for field, own in weights._asdict().items():
        value, expected = getattr(direction, field), (*lead, *own.shape)
        if jnp.shape(value) != expected:
            raise ValueError(f"direction.{field}: expected shape {expected}, got {jnp.shape(value)}")
        check_finite_floats(f"direction.{field}", value)
    return jax.tree.map(lambda d, w: jnp.asarray(d).astype(w.dtype), direction, weights)


def _same_structure(slope: PyTree, meta_params: PyTree) -> bool:
    ours: Any = jax.tree.structure(meta_params)
    return bool(jax.tree.structure(slope) == ours)


def _check_slope(slope: PyTree, meta_params: PyTree, many: int | None) -> None:
    domain = Domain.of(meta_params)
    domain.check("slope", slope if many is None else jax.eval_shape(lambda s: jax.tree.map(lambda x: x[0], s), slope))
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(slope), domain.leaves, strict=True):
        if jnp.result_type(leaf) != like.dtype:
            name = leaf_name("slope", path)
            raise TypeError(
                f"{name}: expected {like.dtype} as λ has, got {jnp.result_type(leaf)}; make the response anew"
            )
