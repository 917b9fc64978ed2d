"""The objectives as one table: the weight w(t), and how t is drawn.

Let e be the squared error of the noise, the MEAN over latent elements, of policy (theta) and frozen reference
(ref) on winner (w) and loser (l). Then

    margin = (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l)
    logit  = beta (w(t) margin + C(t))
    loss   = -p log sigmoid(logit) - (1 - p) log sigmoid(-logit)

This is DDE's Eq. 10 for w = 1/SNR, and Diffusion-DPO's loss (arXiv 2311.12908) for w = 1/2 and C = 0. DDE's
Eq. 15 drops 1 / (2 sigma_t^2), so its single-shot term and C have different units; it is implemented as
printed. In both p = 1. With soft labels p is the winner's share of the preference, of each pair its own: the
loss of conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023). `sft` uses no preference:
its loss is e_theta on winners.

On-policy methods compare two samples of one denoising step: there e is the projection of the model's noise on
z_w - z_l, margin = e_ref - e_theta, and w(t) = a(t, t').
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
from dde_core.models.scheduler_config import check_error, check_terminal_weight
from dde_core.schedule import Schedule
from dde_core.transitions import ranked_transitions

DISCOUNT_STEPS = 50
"""`discounted`: gamma is the discount of one of so many DDIM steps."""


def single_shot(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1 / SNR(t): the error of x0 estimated in one shot (DDE Eq. 9)."""
    return 1 / schedule.snr


def one_half(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1/2: -logsigmoid(-0.5 beta (model_diff - ref_diff)), as in Diffusion-DPO's published code."""
    return torch.full_like(schedule.snr, 0.5)


def one(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1: the error itself."""
    return torch.ones_like(schedule.snr)


def transition(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = a(t, t') where a transition starts that is ranked, else 0 (`dde_core/transitions.py`)."""
    weight = torch.zeros_like(schedule.snr)
    ranked = ranked_transitions(config, schedule)
    weight[ranked.t] = ranked.a.to(weight)
    return weight


def uniform_density(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """t uniform over its range (DDE Algorithm 1 line 2)."""
    return torch.ones_like(schedule.snr)


def discounted_density(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """Proportional to gamma_T^(T - t) with gamma_T = gamma^(50/T).

    Dense Reward (arXiv 2402.08265) defines the discount for 50 DDIM steps; carrying it over to T timesteps is
    our reading. The exponent counts from the end of the range, so that no gamma is so small that every t
    underflows.
    """
    gamma = config.gamma ** (DISCOUNT_STEPS / schedule.T)
    last = config.t_max or schedule.T
    t = torch.arange(schedule.T + 1, dtype=torch.float64, device=schedule.snr.device)
    return torch.pow(gamma, last - t)


@dataclass(frozen=True)
class Objective:
    """How a method assigns credit: w(t) and the (unnormalized) density of t, both for t = 0..T.

    ``source`` cites where the weight comes from.
    """

    weight: Callable[[ObjectiveConfig, Schedule], Tensor]
    source: str
    density: Callable[[ObjectiveConfig, Schedule], Tensor] = uniform_density


TAILORPO = "TailorPO (arXiv 2502.01667) as we read it; the loss is our derivation"

OBJECTIVES: dict[MethodName, Objective] = {
    "dde": Objective(single_shot, "w = 1/SNR(t): DDE v3 Eq. 10, Algorithm 1"),
    "dde_single": Objective(single_shot, "w = 1/SNR(t): DDE v3 section 4.4"),
    # Our reading: `uniform` plus C. One step's literal log-ratio has w = kappa(t), infinite at t = 1.
    "dde_step": Objective(one_half, "w = 1/2, as uniform, plus C(t): DDE v3 section 4.4"),
    "uniform": Objective(one_half, "w = 1/2: Diffusion-DPO"),
    "discounted": Objective(
        one_half,
        "w = 1/2, early steps of sampling drawn more often: Dense Reward",
        density=discounted_density,
    ),
    "sft": Objective(one, "the error on winners: named by DDE v3 without a definition; the usual one"),
    "tailorpo": Objective(transition, f"w = a(t, t'): {TAILORPO}"),
    "tailorpo_g": Objective(
        transition, f"w = a(t, t'), winners moved along the reward's gradient: {TAILORPO}"
    ),
}


def weights(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) for t = 0..T, capped at ``max_weight`` if that is set (ours: the paper has no cap).

    Raises ConfigError if w is infinite at a t that is drawn: at T, with zero terminal SNR; and for errors of
    the velocity of a model that predicts the noise.
    """
    check_error(config, schedule.prediction_type)
    w = OBJECTIVES[config.method].weight(config, schedule)
    if schedule.has_zero_terminal_snr:
        check_terminal_weight(config, schedule.T)
        w = torch.where(w.isposinf(), config.max_weight, w)
    method = METHODS[config.method]
    if config.max_weight and method.has_loser and not method.on_policy:
        return w.clamp(max=config.max_weight)
    return w


def method_distribution(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """The method's p(t) for t = 0..T: 0 outside the configured range, summing to 1.

    Raises ConfigError for a range beyond the schedule's T.
    """
    return _in_range(OBJECTIVES[config.method].density(config, schedule), config, schedule)


def sampling_distribution(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """The distribution that t is drawn from: p(t), or the uniform one if ``t_sampling`` is "uniform"."""
    density = uniform_density if config.t_sampling == "uniform" else OBJECTIVES[config.method].density
    return _in_range(density(config, schedule), config, schedule)


def importance(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """Importance weights p(t) / u(t), u the sampling distribution: each pair's loss is multiplied by them."""
    u = sampling_distribution(config, schedule)
    ratio = method_distribution(config, schedule) / u.clamp(min=torch.finfo(u.dtype).tiny)
    return torch.where(u > 0, ratio, 0.0)


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


def preference_loss(
    logit: Float[Tensor, " b"], share: Float[Tensor, " b"] | float = 1.0
) -> Float[Tensor, " b"]:
    """-p log sigmoid(logit) - (1 - p) log sigmoid(-logit) for each pair, not reduced; p is ``share``.

    DDE Eq. 10 at p = 1. The second logarithm is that of the first sigmoid, minus the logit.
    """
    return -torch.nn.functional.logsigmoid(logit) + (1 - share) * logit


def gradient_weight(
    weight: Float[Tensor, " b"], logit: Float[Tensor, " b"], share: Float[Tensor, " b"] | float = 1.0
) -> Float[Tensor, " b"]:
    """g(t) = w(t) (p - sigmoid(logit)): the factor of the gradient of a pair's margin, apart from beta.

    It is negative where the policy is surer of the winner than ``share`` = p says.
    """
    return weight * (torch.sigmoid(-logit) - (1 - share))


_LOSSES = {
    "hard": "-log sigmoid(beta (w(t) margin + C(t)))",
    "soft": "-p log sigmoid(logit) - (1 - p) log sigmoid(-logit), p the winner's share, "
    "logit = beta (w(t) margin + C(t))",
}


_SQUARES = {"noise": "(eps - eps_model)^2", "velocity": "(v - v_model)^2"}
_TIME_IDS = {
    "per_side": "size and crop of each side's own image (SDXL)",
    "fixed": "the encoded size and no crop for both sides (SDXL)",
}


def conventions(config: ObjectiveConfig, schedule: Schedule) -> dict[str, Any]:
    """How to read this run's numbers, with defaults resolved: for lineages and model cards."""
    method = METHODS[config.method]
    resolved: dict[str, Any] = {
        "loss": _LOSSES[config.label] if method.has_loser else "e_theta of the winner",
        "source": OBJECTIVES[config.method].source,
        "error": f"{config.reduction} over latent elements of {_SQUARES[config.error]}, reduced in float32",
        "timesteps": f"{config.t_min}..{config.t_max or schedule.T} of 1..{schedule.T}; "
        "the U-Net is called with t - 1",
        "prediction_type": schedule.prediction_type,
    }
    if method.on_policy:
        return resolved | _rollout_conventions(config)
    resolved["time_ids"] = _TIME_IDS[config.time_ids]
    if method.has_loser:
        resolved["noise"] = f"{config.noise_mode}; winner and loser share t"
    if method.corrected:
        resolved["correction"] = (
            "C(t) = sum over k = t..T-1 of r_theta^w - r_ref^w - r_theta^l + r_ref^l; r[t-1] is the running "
            f"mean of log p/q at the {config.calibration_point} point with mu = {config.ema_rate}"
        )
    if method.discounted:
        gamma = config.gamma ** (DISCOUNT_STEPS / schedule.T)
        drawn = "drawn from p(t)"
        if config.t_sampling == "uniform":
            drawn = "drawn uniformly, losses weighted by p(t)/u(t)"
        resolved["t_distribution"] = f"p(t) ~ {gamma:.6g}^(T-t), {drawn}"
    return resolved


def _rollout_conventions(config: ObjectiveConfig) -> dict[str, Any]:
    """How an on-policy run drew and ranked its pairs."""
    passes = f"{config.lookahead}" if config.lookahead else "4 above t = 500, 1 below"
    resolved = {
        "error": "mean(dz e) over latent elements, dz = z_w - z_l, e the guided noise, reduced in float32",
        "sampler": f"DDIM, {config.transitions} steps, eta {config.eta:g}, guidance "
        f"{config.guidance_scale:g}, in rollouts and in training (as SPO's code)",
        "candidates": f"{config.candidates} from one x_t (our reading), best against worst, kept if their "
        f"rewards differ by more than {config.min_gap:g}",
        "reward": f"of the clean sample that deterministic DDIM estimates in {passes} passes (1: our reading "
        "of the paper; more are ours)",
        "continue_from": f"{config.continue_from} candidate (random: as SPO's code)",
        "time_ids": "the model's size and no crop (SDXL)",
        "anchor": "the base" if config.anchor == "base" else "the weights that drew the round (ours)",
    }
    if config.label == "soft":
        resolved["share"] = f"sigmoid(gap of rewards / {config.temperature:g}) (Bradley and Terry)"
    if METHODS[config.method].reward_gradient:
        resolved["guidance_of_winners"] = (
            f"z_w + {config.guidance_strength:g} sqrt(D) g, g the reward's unit gradient by x_t' (ours)"
        )
    return resolved
