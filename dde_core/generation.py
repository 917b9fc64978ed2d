"""Prompts and seeds in, images out: a model folder's parts, loaded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from jaxtyping import UInt8

from dde_core.conditioning import Conditioning
from dde_core.config import SampleConfig
from dde_core.errors import ConfigError
from dde_core.models.folder import ModelFolder, image_batch_size
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.noise import initial_latents
from dde_core.sampling import decode, sample_latents


class TextToImage:
    """A text-to-image model with the folder's U-Net or another one. Prompt, seed and settings determine an
    image."""

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        unet: UNet2DConditionModel | None = None,
    ) -> None:
        self._tokenizers = folder.tokenizers()
        self._schedule = folder.schedule()
        self._text_encoders = TextEncoders(folder, device)
        self._unet = (unet or folder.unet()).requires_grad_(False).to(device)
        self._vae = folder.vae().to(device)
        self._device = device
        self.height_px, self.width_px = folder.image_size()
        self._factor = folder.vae_factor

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: SampleConfig,
        on_step: Callable[[int, int], None] | None = None,
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Draw one image for each prompt and seed. ``on_step(i, n)`` is called before each sampling step.

        Raises ConfigError for a size that the VAE's factor does not divide, NonFiniteError if the model gives
        infinite or NaN values.
        """
        height = config.height or self.height_px
        width = config.width or self.width_px
        for name, value in (("height", height), ("width", width)):
            if value % self._factor:
                raise ConfigError(name, value, f"must be a multiple of {self._factor} for this model")
        size = image_batch_size(height, width)
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        images = [self._draw(prompts[part], seeds[part], height, width, config, on_step) for part in parts]
        return np.concatenate(images)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        config: SampleConfig,
        on_step: Callable[[int, int], None] | None,
    ) -> UInt8[np.ndarray, "n height width 3"]:
        shape = (int(self._unet.config.in_channels), height // self._factor, width // self._factor)
        latents = torch.stack([initial_latents(seed, shape) for seed in seeds]).to(self._device)
        cond = self._encode(prompts, height, width)
        uncond = self._encode([""] * len(prompts), height, width)
        latents = sample_latents(self._unet, self._schedule, latents, cond, uncond, config, on_step)
        return decode(self._vae, latents)

    def _encode(self, captions: Sequence[str], height: int, width: int) -> Conditioning:
        """Conditioning as in the diffusers pipelines: SDXL's sizes are those of an uncropped image of this
        size."""
        text = self._text_encoders(tokenize(self._tokenizers, captions))
        sizes = np.tile([[height, width]], (len(captions), 1))
        return self._text_encoders.with_sizes(text, sizes, np.zeros_like(sizes), (height, width))
