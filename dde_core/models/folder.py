"""Load the parts of a diffusers folder in float32: U-Net, VAE, text encoders, tokenizers, noise schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float16, UInt8
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dde_core.errors import ConfigError, ModelError
from dde_core.family import COMPONENTS, family_of, missing_components
from dde_core.models.configs import AutoencoderFields, check_unet, sample_size
from dde_core.models.json_files import parse_object
from dde_core.models.lora_file import read_lora
from dde_core.models.tokens import load_tokenizers
from dde_core.models.weight_files import find_weights
from dde_core.noise import draw_posterior
from dde_core.schedule import Schedule

WEIGHTS = {"dtype": torch.float32, "use_safetensors": True}
"""Weights are loaded as float32 from files of any precision, and never from a pickle."""


class ModelFolder:
    """A model folder of the Stable Diffusion 1.5 or SDXL family, with an optional folder of LoRA adapters.

    Each method loads one part anew. The constructor and the methods raise ModelError for an unsupported or
    incomplete folder; an unsupported family is refused before any weight is read.
    """

    def __init__(self, path: Path | str, adapter: Path | str | None = None) -> None:
        self.path = Path(path)
        self.adapter = Path(adapter) if adapter else None
        try:
            data = (self.path / "model_index.json").read_bytes()
        except FileNotFoundError as error:
            message = f"{str(self.path)!r} is not a diffusers folder: it has no model_index.json"
            raise ModelError(message) from error
        self.index: dict[str, Any] = parse_object(data, "model_index.json")
        self.family = family_of(self.index)
        missing = missing_components(self.index)
        if missing:
            raise ModelError(
                f"{str(self.path)!r} lacks {', '.join(missing)}, which a {self.family} model needs"
            )

    def schedule(self) -> Schedule:
        """The noise schedule and prediction type of the folder's scheduler."""
        return Schedule.from_config(self.sampling_config())

    def sampling_config(self) -> dict[str, Any]:
        """The scheduler's config for sampling.

        ``StableDiffusionPipeline`` takes ``steps_offset`` 1, whatever the folder says.
        """
        config = self.scheduler_config()
        return config | {"steps_offset": 1} if self.family == "sd15" else config

    def scheduler_config(self) -> dict[str, Any]:
        """The contents of the folder's ``scheduler_config.json``."""
        return self._json("scheduler", "scheduler_config.json")

    def unet(self) -> UNet2DConditionModel:
        """A new copy of the U-Net with adapters merged in, in evaluation mode (these families have no
        dropout)."""
        check_unet(self._json("unet", "config.json"), self.family)
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
        AutoencoderFields.read(self._json("vae", "config.json"))
        return self._load(AutoencoderKL, "vae").eval().requires_grad_(False)

    def text_encoders(self) -> list[CLIPTextModel | CLIPTextModelWithProjection]:
        """One frozen text encoder, or SDXL's two."""
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        names = [name for name in kinds if name in COMPONENTS[self.family]]
        return [self._load(kinds[name], name).eval().requires_grad_(False) for name in names]

    def tokenizers(self) -> list[CLIPTokenizer]:
        """One tokenizer for each text encoder."""
        return load_tokenizers(self.path, self.family)

    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the U-Net was trained on."""
        height, width = sample_size(self._json("unet", "config.json"), self.family)
        return height * self.vae_factor, width * self.vae_factor

    def resolution(self) -> int:
        """Side in pixels of the images that the U-Net was trained on.

        Raises ConfigError if they are not square.
        """
        height, width = self.image_size()
        if height != width:
            reason = f"must be given: the images of this model have {width} x {height} px"
            raise ConfigError("data.resolution", 0, reason)
        return height

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """[c h w] of the latents of a square image. Raises ModelError unless the VAE's factor divides
        ``resolution``."""
        if resolution % self.vae_factor:
            raise ModelError(
                f"resolution must be a multiple of {self.vae_factor}, the VAE's factor, got {resolution}"
            )
        side = resolution // self.vae_factor
        return AutoencoderFields.read(self._json("vae", "config.json")).channels, side, side

    @property
    def vae_factor(self) -> int:
        """Pixels of an image for each latent, in height and in width."""
        num_halvings = len(self._json("vae", "config.json")["block_out_channels"]) - 1
        return 1 << num_halvings

    @property
    def no_caption_is_zeros(self) -> bool:
        """How "no caption" is encoded: as zeros (SDXL's ``force_zeros_for_empty_prompt``), else as the empty
        caption."""
        return self.family == "sdxl" and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def _json(self, part: str, name: str) -> dict[str, Any]:
        try:
            return parse_object((self.path / part / name).read_bytes(), f"{part}/{name}")
        except FileNotFoundError as error:
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: it has no {name}") from error

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
