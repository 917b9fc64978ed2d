"""One step of preference training as pure functions: a model's errors on a batch of pairs, and the loss from
them.

A training loop uses them like this:

    ref = pair_errors(reference, schedule, batch)                      # under torch.no_grad(), or read from a
                                                                       ledger
    theta = pair_errors(policy, schedule, batch)                       # with gradient; policy may be wrapped
                                                                       in DDP
    terms = step_losses(theta, ref, batch.t, config, schedule, calibration.correction(batch.t), batch.share)
    check_finite("loss", terms.loss)
    (terms.loss.sum() / global_batch * world_size).backward()          # DDP divides by world_size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dde_core.conditioning import Conditioning, concatenated, guided_noise, predict
from dde_core.config import ObjectiveConfig
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.methods import METHODS, ErrorKind
from dde_core.objectives import (
    gradient_weight,
    importance,
    preference_logit,
    preference_loss,
    weights,
)
from dde_core.schedule import Schedule, add_noise, epsilon_from, velocity
from dde_core.transitions import projection


@dataclass(frozen=True, eq=False)
class PairBatch:
    """b pairs, ready for the U-Net. Row i of every field belongs to ``pair_ids[i]``; winner and loser share
    t.

    ``share`` is the winner's share of the preference. Without losers (`sft`) the fields ending in _l are
    None. Only `sampled` calibration has ``z_w`` and ``z_l``.
    """

    pair_ids: tuple[str, ...]
    t: Int[Tensor, " b"]
    share: Float[Tensor, " b"]
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
        """The batch of some of the pairs."""
        return PairBatch(**{field.name: _rows(getattr(self, field.name), keep) for field in fields(self)})


@dataclass(frozen=True, eq=False)
class PairErrors:
    """For each pair a model's mean squared error of the noise, or of the velocity, on the winner and (not for
    `sft`) on the loser. Of an on-policy pair ``w`` is the projection of the model's noise on z_w - z_l.

    ``z_w`` and ``z_l`` are mean(z (eps_m - eps)), which `sampled` calibration needs as well.
    """

    w: Float[Tensor, " b"]
    l: Float[Tensor, " b"] | None = None  # noqa: E741
    z_w: Float[Tensor, " b"] | None = None
    z_l: Float[Tensor, " b"] | None = None

    def rows(self, keep: slice) -> PairErrors:
        """The errors of some of the pairs."""
        return PairErrors(**{field.name: _rows(getattr(self, field.name), keep) for field in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[PairErrors]) -> PairErrors:
        """The errors of several batches, one after the other, without their gradients."""
        names = [field.name for field in fields(cls) if getattr(parts[0], field.name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]).detach() for name in names})


def _rows(value: Any, keep: slice) -> Any:
    """Some rows of a tensor, a tuple, a conditioning, or nothing."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: rows[keep] for name, rows in value.items()}
    return value[keep]


@dataclass(frozen=True, eq=False)
class StepTerms:
    """One step's terms for each pair, in float64. Only ``loss`` carries a gradient.

    ``gradient_weight`` multiplies the gradient of the margin (for `sft`: of the winner's error), apart from
    beta. ``gradient_weight_at_zero`` is its value at logit 0; the ratio of the two shows how saturated the
    loss is. ``share`` is None unless the loss reads it: for soft labels.
    """

    loss: Float[Tensor, " b"]
    gradient_weight: Float[Tensor, " b"]
    gradient_weight_at_zero: Float[Tensor, " b"]
    margin: Float[Tensor, " b"] | None = None
    logit: Float[Tensor, " b"] | None = None
    share: Float[Tensor, " b"] | None = None


def errors_of(
    objective: ObjectiveConfig,
) -> Callable[[Callable[..., Any], Schedule, Any], PairErrors]:
    """How a model's errors on one of the objective's batches are measured: (unet, schedule, batch)."""
    if METHODS[objective.method].on_policy:
        return partial(ranked_errors, guidance_scale=objective.guidance_scale)
    return partial(pair_errors, error=objective.error)


@dataclass(frozen=True, eq=False)
class RankedBatch:
    """b pairs of an on-policy method, ready for the U-Net: two samples of one denoising step from ``x_t``.

    ``dz`` is z_w - z_l. ``share`` is the winner's share of the preference.
    """

    pair_ids: tuple[str, ...]
    t: Int[Tensor, " b"]
    share: Float[Tensor, " b"]
    x_t: Float[Tensor, "b c h w"]
    dz: Float[Tensor, "b c h w"]
    conditioning: Conditioning
    no_caption: Conditioning

    def __len__(self) -> int:
        return len(self.pair_ids)


def ranked_errors(
    unet: Callable[..., Any], schedule: Schedule, batch: RankedBatch, guidance_scale: float
) -> PairErrors:
    """mean(dz e) of each pair, e the model's guided noise at x_t, from ONE call of the U-Net."""
    noise = guided_noise(
        unet, schedule, batch.x_t, batch.t, batch.conditioning, batch.no_caption, guidance_scale
    )
    return PairErrors(projection(batch.dz, noise))


def pair_errors(
    unet: Callable[..., Any], schedule: Schedule, batch: PairBatch, error: ErrorKind = "noise"
) -> PairErrors:
    """Noise both sides, run the U-Net ONCE on 2b samples (winners, then losers), compare the noise (DDE Eq.
    2), or of a model with v-prediction the velocity.

    Errors are means over latent elements in float32, whatever the model's dtype (in float64 for a float64
    model).
    """
    t = batch.t if batch.latents_l is None else torch.cat([batch.t, batch.t])
    noise = _both(batch.noise_w, batch.noise_l)
    latents = _both(batch.latents_w, batch.latents_l)
    x_t = add_noise(schedule, latents, noise, t)
    conditioning = batch.conditioning_w
    if batch.conditioning_l is not None:
        conditioning = concatenated(conditioning, batch.conditioning_l)
    output = predict(unet, x_t, t, conditioning)
    wide = torch.promote_types(output.dtype, torch.float32)
    if error == "velocity":
        difference = output.to(wide) - velocity(schedule, latents.to(wide), noise.to(wide), t)
    else:
        difference = epsilon_from(schedule, output.to(wide), x_t.to(wide), t) - noise.to(wide)
    columns = list(difference.square().mean(dim=(1, 2, 3)).split(len(batch)))  # type: ignore[no-untyped-call]
    if batch.z_w is not None:
        z = _both(batch.z_w, batch.z_l).to(wide)
        columns += (z * difference).mean(dim=(1, 2, 3)).split(len(batch))  # type: ignore[no-untyped-call]
    return PairErrors(*columns)


def _both(w: Float[Tensor, "b c h w"], l: Float[Tensor, "b c h w"] | None) -> Float[Tensor, "n c h w"]:  # noqa: E741
    return w if l is None else torch.cat([w, l])


def preference_margin(theta: PairErrors, ref: PairErrors) -> Float64[Tensor, " b"]:
    """(e_ref^w - e_theta^w) - (e_ref^l - e_theta^l) of each pair, in float64.

    This is the repository's only sign convention for differences of errors. The margin is positive when the
    policy has improved on the winner more than on the loser, each compared with the reference. Of an
    on-policy pair there is one number for both sides: e_ref - e_theta of its projections.
    """
    if theta.l is None and ref.l is None:
        return ref.w.double() - theta.w.double()
    if theta.l is None or ref.l is None:
        raise ValueError("a margin needs the errors of losers, got those of winners only")
    return (ref.w.double() - theta.w.double()) - (ref.l.double() - theta.l.double())


def step_losses(
    theta: PairErrors,
    ref: PairErrors | None,
    t: Int[Tensor, " b"],
    config: ObjectiveConfig,
    schedule: Schedule,
    correction: Float[Tensor, " b"] | None = None,
    share: Float[Tensor, " b"] | None = None,
) -> StepTerms:
    """The loss of each pair (DDE Eq. 10; `sft`: the winner's error), not reduced.

    ``correction`` is C(t); only corrected methods read it. ``share`` is p, the winner's share of the
    preference; only ``label`` "soft" reads it, else p is 1. `sft` reads neither these nor ``ref``. Raises
    ConfigError if the method needs an argument that is None.
    """
    method = METHODS[config.method]
    scale = importance(config, schedule).to(t.device)[t]
    weight = weights(config, schedule).to(t.device)[t]
    if not method.has_loser:
        return StepTerms(
            loss=scale * weight * theta.w.double(),
            gradient_weight=scale * weight,
            gradient_weight_at_zero=scale * weight,
        )
    has_losers = ref is not None and ref.l is not None and theta.l is not None
    if ref is None or not (has_losers or method.on_policy):
        raise ConfigError("reference and loser", None, f"are needed by method {config.method!r}")
    margin = preference_margin(theta, ref)
    if not method.corrected:
        correction = torch.zeros_like(weight)
    elif correction is None:
        raise ConfigError("correction", None, f"is needed by method {config.method!r}")
    if config.label == "hard":
        share = None
    elif share is None:
        raise ConfigError("share", None, 'of each pair is needed by label "soft"')
    p = 1.0 if share is None else share.double()
    logit = preference_logit(config.beta, weight, margin, correction)
    return StepTerms(
        loss=scale * preference_loss(logit, p),
        gradient_weight=scale * gradient_weight(weight, logit.detach(), p),
        gradient_weight_at_zero=scale * gradient_weight(weight, torch.zeros_like(logit), p),
        margin=margin.detach(),
        logit=logit.detach(),
        share=share,
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NonFiniteError for infinite or NaN values. Call it before the optimizer steps."""
    bad = int((~torch.isfinite(tensor.detach())).sum())
    if bad:
        raise NonFiniteError(f"{name} is not finite in {bad} of {tensor.numel()} values")
