"""The noise schedule: alpha_bar, SNR and kappa in float64, forward noising, and eps <-> v <-> x0.

Timesteps are the paper's, t = 1..T, with alpha_bar[0] = 1. diffusers counts from 0: its ``alphas_cumprod[t - 1]`` is
``alpha_bar[t]`` here, and a U-Net is called with t - 1.

For a sample x0, its noisy x_t and a model m let e_m = mean over latent elements of (eps - eps_m(x_t, t))^2. Everything
that Denoised Distribution Estimation (DDE, arXiv 2411.14871) adds up is a multiple of e_m. Per element:

    single shot, ||x0 - mu_hat||^2 (Eq. 9: DDIM from t to 0)                e_m / SNR(t)
    one step, KL(q(x_{t-1} | x_t, x0) || p_m(x_{t-1} | x_t)) (Eq. 3)        kappa(t) e_m

Two slips of the print are read as what they must mean: Eq. 9 has sqrt(1 - alpha_bar_0 - sigma_t^2), which is negative
for t >= 2 and vanishes with the sigma of Eq. 4 at t' = 0; Eq. 3 has sqrt(alpha_bar_t) as the coefficient of x_t, where
the posterior has sqrt(alpha_t).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_core.errors import ConfigError
from dde_core.family import check_scheduler


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables in float64, indexed by the paper's t = 0..T, and what sampling needs of the scheduler's settings.

    ``snr[0]`` is inf. ``kappa[0]`` is nan (there is no step from 0) and ``kappa[1]`` is inf (q at t = 1 is a point).
    ``steps_offset`` and ``final_alpha_bar`` (the alpha_bar that the last step of DDIM goes to) are diffusers' own.
    """

    alpha_bar: Float[Tensor, " times"]
    snr: Float[Tensor, " times"]
    kappa: Float[Tensor, " times"]
    prediction_type: str
    steps_offset: int
    final_alpha_bar: float

    @property
    def T(self) -> int:
        """The number of timesteps."""
        return len(self.alpha_bar) - 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """From the contents of a diffusers ``scheduler_config.json``, whichever scheduler wrote it.

        An absent ``prediction_type`` is epsilon, ``steps_offset`` 0, ``clip_sample`` and ``set_alpha_to_one`` false
        (the latent-diffusion convention: a DDIM config always states them). Refuses what would change the tables or
        the sampler and is not implemented. Raises ConfigError with field and value.
        """
        check_scheduler(config)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas(config), 0)])
        return cls(
            alpha_bar=alpha_bar,
            snr=snr(alpha_bar),
            kappa=kappa(snr(alpha_bar)),
            prediction_type=config.get("prediction_type", "epsilon"),
            steps_offset=config.get("steps_offset", 0),
            final_alpha_bar=1.0 if config.get("set_alpha_to_one") else alpha_bar[1].item(),
        )

    def to(self, device: torch.device | str) -> Schedule:
        """The same schedule with its tables on a device."""
        tables = {name: getattr(self, name).to(device) for name in ("alpha_bar", "snr", "kappa")}
        return dataclasses.replace(self, **tables)


def betas(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    """The variances beta_1..beta_T, as diffusers makes them but in float64."""
    if config.get("trained_betas") is not None:
        values = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        start, end, timesteps = (config[name] for name in ("beta_start", "beta_end", "num_train_timesteps"))
        if config["beta_schedule"] == "scaled_linear":
            values = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
        else:
            values = torch.linspace(start, end, timesteps, dtype=torch.float64)
    outside = values[~((values > 0) & (values < 1))]
    if len(outside):
        raise ConfigError("betas", outside[0].item(), "must lie between 0 and 1")
    return values


def snr(alpha_bar: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar) (DDE, below Eq. 2)."""
    return alpha_bar / (1 - alpha_bar)


def kappa(snr: Float[Tensor, " times"]) -> Float[Tensor, " times"]:
    """1/2 (SNR(t-1) / SNR(t) - 1): the KL of one step (DDE Eq. 3) is kappa(t) times the error of the noise."""
    return torch.cat([snr.new_tensor([float("nan")]), (snr[:-1] / snr[1:] - 1) / 2])


def mode_weight(alpha_bar: Float[Tensor, " times"]) -> Float[Tensor, " times"]:
    """1/2 beta_t^2 / (alpha_t (1 - alpha_bar_t)): what 1/2 ||mu_m - mu||^2 is as a multiple of the error of the noise
    (the means of DDE Eq. 3, without the variance). nan at t = 0."""
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    return torch.cat(
        [alpha_bar.new_tensor([float("nan")]), (1 - alpha) ** 2 / (alpha * (1 - alpha_bar[1:])) / 2]
    )


def add_noise(
    schedule: Schedule, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise (DDE Eq. 2), t in 1..T."""
    signal, sigma = _coefficients(schedule, t, x0)
    return signal * x0 + sigma * noise


def epsilon_from(
    schedule: Schedule, output: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The noise that a model output stands for. With v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0,
    eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t (Salimans and Ho 2022, appendix D)."""
    if schedule.prediction_type == "epsilon":
        return output
    signal, sigma = _coefficients(schedule, t, x_t)
    return signal * output + sigma * x_t


def x0_from(
    schedule: Schedule, output: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The clean sample that a model output stands for: DDE Eq. 9 (single shot), or from v directly."""
    signal, sigma = _coefficients(schedule, t, x_t)
    if schedule.prediction_type == "v_prediction":
        return signal * x_t - sigma * output
    return (x_t - sigma * output) / signal


def _coefficients(
    schedule: Schedule, t: Int[Tensor, " b"], like: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), taken in float64 and cast to the dtype of the samples."""
    alpha_bar = schedule.alpha_bar.to(t.device)[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)
