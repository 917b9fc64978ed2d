"""Load the parts of a diffusers folder in float32: U-Net, VAE, text encoders, tokenizers, noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float16, UInt8
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dde_core.errors import ModelError
from dde_core.family import COMPONENTS
from dde_core.models.configs import AutoencoderFields, check_unet
from dde_core.models.folder_files import FolderFiles
from dde_core.models.lora_file import read_lora
from dde_core.models.weight_files import find_weights
from dde_core.noise import draw_posterior
from dde_core.schedule import Schedule

WEIGHTS = {"dtype": torch.float32, "use_safetensors": True}
"""Weights are loaded as float32 from files of any precision, and never from a pickle."""


class ModelFolder(FolderFiles):
    """A model folder whose parts can be loaded. Each method loads one part anew, or raises ModelError."""

    def schedule(self) -> Schedule:
        """The noise schedule and prediction type of the folder's scheduler."""
        return Schedule.from_config(self.sampling_config())

    def unet(self) -> UNet2DConditionModel:
        """A new copy of the U-Net with adapters merged in, in evaluation mode (these families have no
        dropout)."""
        check_unet(self.read_json("unet", "config.json"), self.family)
        unet: UNet2DConditionModel = self._load(UNet2DConditionModel, "unet")
        if self.adapter:
            weights, config = read_lora(self.adapter)
            try:
                unet.load_lora_adapter(weights, prefix="unet", metadata=config)
            except Exception as error:  # the libraries raise whatever their parsers do
                raise ModelError(f"adapters of {str(self.adapter)!r} cannot be loaded: {error}") from error
            unet.fuse_lora()
            unet.unload_lora()
        return unet.eval()

    def vae(self) -> AutoencoderKL:
        """The VAE, frozen. It is always float32, as a config's ``force_upcast`` demands."""
        AutoencoderFields.read(self.read_json("vae", "config.json"))
        return self._load(AutoencoderKL, "vae").eval().requires_grad_(False)

    def text_encoders(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        """One frozen text encoder, or SDXL's two."""
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        names = [name for name in kinds if name in COMPONENTS[self.family]]
        return [self._load(kinds[name], name).eval().requires_grad_(False) for name in names]

    def _load(self, kind: Any, part: str) -> Any:  # Any: diffusers and transformers are untyped
        """A part with all of its weights: the libraries would fill in random values for what is missing."""
        folder = self.path / part
        files = find_weights(part, [path.name for path in folder.glob("*")])
        try:
            loaded, info = kind.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, variant=files.variant, **WEIGHTS
            )
        except Exception as error:  # the libraries raise whatever their parsers do
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: {error}") from error
        for reason in ("missing", "mismatched"):
            if names := sorted(map(str, info[f"{reason}_keys"])):
                count = f"{len(names)} of its tensors are {reason}, such as {names[0]}"
                raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: {count}")
        return loaded


@torch.no_grad()
def copy_weights(module: torch.nn.Module) -> None:
    """Give the weights memory of their own. After loading on a CPU it is that of their file: who writes to
    the file would change them, and who shortens it would end the process."""
    for weights in (*module.parameters(), *module.buffers()):
        weights.data = weights.data.clone()


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL,
    images: UInt8[np.ndarray, "b height width 3"],
    sampled: Sequence[str] | None = None,
) -> Float16[np.ndarray, "b c h w"]:
    """Latents of images: the posterior's mean times scaling_factor.

    With the digests of the images' files in ``sampled``, a sample of the posterior instead: mean + std times
    the digest's own noise.

    Slices have a fixed size, so an image's place alone decides which images are encoded together with it.
    """
    size = image_batch_size(*images.shape[1:3])
    latents = []
    for start in range(0, len(images), size):
        part = torch.from_numpy(images[start : start + size].copy()).to(vae.device)
        pixels = part.permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(pixels).latent_dist
        chosen = posterior.mean
        if sampled is not None:
            shape = tuple(chosen.shape[1:])
            noise = torch.stack([draw_posterior(digest, shape) for digest in sampled[start : start + size]])
            chosen = chosen + posterior.std * noise.to(chosen.device)
        scaled = chosen * vae.config.scaling_factor
        latents.append(scaled.to(torch.float16).cpu().numpy())
    return np.concatenate(latents)


def image_batch_size(height: int, width: int) -> int:
    """Images that go through VAE and sampler at once: 4 of 1024 px (11 GB in a float32 VAE), 16 of 512 px."""
    return max(1, min(32, 4 * 1024**2 // (height * width)))
