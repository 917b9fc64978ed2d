"""The reward of clean latents: decoded, and scored by one or several scorers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dde_core.engine.model import decode, to_pixels
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.scorers.kinds import Scorer


@runtime_checkable
class DifferentiableScorer(Scorer, Protocol):
    """A scorer whose scores have a gradient by the images' pixels."""

    def differentiable(
        self, images: Float[Tensor, "n 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Scores of images with values in 0..1, without their rounding to 8 bits."""
        ...


class Reward:
    """The sum of scores, each in its scorer's own unit, times the scorer's weight.

    ``vae`` decodes on its own device. ``scorers`` are of level "image", by name.
    """

    def __init__(self, vae: Any, scorers: Mapping[str, tuple[Scorer, float]]) -> None:
        self._vae = vae
        self._scorers = scorers

    @torch.no_grad()
    def __call__(
        self, latents: Float[Tensor, "n c h w"], captions: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        """Rewards of clean latents. NaN where an image or a score is not finite."""
        images = decode(self._vae, latents.to(self._vae.device))
        try:
            return self._of(images, captions)
        except NonFiniteError:
            one_by_one = [self._of_one(images[i : i + 1], captions[i]) for i in range(len(images))]
            return np.array(one_by_one)

    def differentiable(
        self, latents: Float[Tensor, "n c h w"], captions: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Rewards with their gradient by the latents, on the VAE's device.

        Raises ConfigError for a scorer without gradients.
        """
        images = decode(self._vae, latents.to(self._vae.device)) / 2 + 0.5
        total = torch.zeros(len(latents), device=images.device)
        for name, (scorer, weight) in self._scorers.items():
            if not isinstance(scorer, DifferentiableScorer):
                raise ConfigError("scorers", name, "has no gradient by the image, which tailorpo_g needs")
            total = total + weight * scorer.differentiable(images, captions).to(total)
        return total

    def _of(
        self, images: Float[Tensor, "n 3 height width"], captions: Sequence[str]
    ) -> Float64[np.ndarray, " n"]:
        pixels = to_pixels(images)
        total = np.zeros(len(pixels))
        for scorer, weight in self._scorers.values():
            total += weight * np.asarray(scorer(pixels, captions), dtype=np.float64)
        return total

    def _of_one(self, image: Float[Tensor, "1 3 height width"], caption: str) -> float:
        try:
            return float(self._of(image, [caption])[0])
        except NonFiniteError:
            return float("nan")
