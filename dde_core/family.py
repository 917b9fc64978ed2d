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

ADDED_EMBEDDING: dict[Family, str | None] = {"sd15": None, "sdxl": "text_time"}

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("scaled_linear", "linear")

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
    """Refuse a ``scheduler_config.json`` whose noise schedule is not implemented, or would be another than it says.

    ``timestep_spacing`` is not read: training does not space timesteps, and pictures are drawn by DDIM's "leading" ones.
    Raises ConfigError with field and value.
    """
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        raise ConfigError(
            "_class_name", config["_class_name"], "is of flow matching, which is not supported yet"
        )
    for field in _MUST_BE_FALSE:
        if config.get(field):
            raise ConfigError(field, config[field], "is not supported and must be false")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError("prediction_type", prediction_type, f"must be one of {', '.join(PREDICTION_TYPES)}")
    trained = config.get("trained_betas")
    for field in (
        "num_train_timesteps",
        *(() if trained is not None else ("beta_schedule", "beta_start", "beta_end")),
    ):
        if config.get(field) is None:
            raise ConfigError(field, None, "must be in the scheduler's config")
    timesteps = config["num_train_timesteps"]
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ConfigError("num_train_timesteps", timesteps, "must be a positive whole number")
    if trained is not None and len(trained) != timesteps:
        raise ConfigError(
            "trained_betas", len(trained), f"must hold num_train_timesteps = {timesteps} values"
        )
    if trained is None and config["beta_schedule"] not in BETA_SCHEDULES:
        raise ConfigError(
            "beta_schedule", config["beta_schedule"], f"must be one of {', '.join(BETA_SCHEDULES)}"
        )


def check_unet(config: Mapping[str, Any], family: Family) -> None:
    """Refuse a U-Net's ``config.json`` of another kind than the pipeline's. Raises ConfigError with field and value."""
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind != "UNet2DConditionModel":
        raise ConfigError("unet._class_name", kind, "must be 'UNet2DConditionModel'")
    channels, made = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != made:
        raise ConfigError("unet.in_channels", channels, f"must be out_channels = {made} (no inpainting)")
    added = config.get("addition_embed_type")
    if added != ADDED_EMBEDDING[family]:
        raise ConfigError(
            "unet.addition_embed_type", added, f"must be {ADDED_EMBEDDING[family]!r} in a {family} model"
        )
