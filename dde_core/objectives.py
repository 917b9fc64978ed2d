"""The objectives as one table: a weight w(t), whether the calibrated correction C(t) is added, how t is drawn.

With the errors e of policy (theta) and frozen reference (ref) on winner (w) and loser (l), each the MEAN over latent
elements of the squared error of the noise,

    margin = (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l)
    logit  = beta (w(t) margin + C(t))
    loss   = -log sigmoid(logit)

which is DDE's Eq. 10 with w = 1/SNR and Diffusion-DPO's loss (arXiv 2311.12908) with w = 1/2, C = 0. DDE's Eq. 15 drops
1 / (2 sigma_t^2), so its single-shot term and C are in different units; it is implemented as printed. `sft` alone has no
preference in it: its loss is e_theta on winners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError
from dde_core.methods import METHODS, MethodName
from dde_core.schedule import Schedule

DISCOUNT_STEPS = 50
"""`discounted`: its gamma is that of one step of so many DDIM steps."""


def single_shot(schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1 / SNR(t): the error of x0 estimated in one shot (DDE Eq. 9)."""
    return 1 / schedule.snr


def one_half(schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1/2: -logsigmoid(-0.5 beta (model_diff - ref_diff)), as Diffusion-DPO's published code has it."""
    return torch.full_like(schedule.snr, 0.5)


def one(schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1: the error itself."""
    return torch.ones_like(schedule.snr)


def uniform_density(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """t uniform over its range (DDE Algorithm 1 line 2)."""
    return torch.ones_like(schedule.snr)


def discounted_density(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """In proportion to gamma_T^(T - t), gamma_T = gamma^(50/T): the discount of Dense Reward (arXiv 2402.08265), which is
    given for 50 DDIM steps. Carrying it over to T timesteps is our reading. (Counted from the end of the range, at 1: no
    gamma is so small that nothing is left.)"""
    gamma, last = config.gamma ** (DISCOUNT_STEPS / schedule.T), config.t_max or schedule.T
    return gamma ** (last - torch.arange(schedule.T + 1, dtype=torch.float64, device=schedule.snr.device))


@dataclass(frozen=True)
class Objective:
    """How a method assigns credit: w(t) for t = 0..T, and how often each t is drawn (not normalized).

    ``source`` says where the weight comes from. What else a method needs is in `dde_core.methods.METHODS`.
    """

    weight: Callable[[Schedule], Tensor]
    source: str
    density: Callable[[ObjectiveConfig, Schedule], Tensor] = uniform_density


OBJECTIVES: dict[MethodName, Objective] = {
    "dde": Objective(single_shot, "w = 1/SNR(t): DDE v3 Eq. 10, Algorithm 1"),
    "dde_single": Objective(single_shot, "w = 1/SNR(t): DDE v3 section 4.4"),
    # The literal log-ratio of one step would have w = kappa(t), which is infinite at t = 1: `uniform` plus C is our reading.
    "dde_step": Objective(one_half, "w = 1/2, as uniform, plus C(t): DDE v3 section 4.4"),
    "uniform": Objective(one_half, "w = 1/2: Diffusion-DPO"),
    "discounted": Objective(
        one_half,
        "w = 1/2, early steps of sampling drawn more often: Dense Reward",
        density=discounted_density,
    ),
    "sft": Objective(one, "the error on winners: named by DDE v3 without a definition; the usual one"),
}


def weights(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) of the configured method, at most ``max_weight`` where that is set (ours: the paper has no cap)."""
    w = OBJECTIVES[config.method].weight(schedule)
    if config.max_weight and METHODS[config.method].has_loser:
        return w.clamp(max=config.max_weight)
    return w


def method_distribution(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """p(t) for t = 0..T as the method has it: 0 outside of the configured range, 1 in sum.

    Raises ConfigError for a range that the schedule does not have.
    """
    return _in_range(OBJECTIVES[config.method].density(config, schedule), config, schedule)


def sampling_distribution(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """The distribution that t is drawn from: p(t), or the uniform one where ``t_sampling`` says so."""
    density = uniform_density if config.t_sampling == "uniform" else OBJECTIVES[config.method].density
    return _in_range(density(config, schedule), config, schedule)


def importance(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """p(t) over what t is drawn from: each pair's loss is weighted by it, so that the expectation is the method's."""
    drawn = sampling_distribution(config, schedule)
    return torch.where(
        drawn > 0, method_distribution(config, schedule) / drawn.clamp(min=torch.finfo(drawn.dtype).tiny), 0.0
    )


def _in_range(
    density: Float[Tensor, " times"], config: ObjectiveConfig, schedule: Schedule
) -> Float[Tensor, " times"]:
    for name in ("t_min", "t_max"):
        if getattr(config, name) > schedule.T:
            raise ConfigError(name, getattr(config, name), f"must be at most T = {schedule.T}")
    t = torch.arange(schedule.T + 1, device=density.device)
    inside = torch.where((t >= config.t_min) & (t <= (config.t_max or schedule.T)), density, 0.0)
    return inside / inside.sum()


def preference_logit(
    beta: float, weight: Float[Tensor, " b"], margin: Float[Tensor, " b"], correction: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """beta (w(t) margin + C(t)) (DDE Eq. 10): the log-odds that the winner is preferred."""
    return beta * (weight * margin + correction)


def preference_loss(logit: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """-log sigmoid(logit) for each pair (DDE Eq. 10), not reduced."""
    return -torch.nn.functional.logsigmoid(logit)


def gradient_weight(weight: Float[Tensor, " b"], logit: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """g(t) = w(t) sigmoid(-logit): what the gradient of a pair's margin is multiplied by, but for beta."""
    return weight * torch.sigmoid(-logit)


def conventions(config: ObjectiveConfig, schedule: Schedule) -> dict[str, Any]:
    """Everything that a number of this run means, resolved: for lineages and model cards."""
    method = METHODS[config.method]
    said: dict[str, Any] = {
        "loss": "-log sigmoid(beta (w(t) margin + C(t)))" if method.has_loser else "e_theta of the winner",
        "source": OBJECTIVES[config.method].source,
        "error": f"{config.reduction} over latent elements of (eps - eps_model)^2, reduced in float32",
        "timesteps": f"{config.t_min}..{config.t_max or schedule.T} of 1..{schedule.T}; the U-Net is called with t - 1",
        "prediction_type": schedule.prediction_type,
    }
    if method.has_loser:
        said["noise"] = f"{config.noise_mode}; winner and loser share t"
    if method.corrected:
        said["correction"] = (
            f"C(t) = sum over k = t..T-1 of r_theta^w - r_ref^w - r_theta^l + r_ref^l; r[t-1] is the running mean of log p/q "
            f"at the {config.calibration_point} point with mu = {config.ema_rate}"
        )
    if method.discounted:
        drawn = (
            "drawn from p(t)"
            if config.t_sampling == "method"
            else "drawn uniformly, losses weighted by p(t)/u(t)"
        )
        said["t_distribution"] = f"p(t) ~ {config.gamma ** (DISCOUNT_STEPS / schedule.T):.6g}^(T-t), {drawn}"
    return said
