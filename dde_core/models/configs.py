"""What the ``config.json`` of each network of a model folder may ask for. Imports no torch.

A field that asks for arithmetic that sampling and training do not do is refused by name: ignoring it would
give other images without a word. Every error is a ConfigError that names field and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from dde_core.errors import ConfigError
from dde_core.family import Family
from dde_core.models.json_files import MAX_LAYERS, Fields

ADDED_EMBEDDING: dict[Family, str | None] = {"sd15": None, "sdxl": "text_time"}
NUM_TIME_IDS = 6
"""Numbers of SDXL's size conditioning: height and width of the original, crop and target."""

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
TEXT_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_fast", "relu", "silu")
LEGACY_EOS = 2
"""The value of old configs; transformers then pools at the greatest token id."""


@dataclass(frozen=True, kw_only=True)
class UNetFields:
    """What shapes a UNet2DConditionModel. Lists have one entry for each level, the widest image first.

    ``down_transformers`` and ``up_transformers`` hold the depths of the transformers beside each resnet of a
    block; up blocks start at the deepest level. ``added_width`` is the width of SDXL's pooled text and sizes.
    """

    channels: int
    widths: list[int]
    layers: list[int]
    heads: list[int]
    text_widths: list[int]
    time_width: int
    added_width: int
    size_embedding: int
    conv_in_kernel: int
    conv_out_kernel: int
    down_attends: list[bool]
    up_attends: list[bool]
    down_transformers: list[list[int]]
    up_transformers: list[list[int]]
    mid_block: str | None
    mid_transformers: int
    only_cross: list[bool]
    linear_projection: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], family: Family) -> UNetFields:
        """Raises ConfigError for a config that does not fit the pipeline's family or is not supported."""
        fields = Fields("unet", config)
        check_unet(config, family)
        widths = fields.wholes("block_out_channels", (320, 640, 1280, 1280))
        levels = len(widths)
        groups = fields.whole("norm_num_groups", 32)
        if any(width % groups for width in widths):
            raise fields.refusal("norm_num_groups", f"must divide every one of block_out_channels {widths}")
        down = _blocks(fields, "down_block_types", "Down", levels)
        up = _blocks(fields, "up_block_types", "Up", levels)
        layers = fields.each_level("layers_per_block", 2, levels, MAX_LAYERS)
        transformers = fields.get("transformer_layers_per_block", 1)
        if isinstance(transformers, int):
            transformers = [transformers] * levels
        reverse = fields.get("reverse_transformer_layers_per_block")
        if reverse is None and isinstance(transformers, list | tuple):
            reverse = transformers[::-1]
        depths = _depths(fields, "transformer_layers_per_block", transformers, layers)
        added_width = 0
        size_embedding = 0
        if ADDED_EMBEDDING[family]:
            added_width = fields.whole("projection_class_embeddings_input_dim", None)
            size_embedding = fields.whole("addition_time_embed_dim", None)
        return cls(
            channels=fields.whole("in_channels", 4),
            widths=widths,
            layers=layers,
            heads=fields.each_level("attention_head_dim", 8, levels),
            text_widths=fields.each_level("cross_attention_dim", 1280, levels),
            time_width=_or(fields, "time_embedding_dim", 4 * widths[0]),
            added_width=added_width,
            size_embedding=size_embedding,
            conv_in_kernel=fields.whole("conv_in_kernel", 3),
            conv_out_kernel=fields.whole("conv_out_kernel", 3),
            down_attends=down,
            up_attends=up,
            down_transformers=depths,
            up_transformers=_depths(
                fields,
                "reverse_transformer_layers_per_block",
                reverse,
                [count + 1 for count in reversed(layers)],
            ),
            mid_block=fields.one_of("mid_block_type", MID_BLOCKS[0], MID_BLOCKS),
            mid_transformers=depths[-1][0],
            only_cross=_flags(fields, "only_cross_attention", levels),
            linear_projection=fields.flag("use_linear_projection", False),
        )


MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

_PIPELINE_INPUTS = {
    "time_cond_proj_dim": "an embedding of the guidance scale (latent consistency models)",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "encoder_hid_dim_type": "another projection of text or images",
    "encoder_hid_dim": "another projection of text or images",
    "num_attention_heads": "a meaning that diffusers itself refuses",
    "quantization_config": "quantized weights",
}
"""Fields that ask for an input or a form of weights that is not given, and what that would be."""


def check_unet(config: Mapping[str, Any], family: Family) -> None:
    """Raises ConfigError for a U-Net's ``config.json`` that does not fit the pipeline's family."""
    fields = Fields("unet", config)
    fields.must_be("_class_name", "UNet2DConditionModel")
    channels = fields.get("in_channels", 4)
    out_channels = fields.get("out_channels", 4)
    if channels != out_channels:
        raise fields.refusal("in_channels", f"must be out_channels = {out_channels} (no inpainting)")
    embedding = ADDED_EMBEDDING[family]
    if fields.get("addition_embed_type") != embedding:
        raise fields.refusal("addition_embed_type", f"must be {embedding!r} in a {family} model")
    for name, meaning in _PIPELINE_INPUTS.items():
        fields.must_be(name, None, f": {meaning}")
    for name in ("dual_cross_attention", "class_embeddings_concat"):
        fields.must_be(name, False)
    fields.must_be("attention_type", "default")
    fields.must_be("resnet_time_scale_shift", "default")
    fields.must_be("time_embedding_type", "positional")
    fields.one_of("act_fn", "silu", ACTIVATIONS)
    for name in ("time_embedding_act_fn", "timestep_post_act"):
        fields.one_of(name, None, (None, *ACTIVATIONS))
    for name, default in (("norm_eps", 1e-5), ("mid_block_scale_factor", 1)):
        fields.number(name, default, above=0, below=1000)
    if fields.get("dropout", 0) != 0:
        fields.number("dropout", 0, above=0, below=1)
    fields.one_of("freq_shift", 0, (0, 1))
    for name, is_default in (
        ("center_input_sample", False),
        ("flip_sin_to_cos", True),
        ("upcast_attention", False),
    ):
        fields.flag(name, is_default)
    fields.one_of("downsample_padding", 1, (0, 1))
    sample_size(config, family)


def sample_size(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """Height and width of the U-Net's latents: ``sample_size``, a number or a list of both.

    Where the field is absent, they are those of the family's first model, as in diffusers' pipelines.
    """
    fields = Fields("unet", config)
    value = fields.get("sample_size")
    if value is None:
        value = {"sd15": 64, "sdxl": 128}[family]
    height, width = Fields("unet", {"sample_size": value}).each_level("sample_size", None, 2)
    return height, width


def _blocks(fields: Fields, name: str, way: str, levels: int) -> list[bool]:
    """Whether each block attends to the text."""
    plain = f"{way}Block2D"
    attending = f"CrossAttn{way}Block2D"
    down = way == "Down"
    default = (attending,) * 3 + (plain,) if down else (plain,) + (attending,) * 3
    kinds = fields.names(name, default, (plain, attending), levels)
    return [kind == attending for kind in kinds]


def _depths(fields: Fields, name: str, value: Any, resnets: list[int]) -> list[list[int]]:
    """Depths of the transformers beside each resnet, from one number for a block or a list."""
    reason = f"must be a whole number up to {MAX_LAYERS} for each block, or one for each of its layers"
    if not isinstance(value, list | tuple) or len(value) != len(resnets):
        raise fields.refusal(name, reason)
    depths = []
    for block, count in zip(value, resnets, strict=True):
        each = list(block) if isinstance(block, list | tuple) else [block] * count
        if len(each) < count or not all(
            isinstance(depth, int) and 0 <= depth <= MAX_LAYERS for depth in each
        ):
            raise fields.refusal(name, reason)
        depths.append(each)
    return depths


def _flags(fields: Fields, name: str, levels: int) -> list[bool]:
    value = fields.get(name, False)
    flags = [value] * levels if isinstance(value, bool) else value
    if not isinstance(flags, list | tuple) or len(flags) != levels:
        raise fields.refusal(name, f"must be true, false or a list of {levels} of them")
    if not all(isinstance(flag, bool) for flag in flags):
        raise fields.refusal(name, f"must be true, false or a list of {levels} of them")
    return list(flags)


def _or(fields: Fields, name: str, default: int) -> int:
    """A whole number, or the default where the field is null."""
    return default if fields.get(name) is None else fields.whole(name, default)


@dataclass(frozen=True, kw_only=True)
class AutoencoderFields:
    """What shapes an AutoencoderKL."""

    channels: int
    widths: list[int]
    layers: int
    mid_attends: bool
    quant_conv: bool
    post_quant_conv: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> AutoencoderFields:
        """Raises ConfigError for a config that is invalid or not supported."""
        fields = Fields("vae", config)
        fields.must_be("_class_name", "AutoencoderKL")
        for name in ("in_channels", "out_channels"):
            fields.must_be(name, 3)
        for name in ("latents_mean", "latents_std", "shift_factor"):
            fields.must_be(name, None, ": latents are scaled by scaling_factor alone")
        fields.must_be("quantization_config", None, f": {_PIPELINE_INPUTS['quantization_config']}")
        fields.number("scaling_factor", 0.18215, above=0, below=1000)
        fields.each_level("sample_size", 32, 2)
        fields.one_of("act_fn", "silu", ACTIVATIONS)
        widths = fields.wholes("block_out_channels", (64,))
        groups = fields.whole("norm_num_groups", 32)
        if any(width % groups for width in widths):
            raise fields.refusal("norm_num_groups", f"must divide every one of block_out_channels {widths}")
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            fields.names(name, (kind,), (kind,), len(widths))
        return cls(
            channels=fields.whole("latent_channels", 4),
            widths=widths,
            layers=fields.whole("layers_per_block", 1, most=MAX_LAYERS),
            mid_attends=fields.flag("mid_block_add_attention", True),
            quant_conv=fields.flag("use_quant_conv", True),
            post_quant_conv=fields.flag("use_post_quant_conv", True),
        )


_TEXT_TYPES: dict[str, tuple[type, ...]] = {
    "layer_norm_eps": (float,),
    "initializer_range": (float,),
    "initializer_factor": (float,),
    "attention_dropout": (int, float),
    "bos_token_id": (int, NoneType),
    "pad_token_id": (int, NoneType),
    "projection_dim": (int, NoneType),
}
"""Types that transformers demands of fields that shape nothing."""


@dataclass(frozen=True, kw_only=True)
class TextEncoderFields:
    """What shapes a CLIP text encoder. ``projected_width`` is 0 for the encoder without a projection.

    ``end_id`` is the token at which text is pooled; None where it is not, or at the greatest id.
    """

    vocabulary: int
    positions: int
    width: int
    mlp_width: int
    layers: int
    projected_width: int
    end_id: int | None

    @classmethod
    def read(cls, part: str, config: Mapping[str, Any]) -> TextEncoderFields:
        """Raises ConfigError for a config that is invalid or of another kind of encoder."""
        fields = Fields(part, config)
        fields.must_be("model_type", "clip_text_model")
        fields.must_be("quantization_config", None, f": {_PIPELINE_INPUTS['quantization_config']}")
        fields.one_of("hidden_act", "quick_gelu", TEXT_ACTIVATIONS)
        for name in ("dtype", "torch_dtype"):
            fields.one_of(name, None, (None, "float16", "bfloat16", "float32", "float64"))
        fields.number("layer_norm_eps", 1e-5, above=0)
        for name, kinds in _TEXT_TYPES.items():
            value = fields.get(name)
            if name in config and (isinstance(value, bool) or not isinstance(value, kinds)):
                names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
                raise fields.refusal(name, f"must be of type {names}")
        width = fields.whole("hidden_size", 512)
        if width % fields.whole("num_attention_heads", 8):
            raise fields.refusal("num_attention_heads", f"must divide hidden_size = {width}")
        is_pooled = part == "text_encoder_2"
        end_id = fields.whole("eos_token_id", 49407, least=0)
        return cls(
            vocabulary=fields.whole("vocab_size", 49408),
            positions=fields.whole("max_position_embeddings", 77),
            width=width,
            mlp_width=fields.whole("intermediate_size", 2048),
            layers=fields.whole("num_hidden_layers", 12, most=MAX_LAYERS),
            projected_width=fields.whole("projection_dim", 512) if is_pooled else 0,
            end_id=end_id if is_pooled and end_id != LEGACY_EOS else None,
        )


def check_fit(unet: UNetFields, vae: AutoencoderFields, encoders: list[TextEncoderFields]) -> None:
    """Raises ConfigError unless the U-Net takes what VAE and text encoders give."""
    if unet.channels != vae.channels:
        reason = f"must be the VAE's latent_channels = {vae.channels}"
        raise ConfigError("unet.in_channels", unet.channels, reason)
    width = sum(encoder.width for encoder in encoders)
    if set(unet.text_widths) != {width}:
        reason = f"must be the text encoders' hidden_size, {width} in all"
        raise ConfigError("unet.cross_attention_dim", unet.text_widths, reason)
    if unet.added_width:
        added = encoders[-1].projected_width + NUM_TIME_IDS * unet.size_embedding
        if unet.added_width != added:
            reason = f"must be {added}: text_encoder_2's projection_dim and {NUM_TIME_IDS} sizes"
            raise ConfigError("unet.projection_class_embeddings_input_dim", unet.added_width, reason)
