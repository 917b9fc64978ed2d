"""Prompts and seeds in, pictures out: the parts of a model folder, loaded and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from dde_core.conditioning import Conditioning
from dde_core.config import SampleConfig
from dde_core.errors import ConfigError
from dde_core.models.folder import ModelFolder, image_batch_size
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import tokenize
from dde_core.noise import initial_latents
from dde_core.sampling import decode, sample_latents


class TextToImage:
    """A text-to-image model ready to draw, with the folder's U-Net or another one. A picture is a function of prompt, seed
    and settings."""

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        unet: UNet2DConditionModel | None = None,
    ) -> None:
        self._tokenizers, self._schedule = folder.tokenizers(), folder.schedule()
        self._text_encoders = TextEncoders(folder, device)
        self._unet = (unet or folder.unet()).requires_grad_(False).to(device)
        self._vae = folder.vae().to(device)
        self._device = device
        self.size_px = folder.image_size()
        self._factor = self.size_px // int(self._unet.config.sample_size)

    def __call__(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        config: SampleConfig,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Draw one picture for each prompt and seed: uint8 [n, height, width, 3].

        Raises ConfigError for a size that the VAE's factor does not divide.
        """
        height, width = config.height or self.size_px, config.width or self.size_px
        for name, value in (("height", height), ("width", width)):
            if value % self._factor:
                raise ConfigError(name, value, f"must be a multiple of {self._factor} for this model")
        at_once = image_batch_size(height, width)
        parts = [slice(start, start + at_once) for start in range(0, len(prompts), at_once)]
        drawn = [self._draw(prompts[part], seeds[part], height, width, config, on_step) for part in parts]
        return np.concatenate(drawn)

    def _draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        height: int,
        width: int,
        config: SampleConfig,
        on_step: Callable[[int, int], None] | None,
    ) -> np.ndarray:
        shape = (int(self._unet.config.in_channels), height // self._factor, width // self._factor)
        latents = torch.stack([initial_latents(seed, shape) for seed in seeds]).to(self._device)
        cond, uncond = (self._encode(captions, height, width) for captions in (prompts, [""] * len(prompts)))
        return decode(
            self._vae, sample_latents(self._unet, self._schedule, latents, cond, uncond, config, on_step)
        )

    def _encode(self, captions: Sequence[str], height: int, width: int) -> Conditioning:
        """As the diffusers pipelines do: a picture that was never larger, and not cropped."""
        text = self._text_encoders(tokenize(self._tokenizers, captions))
        sizes = np.tile([[height, width]], (len(captions), 1))
        return self._text_encoders.with_sizes(text, sizes, np.zeros_like(sizes), (height, width))
