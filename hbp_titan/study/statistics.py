"""Means with their spread, and paired differences with Student's t, of a handful of runs.

Owns the arithmetic; numpy alone, because scipy is no dependency of the project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Parts into which the angle of t_probability's integral is cut; the error is far below 1e-9.
_PARTS = 20000


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of a single value is nan."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences over n seeds: its interval at `confidence`, and the two-sided p of no difference."""

    mean: float
    low: float
    high: float
    p: float
    n: int
    confidence: float = 0.95


def paired_difference(values: Sequence[float], base: Sequence[float], confidence: float = 0.95) -> Difference:
    """values - base, pair by pair: at least two pairs. Interval and p are Student's with n - 1 degrees of freedom."""
    differences = np.asarray(values, np.float64) - np.asarray(base, np.float64)
    n = len(differences)
    assert n > 1, "one pair has no spread"
    mean, deviation = mean_and_deviation(differences.tolist())
    error = deviation / n**0.5
    half = t_quantile((1 + confidence) / 2, n - 1) * error
    # Equal differences leave no doubt, unless they are 0.
    p = 1 - t_probability(abs(mean) / error, n - 1) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p, n, confidence)


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's t with so many degrees of freedom."""
    angles, cumulated = _angles(degrees)
    return float(np.interp(np.arctan(t / degrees**0.5), angles, cumulated))


def t_quantile(probability: float, degrees: int) -> float:
    """The t that T stays below with `probability`, which is at least one half."""
    angles, cumulated = _angles(degrees)
    return float(np.tan(np.interp(2 * probability - 1, cumulated, angles)) * degrees**0.5)


def _angles(degrees: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """P(|T| < sqrt(degrees) * tan(angle)) at angles from 0 to pi / 2: with t so written, T's density is
    cos(angle)^(degrees - 1)."""
    angles = np.linspace(0, np.pi / 2, _PARTS + 1)
    density = np.cos(angles) ** (degrees - 1)
    cumulated = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return angles, cumulated / cumulated[-1]
