"""Names and shapes of the tensors of a U-Net, VAE or text encoder, from its ``config.json``.

They are those of diffusers' ``UNet2DConditionModel`` and ``AutoencoderKL`` and of transformers' CLIP text
encoders for the same config: a test builds these classes and compares. Imports no torch, so the control plane
proves a folder's weights without building a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dde_core.family import Family
from dde_core.models.configs import AutoencoderFields, TextEncoderFields, UNetFields

Shapes = dict[str, tuple[int, ...]]


def shapes_of(part: str, config: Mapping[str, Any], family: Family) -> Shapes:
    """The tensors of one of the family's parts with weights. Raises ConfigError for an unusable config."""
    if part == "unet":
        return unet_shapes(UNetFields.read(config, family))
    if part == "vae":
        return autoencoder_shapes(AutoencoderFields.read(config))
    return text_encoder_shapes(TextEncoderFields.read(part, config))


class _Tensors:
    """Collects names and shapes of the tensors of layers."""

    def __init__(self) -> None:
        self.shapes: Shapes = {}

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        self._add(name, (outputs, inputs), outputs if bias else 0)

    def conv(self, name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        self._add(name, (outputs, inputs, kernel, kernel), outputs)

    def norm(self, name: str, width: int) -> None:
        self._add(name, (width,), width)

    def embedding(self, name: str, rows: int, width: int) -> None:
        self._add(name, (rows, width), 0)

    def _add(self, name: str, weight: tuple[int, ...], bias: int) -> None:
        self.shapes[f"{name}.weight"] = weight
        if bias:
            self.shapes[f"{name}.bias"] = (bias,)

    def resnet(self, name: str, inputs: int, outputs: int, time: int = 0) -> None:
        """A residual block. It takes a time embedding of this width, or none (0)."""
        self.norm(f"{name}.norm1", inputs)
        self.conv(f"{name}.conv1", inputs, outputs)
        self.norm(f"{name}.norm2", outputs)
        self.conv(f"{name}.conv2", outputs, outputs)
        if time:
            self.linear(f"{name}.time_emb_proj", time, outputs)
        if inputs != outputs:
            self.conv(f"{name}.conv_shortcut", inputs, outputs, kernel=1)

    def attention(self, name: str, width: int, context: int, *, bias: bool = False) -> None:
        """Queries from ``width`` features, keys and values from ``context`` features."""
        self.linear(f"{name}.to_q", width, width, bias=bias)
        self.linear(f"{name}.to_k", context, width, bias=bias)
        self.linear(f"{name}.to_v", context, width, bias=bias)
        self.linear(f"{name}.to_out.0", width, width)


# ---- U-Net


def unet_shapes(unet: UNetFields) -> Shapes:
    """The tensors of a UNet2DConditionModel."""
    tensors = _Tensors()
    widths = unet.widths
    tensors.conv("conv_in", unet.channels, widths[0], unet.conv_in_kernel)
    tensors.linear("time_embedding.linear_1", widths[0], unet.time_width)
    tensors.linear("time_embedding.linear_2", unet.time_width, unet.time_width)
    if unet.added_width:
        tensors.linear("add_embedding.linear_1", unet.added_width, unet.time_width)
        tensors.linear("add_embedding.linear_2", unet.time_width, unet.time_width)
    for level in range(len(widths)):
        _down_block(tensors, unet, level)
    _mid_block(tensors, unet)
    for level in range(len(widths)):
        _up_block(tensors, unet, level)
    tensors.norm("conv_norm_out", widths[0])
    tensors.conv("conv_out", widths[0], unet.channels, unet.conv_out_kernel)
    return tensors.shapes


def _down_block(tensors: _Tensors, unet: UNetFields, level: int) -> None:
    name = f"down_blocks.{level}"
    width = unet.widths[level]
    inputs = unet.widths[max(level - 1, 0)]
    for i in range(unet.layers[level]):
        tensors.resnet(f"{name}.resnets.{i}", width if i else inputs, width, unet.time_width)
        if unet.down_attends[level]:
            layers = unet.down_transformers[level][i]
            _transformer(tensors, unet, f"{name}.attentions.{i}", level, layers, unet.only_cross[level])
    if level < len(unet.widths) - 1:
        tensors.conv(f"{name}.downsamplers.0.conv", width, width)


def _mid_block(tensors: _Tensors, unet: UNetFields) -> None:
    if unet.mid_block is None:
        return
    width = unet.widths[-1]
    tensors.resnet("mid_block.resnets.0", width, width, unet.time_width)
    if unet.mid_block == "UNetMidBlock2DCrossAttn":
        last = len(unet.widths) - 1
        _transformer(tensors, unet, "mid_block.attentions.0", last, unet.mid_transformers, only_cross=False)
        tensors.resnet("mid_block.resnets.1", width, width, unet.time_width)


def _up_block(tensors: _Tensors, unet: UNetFields, block: int) -> None:
    """Block 0 has the deepest level's width. Each of its resnets also takes a skip connection."""
    name = f"up_blocks.{block}"
    level = len(unet.widths) - 1 - block
    width = unet.widths[level]
    below = unet.widths[min(level + 1, len(unet.widths) - 1)]
    above = unet.widths[max(level - 1, 0)]
    num_resnets = unet.layers[level] + 1
    for i in range(num_resnets):
        inputs = width if i else below
        skipped = above if i == num_resnets - 1 else width
        tensors.resnet(f"{name}.resnets.{i}", inputs + skipped, width, unet.time_width)
        if unet.up_attends[block]:
            layers = unet.up_transformers[block][i]
            _transformer(tensors, unet, f"{name}.attentions.{i}", level, layers, unet.only_cross[level])
    if level:
        tensors.conv(f"{name}.upsamplers.0.conv", width, width)


def _transformer(
    tensors: _Tensors, unet: UNetFields, name: str, level: int, layers: int, only_cross: bool
) -> None:
    width = unet.widths[level]
    heads = unet.heads[level]
    inner = heads * (width // heads)
    text = unet.text_widths[level]
    tensors.norm(f"{name}.norm", width)
    for projection, sizes in (("proj_in", (width, inner)), ("proj_out", (inner, width))):
        if unet.linear_projection:
            tensors.linear(f"{name}.{projection}", *sizes)
        else:
            tensors.conv(f"{name}.{projection}", *sizes, kernel=1)
    for i in range(layers):
        block = f"{name}.transformer_blocks.{i}"
        tensors.norm(f"{block}.norm1", inner)
        tensors.attention(f"{block}.attn1", inner, text if only_cross else inner)
        tensors.norm(f"{block}.norm2", inner)
        tensors.attention(f"{block}.attn2", inner, text)
        tensors.norm(f"{block}.norm3", inner)
        tensors.linear(f"{block}.ff.net.0.proj", inner, 8 * inner)
        tensors.linear(f"{block}.ff.net.2", 4 * inner, inner)


# ---- VAE


def autoencoder_shapes(vae: AutoencoderFields) -> Shapes:
    """The tensors of an AutoencoderKL."""
    tensors = _Tensors()
    widths = vae.widths
    last = len(widths) - 1
    tensors.conv("encoder.conv_in", 3, widths[0])
    for level, width in enumerate(widths):
        name = f"encoder.down_blocks.{level}"
        for i in range(vae.layers):
            tensors.resnet(f"{name}.resnets.{i}", width if i else widths[max(level - 1, 0)], width)
        if level < last:
            tensors.conv(f"{name}.downsamplers.0.conv", width, width)
    tensors.conv("decoder.conv_in", vae.channels, widths[-1])
    for block in range(len(widths)):
        name = f"decoder.up_blocks.{block}"
        width = widths[last - block]
        for i in range(vae.layers + 1):
            inputs = width if i else widths[min(last - block + 1, last)]
            tensors.resnet(f"{name}.resnets.{i}", inputs, width)
        if block < last:
            tensors.conv(f"{name}.upsamplers.0.conv", width, width)
    for side, width in (("encoder", widths[-1]), ("decoder", widths[0])):
        _autoencoder_mid_block(tensors, vae, f"{side}.mid_block")
        tensors.norm(f"{side}.conv_norm_out", width)
    tensors.conv("encoder.conv_out", widths[-1], 2 * vae.channels)
    tensors.conv("decoder.conv_out", widths[0], 3)
    if vae.quant_conv:
        tensors.conv("quant_conv", 2 * vae.channels, 2 * vae.channels, kernel=1)
    if vae.post_quant_conv:
        tensors.conv("post_quant_conv", vae.channels, vae.channels, kernel=1)
    return tensors.shapes


def _autoencoder_mid_block(tensors: _Tensors, vae: AutoencoderFields, name: str) -> None:
    width = vae.widths[-1]
    for i in range(2):
        tensors.resnet(f"{name}.resnets.{i}", width, width)
    if vae.mid_attends:
        tensors.norm(f"{name}.attentions.0.group_norm", width)
        tensors.attention(f"{name}.attentions.0", width, width, bias=True)


# ---- text encoders


def text_encoder_shapes(encoder: TextEncoderFields) -> Shapes:
    """The tensors of a CLIP text encoder, by their names without the prefix ``text_model.``."""
    tensors = _Tensors()
    width = encoder.width
    tensors.embedding("embeddings.token_embedding", encoder.vocabulary, width)
    tensors.embedding("embeddings.position_embedding", encoder.positions, width)
    for i in range(encoder.layers):
        name = f"encoder.layers.{i}"
        tensors.norm(f"{name}.layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors.linear(f"{name}.self_attn.{projection}", width, width)
        tensors.norm(f"{name}.layer_norm2", width)
        tensors.linear(f"{name}.mlp.fc1", width, encoder.mlp_width)
        tensors.linear(f"{name}.mlp.fc2", encoder.mlp_width, width)
    tensors.norm("final_layer_norm", width)
    if encoder.projected_width:
        tensors.linear("text_projection", width, encoder.projected_width, bias=False)
    return tensors.shapes
