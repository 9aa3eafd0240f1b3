"""Confidence intervals of means and of ratios of means, by resampling the examples (Efron 1979, percentile intervals)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparse_engine.errors import InputError

__all__ = ["RESAMPLES", "Interval", "mean_interval", "ratio_interval"]

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the bounds between which 95 % of its resampled values lie."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of ``values``.

    Raises:
        InputError: there are none.
    """
    data = _data(values)
    means = data[_choices(len(data), seed)].mean(1)
    return Interval(float(data.mean()), *_bounds(means))


def ratio_interval(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Interval:
    """mean(above) / mean(below) of values that belong to the same examples, which are resampled together.

    Raises:
        InputError: the lists are empty or differ in length, or the second's mean is zero.
    """
    if len(above) != len(below):
        raise InputError(f"a paired ratio needs values of the same examples, got {len(above)} and {len(below)}")
    upper, lower = _data(above), _data(below)
    if lower.mean() == 0:
        raise InputError("a ratio over a mean of zero is not defined")
    chosen = _choices(len(upper), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = upper[chosen].mean(1) / lower[chosen].mean(1)
    return Interval(float(upper.mean() / lower.mean()), *_bounds(ratios[np.isfinite(ratios)]))


def _data(values: Sequence[float]) -> NDArray[np.float64]:
    if not values:
        raise InputError("an interval needs at least one value")
    return np.asarray(values, dtype=np.float64)


def _choices(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _bounds(means: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
