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
