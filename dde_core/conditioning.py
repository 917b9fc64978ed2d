"""The U-Net's inputs beside the noisy latents, and the one place where it is called.

A conditioning is a flat dict of tensors with one row for each sample: ``encoder_hidden_states`` [b s d], and
for the SDXL family also ``text_embeds`` [b p] (pooled) and ``time_ids`` [b 6] (original height and width,
crop top and left, target height and width).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from dde_core.schedule import Schedule, epsilon_from

Conditioning = dict[str, Tensor]

ADDED = ("text_embeds", "time_ids")
"""The entries that diffusers takes as ``added_cond_kwargs``."""


def predict(
    unet: Callable[..., Any], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, " b"], conditioning: Conditioning
) -> Float[Tensor, "b c h w"]:
    """The U-Net's output at the paper's timesteps t = 1..T. The U-Net is called with t - 1."""
    return call(unet, x_t, t - 1, conditioning)


def guided_noise(
    unet: Callable[..., Any],
    schedule: Schedule,
    x_t: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    conditioning: Conditioning,
    no_caption: Conditioning,
    scale: float,
) -> Float[Tensor, "b c h w"]:
    """e_u + scale (e_c - e_u) (Ho and Salimans 2022, Eq. 6) in float32 or wider, from one call of the U-Net.

    Without guidance, at a scale of at most 1, ``no_caption`` is not used.
    """
    wide = torch.promote_types(x_t.dtype, torch.float32)
    if scale <= 1:
        return epsilon_from(schedule, predict(unet, x_t, t, conditioning).to(wide), x_t, t)
    inputs = concatenated(conditioning, no_caption)
    output = predict(unet, torch.cat([x_t, x_t]), torch.cat([t, t]), inputs).to(wide)
    with_caption, without = output.chunk(2)
    return epsilon_from(schedule, without + scale * (with_caption - without), x_t, t)


def call(
    unet: Callable[..., Any],
    x: Float[Tensor, "b c h w"],
    timesteps: Real[Tensor, " b"],
    conditioning: Conditioning,
) -> Float[Tensor, "b c h w"]:
    """The U-Net's output at diffusers' timesteps 0..T-1, which some samplers have between whole numbers."""
    arguments: dict[str, Any] = {name: rows for name, rows in conditioning.items() if name not in ADDED}
    added = {name: rows for name, rows in conditioning.items() if name in ADDED}
    if added:
        arguments["added_cond_kwargs"] = added
    output: Tensor = unet(x, timesteps, **arguments).sample
    return output


def concatenated(*parts: Conditioning) -> Conditioning:
    """The rows of all parts, in order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
