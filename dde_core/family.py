"""Which diffusers pipelines are supported, decided from their JSON files. Imports no torch: the control plane
uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dde_core.errors import ModelError
from dde_core.models.json_files import shown

Family = Literal["sd15", "sdxl"]
"""sd15: one text encoder (Stable Diffusion 1.x and 2.x). sdxl: two, pooled text, sizes and crops."""

PIPELINES: dict[str, Family] = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}

COMPONENTS: dict[Family, tuple[str, ...]] = {
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}

WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")

CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
}
"""The class of each component. The scheduler may be of several: DDIM samples with its noise schedule."""


def family_of(index: Mapping[str, Any]) -> Family:
    """The family of a ``model_index.json``. Raises ModelError for an unsupported pipeline."""
    pipeline = index.get("_class_name")
    if isinstance(pipeline, list):
        raise ModelError(f"pipeline {shown(pipeline)} has code of its own, which is never run")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise ModelError(
            f"pipeline {shown(pipeline)} is not supported yet: must be one of {', '.join(PIPELINES)}"
        )
    return PIPELINES[pipeline]


def missing_components(index: Mapping[str, Any]) -> list[str]:
    """The family's components that ``model_index.json`` lacks or names as null."""
    named = {name for name, part in index.items() if isinstance(part, list) and part and part[0] is not None}
    return [name for name in COMPONENTS[family_of(index)] if name not in named]


def check_classes(index: Mapping[str, Any]) -> None:
    """Raises ModelError for a component that ``model_index.json`` gives another class than CLASSES."""
    for name in COMPONENTS[family_of(index)]:
        library = index[name][0]
        named = index[name][-1]
        expected = CLASSES.get(name, named)
        if named not in (expected, f"{expected}Fast"):
            raise ModelError(f"{name} must be {expected}, model_index.json says {shown(index[name])}")
        if library not in ("diffusers", "transformers"):
            raise ModelError(f"{name} {shown(index[name])} has code of its own, which is never run")
