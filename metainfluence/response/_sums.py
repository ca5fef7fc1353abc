"""Sums over tasks: the gradient, the linear map behind products and scores, and what a curvature adds.

Every formula is written here once, for one batch of tasks. `Sums` adds them up over tasks that are in memory, at once,
in chunks, or sharded; `metainfluence.scoring` adds up the same formulas over batches that it reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import at_own_precision
from metainfluence._chunks import Chunks, reduce_tasks
from metainfluence._outline import closes_over_traced
from metainfluence._spoilt import Spoilt, change_along, sensitivity_of
from metainfluence.curvature import Curvature, exact
from metainfluence.data import Task, Weights, coefficients, weighted_sum
from metainfluence.differentiation import REVERSE
from metainfluence.operators import Domain, FlatProduct, Losses, Operator, from_matvec
from metainfluence.problem import Bilevel, check_derivatives, knows_inner, meta_regularization, weighted_losses
from metainfluence.response._lean import dear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pull:
    """(vector like λ) -> (Hessian times vector, ∂_w ⟨gradient, vector⟩): a gradient map's pullback, as a pytree.

    Attributes:
      turned: the same map, leaf by leaf.
      domain: domain of λ.
      both: domain of λ and w together.
      outlined: whether it is a separate function in the program, which it cannot be with traced values in it.
    """

    turned: Callable[[PyTree], Any]
    domain: Domain = dataclasses.field(metadata={"static": True})
    both: Domain = dataclasses.field(metadata={"static": True})
    outlined: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, vector: PyTree) -> tuple[PyTree, Weights]:
        """Pulls a vector back."""
        return self.both.unravel(self.flat(self.domain.ravel(vector)))

    def flat(self, vector: Float[Array, " size"]) -> Array:
        """Both results, flat and one after the other."""
        pulled = _pulled if self.outlined else _pulled_in_place
        return pulled(self.domain, self.turned, vector)

    def product(self) -> FlatProduct:
        """The Hessian product alone."""
        return FlatProduct(Partial(_product, self), self.domain)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expansion:
    """The outer objective's gradient map (λ, w) ↦ D_λF to first order at a point.

    Attributes:
      meta_params: λ.
      tasks: stacked tasks.
      weights: w.
      objective: F.
      gradient: D_λF, a pytree like λ.
      inner_gradient_norm: max over tasks of ‖∂_θ L_in‖; None where it is not known.
      linear: the map's derivative as a pytree: in forward mode, or, in reverse mode, its pullback.
      shift: what the curvature adds to the diagonal.
      working_eps: machine epsilon of the lowest precision in which the losses are computed.
      spoilt: what was left out because it has no derivative; None if nothing.
    """

    meta_params: PyTree
    tasks: Task
    weights: Weights
    objective: Array
    gradient: PyTree
    inner_gradient_norm: Array | None
    linear: Callable[..., Any]
    shift: Array
    _sums: Sums = dataclasses.field(metadata={"static": True})
    working_eps: float = dataclasses.field(metadata={"static": True})
    spoilt: Spoilt | None = None

    @property
    def given_weights(self) -> Weights:
        """The weights as they were given, including those of tasks that were left out."""
        return self.weights if self.spoilt is None else self.spoilt.weights

    @property
    def chunks(self) -> Chunks:
        """What was worked on at once."""
        return self._sums.chunks

    @property
    def operator(self) -> Operator:
        """The derivative in λ: the Hessian, or what the curvature puts in its place."""
        data = (self.meta_params, self.tasks, self.weights)
        pull = _pull(self._sums.problem, self.linear, self.meta_params, self.weights)
        return dataclasses.replace(
            from_matvec(pull.product(), self.meta_params).damped(self.shift),
            losses=None if self._sums.problem.adapt is None else Partial(self._sums.outer_losses, *data),
            sample=Partial(self._sums.sample, *data),
            num_groups=self.weights.task.shape[0],
        )

    @property
    def mixed(self) -> Callable[[Weights], PyTree]:
        """(direction in w) -> ∂_w D_λF · direction, a pytree like λ; itself a pytree."""
        return Partial(_mixed, self)

    @property
    def mixed_transposed(self) -> Callable[[PyTree], Weights]:
        """(vector like λ) -> ∂_w ⟨D_λF, vector⟩; itself a pytree."""
        return Partial(_mixed_transposed, self)


def _mixed(at: Expansion, direction: Weights) -> PyTree:
    return change_along(at.spoilt, direction, at._sums.mixed(at, direction))


def _mixed_transposed(at: Expansion, vector: PyTree) -> Weights:
    return sensitivity_of(at.spoilt, at._sums.mixed_transposed(at, vector))


class Seen(NamedTuple):
    """What else evaluating a gradient yields; it is not differentiated.

    Attributes:
      objective: Σ_k w_k L_k of a batch, or F.
      inner_gradient_norm: ‖∂_θ L_in‖ of each task, or the largest.
    """

    objective: Array
    inner_gradient_norm: Array


def batch_gradient(
    problem: Bilevel, curvature: Curvature, at: PyTree, meta_params: PyTree, tasks: Task, weights: Weights
) -> tuple[PyTree, Seen]:
    """Σ_k w_k times the gradient of task k's surrogate built at `at`, and what else that yields."""

    def total(meta_params: PyTree) -> tuple[Array, Array]:
        def single(task: Task, weights: Weights) -> tuple[Array, Array]:
            return curvature.surrogate(problem, at, task, weights)(meta_params)

        losses, norms = jax.vmap(single)(tasks, weights)
        return weighted_sum(losses, weights.task), norms

    (value, norms), slope = jax.value_and_grad(total, has_aux=True)(meta_params)
    return slope, Seen(jax.lax.stop_gradient(value), norms)


def batch_pull(
    problem: Bilevel, curvature: Curvature, at: PyTree, tasks: Task, weights: Weights, *, lean: bool = False
) -> Pull:
    """The pullback of a batch's gradient map; what does not depend on the vector is computed once.

    With `lean`, only the expensive part of that is kept.
    """

    def gradient(meta_params: PyTree, weights: Weights) -> tuple[PyTree, Seen]:
        return batch_gradient(problem, curvature, at, meta_params, tasks, weights)

    stored = jax.checkpoint(gradient, policy=dear) if lean else gradient
    _, linear, _ = _linearised(problem, stored, at, weights)
    return _pull(problem, linear, at, weights)


def batch_shift(problem: Bilevel, curvature: Curvature, at: PyTree, tasks: Task, weights: Weights) -> Array:
    """Σ_k w_k s_k, see `Curvature.shift`; 0 without one."""
    if curvature.shift is None:
        return jnp.zeros((), jnp.result_type(*jax.tree.leaves(at)))
    shifts = jax.vmap(functools.partial(curvature.shift, problem, at))(tasks, weights)
    return weighted_sum(shifts, weights.task)


def batch_sensitivities(problem: Bilevel, at: PyTree, vector: PyTree, tasks: Task, weights: Weights) -> Weights:
    """∂_w ⟨Σ_k w_k D_λL_k, vector⟩."""
    return batch_pull(problem, exact(), at, tasks, weights)(vector)[1]


def mean(total: PyTree, count: Any, regularizer: PyTree) -> PyTree:
    """A sum over tasks as its mean, plus the share of the meta-regulariser, which is not a sum over tasks."""
    return jax.tree.map(lambda t, r: t / jnp.asarray(count, t.dtype) + r, total, regularizer)


def regularizer_gradient(problem: Bilevel, meta_params: PyTree) -> PyTree:
    """∇R."""
    return jax.grad(functools.partial(meta_regularization, problem))(meta_params)


def regularizer_product(problem: Bilevel, meta_params: PyTree, vector: PyTree) -> PyTree:
    """∇²R v."""
    return jax.vjp(functools.partial(regularizer_gradient, problem), meta_params)[1](vector)[0]


def gradient_map(problem: Bilevel, chunks: Chunks, mesh: Mesh | None = None) -> Callable[..., tuple[PyTree, Seen]]:
    """Makes (curvature, at, tasks, meta_params, weights) -> (∇F by the surrogates built at `at`, its `Seen`)."""

    def gradient(
        curvature: Curvature, at: PyTree, tasks: Task, meta_params: PyTree, weights: Weights
    ) -> tuple[PyTree, Seen]:
        def chunk(data: tuple[Task, Weights]) -> tuple[PyTree, Array]:
            slope, seen = batch_gradient(problem, curvature, at, meta_params, *data)
            return (slope, seen.objective), seen.inner_gradient_norm

        stored = jax.checkpoint(chunk, policy=dear) if chunks.lean else chunk
        (slope, value), norms = reduce_tasks(stored, (tasks, weights), chunks.tasks, mesh, keep=chunks.keep)
        count = weights.task.shape[0]
        slope = mean(slope, count, regularizer_gradient(problem, meta_params))
        rest = jax.lax.stop_gradient(meta_regularization(problem, meta_params))
        return slope, Seen(value / count + rest, jnp.max(norms))

    return gradient


class Sums(NamedTuple):
    """How sums over tasks in memory are taken, and what is made from them."""

    problem: Bilevel
    curvature: Curvature
    chunks: Chunks
    mesh: Mesh | None
    precision: str | None

    @at_own_precision
    def expand(self, meta_params: PyTree, tasks: Task, weights: Weights) -> Expansion:
        """The gradient map to first order, linearised once."""
        at, gradient = meta_params, gradient_map(self.problem, self.chunks, self.mesh)
        # The other curvatures apply forward mode to the adaptation itself, not to a gradient.
        eps = check_derivatives(self.problem, at, tasks, weights, twice=self.curvature.is_exact)
        slope, linear, seen = _linearised(
            self.problem, functools.partial(gradient, self.curvature, at, tasks), at, weights
        )
        if not self.curvature.keeps_gradient:
            slope, seen = gradient(exact(), at, tasks, at, weights)
        norm = seen.inner_gradient_norm if knows_inner(self.problem) else None
        shift = self.shift(at, tasks, weights)
        return Expansion(at, tasks, weights, seen.objective, slope, norm, linear, shift, self, eps)

    def shift(self, at: PyTree, tasks: Task, weights: Weights) -> Array:
        """(1/T) Σ_k w_k s_k, see `Curvature.shift`."""
        if self.curvature.shift is None:
            return jnp.zeros((), jnp.result_type(*jax.tree.leaves(at)))

        def chunk(data: tuple[Task, Weights]) -> tuple[Array, tuple[()]]:
            return batch_shift(self.problem, self.curvature, at, *data), ()

        total, _ = reduce_tasks(chunk, (tasks, weights), self.chunks.tasks, self.mesh)
        return total / weights.task.shape[0]

    @at_own_precision
    def mixed(self, at: Expansion, direction: Weights) -> PyTree:
        """∂_w D_λF · direction."""
        meta_params, tasks, weights = at.meta_params, at.tasks, at.weights
        if self.problem.hvp == REVERSE:
            # Mixed derivatives are symmetric: ∂_w D_λF · direction = D_λ ⟨∂_wF, direction⟩.
            slope = jax.grad(self.objective, argnums=2)
            return jax.vjp(lambda m: slope(m, tasks, weights), meta_params)[1](direction)[0]
        if self.curvature.is_exact:
            return at.linear(jax.tree.map(jnp.zeros_like, meta_params), direction)
        gradient = gradient_map(self.problem, self.chunks, self.mesh)
        by_weights = functools.partial(gradient, exact(), meta_params, tasks, meta_params)
        return jax.jvp(lambda w: by_weights(w)[0], (weights,), (direction,))[1]

    @at_own_precision
    def mixed_transposed(self, at: Expansion, vector: PyTree) -> Weights:
        """∂_w ⟨D_λF, vector⟩."""
        if self.curvature.is_exact:
            return _pull(self.problem, at.linear, at.meta_params, at.weights)(vector)[1]

        def chunk(data: tuple[Task, Weights]) -> tuple[tuple[()], Weights]:
            return (), batch_sensitivities(self.problem, at.meta_params, vector, *data)

        _, found = reduce_tasks(chunk, (at.tasks, at.weights), self.chunks.tasks, self.mesh)
        return jax.tree.map(lambda leaf: leaf / at.weights.task.shape[0], found)

    @at_own_precision
    def objective(self, meta_params: PyTree, tasks: Task, weights: Weights) -> Array:
        """F without the meta-regulariser, which sees no weights."""

        def chunk(data: tuple[Task, Weights]) -> tuple[Array, Array]:
            return weighted_losses(self.problem, meta_params, *data)

        return reduce_tasks(chunk, (tasks, weights), self.chunks.tasks, self.mesh)[0] / weights.task.shape[0]

    def sample(self, at: PyTree, tasks: Task, weights: Weights, number: int) -> Operator:
        """The operator of some tasks, chosen at random."""
        # A fixed key: the same λ and tasks give the same operator, and the order of the tasks means nothing.
        chosen = jax.random.permutation(jax.random.key(0), weights.task.shape[0])[:number]
        part = jax.tree.map(lambda leaf: leaf[chosen], (tasks, weights))
        return self.expand(at, *part).operator

    @at_own_precision
    def outer_losses(self, at: PyTree, tasks: Task, weights: Weights) -> Losses:
        """The query losses at adapted parameters that are held fixed."""
        adapt, query_losses = self.problem.adapt, self.problem.query_losses
        assert adapt is not None
        assert query_losses is not None
        params = jax.vmap(adapt, in_axes=(None, 0, 0))(at, tasks, weights)
        scale = (weights.task / weights.task.shape[0])[:, None]
        return Losses(
            function=lambda meta_params, data: query_losses(data[0], meta_params, data[1]),
            point=at,
            data=(params, tasks),
            coefficients=scale * jax.vmap(coefficients)(weights.query, tasks.query_mask),
            regularizer=self.problem.meta_regularizer,
        )


def expand(
    problem: Bilevel, curvature: Curvature, batch_size: int | None = None, mesh: Mesh | None = None
) -> Callable[[PyTree, Task, Weights], Expansion]:
    """Makes (meta_params, tasks, weights) -> Expansion, all tasks at once or in chunks of a size."""
    return Sums(problem, curvature, Chunks(batch_size), mesh, "highest").expand


def _linearised(
    problem: Bilevel, gradient: Callable[..., tuple[PyTree, Any]], at: PyTree, weights: Weights
) -> tuple[PyTree, Callable[..., Any], Any]:
    """A gradient map (λ, w) -> (gradient, aux): the gradient, its derivative as a pytree, and aux."""
    if problem.hvp == REVERSE:
        return jax.vjp(gradient, at, weights, has_aux=True)
    return jax.linearize(gradient, at, weights, has_aux=True)


def _pull(problem: Bilevel, linear: Callable[..., Any], at: PyTree, weights: Weights) -> Pull:
    """The pullback, in either mode."""
    turn, both = _call if problem.hvp == REVERSE else _transposed, Domain.of((at, weights))
    return Pull(Partial(turn, both, linear), Domain.of(at), both, not closes_over_traced(problem, set()))


# These take the linear map as an argument, since Partial(linear) of a map that is itself a Partial would treat its
# arrays as constants.


def _call(domain: Domain, pullback: Callable[[PyTree], Any], vector: PyTree) -> Any:
    del domain
    return pullback(vector)


def _transposed(domain: Domain, linear: Callable[..., PyTree], vector: PyTree) -> Any:
    return jax.linear_transpose(linear, *jax.tree.unflatten(domain.structure, domain.leaves))(vector)


def _pulled_in_place(domain: Domain, turned: Callable[[PyTree], Any], vector: Float[Array, " size"]) -> Array:
    """One function with one flat result, whichever part of it is needed.

    A program that multiplies in one place and scores in another then holds it once.
    """

    def flat(turned: Callable[[PyTree], Any], vector: Array) -> Array:
        leaves = jax.tree.leaves(tuple(turned(domain.unravel(vector))))
        widest = max((leaf.dtype for leaf in leaves), key=lambda dtype: jnp.finfo(dtype).bits)
        return jnp.concatenate([jnp.ravel(leaf).astype(widest) for leaf in leaves])

    # JAX drops from the outermost program what no result needs, but not from the bodies of loops. What the transpose
    # leaves behind is dropped here, so that the function is the same one wherever it is called.
    whole = jax.make_jaxpr(flat)(turned, vector)
    needed, _ = partial_eval.dce_jaxpr(whole.jaxpr, [True], instantiate=True)
    return jax.core.eval_jaxpr(needed, whole.consts, *jax.tree.leaves((turned, vector)))[0]


_pulled = jax.jit(_pulled_in_place)


def _product(pull: Pull, vector: Float[Array, " size"]) -> Float[Array, " size"]:
    return pull.flat(vector)[: pull.domain.size].astype(vector.dtype)
