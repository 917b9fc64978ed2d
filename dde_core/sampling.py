"""Sampling by DDIM with eta = 0 (Song et al. 2020, Eq. 12) and classifier-free guidance (Ho and Salimans
2022, Eq. 6).

The numbers equal those of diffusers' ``StableDiffusionPipeline`` with a ``DDIMScheduler``, including its
spacing of timesteps, ``set_alpha_to_one``, ``steps_offset`` and ``rescale_betas_zero_snr``. Unlike the
pipeline, this loop can be stopped between two steps, and refuses values that are not finite.
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
from dde_core.errors import ConfigError, NonFiniteError
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
    """Denoise latents to clean ones. ``cond`` and ``uncond`` have one row for each image.

    With a guidance scale of at most 1 only the conditional pass runs, and ``uncond`` is not read, as in
    diffusers. ``on_step(i, n)`` is called before step i = 0..n-1; an error that it raises ends the sampling.
    Raises ConfigError for steps that do not fit the schedule, NonFiniteError if the U-Net's output is not
    finite.
    """
    guided = config.guidance_scale > 1
    conditioning = concatenated(uncond, cond) if guided else cond
    latents = initial_latents
    path = timesteps(schedule, config.steps)
    for i, t in enumerate(path):
        if on_step is not None:
            on_step(i, len(path))
        samples = torch.cat([latents, latents]) if guided else latents
        output = predict(unet, samples, torch.full((len(samples),), t, device=samples.device), conditioning)
        if guided:
            without, with_text = output.chunk(2)
            output = without + config.guidance_scale * (with_text - without)
        latents = ddim_step(schedule, output, latents, t, t - schedule.T // config.steps)
    check_images("latents", latents)
    return latents


def timesteps(schedule: Schedule, steps: int) -> list[int]:
    """diffusers' timesteps of ``timestep_spacing``, descending (Lin et al., arXiv 2305.08891, Table 2).

    leading    1 + k (T // steps) + steps_offset for k = steps-1..0
    trailing   T - k T / steps for k = 0..steps-1, rounded: it begins at T
    linspace   from T to 1 in equal parts, rounded: it begins at T and ends at 1

    Every DDIM step leads T // steps down, whatever the spacing, as in diffusers. Raises ConfigError for more
    steps than fit, and for a single one of linspace: that would be t = 1 alone.
    """
    T = schedule.T
    path = [1 + k * (T // steps) + schedule.steps_offset for k in reversed(range(steps))]
    if schedule.timestep_spacing == "trailing":
        path = [int(t) for t in np.round(np.arange(T, 0, -T / steps))[:steps]]
    elif schedule.timestep_spacing == "linspace":
        if steps == 1:
            raise ConfigError("steps", steps, "must be at least 2 with timestep_spacing linspace")
        path = [1 + int(t) for t in np.linspace(0, T - 1, steps).round()[::-1]]
    if steps > T or path[0] > T:
        raise ConfigError("steps", steps, f"must fit T = {T} with steps_offset = {schedule.steps_offset}")
    return path


def ddim_step(
    schedule: Schedule, output: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: int, t_next: int
) -> Float[Tensor, "b c h w"]:
    """x at t_next < t: sqrt(alpha_bar') x0_hat + sqrt(1 - alpha_bar') eps_hat (DDIM Eq. 12, eta = 0).

    A t_next below 1 is the last step: alpha_bar' is then the schedule's ``final_alpha_bar``.
    """
    t_rows = torch.full((len(x_t),), t, device=x_t.device)
    x0 = x0_from(schedule, output, x_t, t_rows)
    epsilon = epsilon_from(schedule, output, x_t, t_rows)
    alpha_bar: float = schedule.final_alpha_bar
    if t_next >= 1:
        alpha_bar = schedule.alpha_bar[t_next].item()
    signal: float = alpha_bar**0.5
    sigma: float = (1 - alpha_bar) ** 0.5
    return signal * x0 + sigma * epsilon


@torch.no_grad()
def decode(vae: Any, latents: Float[Tensor, "b c h w"]) -> UInt8[np.ndarray, "b height width 3"]:
    """Images from clean latents. The VAE's output in [-1, 1] is scaled to 0..255.

    Raises NonFiniteError if it is not finite.
    """
    images: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
    check_images("decoded images", images)
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def check_images(name: str, images: Float[Tensor, "b c h w"]) -> None:
    """Raises NonFiniteError, with the number of images, for infinite or NaN values: they would be black."""
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise NonFiniteError(f"{name} are not finite in {bad} of {len(images)} images")
