"""Calibration coefficients, running means of log p/q, and the correction C(t) (DDE section 3.3, Algorithm 1).

Four arrays r[0..T-1], for policy and reference on winner and loser, start at zero and carry no gradient.
After an optimizer step at timestep t:

    r[t-1] <- (1 - mu) r[t-1] + mu value,    value = log p(x_{t-1} | x_t) / q(x_{t-1} | x_t, x0)
    C(t) = sum over k = t..T-1 of (r_theta^w - r_ref^w - r_theta^l + r_ref^l)[k],    C(T) = 0

The paper does not define the x_{t-1} at which the ratio is evaluated. ``calibration_point`` does:

    expected   the expectation under q, minus the KL of Eq. 3: -kappa e
    sampled    one x_{t-1} = mu + sigma z drawn from q, with one z for all models:
               -kappa e - sqrt(2 kappa) mean(z (eps_m - eps))
    mode       the paper's earlier text: +1/2 ||mu_m - mu||^2, the variance dropped

Our readings of what the paper leaves open: mu is this rate (0.1 is printed without a meaning). The sum ends
at T - 1, as in section 3.3 and Algorithm 1 (the appendix prints T, an entry that does not exist). The samples
of one global batch at one timestep make one update, of their mean. `expected` and `sampled` do not record
timestep 1, because kappa(1) is infinite; no C(t) uses r[0]. With zero terminal SNR, kappa(T) is infinite and
the noise's error 0, so T is not recorded. Its KL is 1/2 SNR(T-1) ||x0 - x0_hat||^2, which is negligible.

``calibration_bins`` = B groups the timesteps that can be drawn into B bins. A bin holds one running mean of
``value`` over all of its timesteps, and is the r of each of them: C is a sum over timesteps, as without bins.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.schedule import Schedule, mode_weight
from dde_core.train_step import PairErrors

NAMES = ("theta_w", "ref_w", "theta_l", "ref_l")


class Calibration:
    """Four float64 arrays on the CPU, of length T or ``calibration_bins``. They are identical on all workers.

    An update replaces the arrays and never writes into one, so an earlier state dict keeps its values.
    """

    theta_w: Float[Tensor, " n"]
    ref_w: Float[Tensor, " n"]
    theta_l: Float[Tensor, " n"]
    ref_l: Float[Tensor, " n"]

    def __init__(self, schedule: Schedule, config: ObjectiveConfig) -> None:
        self._bin_of = bin_of_timestep(schedule, config)
        self._point = config.calibration_point
        table = mode_weight(schedule.alpha_bar) if self._point == "mode" else -schedule.kappa
        self._weight = table.cpu()
        self._rate = config.ema_rate
        self._table: Tensor | None = None
        for name in NAMES:
            setattr(self, name, torch.zeros(config.calibration_bins or schedule.T, dtype=torch.float64))

    def correction(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """C(t) in float64, on t's device, from the coefficients after the last update."""
        if self._table is None:
            credit = self.theta_w - self.ref_w - self.theta_l + self.ref_l
            self._table = correction_table(credit, self._bin_of)
        return self._table[t.cpu()].to(t.device)

    def update(self, t: Int[Tensor, " b"], theta: PairErrors, ref: PairErrors) -> None:
        """Update the running means with the errors of the GLOBAL batch, gathered from all workers.

        The result is bit-identical for any order of the batch. Timesteps outside the configured range, and 1
        except for `mode`, are ignored. Raises NonFiniteError before anything has changed.
        """
        t = t.cpu()
        bins = self._bin_of[t]
        recorded = bins >= 0
        errors = _stack(theta.w, ref.w, theta.l, ref.l)
        values = self._weight[t] * errors
        if self._point == "sampled":  # 2 kappa: inf at t = 1, which is not recorded
            values = values - (-2 * self._weight[t]).sqrt() * _stack(theta.z_w, ref.z_w, theta.z_l, ref.z_l)
        if not errors.isfinite().all() or not values[:, recorded].isfinite().all():
            raise NonFiniteError("the errors that update the calibration coefficients are not all finite")
        for name, value in zip(NAMES, values[:, recorded], strict=True):
            setattr(self, name, ema(getattr(self, name), bins[recorded], value, self._rate))
        self._table = None

    def state_dict(self) -> dict[str, Tensor]:
        """The four arrays by name."""
        return {name: getattr(self, name) for name in NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the arrays of ``state_dict``. Raises DataError before a change if names or lengths differ."""
        if set(state) != set(NAMES):
            raise DataError(f"calibration state must hold {', '.join(NAMES)}, got {', '.join(sorted(state))}")
        for name in NAMES:
            length = len(getattr(self, name))
            if state[name].shape != (length,):
                raise DataError(f"{name} must have {length} entries, got {list(state[name].shape)}")
        for name in NAMES:
            setattr(self, name, state[name].detach().cpu().double())
        self._table = None


def _stack(*columns: Float[Tensor, " b"] | None) -> Float[Tensor, "4 b"]:
    """Columns in the order of NAMES, in float64 on the CPU."""
    return torch.stack([column.detach().cpu().double() for column in columns if column is not None])


def bin_of_timestep(schedule: Schedule, config: ObjectiveConfig) -> Int[Tensor, " times"]:
    """The array entry of each t = 0..T; -1 for timesteps that are not recorded.

    These are the ones outside the configured range, timestep 1 except for `mode`, and T where nothing of an
    image is left at T. Without bins timestep t
    has entry t - 1. Bins divide the recorded timesteps evenly. Raises ConfigError for more bins than
    timesteps.
    """
    bins = config.calibration_bins
    timesteps = schedule.T
    if bins > timesteps:
        raise ConfigError("calibration_bins", bins, f"must be at most T = {timesteps}")
    t = torch.arange(timesteps + 1)
    first = max(1 if config.calibration_point == "mode" else 2, config.t_min)
    last = min(config.t_max or timesteps, timesteps - int(schedule.has_zero_terminal_snr))
    entry = (t - first) * bins // max(1, last - first + 1) if bins else t - 1
    return torch.where((t >= first) & (t <= last), entry, -1)


def ema(
    array: Float[Tensor, " n"], bins: Int[Tensor, " b"], value: Float[Tensor, " b"], rate: float
) -> Float[Tensor, " n"]:
    """(1 - mu) r + mu mean(value) for entries with values. Sorting fixes the order of the sum."""
    value, order = value.sort()
    bins = bins[order]
    counts = torch.bincount(bins, minlength=len(array))
    mean = torch.bincount(bins, weights=value, minlength=len(array)) / counts
    return torch.where(counts > 0, (1 - rate) * array + rate * mean, array)


def correction_table(credit: Float[Tensor, " n"], bin_of: Int[Tensor, " times"]) -> Float[Tensor, " times"]:
    """C(0..T). Entry k of the sum was recorded at timestep k + 1.

    This is a reverse cumulative sum. A total minus a prefix would leave the rounding of all earlier terms
    near T.
    """
    per_timestep = torch.where(bin_of >= 0, credit[bin_of.clamp(min=0)], 0.0)[1:]
    return torch.cat([per_timestep.flip(0).cumsum(0).flip(0), credit.new_zeros(1)])
