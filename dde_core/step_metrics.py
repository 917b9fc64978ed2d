"""Numbers logged in training. Imports no torch.

``margin`` is (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l), see `dde_core.train_step.preference_margin`. A
loss that falls while ``winner_error_diff`` rises belongs to a model that gets worse on winners, and improves
only because it gets worse on losers faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

if TYPE_CHECKING:
    from dde_core.train_step import PairErrors, StepTerms

BUCKETS = 10
"""Metrics are also logged for each tenth of the timesteps."""


def step_metrics(
    t: Any, theta: PairErrors, ref: PairErrors | None, terms: StepTerms, timesteps: int
) -> dict[str, float]:
    """Means over the GLOBAL batch, and over its pairs with t in each tenth of 1..``timesteps``.

    A tenth is named by its last timestep: of 1000, ``margin_t0100`` is the mean over t = 1..100. A tenth
    without pairs has no metrics. Without a reference (`sft`) there are no metrics that compare with it.
    ``implicit_accuracy`` is the fraction of pairs with a positive margin; a margin of 0 counts half. Gradient
    weights count by their size: with soft labels those of surer pairs are negative. A pair of an on-policy
    method has one number, ``projection``, in place of the errors of two sides.
    """
    values = {
        "loss": _array(terms.loss),
        "gradient_weight": np.abs(_array(terms.gradient_weight)),
        "gradient_weight_at_zero": _array(terms.gradient_weight_at_zero),
    }
    if theta.l is None and ref is not None:
        values["projection"] = _array(theta.w)
    else:
        values["winner_error"] = _array(theta.w)
    if ref is not None:
        values["margin"] = _array(terms.margin)
        values["implicit_accuracy"] = (np.sign(values["margin"]) + 1) / 2
    if ref is not None and theta.l is not None:
        values["loser_error"] = _array(theta.l)
        values["winner_error_diff"] = values["winner_error"] - _array(ref.w)
        values["loser_error_diff"] = values["loser_error"] - _array(ref.l)
    metrics = {name: float(value.mean()) for name, value in values.items()}
    buckets = bucket_of(_array(t).astype(np.int64), timesteps)
    for bucket in np.unique(buckets).tolist():
        suffix = _suffix(bucket, timesteps)
        metrics |= {name + suffix: float(value[buckets == bucket].mean()) for name, value in values.items()}
    return metrics


def logit_deviation(t: Any, margin: Any, snr: Any, beta: float, timesteps: int) -> dict[str, float]:
    """Rounding noise of the logit beta w(t) margin, from margins of a model that is its own reference.

    Exact arithmetic gives 0; this is the root mean square. ``snr`` is SNR(t) of each pair. For w = 1/2 the
    mean is over all pairs; for w = 1/SNR(t), which grows with t, over each tenth of 1..``timesteps``. It is a
    lower bound for the run: rounding is larger once the policy has moved. Where SNR(t) is 0, so is the logit.
    """
    t = _array(t).astype(np.int64)
    margin = _array(margin)
    snr = _array(snr)
    logit = np.divide(beta * margin, snr, out=np.zeros_like(margin), where=snr > 0)
    deviation = {"step0_logit_std_half": _root_mean_square(beta * margin / 2)}
    buckets = bucket_of(t, timesteps)
    for bucket in np.unique(buckets).tolist():
        name = f"step0_logit_std_snr{_suffix(bucket, timesteps)}"
        deviation[name] = _root_mean_square(logit[buckets == bucket])
    return deviation


def format_metrics(metrics: dict[str, float]) -> str:
    """Each name with three digits of its value, for an event's message."""
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())


def bucket_of(t: Any, timesteps: int) -> Any:
    """The tenth (0..9) of 1..``timesteps`` that each t belongs to; t is an integer array or tensor."""
    return (t - 1) * BUCKETS // timesteps


def bucket_span(bucket: int, timesteps: int) -> tuple[int, int]:
    """The first and the last timestep of a tenth."""
    return -(-bucket * timesteps // BUCKETS) + 1, -(-(bucket + 1) * timesteps // BUCKETS)


def _suffix(bucket: int, timesteps: int) -> str:
    return f"_t{bucket_span(bucket, timesteps)[1]:04d}"


def _root_mean_square(values: Float64[np.ndarray, " n"]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _array(values: Any) -> Float64[np.ndarray, " n"]:
    """A torch tensor on any device, or anything array-like, as float64."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)
