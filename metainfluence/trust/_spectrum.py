"""The total Hessian's spectrum."""

from __future__ import annotations

from typing import Any, Protocol

from jax.sharding import Mesh
from jaxtyping import PyTree

from metainfluence._checks import maker
from metainfluence.curvature import Curvature
from metainfluence.data import Task, Weights
from metainfluence.problem import Bilevel
from metainfluence.response import Options, checked
from metainfluence.spectra import Spectrum, of_operator


class SpectrumAt(Protocol):
    """What `spectrum` makes."""

    def __call__(
        self,
        meta_params: PyTree,
        tasks: Task,
        weights: Weights | None = None,
        *,
        rank: int | None = None,
        num_probes: int | None = None,
        seed: int | None = None,
    ) -> Spectrum:
        """The spectrum at λ."""


@maker
def spectrum(
    problem: Bilevel,
    curvature: Curvature | None = None,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
    rank: int = 50,
    num_probes: int = 0,
    seed: int = 0,
) -> SpectrumAt:
    """Makes (meta_params, tasks, weights=None) -> Spectrum of the total Hessian.

    Lanczos' method with full reorthogonalisation. Where the Krylov space closes early, it continues from a random
    vector, so that no ghost takes the place of an eigenvalue. The density comes from stochastic Lanczos quadrature
    (Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38, 2017) with `num_probes` random-sign probes, `rank` products
    each.

    Args:
      problem: the problem.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.
      rank: Lanczos steps; this and the two options below may also be given in the second call.
      num_probes: random probes for the density.
      seed: of the random vectors.

    Raises:
      ValueError: as `total_hessian`; `rank` not a positive integer or `num_probes` negative.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (task.query @ m) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[[2.0, 0.0]], [[0.0, 4.0]]]))
      >>> jax.jit(mi.spectrum(problem))(jnp.zeros(2), tasks).values.round(3).tolist()  # (2², 4²) / 2
      [2.0, 8.0]
    """
    own = {"rank": rank, "num_probes": num_probes, "seed": seed}
    shared: dict[str, Any] = {
        "curvature": curvature,
        "batch_size": batch_size,
        "mesh": mesh,
        "hvp": hvp,
        "precision": precision,
    }
    options = Options.of(problem, **shared)

    def run(
        meta_params: PyTree,
        tasks: Task,
        weights: Weights | None = None,
        *,
        rank: int | None = None,
        num_probes: int | None = None,
        seed: int | None = None,
    ) -> Spectrum:
        named = {"rank": rank, "num_probes": num_probes, "seed": seed}
        asked = {**own, **{name: value for name, value in named.items() if value is not None}}
        with options.traced():
            point = checked(meta_params, tasks, weights)
            return of_operator(options.expanded(*point, options.chunks(*point[:2])).operator, **asked)

    return run
