"""LevelTime from measured iterations.

Owns the fit: least squares with no negative coefficient. What a pack costs cannot fall with what it holds, and columns
may be nearly collinear (packs of equal token count): a column that explains next to nothing is dropped, not given a
wild value.
"""

from __future__ import annotations

import itertools

import numpy as np

from hbp_titan.levels.level_time import FloatArray, LevelTime

WORTH = 1.5
"""A column is used only where it lowers the squared error by more than this factor: few noisy packs fit anything."""


def fit_level_time(loads: FloatArray, seconds: FloatArray) -> tuple[LevelTime, float]:
    """The time model of a level, and the root mean square of its error relative to the mean of `seconds`.

    loads: of the timed packs, [n, 4] as from pack_loads, n at least 1; seconds: [n].
    Of all sets of columns the one with the least squared error * WORTH ** columns is taken. The base is no column to
    save on: shapes are static, so there is one.
    """
    loads, seconds = np.asarray(loads, np.float64), np.asarray(seconds, np.float64)
    assert loads.shape == (len(seconds), 4), loads.shape
    fits = _nonnegative_fits(loads, seconds)
    rounding = (1e-9 * float(np.linalg.norm(seconds))) ** 2

    def score(fit: tuple[FloatArray, float]) -> float:
        coefficients, error = fit
        columns = np.count_nonzero(coefficients[1:]) + (coefficients[0] == 0)
        return (error + rounding) * WORTH ** float(columns)

    coefficients, error = min(fits, key=score)
    return LevelTime(*coefficients.tolist()), float(np.sqrt(error / len(seconds)) / seconds.mean())


def nonnegative_least_squares(columns: FloatArray, values: FloatArray) -> FloatArray:
    """The x >= 0 with the least |columns @ x - values|; columns: [n, k], few; values: [n] -> [k]."""
    return min(_nonnegative_fits(columns, values), key=lambda fit: fit[1])[0]


def _nonnegative_fits(columns: FloatArray, values: FloatArray) -> list[tuple[FloatArray, float]]:
    """(coefficients, squared error) of each set of columns whose own least squares has no negative coefficient.

    The best of them is the constrained optimum, because that is the plain optimum over its nonzero columns. Small
    sets first, those with the first columns first.
    """
    count = columns.shape[1]
    fits = [(np.zeros(count), float(values @ values))]
    # Columns of comparable size: tokens and squared tokens differ by many orders of magnitude.
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            part = columns[:, chosen] / scale[chosen]
            solution, _, rank, _ = np.linalg.lstsq(part, values, rcond=1e-10)
            if rank < size or solution.min() < 0:
                continue
            coefficients = np.zeros(count)
            coefficients[chosen] = solution / scale[chosen]
            fits.append((coefficients, float(np.sum((part @ solution - values) ** 2))))
    return fits
