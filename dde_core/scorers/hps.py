"""HPS v2 and v2.1 (arXiv 2306.09341): CLIP ViT-H/14 in the layout of open_clip, on transformers' CLIPModel.

All sizes but one are derived from the tensors. The number of attention heads leaves no trace in them: it is
ViT-H/14's in both encoders, ``HEADS``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig

from dde_core.errors import DataError
from dde_core.models.configs import TextEncoderFields
from dde_core.models.json_files import MAX_LAYERS
from dde_core.scorers.clip_folders import build_clip
from dde_core.scorers.models import Cosine
from dde_core.scorers.pixels import Pad, Resize
from dde_core.scorers.plans import Plan
from dde_core.scorers.prompts import read_clip_prompts
from dde_core.scorers.weights import Tensors, check_tensors, shape_at, weights_at

OWNER = "HPS in open_clip's layout"
KEY = "state_dict"
HEADS = 16
"""Of both encoders of ViT-H/14: 1280 and 1024 wide."""
DEPTHS = {1280: 32, 1024: 24}
"""Layers of ViT-H/14's encoders by their width: a checkpoint that lost its last layers is refused."""
ACTIVATION = "gelu"
"""ViT-H/14's; OpenAI's checkpoints have quick_gelu."""
EPS = 1e-5

_BLOCK = {
    "ln_1.weight": "layer_norm1.weight",
    "ln_1.bias": "layer_norm1.bias",
    "attn.out_proj.weight": "self_attn.out_proj.weight",
    "attn.out_proj.bias": "self_attn.out_proj.bias",
    "ln_2.weight": "layer_norm2.weight",
    "ln_2.bias": "layer_norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_PARTS = {"visual.": "vision_model", "": "text_model"}


@dataclass(frozen=True)
class Encoder:
    """Sizes of one of the two transformers."""

    width: int
    mlp_width: int
    layers: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a checkpoint. ``patch`` in pixels; ``grid``: patches in height and in width."""

    vision: Encoder
    text: Encoder
    patch: int
    grid: int
    vocabulary: int
    positions: int
    embedding: int

    @property
    def side(self) -> int:
        """Height and width of the image in pixels."""
        return self.grid * self.patch


def plan_hps(checkpoint: Path, processor: Path | None, resize: Resize) -> Plan:
    """``processor`` has CLIP's tokenizer; without it, the folder of the checkpoint. Raises DataError."""
    weights = weights_at(checkpoint, KEY)
    found = weights.headers()
    sizes = read_sizes(weights.name, found)
    check_tensors(weights.name, OWNER, shapes_of(sizes), found)
    config = config_of(sizes)
    folder = processor or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    encoder = TextEncoderFields(
        vocabulary=sizes.vocabulary,
        positions=sizes.positions,
        width=sizes.text.width,
        mlp_width=sizes.text.mlp_width,
        layers=sizes.text.layers,
        projected_width=sizes.embedding,
        end_id=sizes.vocabulary - 1,
    )

    def build(dtype: torch.dtype) -> nn.Module:
        return Cosine(build_clip(config, to_transformers(weights.values()), dtype))

    return Plan(
        build=build,
        pixels=Pad(side=sizes.side, resize=resize),
        prompts=read_clip_prompts(folder, encoder, cleans=True, is_exact=True),
    )


def read_sizes(name: str, found: Tensors) -> Sizes:
    """The sizes that the tensors have. Raises DataError for a tensor that is missing or impossible."""
    width, channels, patch, _ = shape_at(name, OWNER, found, "visual.conv1.weight", 4)
    patches = shape_at(name, OWNER, found, "visual.positional_embedding", 2)[0] - 1
    if patches < 1 or isqrt(patches) ** 2 != patches:
        raise DataError(
            f"{name}: 'visual.positional_embedding' must have 1 + a square of rows, got {patches + 1}"
        )
    if channels != 3:
        raise DataError(f"{name}: 'visual.conv1.weight' must read 3 channels, got {channels}")
    vocabulary, text_width = shape_at(name, OWNER, found, "token_embedding.weight", 2)
    return Sizes(
        vision=_encoder(name, found, "visual.", width),
        text=_encoder(name, found, "", text_width),
        patch=patch,
        grid=isqrt(patches),
        vocabulary=vocabulary,
        positions=shape_at(name, OWNER, found, "positional_embedding", 2)[0],
        embedding=shape_at(name, OWNER, found, "visual.proj", 2)[1],
    )


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of these sizes, in open_clip's layout."""
    vision = sizes.vision.width
    text = sizes.text.width
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (vision, 3, sizes.patch, sizes.patch),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (sizes.grid**2 + 1, vision),
        "visual.proj": (vision, sizes.embedding),
        "token_embedding.weight": (sizes.vocabulary, text),
        "positional_embedding": (sizes.positions, text),
        "text_projection": (text, sizes.embedding),
        "logit_scale": (),
    }
    norms = {"visual.ln_pre": vision, "visual.ln_post": vision, "ln_final": text}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, encoder in (("visual.", sizes.vision), ("", sizes.text)):
        for i in range(encoder.layers):
            block = f"{prefix}transformer.resblocks.{i}."
            shapes |= {f"{block}{name}": shape for name, shape in _block_shapes(encoder).items()}
    return shapes


def config_of(sizes: Sizes) -> CLIPConfig:
    """The config of the CLIPModel with these sizes."""
    return CLIPConfig(
        projection_dim=sizes.embedding,
        vision_config={
            **_encoder_config(sizes.vision),
            "image_size": sizes.side,
            "patch_size": sizes.patch,
            "projection_dim": sizes.embedding,
        },
        text_config={
            **_encoder_config(sizes.text),
            "vocab_size": sizes.vocabulary,
            "max_position_embeddings": sizes.positions,
            "projection_dim": sizes.embedding,
            "bos_token_id": sizes.vocabulary - 2,
            "eos_token_id": sizes.vocabulary - 1,
        },
    )


def to_transformers(values: Tensors) -> Tensors:
    """The same tensors under the names, and with the shapes, of CLIPModel."""
    converted: Tensors = {}
    for name, value in values.items():
        match = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if match:
            layer = f"{_PARTS[match[1] or '']}.encoder.layers.{match[2]}"
            converted |= _converted_block(layer, match[3], value)
        elif name in _TRANSPOSED:
            converted[_TRANSPOSED[name]] = value.T.contiguous()
        else:
            converted[_TOP[name]] = value
    return converted


def _converted_block(layer: str, name: str, value: torch.Tensor) -> Tensors:
    if name.startswith("attn.in_proj_"):
        of_all = name.removeprefix("attn.in_proj_")
        parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
        return {f"{layer}.self_attn.{part}.{of_all}": each.contiguous() for part, each in parts}
    return {f"{layer}.{_BLOCK[name]}": value}


def _encoder(name: str, found: Tensors, prefix: str, width: int) -> Encoder:
    if width % HEADS:
        raise DataError(f"{name}: the width of its encoders must be a multiple of {HEADS} heads, got {width}")
    blocks = rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\..+"
    numbers = [int(match[1]) for match in (re.fullmatch(blocks, key) for key in found) if match]
    layers = max(numbers, default=0) + 1
    if layers > MAX_LAYERS or layers != DEPTHS.get(width, layers):
        wanted = DEPTHS.get(width, f"at most {MAX_LAYERS}")
        raise DataError(
            f"{name}: {prefix}transformer must have {wanted} layers at width {width}, got {layers}"
        )
    key = f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"
    return Encoder(width=width, mlp_width=shape_at(name, OWNER, found, key, 2)[0], layers=layers)


def _block_shapes(encoder: Encoder) -> dict[str, tuple[int, ...]]:
    width = encoder.width
    mlp = encoder.mlp_width
    return {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (mlp, width),
        "mlp.c_fc.bias": (mlp,),
        "mlp.c_proj.weight": (width, mlp),
        "mlp.c_proj.bias": (width,),
    }


def _encoder_config(encoder: Encoder) -> dict[str, int | float | str]:
    return {
        "hidden_size": encoder.width,
        "intermediate_size": encoder.mlp_width,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": HEADS,
        "hidden_act": ACTIVATION,
        "layer_norm_eps": EPS,
    }
