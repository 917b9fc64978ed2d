"""The preference losses as one table: a weight w(t), and whether the calibrated correction C(t) is added.

With the errors e of policy (theta) and frozen reference (ref) on winner (w) and loser (l), each the MEAN over latent
elements of the squared error of the noise,

    margin = (e_ref^w - e_theta^w) - (e_ref^l - e_theta^l)
    logit  = beta (w(t) margin + C(t))
    loss   = -log sigmoid(logit)

which is DDE's Eq. 10 with w = 1/SNR and Diffusion-DPO's loss (arXiv 2311.12908) with w = 1/2, C = 0. DDE's Eq. 15 drops
1 / (2 sigma_t^2), so its single-shot term and C are in different units; it is implemented as printed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dde_core.config import ObjectiveConfig
from dde_core.schedule import Schedule


@dataclass(frozen=True)
class Objective:
    """How a method assigns credit: ``weight`` gives w(t) for t = 0..T in float64, ``corrected`` says if C(t) counts."""

    weight: Callable[[Schedule], Tensor]
    corrected: bool


def single_shot(schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1 / SNR(t): the error of x0 estimated in one shot (DDE Eq. 9)."""
    return 1 / schedule.snr


def uniform(schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) = 1/2: -logsigmoid(-0.5 beta (model_diff - ref_diff)), as Diffusion-DPO's published code has it."""
    return torch.full_like(schedule.snr, 0.5)


OBJECTIVES: dict[str, Objective] = {
    "dde": Objective(weight=single_shot, corrected=True),
    "uniform": Objective(weight=uniform, corrected=False),
}


def weights(config: ObjectiveConfig, schedule: Schedule) -> Float[Tensor, " times"]:
    """w(t) of the configured method, at most ``max_weight`` where that is set (ours: the paper has no cap)."""
    w = OBJECTIVES[config.method].weight(schedule)
    return w.clamp(max=config.max_weight) if config.max_weight else w


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
