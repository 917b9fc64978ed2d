"""Calibration coefficients: running means of each step's log p/q, and the correction C(t) (DDE section 3.3, Alg. 1).

Four arrays r[0..T-1], policy and reference by winner and loser, start at zero and carry no gradient. After the
optimizer step that was made at timestep t

    r[t-1] <- (1 - mu) r[t-1] + mu value,    value = log p(x_{t-1} | x_t) / q(x_{t-1} | x_t, x0)
    C(t) = sum over k = t..T-1 of (r_theta^w - r_ref^w - r_theta^l + r_ref^l)[k],    C(T) = 0

The paper does not say at which x_{t-1} the ratio is taken. ``calibration_point`` does:

    expected   the expectation under q, minus the KL of Eq. 3: -kappa e
    sampled    one x_{t-1} = mu + sigma z drawn from q: -kappa e - sqrt(2 kappa) mean(z (eps_m - eps)), one z for all models
    mode       the paper's earlier text: +1/2 ||mu_m - mu||^2, the variance dropped

What else the paper leaves open is read so: mu = 0.1 is printed without a meaning, and is taken as this rate; the sum ends
at T - 1, as in section 3.3 and Algorithm 1 (the appendix prints T, an entry that does not exist); the samples of one global
batch at one timestep are one update, of their mean. Timestep 1 is never recorded where kappa counts: kappa(1) is infinite,
no C(t) uses r[0].

With ``calibration_bins`` = B the timesteps that can be drawn are shared out among B bins. A bin holds the running mean
of ``value`` at any of its timesteps, so it stands for r at each of them: C is summed over timesteps, as without bins.
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
    """Four float64 arrays on the CPU, of length T, or of the number of bins. Every worker holds identical ones.

    An update replaces the arrays and never changes one in place, so a state dict stays what it was.
    """

    theta_w: Float[Tensor, " n"]
    ref_w: Float[Tensor, " n"]
    theta_l: Float[Tensor, " n"]
    ref_l: Float[Tensor, " n"]

    def __init__(self, schedule: Schedule, config: ObjectiveConfig) -> None:
        self._bin_of = bin_of_timestep(schedule.T, config)
        self._point = config.calibration_point
        table = mode_weight(schedule.alpha_bar) if self._point == "mode" else -schedule.kappa
        self._weight = table.cpu()
        self._rate = config.ema_rate
        self._table: Tensor | None = None
        for name in NAMES:
            setattr(self, name, torch.zeros(config.calibration_bins or schedule.T, dtype=torch.float64))

    def correction(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """C(t) in float64, on t's device. It stays as it is until the next update."""
        if self._table is None:
            credit = self.theta_w - self.ref_w - self.theta_l + self.ref_l
            self._table = correction_table(credit, self._bin_of)
        return self._table[t.cpu()].to(t.device)

    def update(self, t: Int[Tensor, " b"], theta: PairErrors, ref: PairErrors) -> None:
        """One step of the running means from the errors of the GLOBAL batch (gathered from all workers).

        The result does not depend on the order of the batch, to the bit. Timesteps that are not recorded (1, and those
        outside of the configured range) are left out. Raises NonFiniteError before anything has changed.
        """
        t = t.cpu()
        bins, recorded = self._bin_of[t], self._bin_of[t] >= 0
        errors = _stack(theta.w, ref.w, theta.l, ref.l)
        values = self._weight[t] * errors
        if self._point == "sampled":  # 2 kappa: inf at t = 1, which is not recorded
            values = values - (-2 * self._weight[t]).sqrt() * _stack(theta.z_w, ref.z_w, theta.z_l, ref.z_l)
        if not errors.isfinite().all() or not values[:, recorded].isfinite().all():
            raise NonFiniteError("errors for the calibration coefficients are not all finite")
        for name, value in zip(NAMES, values[:, recorded], strict=True):
            setattr(self, name, ema(getattr(self, name), bins[recorded], value, self._rate))
        self._table = None

    def state_dict(self) -> dict[str, Tensor]:
        """The four arrays, as plain tensors."""
        return {name: getattr(self, name) for name in NAMES}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the arrays of ``state_dict``. Raises DataError, and changes nothing, where they do not fit."""
        if set(state) != set(NAMES):
            raise DataError(f"calibration state must hold {', '.join(NAMES)}, got {', '.join(sorted(state))}")
        for name in NAMES:
            if state[name].shape != getattr(self, name).shape:
                raise DataError(
                    f"{name} must have {len(getattr(self, name))} entries, got {list(state[name].shape)}"
                )
        for name in NAMES:
            setattr(self, name, state[name].detach().cpu().double())
        self._table = None


def _stack(*columns: Float[Tensor, " b"] | None) -> Float[Tensor, "4 b"]:
    """Columns in the order of NAMES, in float64 on the CPU."""
    return torch.stack([column.detach().cpu().double() for column in columns if column is not None])


def bin_of_timestep(timesteps: int, config: ObjectiveConfig) -> Int[Tensor, " times"]:
    """The array entry for each t = 0..T, -1 where nothing is recorded: outside of the range, and timestep 1 but for `mode`.

    Without bins timestep t has entry t - 1. Bins divide the timesteps that are recorded, so none is half empty.
    """
    bins = config.calibration_bins
    if bins > timesteps:
        raise ConfigError("calibration_bins", bins, f"must be at most T = {timesteps}")
    t = torch.arange(timesteps + 1)
    first, last = max(1 if config.calibration_point == "mode" else 2, config.t_min), config.t_max or timesteps
    entry = (t - first) * bins // max(1, last - first + 1) if bins else t - 1
    return torch.where((t >= first) & (t <= last), entry, -1)


def ema(
    array: Float[Tensor, " n"], bins: Int[Tensor, " b"], value: Float[Tensor, " b"], rate: float
) -> Float[Tensor, " n"]:
    """(1 - mu) r + mu mean(value), for the entries that have values. Sorted first: then the sum has one order."""
    value, order = value.sort()
    bins = bins[order]
    counts = torch.bincount(bins, minlength=len(array))
    mean = torch.bincount(bins, weights=value, minlength=len(array)) / counts
    return torch.where(counts > 0, (1 - rate) * array + rate * mean, array)


def correction_table(credit: Float[Tensor, " n"], bin_of: Int[Tensor, " times"]) -> Float[Tensor, " times"]:
    """C(0..T): entry k of the sum is what was recorded at timestep k + 1. A reverse cumulative sum, never a total
    minus a prefix: near T the terms that do not belong would otherwise leave their rounding behind."""
    per_timestep = torch.where(bin_of >= 0, credit[bin_of.clamp(min=0)], 0.0)[1:]
    return torch.cat([per_timestep.flip(0).cumsum(0).flip(0), credit.new_zeros(1)])
