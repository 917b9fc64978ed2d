"""One step of preference training, as pure functions: errors of a model on a batch of pairs, and the loss from them.

What a training loop does with them:

    ref = pair_errors(reference, schedule, batch)                      # under torch.no_grad(), or read from storage
    theta = pair_errors(policy, schedule, batch)                       # with gradient; policy may be wrapped in DDP
    terms = step_losses(theta, ref, batch.t, config, schedule, calibration.correction(batch.t))
    check_finite("loss", terms.loss)
    (terms.loss.sum() / global_batch * world_size).backward()          # DDP divides by world_size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_core.conditioning import Conditioning, concatenated, predict
from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.methods import METHODS
from dde_core.objectives import (
    gradient_weight,
    importance,
    preference_logit,
    preference_loss,
    weights,
)
from dde_core.schedule import Schedule, add_noise, epsilon_from


@dataclass(frozen=True, eq=False)
class PairBatch:
    """b pairs, ready for the U-Net. Row i of every field belongs to ``pair_ids[i]``; winner and loser share t.

    Without losers (`sft`) the fields that end in _l are None. ``z_w``/``z_l`` are there for `sampled` calibration alone.
    """

    pair_ids: tuple[str, ...]
    t: Int[Tensor, " b"]
    latents_w: Float[Tensor, "b c h w"]
    noise_w: Float[Tensor, "b c h w"]
    conditioning_w: Conditioning
    latents_l: Float[Tensor, "b c h w"] | None = None
    noise_l: Float[Tensor, "b c h w"] | None = None
    conditioning_l: Conditioning | None = None
    z_w: Float[Tensor, "b c h w"] | None = None
    z_l: Float[Tensor, "b c h w"] | None = None

    def __len__(self) -> int:
        return len(self.pair_ids)

    def rows(self, keep: slice) -> PairBatch:
        """The batch of some of its pairs."""

        def cut(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: rows[keep] for name, rows in value.items()}
            return None if value is None else value[keep]

        return PairBatch(**{field.name: cut(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class PairErrors:
    """For each pair the mean squared error of a model's noise, on the winner and (not for `sft`) on the loser.

    ``z_w``/``z_l`` are mean(z (eps_m - eps)), what `sampled` calibration needs beside the errors.
    """

    w: Float[Tensor, " b"]
    l: Float[Tensor, " b"] | None = None  # noqa: E741
    z_w: Float[Tensor, " b"] | None = None
    z_l: Float[Tensor, " b"] | None = None

    @classmethod
    def joined(cls, parts: Sequence[PairErrors]) -> PairErrors:
        """The errors of several batches, one after the other, without their gradients."""
        there = [field.name for field in fields(cls) if getattr(parts[0], field.name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]).detach() for name in there})


@dataclass(frozen=True, eq=False)
class StepTerms:
    """What one step says about each pair, in float64. Only ``loss`` carries a gradient.

    ``gradient_weight`` is what the margin's gradient is multiplied by, but for beta (for `sft`: the winner's error's);
    ``gradient_weight_at_zero`` what it would be at logit 0: the ratio of the two says how far the loss is saturated.
    """

    loss: Float[Tensor, " b"]
    gradient_weight: Float[Tensor, " b"]
    gradient_weight_at_zero: Float[Tensor, " b"]
    margin: Float[Tensor, " b"] | None = None
    logit: Float[Tensor, " b"] | None = None


def pair_errors(unet: Callable[..., Any], schedule: Schedule, batch: PairBatch) -> PairErrors:
    """Noise both sides, run the U-Net ONCE on 2b samples (winners, then losers), compare the noise (DDE Eq. 2).

    The mean over latent elements is taken in float32, whatever the dtype of the model (in float64 where that is it).
    """
    two_sides = batch.latents_l is not None
    t = torch.cat([batch.t, batch.t]) if two_sides else batch.t
    noise = _both(batch.noise_w, batch.noise_l)
    x_t = add_noise(schedule, _both(batch.latents_w, batch.latents_l), noise, t)
    conditioning = batch.conditioning_w
    if batch.conditioning_l is not None:
        conditioning = concatenated(conditioning, batch.conditioning_l)
    output = predict(unet, x_t, t, conditioning)
    wide = torch.promote_types(output.dtype, torch.float32)
    off = epsilon_from(schedule, output.to(wide), x_t.to(wide), t) - noise.to(wide)
    errors = off.square().mean(dim=(1, 2, 3)).split(len(batch))
    if batch.z_w is not None:
        errors += (_both(batch.z_w, batch.z_l).to(wide) * off).mean(dim=(1, 2, 3)).split(len(batch))
    return PairErrors(*errors)


def _both(w: Float[Tensor, "b c h w"], l: Float[Tensor, "b c h w"] | None) -> Float[Tensor, "n c h w"]:  # noqa: E741
    return w if l is None else torch.cat([w, l])


def step_losses(
    theta: PairErrors,
    ref: PairErrors | None,
    t: Int[Tensor, " b"],
    config: ObjectiveConfig,
    schedule: Schedule,
    correction: Float[Tensor, " b"] | None = None,
) -> StepTerms:
    """The loss of each pair (DDE Eq. 10; `sft`: the winner's error), not reduced.

    ``correction`` is C(t); methods without one do not read it, and `sft` does not read ``ref``. Raises ConfigError for what
    the method needs and does not get.
    """
    method = METHODS[config.method]
    scale, weight = (table(config, schedule).to(t.device)[t] for table in (importance, weights))
    if not method.has_loser:
        loss, constant = scale * weight * theta.w.double(), scale * weight
        return StepTerms(loss=loss, gradient_weight=constant, gradient_weight_at_zero=constant)
    if ref is None or ref.l is None or theta.l is None:
        raise ConfigError("reference and loser", None, f"are needed by method {config.method!r}")
    margin = (ref.w.double() - theta.w.double()) - (ref.l.double() - theta.l.double())
    if not method.corrected:
        correction = torch.zeros_like(weight)
    elif correction is None:
        raise ConfigError("correction", None, f"is needed by method {config.method!r}")
    logit = preference_logit(config.beta, weight, margin, correction)
    return StepTerms(
        loss=scale * preference_loss(logit),
        gradient_weight=scale * gradient_weight(weight, logit.detach()),
        gradient_weight_at_zero=scale * gradient_weight(weight, torch.zeros_like(logit)),
        margin=margin.detach(),
        logit=logit.detach(),
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """Stop a run before the optimizer moves: raises NonFiniteError where a value is infinite or not a number."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise NonFiniteError(f"{name} is not finite in {bad} of {tensor.numel()} values")
