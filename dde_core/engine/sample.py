"""One image while it is denoised: its latents, its conditioning, its own scheduler and generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dde_core.conditioning import Conditioning
from dde_core.config import SampleConfig
from dde_core.engine.model import BaseModel
from dde_core.engine.samplers import first_latents, step
from dde_core.noise import initial_latents, step_generator


@dataclass(eq=False)
class Sample:
    """The state of one image. ``cond`` and ``uncond`` have one row; ``uncond`` is None without guidance."""

    latents: Float[Tensor, "1 c h w"]
    cond: Conditioning
    uncond: Conditioning | None
    guidance_scale: float
    scheduler: Any
    generator: torch.Generator
    timesteps: list[float]
    adapter: str | None = None
    steps_done: int = 0
    estimate: Float[Tensor, "1 c h w"] | None = None
    """The clean latents that the last step predicted."""

    @property
    def is_finished(self) -> bool:
        return self.steps_done == len(self.timesteps)

    @property
    def next_timestep(self) -> float:
        """diffusers' timestep of the next U-Net call."""
        return self.timesteps[self.steps_done]

    @property
    def rows(self) -> int:
        """Rows of the next U-Net call."""
        return 1 if self.uncond is None else 2


def take_step(samples: Sequence[Sample], output: Float[Tensor, "b c h w"]) -> None:
    """Take one step with the U-Net's output for each sample, guidance included. They share the step."""
    first = samples[0]
    latents = torch.cat([sample.latents for sample in samples])
    stepped, estimates = step(first.scheduler, output, latents, first.generator)
    for i, sample in enumerate(samples):
        sample.latents = stepped[i : i + 1]
        sample.estimate = estimates[i : i + 1]
        sample.steps_done += 1
        sample.scheduler.steps_done = sample.steps_done


def start(
    model: BaseModel,
    seed: int,
    sample: SampleConfig,
    cond: Conditioning,
    uncond: Conditioning | None,
    adapter: str | None = None,
) -> Sample:
    """A new sample at its first step. Raises ConfigError for settings that the model cannot draw with."""
    height_px, width_px = model.size_of(sample)
    factor = model.pixels_per_latent
    scheduler: Any = model.scheduler(sample)
    noise = initial_latents(seed, (model.latent_channels, height_px // factor, width_px // factor))
    return Sample(
        latents=first_latents(scheduler, noise[None]).to(model.device),
        cond=cond,
        uncond=uncond if sample.guidance_scale > 1 else None,
        guidance_scale=sample.guidance_scale,
        scheduler=scheduler,
        generator=step_generator(seed),
        timesteps=scheduler.timesteps.tolist(),
        adapter=adapter,
    )
