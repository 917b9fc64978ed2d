"""Statistics of an evaluation's scores. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

from dde_core.errors import DataError

Scores = Sequence[float] | np.ndarray

Z95 = NormalDist().inv_cdf(0.975)
"""1.95996: 95% of a normal distribution lie within so many standard deviations."""


def beat_ratio(candidate: Scores, base: Scores) -> tuple[float, float, float]:
    """The fraction of scores where the candidate beats the base (ties count half), and its 95% Wilson
    interval.

    Raises DataError for scores that are not finite pairs.
    """
    difference = _differences(candidate, base)
    n = len(difference)
    ratio = float(((np.sign(difference) + 1) / 2).mean())
    center = (ratio + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * (ratio * (1 - ratio) / n + Z95**2 / (4 * n**2)) ** 0.5
    return ratio, max(0.0, center - half), min(1.0, center + half)


def paired_difference(candidate: Scores, base: Scores) -> tuple[float, float, float]:
    """The mean of candidate - base and its 95% normal interval (mean +- 1.96 standard errors).

    The interval assumes independent pairs, and is too narrow for few pairs (by 15% at n = 10, 1% at n = 150).
    Raises DataError for scores that are not finite pairs, or for a single pair.
    """
    difference = _differences(candidate, base)
    if len(difference) < 2:
        raise DataError("an interval needs at least 2 pairs of scores, got 1")
    mean = float(difference.mean())
    half = Z95 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return mean, mean - half, mean + half


def _differences(candidate: Scores, base: Scores) -> Float64[np.ndarray, " n"]:
    candidate = np.asarray(candidate, dtype=np.float64)
    base = np.asarray(base, dtype=np.float64)
    if candidate.shape != base.shape or candidate.ndim != 1 or not len(candidate):
        raise DataError(f"scores must come in pairs, got {candidate.shape} and {base.shape}")
    if not (np.isfinite(candidate).all() and np.isfinite(base).all()):
        raise DataError("scores must be finite")
    return candidate - base
