"""Scorers on a CLIP folder of transformers: clip, pickscore, aesthetic, diversity and drift."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from dde_core.errors import ConfigError, DataError
from dde_core.models.configs import LEGACY_EOS, TEXT_ACTIVATIONS, TextEncoderFields
from dde_core.models.json_files import MAX_LAYERS, Fields
from dde_core.scorers.models import LAYERS, Cosine, Features, Rating, affine, head_shapes
from dde_core.scorers.pixels import read_crop
from dde_core.scorers.plans import Plan
from dde_core.scorers.prompts import read_clip_prompts
from dde_core.scorers.weights import (
    Tensors,
    Weights,
    check_tensors,
    read_object,
    weights_at,
    weights_of_folder,
)

COMPUTED = r"(text|vision)_model\.embeddings\.position_ids"
"""Tensors that older files hold although they are computed."""


@dataclass(frozen=True)
class ClipFolder:
    """A folder of transformers' CLIPModel, proven from its config and the headers of its weights."""

    config: CLIPConfig
    weights: Weights

    @property
    def side(self) -> int:
        """Height and width in pixels of the images that the vision encoder reads."""
        return int(self.config.vision_config.image_size)

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return int(self.config.projection_dim)

    @property
    def encoder(self) -> TextEncoderFields:
        """What shapes the text encoder."""
        text = self.config.text_config
        return TextEncoderFields(
            vocabulary=text.vocab_size,
            positions=text.max_position_embeddings,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            layers=text.num_hidden_layers,
            projected_width=self.width,
            end_id=None if text.eos_token_id == LEGACY_EOS else text.eos_token_id,
        )

    def load(self, dtype: torch.dtype) -> CLIPModel:
        """The model in memory."""
        return build_clip(self.config, without_computed(self.weights.values()), dtype)


def read_clip_folder(folder: Path) -> ClipFolder:
    """Raises DataError for the first file, config field or tensor that is not of a CLIPModel."""
    if not folder.is_dir():
        raise DataError(f"{folder} must be a folder of CLIP, with config.json and model.safetensors")
    config = _config(read_object(folder / "config.json"))
    weights = weights_of_folder(folder)
    with torch.device("meta"):
        expected = {name: tuple(each.shape) for name, each in CLIPModel(config).state_dict().items()}
    check_tensors(weights.name, "CLIP of this config.json", expected, without_computed(weights.headers()))
    return ClipFolder(config, weights)


def build_clip(config: CLIPConfig, values: Tensors, dtype: torch.dtype) -> CLIPModel:
    """A CLIPModel with these weights, all of them, in evaluation mode."""
    return build(CLIPModel, config, values, dtype)


def build(kind: Any, config: Any, values: Tensors, dtype: torch.dtype, **more: Any) -> Any:
    """A model of transformers (untyped) with these weights, all of them, in evaluation mode, frozen."""
    model, info = kind.from_pretrained(
        None, config=config, state_dict=values, dtype=dtype, output_loading_info=True, **more
    )
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[name]:
            raise DataError(
                f"{kind.__name__} has {name.replace('_', ' ')}: {sorted(map(str, info[name]))[0]}"
            )
    return model.eval().requires_grad_(False)


def without_computed(found: Tensors) -> Tensors:
    """Without the tensors that are computed."""
    return {name: each for name, each in found.items() if not re.fullmatch(COMPUTED, name)}


def plan_cosine(checkpoint: Path, processor: Path | None) -> Plan:
    """clip and pickscore."""
    clip = read_clip_folder(checkpoint)
    files = processor or checkpoint
    return Plan(
        build=lambda dtype: Cosine(clip.load(dtype)),
        pixels=read_crop(files, clip.side),
        prompts=read_clip_prompts(files, clip.encoder, cleans=False, is_exact=False),
    )


def plan_features(checkpoint: Path, processor: Path | None) -> Plan:
    """diversity and drift."""
    clip = read_clip_folder(checkpoint)
    pixels = read_crop(processor or checkpoint, clip.side)
    return Plan(build=lambda dtype: Features(clip.load(dtype)), pixels=pixels, prompts=None)


def plan_rating(checkpoint: Path, processor: Path | None) -> Plan:
    """aesthetic: ``checkpoint`` has the head, ``processor`` is the CLIP folder whose embedding it reads."""
    if processor is None:
        raise DataError(
            "processor must be the CLIP folder whose embeddings the aesthetic head reads, got none"
        )
    clip = read_clip_folder(processor)
    weights = weights_at(checkpoint)
    read_head = _head(weights, clip.width)

    def build_rating(dtype: torch.dtype) -> nn.Module:
        head = affine(read_head(weights.values()))
        return Rating(clip.load(dtype), head)

    return Plan(build=build_rating, pixels=read_crop(processor, clip.side, center="even"), prompts=None)


def _head(weights: Weights, width: int) -> Callable[[Tensors], list[tuple[Tensor, Tensor]]]:
    """How the layers of LAION's head are read: five linear layers (v2), or one (v1). Raises DataError."""
    found = weights.headers()
    if "weight" in found:
        shapes: dict[str, tuple[int, ...]] = {"weight": (1, width), "bias": (1,)}
        names = [""]
        owner = f"a linear layer on an embedding of {width} numbers"
    else:
        owner = f"LAION's head on an embedding of {width} numbers"
        shapes = head_shapes(weights.name, owner, found, width)
        names = [f"layers.{number}." for number in LAYERS]
    check_tensors(weights.name, owner, shapes, found)
    return lambda values: [(values[f"{name}weight"], values[f"{name}bias"]) for name in names]


def _config(values: dict[str, Any]) -> CLIPConfig:
    if values.get("model_type") != "clip":
        raise DataError(f"config.json: model_type must be 'clip', got {values.get('model_type')!r}")
    try:
        config = CLIPConfig.from_dict(values)
    except Exception as error:  # transformers raises whatever its validators do
        raise DataError(f"config.json is not one of CLIP: {error}") from error
    try:
        for part in ("text_config", "vision_config"):
            _check_encoder(Fields(part, getattr(config, part).to_dict()))
        Fields("", config.to_dict()).whole("projection_dim", None)
        vision = Fields("vision_config", config.vision_config.to_dict())
        side = vision.whole("image_size", None)
        if side % vision.whole("patch_size", None, most=side):
            raise vision.refusal("patch_size", f"must divide image_size = {side}")
        vision.must_be("num_channels", 3)
        text = Fields("text_config", config.text_config.to_dict())
        text.whole("vocab_size", None)
        text.whole("max_position_embeddings", None, least=3)
        text.whole("eos_token_id", None, least=0)
    except ConfigError as error:
        raise DataError(f"config.json: {error}") from error
    return config


def _check_encoder(fields: Fields) -> None:
    """What both encoders' configs must hold. Raises ConfigError."""
    fields.one_of("hidden_act", None, TEXT_ACTIVATIONS)
    fields.number("layer_norm_eps", None, above=0)
    fields.whole("num_hidden_layers", None, most=MAX_LAYERS)
    fields.whole("intermediate_size", None)
    width = fields.whole("hidden_size", None)
    if width % fields.whole("num_attention_heads", None):
        raise fields.refusal("num_attention_heads", f"must divide hidden_size = {width}")
