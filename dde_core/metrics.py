"""Numbers that are logged in training and reported in evaluation. Imports no torch.

``margin`` is (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l): by how much the policy has moved towards the winner and
away from the loser, as against the reference. A loss that falls while ``winner_error_diff`` rises is a model that gets
worse at the winner, and gains only because it gets worse at the loser faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from dde_core.errors import DataError

if TYPE_CHECKING:
    from dde_core.train_step import PairErrors, StepTerms

Scores = Sequence[float] | np.ndarray

BUCKETS = 10

Z95 = NormalDist().inv_cdf(0.975)
"""1.95996: 95% of a normal distribution lie within so many standard deviations."""


def step_metrics(
    t: Any, theta: PairErrors, ref: PairErrors | None, terms: StepTerms, timesteps: int
) -> dict[str, float]:
    """Means over the GLOBAL batch, and over those of its pairs whose t lies in one tenth of 1..``timesteps``.

    A tenth is named by its last timestep: ``margin_t0100`` is the mean over t = 1..100 of 1000. Where a tenth has no
    pair its names are absent, as is what compares with a reference where there is none (`sft`).
    ``implicit_accuracy`` is the share of pairs with a positive margin, a margin of 0 counting half.
    """
    values = {
        name: _array(getattr(terms, name)) for name in ("loss", "gradient_weight", "gradient_weight_at_zero")
    }
    values["winner_error"] = _array(theta.w)
    if ref is not None:
        values["margin"] = _array(terms.margin)
        values["implicit_accuracy"] = (np.sign(values["margin"]) + 1) / 2
        values["loser_error"] = _array(theta.l)
        values["winner_error_diff"] = _array(theta.w) - _array(ref.w)
        values["loser_error_diff"] = _array(theta.l) - _array(ref.l)
    metrics = {name: float(value.mean()) for name, value in values.items()}
    bucket = bucket_of(_array(t).astype(np.int64), timesteps)
    for j in np.unique(bucket):
        last = bucket_span(int(j), timesteps)[1]
        metrics |= {f"{name}_t{last:04d}": float(value[bucket == j].mean()) for name, value in values.items()}
    return metrics


def logit_deviation(t: Any, margin: Any, snr: Any, beta: float, timesteps: int) -> dict[str, float]:
    """How far rounding moves the logit beta w(t) margin of a model that is its own reference, where exact arithmetic has 0: the
    root of the mean square, over all pairs for w = 1/2, and in tenths of 1..``timesteps`` for w = 1/SNR(t), which grows with t.

    ``snr`` is SNR(t) of each pair. A lower bound for the run: rounding returns once the policy moves.
    """
    t, margin, snr = (_array(values) for values in (t, margin, snr))
    deviation = {"step0_logit_std_half": _root_mean_square(beta * margin / 2)}
    bucket = bucket_of(t.astype(np.int64), timesteps)
    for j in np.unique(bucket):
        name = f"step0_logit_std_snr_t{bucket_span(int(j), timesteps)[1]:04d}"
        deviation[name] = _root_mean_square((beta * margin / snr)[bucket == j])
    return deviation


def format_metrics(numbers: dict[str, float]) -> str:
    """Three digits of each, for an event."""
    return ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def bucket_of(t: Any, timesteps: int) -> Any:
    """The tenth (0..9) of 1..``timesteps`` in which each t lies; t is an array or a tensor of whole numbers."""
    return (t - 1) * BUCKETS // timesteps


def bucket_span(bucket: int, timesteps: int) -> tuple[int, int]:
    """The first and the last timestep of a tenth."""
    return -(-bucket * timesteps // BUCKETS) + 1, -(-(bucket + 1) * timesteps // BUCKETS)


def beat_ratio(candidate: Scores, base: Scores) -> tuple[float, float, float]:
    """The share of scores in which the candidate beats the base, ties counting half, and its 95% Wilson interval."""
    difference = _differences(candidate, base)
    n, ratio = len(difference), float(((np.sign(difference) + 1) / 2).mean())
    centre = (ratio + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * (ratio * (1 - ratio) / n + Z95**2 / (4 * n**2)) ** 0.5
    return ratio, max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(candidate: Scores, base: Scores) -> tuple[float, float, float]:
    """The mean of candidate - base and its 95% normal interval (mean +- 1.96 standard errors).

    The interval takes the pairs as independent, and is too narrow for a few (15% at n = 10, 1% at n = 150).
    """
    difference = _differences(candidate, base)
    if len(difference) < 2:
        raise DataError("an interval needs at least 2 pairs of scores, got 1")
    mean = float(difference.mean())
    half = Z95 * float(difference.std(ddof=1)) / len(difference) ** 0.5
    return mean, mean - half, mean + half


def _differences(candidate: Scores, base: Scores) -> np.ndarray:
    """Candidate minus base, score by score. Raises DataError unless both are as many, and finite."""
    candidate, base = np.asarray(candidate, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if candidate.shape != base.shape or candidate.ndim != 1 or not len(candidate):
        raise DataError(f"scores must come in pairs, got {candidate.shape} and {base.shape}")
    if not (np.isfinite(candidate).all() and np.isfinite(base).all()):
        raise DataError("scores must be finite")
    return candidate - base


def _array(tensor: Any) -> np.ndarray:
    """A torch tensor on whatever device, or anything array-like, as float64."""
    return np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else tensor, dtype=np.float64)
