"""The response of a training run of which a few checkpoints are known.

Between checkpoints the optimiser is treated as the gradient flow of a quadratic, with the curvature H and the mixed
derivative g = ∂_w D_λF of one checkpoint: over the time τ, dψ/dt = − P⁻¹ (H ψ + g) for ψ = dλ/dw, so that

    ψ ← P^-½ [exp(−τ H̃) P^½ ψ − φ(H̃) P^-½ g],    H̃ = P^-½ H P^-½,    φ(h) = (1 − exp(−τ h)) / h,

and, backwards along a target's slope v, dφ/dw −= gᵀ P^-½ φ(H̃) P^-½ v, then v ← P^½ exp(−τ H̃) P^-½ v. Negative
eigenvalues are treated as 0, where φ is τ: along them a run does not respond to the data, but departs.

Bae, Lin, Lorraine and Grosse, Training Data Attribution via Approximate Unrolled Differentiation, NeurIPS 2024, with
the total Hessian itself in place of its Kronecker factors. The dependence of P on the weights is left out, as in that
paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree

from metainfluence._checks import concrete, maker
from metainfluence._chunks import Chunks
from metainfluence._spoilt import Spoilt, change_along, sensitivity_of, without_spoilt
from metainfluence.curvature import Curvature, exact
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.operators import Domain, Operator, from_matvec
from metainfluence.problem import Bilevel, check_meta_params
from metainfluence.response._checkpoints import Checkpoint, check_checkpoints
from metainfluence.response._decay import Decay, decay
from metainfluence.response._options import Options
from metainfluence.response._response import Influence
from metainfluence.response._sums import Expansion, gradient_map
from metainfluence.solvers import SolveStatus

__all__ = ["Segments", "SegmentsInfo", "segments"]

RANK = 12
TOL = 1e-2


class SegmentsInfo(NamedTuple):
    """Report on a response by K segments; with a leading axis for several directions or slopes.

    Attributes:
      status: `[]`, see `SolveStatus`: CONVERGED where the errors of the segments add up to at most `tol`, MAX_STEPS
        where `rank` products were too few for that.
      num_matvecs: `[]`, products with Hessians, of all segments.
      relative_error: `[K]`, estimated relative error of each segment's functions of H̃, from the last Lanczos
        coefficient; a bound where H is positive semidefinite.
      min_curvature: `[K]`, the smallest Ritz value of H̃ that was seen; a negative one was treated as 0.
      outer_gradient_norm: `[K]`, ‖D_λF‖ at the checkpoints.
    """

    status: Int[Array, "..."]
    num_matvecs: Int[Array, "..."]
    relative_error: Float[Array, "... K"]
    min_curvature: Float[Array, "... K"]
    outer_gradient_norm: Float[Array, "... K"]


class _Method(NamedTuple):
    """The static part of a response."""

    options: Options
    chunks: Chunks
    rank: int
    tol: float


class _Run(NamedTuple):
    """Checkpoints stacked, with a leading axis `[K]`; `scale` is P^½."""

    meta_params: PyTree
    time: Float[Array, " K"]
    weight_decay: Float[Array, " K"]
    scale: PyTree | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """How the end of a run responds to the data weights, by its checkpoints; made by `segments`, a registered pytree.

    Attributes:
      meta_params: λ of the last checkpoint.
      outer_gradient_norm: `[K]`, ‖D_λF‖ at the checkpoints.
    """

    meta_params: PyTree
    outer_gradient_norm: Float[Array, " K"]
    run: _Run
    tasks: Task
    used_weights: Weights
    spoilt: Spoilt | None
    method: _Method = dataclasses.field(metadata={"static": True})

    @property
    def weights(self) -> Weights:
        """The weights w of the run."""
        return self.used_weights if self.spoilt is None else self.spoilt.weights

    @property
    def info(self) -> SegmentsInfo:
        """What is known before `jvp` or `vjp`: the gradients' norms."""
        zeros = jnp.zeros_like(self.outer_gradient_norm)
        count = jnp.zeros((), jnp.int32)
        return SegmentsInfo(count, count, zeros, jnp.full_like(zeros, jnp.inf), self.outer_gradient_norm)

    def vjp(self, slope: PyTree) -> tuple[Weights, SegmentsInfo]:
        """dφ/dw of a target with the slope ∇φ at `meta_params`; of several targets, on a leading axis, together.

        Raises:
          ValueError: a slope whose structure or shapes are not λ's.
        """
        many = _leading("slope", slope, self.meta_params)
        slope = jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(like.dtype), slope, self.meta_params)
        rank, tol = self.method.rank, _share(self.method.tol, self.run.time)

        def segment(expansion: Expansion, run: _Run, slope: PyTree) -> tuple[PyTree, Weights, Decay]:
            operator = _scaled_operator(expansion.operator, run)
            start = operator.domain.ravel(_divided(slope, run.scale))
            found = decay(operator, start, run.time, rank, tol)
            decayed, integrated = map(operator.domain.unravel, (found.decayed, found.integrated))
            change = jax.tree.map(jnp.negative, expansion.mixed_transposed(_divided(integrated, run.scale)))
            return _multiplied(decayed, run.scale), change, found

        if many:
            segment = jax.vmap(segment, in_axes=(None, None, 0))

        def step(carry: tuple[PyTree, Weights], run: _Run) -> tuple[tuple[PyTree, Weights], Decay]:
            slope, total = carry
            slope, change, found = segment(self._expansion(run), run, slope)
            return (slope, jax.tree.map(jnp.add, total, change)), found

        lead = (jax.tree.leaves(slope)[0].shape[0],) if many else ()
        zero = jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), self.weights)
        with self.method.options.traced():
            (_, total), found = jax.lax.scan(step, (slope, zero), self.run, reverse=True)
        return sensitivity_of(self.spoilt, total, many), self._report(found)

    def jvp(self, direction: Weights) -> Influence:
        """The change of λ along a direction in the data weights; along several, on a leading axis, together.

        λ + delta predicts the end of a run at the weights w + direction.

        Raises:
          ValueError: a direction whose shapes are not those of the weights, or that is not finite.
        """
        many = isinstance(direction, Weights) and jnp.ndim(direction.task) == 2
        for each in _rows(direction) if many else (direction,):
            resolve_weights(each, self.tasks, name="direction")
        direction = jax.tree.map(lambda leaf, like: jnp.asarray(leaf).astype(like.dtype), direction, self.weights)
        rank, tol = self.method.rank, _share(self.method.tol, self.run.time)

        def segment(expansion: Expansion, run: _Run, change: PyTree, direction: Weights) -> tuple[PyTree, Decay]:
            operator = _scaled_operator(expansion.operator, run)
            slope = _divided(expansion.mixed(direction), run.scale)
            starts = jnp.stack([operator.domain.ravel(tree) for tree in (_multiplied(change, run.scale), slope)])
            found = jax.vmap(lambda start: decay(operator, start, run.time, rank, tol))(starts)
            change = operator.domain.unravel(found.decayed[0] - found.integrated[1])
            both = found._replace(
                error=jnp.max(found.error),
                smallest=jnp.min(found.smallest),
                num_matvecs=jnp.sum(found.num_matvecs, dtype=jnp.int32),
            )
            return _divided(change, run.scale), both

        if many:
            segment = jax.vmap(segment, in_axes=(None, None, 0, 0))

        def step(change: PyTree, run: _Run) -> tuple[PyTree, Decay]:
            return segment(self._expansion(run), run, change, direction)

        lead = (direction.task.shape[0],) if many else ()
        zero = jax.tree.map(lambda leaf: jnp.zeros((*lead, *leaf.shape), leaf.dtype), self.meta_params)
        with self.method.options.traced():
            change, found = jax.lax.scan(step, zero, self.run)
        info: Any = self._report(found)
        return Influence(change_along(self.spoilt, direction, change, many), info)

    def _expansion(self, run: _Run) -> Expansion:
        return self.method.options.expanded(run.meta_params, self.tasks, self.used_weights, self.method.chunks)

    def _report(self, found: Decay) -> SegmentsInfo:
        error, smallest, products = (
            jnp.moveaxis(leaf, 0, -1) for leaf in (found.error, found.smallest, found.num_matvecs)
        )
        finite = jnp.all(jnp.isfinite(error), axis=-1)
        unsolved = jnp.where(finite, jnp.int32(SolveStatus.MAX_STEPS), jnp.int32(SolveStatus.NONFINITE))
        good = jnp.sum(error, axis=-1) <= len(self.run.time) * _share(self.method.tol, self.run.time)
        return SegmentsInfo(
            jnp.where(good, jnp.int32(SolveStatus.CONVERGED), unsolved),
            jnp.sum(products, axis=-1, dtype=jnp.int32),
            error,
            smallest,
            jnp.broadcast_to(self.outer_gradient_norm, error.shape),
        )


class SegmentsOf(Protocol):
    """What `segments` makes."""

    def __call__(self, checkpoints: Sequence[Checkpoint], tasks: Task, weights: Weights | None = None) -> Segments:
        """The response of a run known by its checkpoints."""


@maker
def segments(
    problem: Bilevel,
    *,
    curvature: Curvature | None = None,
    rank: int = RANK,
    tol: float = TOL,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    precision: str | None = "highest",
    hvp: str | None = None,
) -> SegmentsOf:
    """Makes (checkpoints, tasks, weights=None) -> Segments, how the end of a run responds to the data weights.

    For a run of which only a few λ are left, for one too rough for its derivative to mean anything, and for the removal
    of many data at once. One segment with τ → ∞ gives the response of the optimum, many short ones that of the gradient
    flow. The functions of H are computed by Lanczos' method, which ends early where it is exact enough.

    Args:
      problem: the problem.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      rank: maximum number of Hessian products per segment and vector. About √(τ ‖H̃‖) are needed, and a stable run has
        τ ‖H̃‖ ≤ 2 · steps of the segment.
      tol: estimated relative error that all segments together may have; each segment stops at its share.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once where they fit.
      mesh: devices over which tasks are sharded, along all axes of the mesh; None leaves tasks where they are.
      precision: of matrix products; None for JAX's own, which on some devices is less than float32.
      hvp: how derivatives of gradients are taken, see `bilevel`; None for the problem's own.

    Returns:
      Function of a sequence of `Checkpoint` in the order of training, stacked tasks and weights.

    Raises:
      TypeError: not a `Bilevel`, `Curvature` or sequence of `Checkpoint`.
      ValueError: a rank that is not positive or a negative tol; checkpoints that are out of order, differ in structure
        or shapes, or are not finite; tasks or weights that are malformed or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> def scores(time):
      ...     at = mi.segments(problem)([mi.Checkpoint(jnp.asarray(2.0), time)], tasks)
      ...     return [round(x, 3) for x in mi.scores(at, lambda m: m)().task.tolist()]
      >>> scores(time=50.0)  # as of the optimum: (2 - query) / 3
      [0.667, 0.333, -1.0]
      >>> scores(time=0.6931)  # with e**-time = 1/2: the run is half of the way there
      [0.333, 0.167, -0.5]
    """
    options = Options.of(problem, curvature=curvature, batch_size=batch_size, mesh=mesh, hvp=hvp, precision=precision)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected a positive integer, got {rank!r}")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol >= 0:
        raise ValueError(f"tol: expected a number from 0 on, got {tol!r}")

    def run(checkpoints: Sequence[Checkpoint], tasks: Task, weights: Weights | None = None) -> Segments:
        known = check_checkpoints(checkpoints)
        meta_params = known[-1].meta_params
        check_meta_params(meta_params)
        weights = resolve_weights(weights, tasks)
        with options.traced():
            chunks = options.chunks(meta_params, tasks)
        stacked = _stacked(known)
        gradient = gradient_map(options.problem, chunks, mesh)

        def norms_of(tasks: Task, weights: Weights) -> Array:
            def norm(meta_params: PyTree) -> Array:
                return optax.tree.norm(gradient(exact(), meta_params, tasks, meta_params, weights)[0])

            return jax.lax.map(norm, stacked.meta_params)

        with options.traced():
            norms = norms_of(tasks, weights)
            first = known[int(np.argmin(np.isfinite(np.asarray(norms))))] if concrete(norms) else known[0]
            rest = without_spoilt(options.problem, jnp.sum(norms), first.meta_params, tasks, weights)
            used, spoilt = weights, None
            if rest is not None:
                tasks, used, spoilt = rest.tasks, rest.weights(weights), rest.left_out(weights)
                norms = norms_of(tasks, used)
        method = _Method(options, chunks, rank, float(tol))
        return Segments(meta_params, norms, stacked, tasks, used, spoilt, method)

    return run


def _stacked(checkpoints: Sequence[Checkpoint]) -> _Run:
    dtype = Domain.of(checkpoints[0].meta_params).dtype

    def stack(*leaves: Any) -> Array:
        return jnp.stack([jnp.asarray(leaf) for leaf in leaves])

    scale = None
    if checkpoints[0].preconditioner is not None:
        like = checkpoints[0].meta_params
        scale = jax.tree.map(stack, *(each.preconditioner for each in checkpoints))
        scale = jax.tree.map(lambda leaf, own: jnp.sqrt(leaf).astype(jnp.result_type(own)), scale, like)
    return _Run(
        jax.tree.map(stack, *(each.meta_params for each in checkpoints)),
        jnp.stack([jnp.asarray(each.time, dtype) for each in checkpoints]),
        jnp.stack([jnp.asarray(each.weight_decay, dtype) for each in checkpoints]),
        scale,
    )


def _scaled_operator(operator: Operator, run: _Run) -> Operator:
    """H̃ = P^-½ H P^-½, plus what decoupled decay adds: in these coordinates a multiple of the identity."""
    return from_matvec(Partial(_scaled_product, operator, run.scale, run.weight_decay), operator.domain.zeros())


def _scaled_product(operator: Operator, scale: PyTree | None, decay: Array, vector: PyTree) -> PyTree:
    product = _divided(operator.matvec(_divided(vector, scale)), scale)
    return jax.tree.map(lambda p, v: p + decay.astype(v.dtype) * v, product, vector)


def _divided(tree: PyTree, scale: PyTree | None) -> PyTree:
    return tree if scale is None else jax.tree.map(jnp.divide, tree, scale)


def _multiplied(tree: PyTree, scale: PyTree | None) -> PyTree:
    return tree if scale is None else jax.tree.map(jnp.multiply, tree, scale)


def _share(tol: float, times: Float[Array, " K"]) -> float:
    """The error that one of K segments may have, but no less than rounding causes."""
    return max(tol / len(times), 100 * float(jnp.finfo(times.dtype).eps))


def _rows(directions: Weights) -> list[Weights]:
    """Directions one by one where they have values; else the first for all."""
    count = len(directions.task) if concrete(directions) else 1
    return [Weights(*(leaf[index] for leaf in directions)) for index in range(count)]


def _leading(name: str, tree: PyTree, like: PyTree) -> bool:
    """Whether a pytree like λ has one more axis in front."""
    domain = Domain.of(like)
    leaves = jax.tree.leaves(tree)
    many = len(leaves) == len(domain.leaves) and all(
        jnp.ndim(leaf) == len(own.shape) + 1 for leaf, own in zip(leaves, domain.leaves, strict=True)
    )
    lead = {jnp.shape(leaf)[0] for leaf in leaves} if many else set()
    if len(lead) == 1:
        domain.check(name, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], leaf.dtype), tree))
        return True
    domain.check(name, tree)
    return False


def problems_of_segments(info: SegmentsInfo) -> list[str]:
    """What is wrong with a result of `Segments`, in words; empty where nothing is. For use outside jit."""
    found, status = [], np.asarray(info.status)
    if np.any(status == SolveStatus.NONFINITE):
        found.append(
            "NaN or infinity in the answer: look for it in the checkpoints, the slope, the weights or the data"
        )
    if np.any(status == SolveStatus.MAX_STEPS):
        errors = np.asarray(info.relative_error)[status == SolveStatus.MAX_STEPS].reshape(
            -1, np.shape(info.relative_error)[-1]
        )
        where = int(np.unravel_index(np.argmax(errors), errors.shape)[1])
        found.append(
            f"the segments' functions of the Hessian are off by about {np.max(np.sum(errors, axis=-1)):.1e}, most in "
            f"segment {where}: raise rank, or tol"
        )
    return found
