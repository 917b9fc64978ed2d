"""Sampling by DDIM with eta = 0 (Song et al. 2020, Eq. 12) and classifier-free guidance (Ho and Salimans 2022, Eq. 6).

The same numbers as diffusers' ``StableDiffusionPipeline`` with a ``DDIMScheduler``, whose "leading" timesteps and
``set_alpha_to_one`` / ``steps_offset`` settings are followed; a loop of our own can be stopped between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dde_core.conditioning import Conditioning, concatenated, predict
from dde_core.config import SampleConfig
from dde_core.errors import ConfigError
from dde_core.schedule import Schedule, epsilon_from, x0_from


@torch.no_grad()
def sample_latents(
    unet: Callable[..., Any],
    schedule: Schedule,
    initial_latents: Float[Tensor, "b c h w"],
    cond: Conditioning,
    uncond: Conditioning,
    config: SampleConfig,
    on_step: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Denoise latents to clean ones. ``cond``/``uncond`` have one row for each picture.

    Guidance of at most 1 runs the conditional pass alone and does not read ``uncond``, as diffusers does. ``on_step(i,
    n)`` is called before step i = 0..n-1; what it raises ends the sampling. Raises ConfigError for impossible steps.
    """
    guided = config.guidance_scale > 1
    conditioning = concatenated(uncond, cond) if guided else cond
    latents, path = initial_latents, timesteps(schedule, config.steps)
    for i, t in enumerate(path):
        if on_step is not None:
            on_step(i, len(path))
        samples = torch.cat([latents, latents]) if guided else latents
        output = predict(unet, samples, torch.full((len(samples),), t, device=samples.device), conditioning)
        if guided:
            without, with_text = output.chunk(2)
            output = without + config.guidance_scale * (with_text - without)
        latents = ddim_step(schedule, output, latents, t, t - schedule.T // config.steps)
    return latents


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """The "leading" timesteps, descending, in the paper's numbering: 1 + k (T // steps) + offset, k = steps-1..0."""
    stride = schedule.T // steps
    path = [1 + k * stride + schedule.steps_offset for k in reversed(range(steps))]
    if steps > schedule.T or path[0] > schedule.T:
        raise ConfigError(
            "steps", steps, f"must fit T = {schedule.T} with steps_offset = {schedule.steps_offset}"
        )
    return path


def ddim_step(
    schedule: Schedule, output: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: int, t_next: int
) -> Float[Tensor, "b c h w"]:
    """x at t_next < t: sqrt(alpha_bar') x0_hat + sqrt(1 - alpha_bar') eps_hat (DDIM Eq. 12, eta = 0).

    A t_next below 1 means the end, where alpha_bar' is the schedule's ``final_alpha_bar``.
    """
    rows = torch.full((len(x_t),), t, device=x_t.device)
    alpha_bar = schedule.alpha_bar[t_next].item() if t_next >= 1 else schedule.final_alpha_bar
    x0, epsilon = x0_from(schedule, output, x_t, rows), epsilon_from(schedule, output, x_t, rows)
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * epsilon


@torch.no_grad()
def decode(vae: Any, latents: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b height width 3"]:
    """Pictures from clean latents: through the VAE, from [-1, 1] to 0..255."""
    pictures = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
    scaled = (pictures / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
