"""ImageReward (arXiv 2304.05977) on transformers' BlipVisionModel and BlipTextModel.

Sizes are derived from the tensors and from ``med_config.json``. The number of heads of the vision encoder
leaves no trace in either: it is ViT-L's, ``VISION_HEADS``.
"""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path

import torch
from torch import nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from dde_core.errors import ConfigError, DataError
from dde_core.models.json_files import MAX_LAYERS, Fields
from dde_core.scorers.clip_folders import build
from dde_core.scorers.models import LAYERS, Reward, affine, head_shapes
from dde_core.scorers.pixels import Crop
from dde_core.scorers.plans import Plan
from dde_core.scorers.prompts import ADDED_TO_BERT, read_bert_prompts
from dde_core.scorers.weights import Tensors, check_tensors, read_object, shape_at, weights_at

OWNER = "ImageReward"
CONFIG = "med_config.json"
VISION = "blip.visual_encoder."
TEXT = "blip.text_encoder."
HEAD = "mlp."
COMPUTED = f"{TEXT}embeddings.position_ids"
VISION_HEADS = 16
"""Of ViT-L, 1024 wide."""
VISION_DEPTHS = {1024: 24}
VISION_EPS = 1e-6
"""BLIP's; transformers' default is 1e-5."""

_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TOP = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


def plan_reward(checkpoint: Path, processor: Path | None) -> Plan:
    """``processor`` has BERT's vocabulary; without it, the folder of the checkpoint. Raises DataError.

    ``med_config.json`` is in the folder of the checkpoint.
    """
    weights = weights_at(checkpoint)
    folder = weights.files[0].parent
    found = _without_computed(weights.headers())
    name = weights.name
    vision = _vision_config(name, found)
    text = _text_config(name, found, read_object(folder / CONFIG), vision.hidden_size)
    head = head_shapes(name, f"{OWNER}'s mlp", _part(found, HEAD), text.hidden_size)
    with torch.device("meta"):
        parts = {
            VISION: {to_original(key): each for key, each in BlipVisionModel(vision).state_dict().items()},
            TEXT: BlipTextModel(text, add_pooling_layer=False).state_dict(),
        }
    expected = {
        f"{prefix}{key}": tuple(each.shape) for prefix, part in parts.items() for key, each in part.items()
    }
    expected |= {f"{HEAD}{key}": shape for key, shape in head.items()}
    check_tensors(name, OWNER, expected, found)

    def build_reward(dtype: torch.dtype) -> nn.Module:
        values = _without_computed(weights.values())
        of_vision = {to_transformers(key): each for key, each in _part(values, VISION).items()}
        of_text = _part(values, TEXT)
        layers = [(values[f"{HEAD}layers.{i}.weight"], values[f"{HEAD}layers.{i}.bias"]) for i in LAYERS]
        return Reward(
            build(BlipVisionModel, vision, of_vision, dtype),
            build(BlipTextModel, text, of_text, dtype, add_pooling_layer=False),
            affine(layers),
        )

    side = int(vision.image_size)
    return Plan(
        build=build_reward,
        pixels=Crop(side=side, shortest=side, center="even"),
        prompts=read_bert_prompts(processor or folder, text.vocab_size, text.max_position_embeddings),
    )


def to_transformers(name: str) -> str:
    """BlipVisionModel's name of a tensor of BLIP's vision encoder."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if match:
        return f"encoder.layers.{match[1]}.{_BLOCK[match[2]]}.{match[3]}"
    return _TOP[name]


def to_original(name: str) -> str:
    """The inverse of ``to_transformers``."""
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match:
        by_name = {theirs: original for original, theirs in _BLOCK.items()}
        return f"blocks.{match[1]}.{by_name[match[2]]}.{match[3]}"
    return {theirs: original for original, theirs in _TOP.items()}[name]


def _part(found: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): each for key, each in found.items() if key.startswith(prefix)}


def _without_computed(found: Tensors) -> Tensors:
    return {key: each for key, each in found.items() if key != COMPUTED}


def _vision_config(name: str, found: Tensors) -> BlipVisionConfig:
    width, channels, patch, _ = shape_at(name, OWNER, found, f"{VISION}patch_embed.proj.weight", 4)
    patches = shape_at(name, OWNER, found, f"{VISION}pos_embed", 3)[1] - 1
    if channels != 3:
        raise DataError(f"{name}: '{VISION}patch_embed.proj.weight' must read 3 channels, got {channels}")
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise DataError(f"{name}: '{VISION}pos_embed' must have 1 + a square of rows, got {patches + 1}")
    if width % VISION_HEADS:
        reason = f"the width of the vision encoder must be a multiple of {VISION_HEADS} heads, got {width}"
        raise DataError(f"{name}: {reason}")
    layers = _layers(name, found, f"{VISION}blocks.", VISION_DEPTHS.get(width))
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape_at(name, OWNER, found, f"{VISION}blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=layers,
        num_attention_heads=VISION_HEADS,
        image_size=isqrt(patches) * patch,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=VISION_EPS,
    )


def _text_config(name: str, found: Tensors, values: dict[str, object], vision_width: int) -> BlipTextConfig:
    """By med_config.json. Its ``encoder_width`` is not read: BLIP takes the vision encoder's width."""
    fields = Fields(CONFIG, values)
    try:
        fields.must_be("model_type", "bert")
        fields.must_be("add_cross_attention", True)
        width = fields.whole("hidden_size", None)
        if width % fields.whole("num_attention_heads", None):
            raise fields.refusal("num_attention_heads", f"must divide hidden_size = {width}")
        config = BlipTextConfig(
            vocab_size=fields.whole("vocab_size", None),
            hidden_size=width,
            encoder_hidden_size=vision_width,
            intermediate_size=fields.whole("intermediate_size", None),
            num_hidden_layers=fields.whole("num_hidden_layers", None, most=MAX_LAYERS),
            num_attention_heads=fields.whole("num_attention_heads", None),
            max_position_embeddings=fields.whole("max_position_embeddings", None, least=3),
            hidden_act=fields.one_of("hidden_act", "gelu", ("gelu", "relu")),
            layer_norm_eps=fields.number("layer_norm_eps", 1e-12, above=0),
            bos_token_id=fields.whole("vocab_size", None) - len(ADDED_TO_BERT),
            pad_token_id=fields.whole("pad_token_id", 0, least=0),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=True,
        )
    except ConfigError as error:
        raise DataError(str(error)) from error
    _layers(name, found, f"{TEXT}encoder.layer.", config.num_hidden_layers)
    return config


def _layers(name: str, found: Tensors, prefix: str, wanted: int | None) -> int:
    """The number of layers that the tensors have. Raises DataError unless it is ``wanted``."""
    numbers = [int(key.removeprefix(prefix).split(".")[0]) for key in found if key.startswith(prefix)]
    layers = max(numbers, default=-1) + 1
    if wanted is not None and layers != wanted:
        raise DataError(f"{name}: {prefix}* must have {wanted} layers, got {layers}")
    if layers > MAX_LAYERS:
        raise DataError(f"{name}: {prefix}* must have at most {MAX_LAYERS} layers, got {layers}")
    return max(layers, 1)
