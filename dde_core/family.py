"""Which diffusers pipelines are supported, told from their JSON files alone. Imports no torch: the control plane asks too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dde_core.errors import ConfigError, ModelError

Family = Literal["sd15", "sdxl"]
"""sd15: one text encoder (Stable Diffusion 1.x and 2.x). sdxl: two, pooled text, sizes and crops."""

PIPELINES: dict[str, Family] = {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl"}

COMPONENTS: dict[Family, tuple[str, ...]] = {
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}

WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")

PREDICTION_TYPES = ("epsilon", "v_prediction")

_MUST_BE_FALSE = ("rescale_betas_zero_snr", "thresholding", "clip_sample")


def family_of(index: Mapping[str, Any]) -> Family:
    """The family that a ``model_index.json`` is of. Raises ModelError, naming a pipeline that is not supported yet."""
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(f"pipeline {pipeline!r} is not supported yet: must be one of {', '.join(PIPELINES)}")
    return PIPELINES[pipeline]


def missing_components(index: Mapping[str, Any]) -> list[str]:
    """What the family needs and ``model_index.json`` does not name (or names as null)."""
    there = {name for name, part in index.items() if isinstance(part, list) and part and part[0] is not None}
    return [name for name in COMPONENTS[family_of(index)] if name not in there]


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Refuse a ``scheduler_config.json`` that would change the schedule or the sampler in a way that is not implemented.

    Raises ConfigError with field and value.
    """
    for field in _MUST_BE_FALSE:
        if config.get(field):
            raise ConfigError(field, config[field], "is not supported and must be false")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError("prediction_type", prediction_type, f"must be one of {', '.join(PREDICTION_TYPES)}")
    spacing = config.get("timestep_spacing", "leading")
    if spacing != "leading":
        raise ConfigError("timestep_spacing", spacing, "must be 'leading'")
