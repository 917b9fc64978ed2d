"""Load the parts of a diffusers folder in float32: U-Net, VAE, text encoders, tokenizers, noise schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float16, UInt8
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dde_core.errors import ModelError
from dde_core.family import COMPONENTS, check_unet, family_of, missing_components
from dde_core.models.tokens import load_tokenizers
from dde_core.schedule import Schedule

WEIGHTS = {"dtype": torch.float32, "use_safetensors": True}
"""Weights are loaded as float32 from files of any precision, and never from a pickle."""

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers' ``load_lora_weights`` reads from a folder."""


class ModelFolder:
    """A model folder of the Stable Diffusion 1.5 or SDXL family, with an optional folder of LoRA adapters.

    Each method loads one part anew. The constructor and the methods raise ModelError for an unsupported or
    incomplete folder; an unsupported family is refused before any weight is read.
    """

    def __init__(self, path: Path | str, adapter: Path | str | None = None) -> None:
        self.path = Path(path)
        self.adapter = Path(adapter) if adapter else None
        try:
            self.index: dict[str, Any] = json.loads((self.path / "model_index.json").read_text())
        except FileNotFoundError as error:
            message = f"{str(self.path)!r} is not a diffusers folder: it has no model_index.json"
            raise ModelError(message) from error
        self.family = family_of(self.index)
        missing = missing_components(self.index)
        if missing:
            raise ModelError(
                f"{str(self.path)!r} lacks {', '.join(missing)}, which a {self.family} model needs"
            )

    def schedule(self) -> Schedule:
        """The noise schedule and prediction type of the folder's scheduler."""
        return Schedule.from_config(self.scheduler_config())

    def scheduler_config(self) -> dict[str, Any]:
        """The contents of the folder's ``scheduler_config.json``."""
        return self._json("scheduler", "scheduler_config.json")

    def unet(self) -> UNet2DConditionModel:
        """A new copy of the U-Net with adapters merged in, in evaluation mode (these families have no
        dropout)."""
        check_unet(self._json("unet", "config.json"), self.family)
        unet: UNet2DConditionModel = self._load(UNet2DConditionModel, "unet", **WEIGHTS)
        if self.adapter:
            unet.load_lora_adapter(
                str(self.adapter), prefix="unet", weight_name=LORA_WEIGHTS, local_files_only=True
            )
            unet.fuse_lora()
            unet.unload_lora()
        return unet.eval()

    def vae(self) -> AutoencoderKL:
        """The VAE, frozen. It is always float32, as a config's ``force_upcast`` demands."""
        return self._load(AutoencoderKL, "vae", **WEIGHTS).eval().requires_grad_(False)

    def text_encoders(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        """One frozen text encoder, or SDXL's two."""
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        names = [name for name in kinds if name in COMPONENTS[self.family]]
        return [self._load(kinds[name], name, **WEIGHTS).eval().requires_grad_(False) for name in names]

    def tokenizers(self) -> list[CLIPTokenizer]:
        """One tokenizer for each text encoder."""
        return load_tokenizers(self.path, self.family)

    def image_size(self) -> int:
        """Height and width in pixels of the images that the U-Net was trained on."""
        return int(self._json("unet", "config.json")["sample_size"]) * self._vae_factor

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """[c h w] of the latents of a square image. Raises ModelError unless the VAE's factor divides
        ``resolution``."""
        if resolution % self._vae_factor:
            raise ModelError(
                f"resolution must be a multiple of {self._vae_factor}, the VAE's factor, got {resolution}"
            )
        side = resolution // self._vae_factor
        return int(self._json("vae", "config.json")["latent_channels"]), side, side

    @property
    def _vae_factor(self) -> int:
        num_halvings = len(self._json("vae", "config.json")["block_out_channels"]) - 1
        return 1 << num_halvings

    @property
    def no_caption_is_zeros(self) -> bool:
        """How "no caption" is encoded: as zeros (SDXL's ``force_zeros_for_empty_prompt``), else as the empty
        caption."""
        return self.family == "sdxl" and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def _json(self, part: str, name: str) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads((self.path / part / name).read_text())
        except FileNotFoundError as error:
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: it has no {name}") from error
        return values

    def _load(
        self, kind: Any, part: str, **options: Any
    ) -> Any:  # Any: diffusers and transformers are untyped
        try:
            return kind.from_pretrained(str(self.path / part), local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: {error}") from error


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "b height width 3"]
) -> Float16[np.ndarray, "b c h w"]:
    """Latents of images: the posterior's mean times scaling_factor.

    Slices have a fixed size, so an image's place alone decides which images are encoded together with it.
    """
    size = image_batch_size(*images.shape[1:3])
    latents = []
    for start in range(0, len(images), size):
        part = torch.from_numpy(images[start : start + size].copy()).to(vae.device)
        pixels = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        scaled = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        latents.append(scaled.to(torch.float16).cpu().numpy())
    return np.concatenate(latents)


def image_batch_size(height: int, width: int) -> int:
    """Images that go through VAE and sampler at once: 4 of 1024 px (11 GB in a float32 VAE), 16 of 512 px."""
    return max(1, min(32, 4 * 1024**2 // (height * width)))
