"""The parts of a diffusers folder that alignment needs, loaded in float32: VAE, tokenizers, text encoders, U-Net, schedule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, UInt8
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dde_core.errors import ModelError
from dde_core.family import COMPONENTS, check_unet, family_of, missing_components
from dde_core.models.tokens import load_tokenizers
from dde_core.schedule import Schedule

WEIGHTS = {"dtype": torch.float32, "use_safetensors": True}
"""How weights are loaded: whatever precision the file has, and never from a pickle."""

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers' ``load_lora_weights`` looks for adapters in a folder."""


class ModelFolder:
    """A folder of Stable Diffusion 1.5's or SDXL's kind, and perhaps a folder of LoRA adapters for it.

    Each method loads one part; nothing is kept. Raises ModelError: for a folder of another kind before a weight is read.
    """

    def __init__(self, path: Path | str, adapter: Path | str | None = None) -> None:
        self.path, self.adapter = Path(path), Path(adapter) if adapter else None
        try:
            self.index = json.loads((self.path / "model_index.json").read_text())
        except FileNotFoundError as error:
            raise ModelError(
                f"{str(self.path)!r} is not a diffusers folder: it has no model_index.json"
            ) from error
        self.family = family_of(self.index)
        if missing := missing_components(self.index):
            raise ModelError(
                f"{str(self.path)!r} lacks {', '.join(missing)}, which a {self.family} model needs"
            )

    def schedule(self) -> Schedule:
        """The noise schedule and prediction type of the folder's scheduler."""
        return Schedule.from_config(self.scheduler_config())

    def scheduler_config(self) -> dict:
        """What the folder's scheduler was configured with."""
        path = self.path / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            raise ModelError(f"scheduler of {str(self.path)!r} cannot be loaded: it has no {path.name}")
        return json.loads(path.read_text())

    def unet(self) -> UNet2DConditionModel:
        """A new copy of the U-Net, adapters merged in, in evaluation mode (no dropout anywhere in these families)."""
        check_unet(self._config("unet"), self.family)
        unet = self._load(UNet2DConditionModel, "unet", **WEIGHTS)
        if self.adapter:
            unet.load_lora_adapter(
                str(self.adapter), prefix="unet", weight_name=LORA_WEIGHTS, local_files_only=True
            )
            unet.fuse_lora()
            unet.unload_lora()
        return unet.eval()

    def vae(self) -> AutoencoderKL:
        """The VAE, frozen. In float32 always, so a config's ``force_upcast`` is heeded."""
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
        """Height and width in pixels that the U-Net was made for."""
        return self._config("unet")["sample_size"] * self._vae_factor

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """[c h w] of a square picture's latents. Raises ModelError for a size in pixels that the VAE cannot halve so often."""
        if resolution % self._vae_factor:
            raise ModelError(
                f"resolution = {resolution} is no multiple of {self._vae_factor}, the factor of the VAE"
            )
        side = resolution // self._vae_factor
        return self._config("vae")["latent_channels"], side, side

    @property
    def _vae_factor(self) -> int:
        return 2 ** (len(self._config("vae")["block_out_channels"]) - 1)

    @property
    def no_caption_is_zeros(self) -> bool:
        """What stands for no caption: zeros (SDXL's ``force_zeros_for_empty_prompt``), else the empty caption."""
        return self.family == "sdxl" and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def _config(self, part: str) -> dict:
        try:
            return json.loads((self.path / part / "config.json").read_text())
        except FileNotFoundError as error:
            raise ModelError(
                f"{part} of {str(self.path)!r} cannot be loaded: it has no config.json"
            ) from error

    def _load(self, kind, part: str, **options):
        try:
            return kind.from_pretrained(str(self.path / part), local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: {error}") from error


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, pictures: UInt8[np.ndarray, "b height width 3"]
) -> Float[np.ndarray, "b c h w"]:
    """uint8 pictures to latents: the posterior's mean times scaling_factor, as float16.

    Slices are of a fixed size, so what a picture is encoded beside depends on its place alone.
    """
    size, latents = image_batch_size(*pictures.shape[1:3]), []
    for start in range(0, len(pictures), size):
        pixels = (
            torch.from_numpy(pictures[start : start + size].copy()).to(vae.device).permute(0, 3, 1, 2).float()
            / 127.5
            - 1
        )
        latents.append(
            (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).to(torch.float16).cpu().numpy()
        )
    return np.concatenate(latents)


def image_batch_size(height: int, width: int) -> int:
    """How many pictures go through VAE and sampler together: at most 4 of 1024 px (11 GB in a float32 VAE), 16 of 512 px."""
    return max(1, min(32, 4 * 1024**2 // (height * width)))
