"""Prompts and seeds in, images out, in this process: for evaluation, validation and pairs from scorers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from dde_core.config import SampleConfig
from dde_core.engine.model import BaseModel, to_pixels
from dde_core.engine.sample import start
from dde_core.engine.turn import advance
from dde_core.models.folder import ModelFolder, image_batch_size


class TextToImage:
    """A text-to-image model with the folder's U-Net or another one.

    Prompt, seed and settings determine an image. The images of a call go through the U-Net in slices of a
    fixed size, so the same call gives the same bits.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        unet: nn.Module | None = None,
    ) -> None:
        self._model = BaseModel(folder, device, unet=unet)

    def __call__(
        self, prompts: Sequence[str], seeds: Sequence[int], config: SampleConfig
    ) -> UInt8[np.ndarray, "n height width 3"]:
        """Draw one image for each prompt and seed.

        Raises ConfigError for settings that the model cannot draw with, NonFiniteError if the model gives
        infinite or NaN values.
        """
        size = image_batch_size(*self._model.size_of(config))
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        return np.concatenate([self._draw(prompts[part], seeds[part], config) for part in parts])

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], config: SampleConfig
    ) -> UInt8[np.ndarray, "n height width 3"]:
        model = self._model
        encoded = model.encode([*prompts, None], *model.size_of(config))
        rows = [{name: row[i : i + 1] for name, row in encoded.items()} for i in range(len(prompts) + 1)]
        samples = [
            start(model, seed, config, cond, rows[-1]) for seed, cond in zip(seeds, rows[:-1], strict=True)
        ]
        while not samples[0].is_finished:
            advance(model, samples)
        return to_pixels(model.decode(torch.cat([sample.latents for sample in samples])))
