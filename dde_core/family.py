"""Which diffusers pipelines are supported, decided from their JSON files. Imports no torch: the control plane
uses it."""

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

ADDED_EMBEDDING: dict[Family, str | None] = {"sd15": None, "sdxl": "text_time"}

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")

_MUST_BE_FALSE = ("rescale_betas_zero_snr", "thresholding", "clip_sample")


def family_of(index: Mapping[str, Any]) -> Family:
    """The family of a ``model_index.json``. Raises ModelError for an unsupported pipeline."""
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ModelError(f"pipeline {pipeline!r} is not supported yet: must be one of {', '.join(PIPELINES)}")
    return PIPELINES[pipeline]


def missing_components(index: Mapping[str, Any]) -> list[str]:
    """The family's components that ``model_index.json`` lacks or names as null."""
    named = {name for name, part in index.items() if isinstance(part, list) and part and part[0] is not None}
    return [name for name in COMPONENTS[family_of(index)] if name not in named]


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a ``scheduler_config.json`` with an invalid or unsupported noise schedule.

    ``timestep_spacing`` is ignored: training does not space timesteps, and sampling uses DDIM's "leading"
    ones.
    """
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        reason = "is of flow matching, which is not supported yet"
        raise ConfigError("_class_name", config["_class_name"], reason)
    for field in _MUST_BE_FALSE:
        if config.get(field):
            raise ConfigError(field, config[field], "is not supported and must be false")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError("prediction_type", prediction_type, f"must be one of {', '.join(PREDICTION_TYPES)}")
    trained_betas = config.get("trained_betas")
    required = ["num_train_timesteps"]
    if trained_betas is None:
        required += ["beta_schedule", "beta_start", "beta_end"]
    for field in required:
        if config.get(field) is None:
            raise ConfigError(field, None, "must be in the scheduler's config")
    timesteps = config["num_train_timesteps"]
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ConfigError("num_train_timesteps", timesteps, "must be a positive whole number")
    if trained_betas is not None:
        if len(trained_betas) != timesteps:
            reason = f"must hold num_train_timesteps = {timesteps} values"
            raise ConfigError("trained_betas", len(trained_betas), reason)
    elif config["beta_schedule"] not in BETA_SCHEDULES:
        reason = f"must be one of {', '.join(BETA_SCHEDULES)}"
        raise ConfigError("beta_schedule", config["beta_schedule"], reason)


def check_unet(config: Mapping[str, Any], family: Family) -> None:
    """Raises ConfigError for a U-Net's ``config.json`` that does not fit the pipeline's family."""
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ConfigError("unet._class_name", kind, "must be 'UNet2DConditionModel'")
    channels = config.get("in_channels", 4)
    out_channels = config.get("out_channels", 4)
    if channels != out_channels:
        raise ConfigError(
            "unet.in_channels", channels, f"must be out_channels = {out_channels} (no inpainting)"
        )
    embedding = config.get("addition_embed_type")
    if embedding != ADDED_EMBEDDING[family]:
        reason = f"must be {ADDED_EMBEDDING[family]!r} in a {family} model"
        raise ConfigError("unet.addition_embed_type", embedding, reason)
