"""Intervals by resampling, and the checks that all metrics share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """A statistic with its bootstrap interval; floats, or arrays of the statistic's shape.

    Attributes:
      value: the statistic of the data themselves.
      low: lower end of the interval.
      high: upper end of the interval.
    """

    value: Float[np.ndarray, "..."]
    low: Float[np.ndarray, "..."]
    high: Float[np.ndarray, "..."]


def bootstrap(
    statistic: Callable[..., Any], *arrays: Any, num: int = 1000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """A statistic and its percentile interval (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13).

    Rows are drawn with replacement, the same ones from all arrays. What belongs together stays together, so the
    difference of two methods on the same data is resampled in pairs. Draws where the statistic is NaN, such as an area
    under the curve without damaged data, are left out of the interval; if it is NaN in all draws, so are the ends.

    Args:
      statistic: (*arrays) -> number or array.
      *arrays: with a common leading axis `[n, ...]`.
      num: draws.
      seed: of the draws.
      level: share of the draws inside the interval.

    Raises:
      ValueError: no arrays, leading axes that differ or are empty, `num` not positive, `level` outside (0, 1).

    Examples:
      >>> import numpy as np
      >>> import metainfluence as mi
      >>> found = mi.evaluation.bootstrap(np.mean, np.asarray([0.0, 0.0, 1.0, 1.0]))
      >>> [float(end) for end in found]  # value, low, high: one draw in 16 holds zeros only
      [0.5, 0.0, 1.0]
    """
    if not arrays:
        raise ValueError("arrays: expected at least one array to draw rows from, got none")
    data = [np.asarray(array) for array in arrays]
    lengths = {array.shape[:1] for array in data}
    if len(lengths) != 1 or lengths <= {(), (0,)}:
        shapes = [array.shape for array in data]
        raise ValueError(f"arrays: expected a common leading axis that is not empty, got shapes {shapes}")
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise ValueError(f"num: expected a positive integer, got {num!r}")
    check_share("level", level)
    rng, count = np.random.default_rng(seed), len(data[0])
    rows = (rng.integers(count, size=count) for _ in range(num))
    draws = np.stack([np.asarray(statistic(*(array[row] for array in data)), float) for row in rows])
    ends = _percentiles(draws, np.array([(1 - level) / 2, (1 + level) / 2]))
    return Estimate(np.asarray(statistic(*data), float), *ends)


def _percentiles(draws: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Quantiles along the first axis of what is not NaN, NaN where nothing is left."""
    empty = np.all(np.isnan(draws), axis=0)
    ends = np.nanquantile(np.where(empty, 0.0, draws), shares, axis=0)
    return np.where(empty, np.nan, ends)


def check_share(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number strictly between 0 and 1."""
    if isinstance(value, (bool, str)) or np.ndim(value) != 0 or not 0.0 < float(value) < 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1, both excluded, got {value!r}")


def numbers(name: str, value: Any, axes: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Values as an array of finite float64.

    Raises:
      ValueError: a number of axes that is not in `axes`, an empty axis, or a value that is not finite.
    """
    array = np.asarray(value, float)
    if array.ndim not in axes or array.size == 0:
        kinds = " or ".join(map(str, axes))
        raise ValueError(f"{name}: expected an array of {kinds} axes that is not empty, got shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return array


def flags(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Values as a Boolean array.

    Raises:
      TypeError: no booleans.
      ValueError: another shape.
    """
    array = np.asarray(value)
    if array.dtype != np.bool_:
        raise TypeError(f"{name}: expected booleans, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return array
