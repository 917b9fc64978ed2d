"""The parts of a diffusers folder that alignment needs, loaded in float32: VAE, tokenizer, text encoder, U-Net, schedule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from dde_core.errors import ModelError
from dde_core.schedule import Schedule

WEIGHTS = {"dtype": torch.float32, "use_safetensors": True}
"""How weights are loaded: whatever precision the file has, and never from a pickle."""


class ModelFolder:
    """A Stable Diffusion 1.5 kind of folder. Each method loads one part; nothing is kept. Raises ModelError."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "model_index.json").is_file():
            raise ModelError(f"{str(self.path)!r} is not a diffusers folder: it has no model_index.json")

    def schedule(self) -> Schedule:
        """The noise schedule and prediction type of the folder's scheduler."""
        path = self.path / "scheduler" / "scheduler_config.json"
        if not path.is_file():
            raise ModelError(f"scheduler of {str(self.path)!r} cannot be loaded: it has no {path.name}")
        return Schedule.from_config(json.loads(path.read_text()))

    def unet(self) -> UNet2DConditionModel:
        """A new copy of the U-Net, in evaluation mode (no dropout anywhere in this family)."""
        return self._load(UNet2DConditionModel, "unet", **WEIGHTS).eval()

    def vae(self) -> AutoencoderKL:
        """The VAE, frozen."""
        return self._load(AutoencoderKL, "vae", **WEIGHTS).eval().requires_grad_(False)

    def text_encoder(self) -> CLIPTextModel:
        """The text encoder, frozen."""
        return self._load(CLIPTextModel, "text_encoder", **WEIGHTS).eval().requires_grad_(False)

    def tokenizer(self) -> CLIPTokenizer:
        return self._load(CLIPTokenizer, "tokenizer")

    def _load(self, kind, part: str, **options):
        try:
            return kind.from_pretrained(str(self.path / part), local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: {error}") from error


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Int[np.ndarray, "b s"]:
    """Token ids padded and cut to the tokenizer's length, as the diffusers pipeline does."""
    settings = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(texts), return_tensors="np", **settings).input_ids.astype(np.int32)


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, token_ids: Int[np.ndarray, "b s"]) -> dict[str, Float[Tensor, "b s d"]]:
    """The U-Net's keyword arguments for these captions."""
    ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64)).to(text_encoder.device)
    return {"encoder_hidden_states": text_encoder(ids).last_hidden_state}


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pictures: UInt8[np.ndarray, "b height width 3"]) -> Float[np.ndarray, "b c h w"]:
    """uint8 pictures to latents: the posterior's mean times scaling_factor, as float16."""
    pixels = torch.from_numpy(pictures).to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    return latents.to(torch.float16).cpu().numpy()


def picture_size(folder: ModelFolder) -> int:
    """Height and width in pixels that the folder's U-Net was made for."""
    unet = json.loads((folder.path / "unet" / "config.json").read_text())
    vae = json.loads((folder.path / "vae" / "config.json").read_text())
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def save_aligned(base: Path, unet: Path, target: Path) -> None:
    """A folder like ``base`` with another U-Net, which ``StableDiffusionPipeline.from_pretrained`` loads unchanged.

    Taken over are the parts that model_index.json names, as safetensors, JSON and text: no pickle.
    """
    index = json.loads((base / "model_index.json").read_text())
    target.mkdir(parents=True)
    shutil.copyfile(base / "model_index.json", target / "model_index.json")
    ignored = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    for part in (name for name, kind in index.items() if isinstance(kind, list) and kind[0]):
        shutil.copytree(unet if part == "unet" else base / part, target / part, ignore=ignored)
