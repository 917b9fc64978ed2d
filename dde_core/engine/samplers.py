"""Samplers are diffusers' own scheduler objects, one for each image.

A scheduler keeps what it has seen of its image (earlier outputs, its step), so it is never shared, and never
given a vector of timesteps: some of them would read the first one for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler

from dde_core.config import SamplerName


def make_scheduler(config: Mapping[str, Any], sampler: SamplerName, steps: int) -> Any:
    """A new scheduler with its timesteps set. ``config`` is the folder's scheduler_config.json.

    Raises ConfigError for steps that do not fit, or a schedule that the sampler cannot follow.
    """
    scheduler = DDIMScheduler.from_config({**config, "clip_sample": False})
    scheduler.set_timesteps(steps)
    return scheduler


def first_latents(scheduler: Any, noise: Any) -> Any:
    return noise * scheduler.init_noise_sigma


def scaled_input(scheduler: Any, latents: Any) -> Any:
    return scheduler.scale_model_input(latents, scheduler.timesteps[0])


def step(scheduler: Any, output: Any, latents: Any, generator: Any) -> Any:
    i = getattr(scheduler, "_dde_i", 0)
    scheduler._dde_i = i + 1
    result = scheduler.step(output, scheduler.timesteps[i], latents)
    return result.prev_sample, result.pred_original_sample


def step_generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)
