"""What the JSON files and the vocabularies of a diffusers folder say.

Imports neither torch nor diffusers: a process that leaves weights to others starts in a fifth of the time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from dde_core.errors import ConfigError, ModelError
from dde_core.family import family_of, missing_components
from dde_core.models.configs import AutoencoderFields, sample_size
from dde_core.models.json_files import parse_object
from dde_core.models.tokens import load_tokenizers


class FolderFiles:
    """A model folder of the Stable Diffusion 1.5 or SDXL family, with an optional folder of LoRA adapters.

    The constructor and the methods raise ModelError for an unsupported or incomplete folder; an unsupported
    family is refused before any weight is read.
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

    def sampling_config(self) -> dict[str, Any]:
        """The scheduler's config for sampling.

        ``StableDiffusionPipeline`` takes ``steps_offset`` 1, whatever the folder says.
        """
        config = self.scheduler_config()
        return config | {"steps_offset": 1} if self.family == "sd15" else config

    def scheduler_config(self) -> dict[str, Any]:
        """The contents of the folder's ``scheduler_config.json``."""
        return self.read_json("scheduler", "scheduler_config.json")

    def tokenizers(self) -> list[CLIPTokenizer]:
        """One tokenizer for each text encoder."""
        return load_tokenizers(self.path, self.family)

    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the U-Net was trained on."""
        height, width = sample_size(self.read_json("unet", "config.json"), self.family)
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
        return AutoencoderFields.read(self.read_json("vae", "config.json")).channels, side, side

    @property
    def vae_factor(self) -> int:
        """Pixels of an image for each latent, in height and in width."""
        num_halvings = len(self.read_json("vae", "config.json")["block_out_channels"]) - 1
        return 1 << num_halvings

    @property
    def no_caption_is_zeros(self) -> bool:
        """How "no caption" is encoded: as zeros (SDXL's ``force_zeros_for_empty_prompt``), else as the empty
        caption."""
        return self.family == "sdxl" and bool(self.index.get("force_zeros_for_empty_prompt", True))

    def read_json(self, part: str, name: str) -> dict[str, Any]:
        """The JSON object in the file ``name`` of a part, such as ``unet``."""
        try:
            return parse_object((self.path / part / name).read_bytes(), f"{part}/{name}")
        except FileNotFoundError as error:
            raise ModelError(f"{part} of {str(self.path)!r} cannot be loaded: it has no {name}") from error
