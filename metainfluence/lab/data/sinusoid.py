"""Regression of sinusoids, MAML's first experiment (Finn et al., ICML 2017): y = A sin(x − φ), five points to adapt to.

A list of tasks holds every task's amplitude, phase and seed, so it is the same on every machine. Damage is done to the
list and recorded in it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

import metainfluence as mi

CLEAN, WRONG_SIGN, NOISY = "clean", "wrong sign", "noisy targets"
AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, np.pi), (-5.0, 5.0)


class SinusoidTasks(NamedTuple):
    """T identified regression tasks; task k is row k. The last two fields are ground truth."""

    amplitude: np.ndarray  # float [T], uniform in 0.1 … 5
    phase: np.ndarray  # float [T], uniform in 0 … π
    seed: np.ndarray  # int [T]: of the task's inputs and of its noise
    wrong_sign: np.ndarray  # bool [T]: tasks whose query targets are − A sin(x − φ), unlike their support set's
    noise: np.ndarray  # float [T]: standard deviation of the noise added to the query targets


class Points(NamedTuple):
    """The leaves of a task's support or query set: inputs [..., n, 1], targets [..., n]."""

    inputs: jax.Array
    targets: jax.Array


def sample_tasks(*, num_tasks: int, seed: int) -> SinusoidTasks:
    """Sample tasks; task k draws from a generator seeded with (seed, k), whatever the number of tasks.

    Raises:
      ValueError: `num_tasks` is not a positive integer.
    """
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks: expected a positive integer, got {num_tasks!r}")
    drawn = []
    for k in range(num_tasks):
        rng = np.random.default_rng([seed, k])
        drawn.append((rng.uniform(*AMPLITUDES), rng.uniform(*PHASES), rng.integers(2**32)))
    amplitude, phase, seeds = (np.array(column) for column in zip(*drawn, strict=True))
    return SinusoidTasks(amplitude, phase, seeds, np.zeros(num_tasks, bool), np.zeros(num_tasks))


def flip_sign(tasks: SinusoidTasks, index: ArrayLike) -> SinusoidTasks:
    """Give the query targets of the tasks in `index` the wrong sign; returns a new list."""
    wrong = tasks.wrong_sign.copy()
    wrong[np.asarray(index, int)] = True
    return tasks._replace(wrong_sign=wrong)


def add_noise(tasks: SinusoidTasks, index: ArrayLike, *, scale: float) -> SinusoidTasks:
    """Add Gaussian noise to the query targets of the tasks in `index`; returns a new list.

    Args:
      tasks: the list to damage; it is not modified.
      index: the tasks to damage.
      scale: standard deviation.

    Raises:
      ValueError: a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    noise = tasks.noise.copy()
    noise[np.asarray(index, int)] = scale
    return tasks._replace(noise=noise)


def harm(tasks: SinusoidTasks) -> np.ndarray:
    """The ground truth, [T] strings: CLEAN, WRONG_SIGN or NOISY (a task with both counts as WRONG_SIGN)."""
    return np.where(tasks.wrong_sign, WRONG_SIGN, np.where(tasks.noise > 0, NOISY, CLEAN))


def materialize(tasks: SinusoidTasks, *, shots: int = 5, queries: int = 10) -> mi.Task:
    """Draw the points, with inputs uniform in −5 … 5.

    Args:
      tasks: T tasks.
      shots: support points.
      queries: query points.

    Returns:
      Stacked tasks: support and query are `Points` with inputs [T, n, 1] and targets [T, n].
    """
    count = shots + queries
    generators = [np.random.default_rng(int(seed)) for seed in tasks.seed]
    # Separate calls for inputs and noise, so that damage to a task does not change its inputs.
    inputs = np.stack([rng.uniform(*INPUTS, size=count) for rng in generators])
    noise = np.stack([rng.normal(size=count) for rng in generators]) * tasks.noise[:, None]
    targets = tasks.amplitude[:, None] * np.sin(inputs - tasks.phase[:, None])
    damaged = np.where(tasks.wrong_sign[:, None], -targets, targets) + noise

    def points(part: slice, values: np.ndarray) -> Points:
        dtype = jnp.result_type(float)
        return Points(jnp.asarray(inputs[:, part, None], dtype), jnp.asarray(values[:, part], dtype))

    return mi.Task(points(slice(shots), targets), points(slice(shots, None), damaged))
