"""Prompts and seeds in, pictures out: the parts of a model folder, loaded and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dde_core.config import SampleConfig
from dde_core.errors import ConfigError
from dde_core.models import ModelFolder, encode_text, picture_size, tokenize
from dde_core.noise import initial_latents
from dde_core.sampling import decode, sample_latents


class TextToImage:
    """A text-to-image model ready to draw. A picture is a function of prompt, seed and settings."""

    def __init__(self, folder: ModelFolder, device: torch.device | str = "cpu") -> None:
        self._tokenizer, self._schedule = folder.tokenizer(), folder.schedule()
        self._text_encoder = folder.text_encoder().to(device)
        self._unet = folder.unet().requires_grad_(False).to(device)
        self._vae = folder.vae().to(device)
        self._device = device
        self.size_px = picture_size(folder)
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
        shape = (int(self._unet.config.in_channels), height // self._factor, width // self._factor)
        latents = torch.stack([initial_latents(seed, shape) for seed in seeds]).to(self._device)
        cond, uncond = self._encode(prompts), self._encode([""] * len(prompts))
        return decode(self._vae, sample_latents(self._unet, self._schedule, latents, cond, uncond, config, on_step))

    def _encode(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return encode_text(self._text_encoder, tokenize(self._tokenizer, prompts))
