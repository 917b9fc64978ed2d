"""Credit of each timestep: the gradient weight g(t) of a method as a curve, and its values in a finished run.

Both run `step_losses` and `Calibration` on chosen margins, so they compute what training computes, without a
second formula. A margin d is (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l), a mean over latent elements;
t = 1..T.

    curves              one margin at every t, coefficients converged: w(t), C(t), g(t), and the density of t
    replay              the margins of a whole run: C(t) step by step, and g of every pair (DDE Algorithm 1)
    remaining_fraction  how fast the coefficients forget their start (DDE Fig. 5(b))
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
"""Far above any mean squared error; everything computed from it is finite."""

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}
"""The noise schedule of Stable Diffusion 1.5 and XL, in the form of a diffusers ``scheduler_config.json``."""


@dataclass(frozen=True, eq=False)
class Curves:
    """The curves of a method at one margin d, float64; entry t - 1 belongs to timestep t.

    ``gradient_weight`` is g(t) = w(t) sigmoid(-beta (w(t) d + C(t))), 0 outside of the configured range, and
    times the importance weight where t is not drawn from the method's own distribution. ``density`` is T
    times the probability that t is drawn.
    """

    weight: Float[Tensor, " T"]
    correction: Float[Tensor, " T"]
    gradient_weight: Float[Tensor, " T"]
    density: Float[Tensor, " T"]

    @property
    def credit(self) -> Float[Tensor, " T"]:
        """g(t) times the density: the contribution of t to the gradient, not normalized."""
        return self.gradient_weight * self.density


def curves(config: ObjectiveConfig, schedule: Schedule, margin: float) -> Curves:
    """The curves of a method at one margin, the same at every t. `sft` has g = 1 and C = 0 at every margin.

    The label is whole: a winner's share of p lowers g by w(t) (1 - p). The coefficients are converged: each t
    is recorded once at rate 1, `sampled` at its expectation. Raises ConfigError for a margin beyond
    MAX_MARGIN, and for timesteps or bins beyond the schedule's T.
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
    terms = step_losses(*_with_margin(margins), t, replace(config, label="hard"), schedule, correction)
    return Curves(weights(config, schedule)[1:], correction, terms.gradient_weight, density)


def replay(
    config: ObjectiveConfig,
    schedule: Schedule,
    step: Int[Tensor, " n"],
    t: Int[Tensor, " n"],
    margin: Float[Tensor, " n"] | None = None,
    share: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """The gradient weight g of every pair of a run, float64, from the pairs' margins alone.

    ``step`` starts at the run's first and never decreases. C(t) is frozen within a step and updated after it.
    Margins suffice because `expected` and `mode` are linear in the errors; for `sampled` the result is the
    expectation over z. `sft` reads no margin; soft labels need each pair's ``share``. Raises ConfigError for
    a missing margin or share, DataError for a decreasing step.
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
    return step_losses(*_with_margin(margin), t, config, schedule, correction, share).gradient_weight


def remaining_fraction(
    config: ObjectiveConfig, schedule: Schedule, batch_size: int, steps: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The expected fraction of its start that a coefficient retains after ``steps`` of ``batch_size`` pairs.

    (1 - mu (1 - (1 - 1/N)^B))^s for N coefficients, one for each timestep of the range or one for each bin,
    and t drawn uniformly. The rest is what the coefficient has learned (DDE Fig. 5(b)).
    """
    drawn = int((sampling_distribution(config, schedule) > 0).sum())
    coefficients = min(config.calibration_bins or drawn, drawn)
    recorded = 1 - (1 - 1 / coefficients) ** batch_size
    return (1 - config.ema_rate * recorded) ** steps.double()


def _with_margin(margin: Float[Tensor, " n"]) -> tuple[PairErrors, PairErrors]:
    """Errors of policy and reference with this margin. Any do: all sums are linear in them.

    z is 0, its mean, so that `sampled` records its expectation.
    """
    zero = torch.zeros_like(margin)
    return PairErrors(-margin, zero, zero, zero), PairErrors(zero, zero, zero, zero)


def _record(calibration: Calibration, t: Int[Tensor, " n"], margin: Float[Tensor, " n"]) -> None:
    calibration.update(t, *_with_margin(margin))


def _steps(step: Int[Tensor, " n"]) -> Iterator[slice]:
    """The rows of each step. Raises DataError for a step smaller than the one before it."""
    decreases = (step.diff() < 0).nonzero()
    if len(decreases):
        row = int(decreases[0])
        raise DataError(f"step must not decrease, got {int(step[row + 1])} after {int(step[row])}")
    end = 0
    for count in torch.unique_consecutive(step, return_counts=True)[1].tolist():
        yield slice(end, end + count)
        end += count
