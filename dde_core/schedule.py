"""The noise schedule: alpha_bar, SNR and kappa in float64, forward noising, and eps <-> v <-> x0.

Timesteps are the paper's, t = 1..T, with alpha_bar[0] = 1. diffusers counts from 0: ``alpha_bar[t]`` here is
its ``alphas_cumprod[t - 1]``, and a U-Net is called with t - 1.

For a sample x0, its noisy x_t and a model m, let e_m = mean over latent elements of (eps - eps_m(x_t, t))^2.
Every term of Denoised Distribution Estimation (DDE, arXiv 2411.14871) is a multiple of e_m. Per element:

    single shot, ||x0 - mu_hat||^2 (Eq. 9: DDIM from t to 0)                e_m / SNR(t)
    one step, KL(q(x_{t-1} | x_t, x0) || p_m(x_{t-1} | x_t)) (Eq. 3)        kappa(t) e_m

Two misprints are corrected. Eq. 9 has sqrt(1 - alpha_bar_0 - sigma_t^2), which is negative for t >= 2; it
vanishes with the sigma of Eq. 4 at t' = 0. Eq. 3 has sqrt(alpha_bar_t) as the coefficient of x_t; the
posterior has sqrt(alpha_t).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_core.models.scheduler_config import check_scheduler


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables in float64, indexed by the paper's t = 0..T.

    ``snr[0]`` is inf. ``kappa[0]`` is nan (there is no step from 0). ``kappa[1]`` is inf (q at t = 1 is a
    point). With zero terminal SNR, ``snr[T]`` is 0 and ``kappa[T]`` is inf.
    """

    alpha_bar: Float[Tensor, " times"]
    snr: Float[Tensor, " times"]
    kappa: Float[Tensor, " times"]
    prediction_type: str
    has_zero_terminal_snr: bool = False
    """Whether nothing of an image is left at T."""

    @property
    def T(self) -> int:
        """The number of timesteps."""
        return len(self.alpha_bar) - 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """From the contents of any diffusers scheduler's ``scheduler_config.json``.

        The default of ``prediction_type`` is epsilon. Raises ConfigError for settings that would change the
        tables or the samplers and are not implemented.
        """
        check_scheduler(config)
        products = torch.cumprod(1 - betas(config), 0)
        if config.get("rescale_betas_zero_snr"):
            products = zero_terminal_snr(products)
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), products])
        return cls(
            alpha_bar=alpha_bar,
            snr=snr(alpha_bar),
            kappa=kappa(snr(alpha_bar)),
            prediction_type=config.get("prediction_type", "epsilon"),
            has_zero_terminal_snr=alpha_bar[-1].item() == 0,
        )

    def to(self, device: torch.device | str) -> Schedule:
        """The schedule with its tables on a device."""
        tables = {name: getattr(self, name).to(device) for name in ("alpha_bar", "snr", "kappa")}
        return dataclasses.replace(self, **tables)


def betas(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    """beta_1..beta_T of a config that ``check_scheduler`` accepts, by diffusers' formulas, in float64."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    start, end, timesteps = (config[name] for name in ("beta_start", "beta_end", "num_train_timesteps"))
    if config["beta_schedule"] == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    return torch.linspace(start, end, timesteps, dtype=torch.float64)


def zero_terminal_snr(alpha_bar: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """alpha_bar_1..alpha_bar_T, moved and scaled so that the last is 0 and the first stays.

    Lin et al. (arXiv 2305.08891), Algorithm 1, which works on the square roots.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def snr(alpha_bar: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Signal-to-noise ratio, alpha_bar / (1 - alpha_bar) (DDE, below Eq. 2)."""
    return alpha_bar / (1 - alpha_bar)


def kappa(snr: Float[Tensor, " times"]) -> Float[Tensor, " times"]:
    """1/2 (SNR(t-1) / SNR(t) - 1): the KL of one step (DDE Eq. 3) is kappa(t) e_m. nan at t = 0."""
    return torch.cat([snr.new_tensor([float("nan")]), (snr[:-1] / snr[1:] - 1) / 2])


def mode_weight(alpha_bar: Float[Tensor, " times"]) -> Float[Tensor, " times"]:
    """1/2 beta_t^2 / (alpha_t (1 - alpha_bar_t)): 1/2 ||mu_m - mu||^2 is this times e_m. nan at t = 0.

    The means mu are those of DDE Eq. 3; its variance is dropped.
    """
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    weight = (1 - alpha) ** 2 / (alpha * (1 - alpha_bar[1:])) / 2
    return torch.cat([alpha_bar.new_tensor([float("nan")]), weight])


def add_noise(
    schedule: Schedule, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise (DDE Eq. 2), t in 1..T."""
    signal, sigma = _coefficients(schedule, t, x0)
    return signal * x0 + sigma * noise


def epsilon_from(
    schedule: Schedule, output: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The noise predicted by a model output.

    For v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022, appendix D), it is
    eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t.
    """
    if schedule.prediction_type == "epsilon":
        return output
    signal, sigma = _coefficients(schedule, t, x_t)
    return signal * output + sigma * x_t


def velocity(
    schedule: Schedule, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0 (Salimans and Ho 2022, appendix D)."""
    signal, sigma = _coefficients(schedule, t, x0)
    return signal * noise - sigma * x0


def x0_from(
    schedule: Schedule, output: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The clean sample predicted by a model output: DDE Eq. 9 (single shot), or from v directly."""
    signal, sigma = _coefficients(schedule, t, x_t)
    if schedule.prediction_type == "v_prediction":
        return signal * x_t - sigma * output
    return (x_t - sigma * output) / signal


def _coefficients(
    schedule: Schedule, t: Int[Tensor, " b"], like: Float[Tensor, "b c h w"]
) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), computed in float64 and cast to the samples' dtype."""
    alpha_bar = schedule.alpha_bar.to(t.device)[t].view(-1, 1, 1, 1)
    return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)
