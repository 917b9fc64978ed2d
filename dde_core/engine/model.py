"""A diffusers folder on a device, loaded once: what the engine calls."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dde_core.conditioning import Conditioning, call
from dde_core.config import SampleConfig
from dde_core.engine.adapters import RowAdapters
from dde_core.engine.graphs import Graphs
from dde_core.engine.samplers import make_scheduler
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.models.folder import ModelFolder, copy_weights, image_batch_size
from dde_core.models.text import TextEncoders
from dde_core.models.tokens import count_tokens


@dataclass(frozen=True)
class Model:
    """A base model, or one of its adapters, which takes ``num_bytes`` beside its base."""

    base: BaseModel
    adapter: str | None = None
    num_bytes: int = 0


class BaseModel:
    """The parts of one folder, and the adapters loaded into its U-Net.

    One thread draws with it; others may load and unload adapters that it does not draw with at the time.

    U-Net, text encoders and VAE compute in ``dtype``: float32, or bfloat16, whose range is that of float32.
    Latents and schedulers are float32.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        unet: nn.Module | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.height_px, self.width_px = folder.image_size()
        self.pixels_per_latent = folder.vae_factor
        self.has_safety_checker = (folder.path / "safety_checker").is_dir()
        self._scheduler_config = folder.sampling_config()
        self._text_encoders = TextEncoders(folder, self.device, dtype)
        drawing: Any = unet or folder.unet()
        self._unet = drawing.requires_grad_(False).to(self.device, dtype)
        self._vae: Any = folder.vae().to(self.device, dtype)
        self._adapters = RowAdapters(self._unet)
        self._lock = threading.Lock()
        """Held while the U-Net or its adapters are used."""
        self._graphs: Graphs | None = None
        if self.device.type == "cuda":
            self._unet.to(memory_format=torch.channels_last)
            self._vae.to(memory_format=torch.channels_last)
            self._graphs = Graphs(self._call)
        else:
            loaded: list[nn.Module] = [self._vae, *self._text_encoders.encoders]
            for part in loaded if unet else [self._unet, *loaded]:
                copy_weights(part)

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """A prompt's tokens, and how many of them the text encoders read at most. In any thread."""
        return count_tokens(self._text_encoders.tokenizers, prompt)

    @property
    def model(self) -> Model:
        """The model without an adapter."""
        return Model(self)

    def load_adapter(self, key: str, folder: Path) -> Model:
        """The model with the LoRA adapters of a folder.

        Raises ModelError for adapters that are damaged or of another base.
        """
        with self._lock:
            before = self._adapters.num_bytes
            self._adapters.load(key, folder)
            return Model(self, key, self._adapters.num_bytes - before)

    def unload_adapter(self, key: str) -> None:
        """Free an adapter's memory."""
        with self._lock:
            self._adapters.unload(key)

    def close(self) -> None:
        """Free the memory. The model cannot be used any more."""
        with self._lock:
            del self._unet, self._vae, self._text_encoders, self._adapters
            self._graphs = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, without adapters."""
        modules = [self._unet, self._vae, *self._text_encoders.encoders]
        return sum(
            parameter.numel() * parameter.element_size()
            for module in modules
            for parameter in module.parameters()
        )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self._unet.config.in_channels)

    def size_of(self, sample: SampleConfig) -> tuple[int, int]:
        """Height and width in pixels: the requested ones, else the model's own.

        Raises ConfigError for a size that the VAE's factor does not divide.
        """
        height = sample.height or self.height_px
        width = sample.width or self.width_px
        for name, value in (("height", height), ("width", width)):
            if value % self.pixels_per_latent:
                raise ConfigError(
                    name, value, f"must be a multiple of {self.pixels_per_latent} for this model"
                )
        return height, width

    def scheduler(self, sample: SampleConfig) -> object:
        """A new scheduler for one image. Raises ConfigError for settings that the schedule does not allow."""
        return make_scheduler(self._scheduler_config, sample.sampler, sample.steps)

    def encode(self, captions: Sequence[str | None], height_px: int, width_px: int) -> Conditioning:
        """Conditioning as in the diffusers pipelines: SDXL's sizes are those of an uncropped image of this
        size. None is no caption; "" is a caption, which is encoded."""
        return self._text_encoders.of_captions(captions, height_px, width_px)

    @torch.no_grad()
    def predict(
        self,
        latents: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        conditioning: Conditioning,
        adapters: Sequence[str | None] = (),
    ) -> Float[Tensor, "b c h w"]:
        """The U-Net's output, float32, at diffusers' timesteps ``t``, one for each row.

        ``adapters`` names each row's adapter; empty means none.
        """
        with self._lock:
            if any(adapters):
                with self._adapters.rows(adapters):
                    return self._call(latents, t, conditioning)
            if self._graphs is not None and self._graphs.applies(latents):
                return self._graphs(latents, t, conditioning)
            return self._call(latents, t, conditioning)

    def _call(self, latents: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        rows = latents.to(self.dtype)
        if self.device.type == "cuda":
            rows = rows.contiguous(memory_format=torch.channels_last)
        return call(self._unet, rows, t, conditioning).float()

    def capture_up_to(self, size_px: tuple[int, int], rows: int) -> None:
        """Run calls of at most so many rows as CUDA graphs, on a GPU."""
        if self._graphs is not None:
            height, width = (side // self.pixels_per_latent for side in size_px)
            self._graphs.capture_up_to((height, width), rows)

    def wait(self) -> None:
        """Wait for what the device has still to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """The VAE's output in about [-1, 1] for clean latents, on the device."""
        return decode(self._vae, latents)


def decode(vae: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
    """The VAE's output in about [-1, 1] for clean latents on its device. Slices have a fixed size."""
    factor = 1 << (len(vae.config.block_out_channels) - 1)
    size = image_batch_size(*(side * factor for side in latents.shape[2:]))
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    return torch.cat([vae.decode(part).sample.float() for part in scaled.split(size)])


def to_pixels(images: Float[Tensor, "b 3 height width"]) -> UInt8[np.ndarray, "b height width 3"]:
    """The VAE's output in [-1, 1], scaled to 0..255; what lies outside is clamped.

    Raises NonFiniteError, with the number of bad images: they would be black.
    """
    bad = are_finite(images).count(False)
    if bad:
        raise NonFiniteError(f"decoded images are not finite in {bad} of {len(images)} images")
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def are_finite(values: Float[Tensor, "b c h w"]) -> list[bool]:
    """Which rows have no infinite or NaN value."""
    finite: list[bool] = values.isfinite().flatten(1).all(1).tolist()
    return finite
