"""From the scores of several images of one prompt to preference pairs. Imports no torch.

Scorers have different scales: a cosine varies by hundredths where a rating varies by halves. So each score
is divided by its scorer's spread, the standard deviation among images of one prompt, pooled over all prompts;
the weighted mean of the quotients is an image's utility. Weights then mean the same for every scorer, and
margins are in units of the spreads. The pooled spread is used, not each prompt's own: that one would blow up
the noise of prompts whose images are all alike, and make every two images differ by the same amount.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from dde_core.errors import DataError

Keep = Literal["best_worst", "all_pairs"]


class Preference(NamedTuple):
    """``winner`` and ``loser`` are indices of a prompt's images; their utilities differ by ``margin``."""

    winner: int
    loser: int
    margin: float


def spreads(
    scores: Float64[np.ndarray, "images scorers"], groups: Int64[np.ndarray, " images"]
) -> Float64[np.ndarray, " scorers"]:
    """The standard deviation of each scorer among images of one group, pooled over the groups.

    sqrt(sum of squared distances from the group's mean / (images - groups)); 0 where a scorer gives all
    images of every group the same score. Raises DataError for scores that are not finite, and if no group has
    two images.
    """
    _check_finite(scores)
    _, first, number, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    degrees = len(groups) - len(counts)
    if degrees < 1:
        raise DataError("a spread needs a prompt with at least 2 images")
    distances = scores - scores[first][number]  # exactly 0 where all scores of a group are equal
    sums = np.zeros((len(counts), scores.shape[1]))
    np.add.at(sums, number, distances)
    deviations = distances - (sums / counts[:, None])[number]
    pooled: Float64[np.ndarray, " scorers"] = np.sqrt((deviations**2).sum(axis=0) / degrees)
    return pooled


def utilities(
    scores: Float64[np.ndarray, "images scorers"],
    weights: Sequence[float],
    spread: Float64[np.ndarray, " scorers"],
) -> Float64[np.ndarray, " images"]:
    """The weighted mean of each image's scores in units of their spreads.

    A scorer whose spread is 0 has no say. Raises DataError for scores that are not finite, and for weights
    that are not one positive number a scorer.
    """
    _check_finite(scores)
    shares = np.asarray(weights, dtype=np.float64)
    if shares.shape != spread.shape or not (np.isfinite(shares).all() and (shares > 0).all()):
        raise DataError(f"weights must be {len(spread)} positive numbers, got {list(weights)}")
    scaled = np.divide(scores, spread, out=np.zeros_like(scores), where=spread > 0)
    # Not a matrix product: equal scores must give equal utilities, whatever their place in the array.
    mean: Float64[np.ndarray, " images"] = (scaled * (shares / shares.sum())).sum(axis=1)
    return mean


def best_worst(utility: Float64[np.ndarray, " images"], margin: float) -> list[Preference]:
    """The best image against the worst; nothing if their utilities differ by at most ``margin``.

    Of equally good images the first counts as the best, of equally bad ones the last as the worst.
    """
    best = int(np.argmax(utility))
    worst = len(utility) - 1 - int(np.argmin(utility[::-1]))
    return _decided(utility, [(best, worst)], margin)


def all_pairs(utility: Float64[np.ndarray, " images"], margin: float) -> list[Preference]:
    """Every two images whose utilities differ by more than ``margin``, in the order of their indices."""
    return _decided(utility, list(combinations(range(len(utility)), 2)), margin)


KEEP: dict[Keep, Callable[[Float64[np.ndarray, " images"], float], list[Preference]]] = {
    "best_worst": best_worst,
    "all_pairs": all_pairs,
}
"""The pairs of a prompt that are kept."""


def num_candidates(keep: Keep, num_images: int) -> int:
    """How many pairs of a prompt would be kept if none were a tie."""
    return 1 if keep == "best_worst" else num_images * (num_images - 1) // 2


def _decided(
    utility: Float64[np.ndarray, " images"], candidates: list[tuple[int, int]], margin: float
) -> list[Preference]:
    if len(utility) < 2:
        raise DataError(f"a preference needs at least 2 images, got {len(utility)}")
    if not margin >= 0:
        raise DataError(f"margin must be at least 0, got {margin}")
    _check_finite(utility)
    found = []
    for first, second in candidates:
        difference = float(utility[first] - utility[second])
        if abs(difference) > margin:
            winner, loser = (first, second) if difference > 0 else (second, first)
            found.append(Preference(winner, loser, abs(difference)))
    return found


def _check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise DataError(f"scores must be finite, got {values[~np.isfinite(values)][0]}")
