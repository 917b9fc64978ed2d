"""One step of preference training, as pure functions: errors of a model on a batch of pairs, and the loss from them.

What a training loop does with them:

    theta = pair_errors(policy, schedule, batch)                       # with gradient; policy may be wrapped in DDP
    ref = pair_errors(reference, schedule, batch)                      # under torch.no_grad(), or read from storage
    terms = step_losses(theta, ref, batch.t, config, schedule, calibration.correction(batch.t))
    check_finite("loss", terms.loss)
    (terms.loss.sum() / global_batch * world_size).backward()          # DDP divides by world_size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.objectives import OBJECTIVES, gradient_weight, preference_logit, preference_loss, weights
from dde_core.schedule import Schedule, add_noise, epsilon_from


@dataclass(frozen=True, eq=False)
class PairBatch:
    """b pairs, ready for the U-Net. Row i of every field belongs to ``pair_ids[i]``; winner and loser share t.

    ``conditioning`` holds the U-Net's keyword arguments (``encoder_hidden_states`` [b s d]), one row for each pair.
    Latents and noise come in the dtype in which the U-Net is to be called.
    """

    pair_ids: tuple[str, ...]
    latents_w: Float[Tensor, "b c h w"]
    latents_l: Float[Tensor, "b c h w"]
    conditioning: dict[str, Tensor]
    t: Int[Tensor, " b"]
    noise_w: Float[Tensor, "b c h w"]
    noise_l: Float[Tensor, "b c h w"]


@dataclass(frozen=True, eq=False)
class PairErrors:
    """For each pair the mean squared error of a model's noise, on the winner and on the loser."""

    w: Float[Tensor, " b"]
    l: Float[Tensor, " b"]  # noqa: E741


@dataclass(frozen=True, eq=False)
class StepTerms:
    """What one step says about each pair, in float64. Only ``loss`` carries a gradient."""

    loss: Float[Tensor, " b"]
    logit: Float[Tensor, " b"]
    margin: Float[Tensor, " b"]
    gradient_weight: Float[Tensor, " b"]


def pair_errors(unet: Callable[..., Any], schedule: Schedule, batch: PairBatch) -> PairErrors:
    """Noise both sides, run the U-Net ONCE on 2b samples (winners, then losers), compare the noise (DDE Eq. 2).

    The mean over latent elements is taken in float32, whatever the dtype of the model (in float64 where that is it).
    """
    t = torch.cat([batch.t, batch.t])
    noise = torch.cat([batch.noise_w, batch.noise_l])
    x_t = add_noise(schedule, torch.cat([batch.latents_w, batch.latents_l]), noise, t)
    conditioning = {name: torch.cat([rows, rows]) for name, rows in batch.conditioning.items()}
    output = unet(x_t, t - 1, **conditioning).sample
    wide = torch.promote_types(output.dtype, torch.float32)
    epsilon = epsilon_from(schedule, output.to(wide), x_t.to(wide), t)
    errors = (noise.to(wide) - epsilon).square().mean(dim=(1, 2, 3))
    return PairErrors(*errors.chunk(2))


def step_losses(
    theta: PairErrors,
    ref: PairErrors,
    t: Int[Tensor, " b"],
    config: ObjectiveConfig,
    schedule: Schedule,
    correction: Float[Tensor, " b"] | None = None,
) -> StepTerms:
    """The loss of each pair (DDE Eq. 10), not reduced. ``correction`` is C(t); methods without one do not read it."""
    weight = weights(config, schedule).to(t.device)[t]
    margin = (ref.w.double() - theta.w.double()) - (ref.l.double() - theta.l.double())
    if not OBJECTIVES[config.method].corrected:
        correction = torch.zeros_like(weight)
    elif correction is None:
        raise ConfigError("correction", None, f"is needed by method {config.method!r}")
    logit = preference_logit(config.beta, weight, margin, correction)
    return StepTerms(
        loss=preference_loss(logit),
        logit=logit.detach(),
        margin=margin.detach(),
        gradient_weight=gradient_weight(weight, logit.detach()),
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """Stop a run before the optimizer moves: raises NonFiniteError where a value is infinite or not a number."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise NonFiniteError(f"{name} is not finite in {bad} of {tensor.numel()} values")
