"""Where a method puts its credit: the gradient weight g(t) as a curve over t, and as a finished run must have had it.

Everything here is `step_losses` and `Calibration` fed with chosen numbers, so a curve is what training computes and not a
second formula. A margin d is (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l), a mean over latent elements; t = 1..T.

    curves      one constant margin at every t, coefficients converged: g(t), C(t), w(t), and how often t is drawn
    replay      the margins of a whole run: the calibration step by step, and the g of every pair (DDE Algorithm 1)
    start_left  how fast the coefficients forget their start (DDE Fig. 5(b))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_core.calibration import Calibration
from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, DataError
from dde_core.methods import METHODS
from dde_core.objectives import sampling_distribution, weights
from dde_core.schedule import Schedule
from dde_core.train_step import PairErrors, step_losses

MAX_MARGIN = 1e6
"""No mean squared error comes near it, and everything computed from it is finite."""

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
"""The noise schedule of Stable Diffusion 1.5 and XL, in the form of a diffusers ``scheduler_config.json``."""


@dataclass(frozen=True, eq=False)
class Curves:
    """What a method makes of one margin: float64, entry t - 1 belongs to timestep t.

    ``gradient_weight`` is g(t) = w(t) sigmoid(-beta (w(t) d + C(t))) times p(t) over what t is drawn from, so 0 outside of
    the configured range. ``density`` is T times the probability that t is drawn. Their product is the credit of t.
    """

    weight: Float[Tensor, " T"]
    correction: Float[Tensor, " T"]
    gradient_weight: Float[Tensor, " T"]
    density: Float[Tensor, " T"]

    @property
    def credit(self) -> Float[Tensor, " T"]:
        """g(t) times the density: the share of t in the gradient, not normalised."""
        return self.gradient_weight * self.density


def curves(config: ObjectiveConfig, schedule: Schedule, margin: float) -> Curves:
    """The curves of a method at one margin, the same at every t. `sft` has g = 1 and C = 0, whatever the margin.

    The coefficients are converged: every t was recorded once at rate 1, and `sampled` stands at its expectation. Raises
    ConfigError for a margin that is not a number, and for a range or bins that the schedule does not have.
    """
    if not abs(margin) <= MAX_MARGIN:
        raise ConfigError("margin", margin, "must lie between -1e6 and 1e6")
    density = sampling_distribution(config, schedule)[1:] * schedule.T
    t = torch.arange(1, schedule.T + 1)
    margins = torch.full((schedule.T,), margin, dtype=torch.float64)
    calibration = Calibration(schedule, replace(config, ema_rate=1.0))
    if METHODS[config.method].corrected:
        _record(calibration, t, margins)
    correction = calibration.correction(t)
    terms = step_losses(*_with_margin(margins), t, config, schedule, correction)
    return Curves(weights(config, schedule)[1:], correction, terms.gradient_weight, density)


def replay(
    config: ObjectiveConfig,
    schedule: Schedule,
    step: Int[Tensor, " n"],
    t: Int[Tensor, " n"],
    margin: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """The gradient weight of every pair of a run, float64, from nothing but the pairs' margins.

    ``step`` counts up from the run's first; all pairs of a step are together. C(t) is frozen within a step and updated
    after it. `expected` and `mode` are linear in the errors, so the margins say all; for `sampled` this is the expectation
    over z. `sft` reads no margin. Raises ConfigError for a margin that is needed, DataError for steps out of order.
    """
    method = METHODS[config.method]
    if margin is None and method.has_reference:
        raise ConfigError("margin", None, f"is needed by method {config.method!r}")
    margin = torch.zeros(len(t), dtype=torch.float64) if margin is None else margin.double()
    correction = torch.zeros_like(margin)
    if method.corrected:
        calibration = Calibration(schedule, config)
        for rows in _steps(step):
            correction[rows] = calibration.correction(t[rows])
            _record(calibration, t[rows], margin[rows])
    return step_losses(*_with_margin(margin), t, config, schedule, correction).gradient_weight


def start_left(
    config: ObjectiveConfig, schedule: Schedule, batch_size: int, steps: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The share of its start value that a coefficient still holds after so many steps of ``batch_size`` pairs, in expectation.

    (1 - mu (1 - (1 - 1/N)^B))^s for N coefficients over t drawn uniformly: one for each timestep of the range, or the bins.
    What is gone of the start is what has been learnt (DDE Fig. 5(b)).
    """
    drawn = int((sampling_distribution(config, schedule) > 0).sum())
    coefficients = min(config.calibration_bins or drawn, drawn)
    recorded = 1 - (1 - 1 / coefficients) ** batch_size
    return (1 - config.ema_rate * recorded) ** steps.double()


def _with_margin(margin: Float[Tensor, " n"]) -> tuple[PairErrors, PairErrors]:
    """Errors of policy and reference that have this margin: only the margin counts, as all that is summed up is linear.

    z is 0, its mean: then `sampled` records its expectation.
    """
    none = torch.zeros_like(margin)
    return PairErrors(-margin, none, none, none), PairErrors(none, none, none, none)


def _record(calibration: Calibration, t: Int[Tensor, " n"], margin: Float[Tensor, " n"]) -> None:
    calibration.update(t, *_with_margin(margin))


def _steps(step: Int[Tensor, " n"]) -> Iterator[slice]:
    """The rows of each step. Raises DataError where a step is smaller than the one before it."""
    if (step.diff() < 0).any():
        raise DataError("steps must count up")
    end = 0
    for count in torch.unique_consecutive(step, return_counts=True)[1].tolist():
        yield slice(end, end + count)
        end += count
