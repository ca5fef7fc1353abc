"""How far the derivative of a training run can be trusted, and what is wrong with it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

_NO_DIGITS = 1e-3


class RunInfo(NamedTuple):
    """How far a run's derivative can be trusted.

    Attributes:
      num_steps: N.
      outer_gradient_norm: ‖D_λF‖ at the end, over all tasks; None where the objective is not known, as for a
        `training_loop`.
      replay_difference: ‖λ_N − end‖ / ‖end‖, where `end` is the λ that was recorded; None where none was given.
      first_nonfinite_step: number of the first step after which λ is not finite; −1 for none.
      cotangent_norms: `[N]`, ‖c ⊙ s‖ of the cotangent c and the state s before each step: the change of φ by relative
        changes of the state, so that leaves of different units compare. None except from `vjp`.
      growth: the largest of these norms over the norm at the end; rounding grows as much. None except from `vjp`.
      smoothness: as measured by `mi.smoothness`; None where it was not measured.
    """

    num_steps: int | Int[Array, ""]
    outer_gradient_norm: Float[Array, ""] | None
    replay_difference: Float[Array, ""] | None
    first_nonfinite_step: Int[Array, ""]
    cotangent_norms: Float[Array, "*m N"] | None = None
    growth: Float[Array, "*m"] | None = None
    smoothness: Any = None


def problems_of_run(info: RunInfo) -> list[str]:
    """What is wrong with a run's derivative, in words; empty where nothing is. For use outside jit."""
    found = []
    first = int(info.first_nonfinite_step)
    if first >= 0:
        found.append(
            f"λ is not finite after step {first} of {int(info.num_steps)}: lower the learning rate, clip the gradient, "
            "or give Adam an eps_root > 0"
        )
    eps = float(np.finfo(np.asarray(info.growth).dtype).eps) if info.growth is not None else 0.0
    if info.cotangent_norms is not None and first < 0:
        norms = np.asarray(info.cotangent_norms)
        norms = norms.reshape(-1, norms.shape[-1])
        bad = np.flatnonzero(~np.all(np.isfinite(norms), axis=0))
        largest = float(np.max(np.asarray(info.growth)))
        if bad.size:
            found.append(
                f"the derivative is not finite at step {int(bad[-1])} of {int(info.num_steps)}, seen from the end: a "
                "square root or a norm at 0, as in Adam without eps_root, or a derivative that overflows"
            )
        elif not largest * eps <= _NO_DIGITS:
            where = int(np.unravel_index(np.argmax(norms), norms.shape)[1])
            found.append(
                f"cotangents grow by {largest:.1e} on the way back, the most at step {where} of "
                f"{int(info.num_steps)}, and rounding with them: no digit of the derivative holds; the run is chaotic: "
                "train with a lower learning rate, warm-up or a larger eps_root, or ask metainfluence.optimum"
            )
    if info.replay_difference is not None:
        difference = float(info.replay_difference)
        dtype = np.asarray(info.replay_difference).dtype
        if not difference <= math.sqrt(float(np.finfo(dtype).eps)):
            found.append(
                f"the run does not end at the λ that was recorded, but {difference:.1e} ‖λ‖ from it: another start, "
                "order of tasks, number of steps, optimiser or precision than in training"
            )
    return found
