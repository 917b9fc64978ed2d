"""The real U-Nets, VAE and noise schedule of Stable Diffusion 1.5 and SDXL, and random pairs of their shapes.

The configurations are those of their diffusers folders. Weights are random, or absent (device "meta").
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dde_core.schedule import Schedule
from dde_core.train_step import PairBatch

TOKENS = 77
LATENT_CHANNELS = 4

SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
"""Not a real model: for runs in seconds."""

UNETS = {"tiny": TINY, "sd15": SD15, "sdxl": SDXL}

SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
"""SDXL's VAE differs only in ``sample_size`` and the scale of its latents."""

POOLED_WIDTH = 1280
"""Width of SDXL's pooled text: 2816 minus 6 x 256 for sizes and crops."""

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
"""The scheduler_config.json of both models."""


def schedule(device: torch.device | str = "cpu") -> Schedule:
    """Stable Diffusion's noise schedule."""
    return Schedule.from_config(SCHEDULER).to(device)


def unet(name: str, device: torch.device | str = "meta", seed: int | None = None) -> UNet2DConditionModel:
    """A float32 U-Net in evaluation mode. With a seed its weights are random, without one uninitialized."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**UNETS[name]).eval()
    model = model.to_empty(device=device)
    if seed is not None:
        fill(model, torch.randn(2**22, device=device, generator=torch.Generator(device).manual_seed(seed)))
    return model


@torch.no_grad()
def fill(model: torch.nn.Module, normal: Tensor) -> None:
    """Set weights of variance 1 / inputs, biases of 0 and normalizations without effect.

    Weights repeat the table ``normal``: drawing a billion numbers takes minutes.
    """
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = normal.repeat(-(-parameter.numel() // len(normal)))[: parameter.numel()]
            parameter.copy_(values.view_as(parameter) * parameter[0].numel() ** -0.5)
        else:
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)


def conditioning(
    name: str, b: int, device: torch.device | str, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Random text embeddings of b samples; for SDXL also pooled text and time ids."""
    draw = {"device": device, "generator": generator}
    given = {"encoder_hidden_states": torch.randn(b, TOKENS, UNETS[name]["cross_attention_dim"], **draw)}
    if name == "sdxl":
        given["text_embeds"] = torch.randn(b, POOLED_WIDTH, **draw)
        given["time_ids"] = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0], device=device).repeat(
            b, 1
        )
    return given


def random_pairs(
    name: str,
    b: int,
    device: torch.device | str = "meta",
    *,
    size: int = 0,
    seed: int | None = None,
    losers: bool = True,
) -> PairBatch:
    """b random pairs with ``size`` x ``size`` latents (0: the model's own), t spread over 1..1000."""
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    size = size or UNETS[name]["sample_size"]
    given = conditioning(name, b, device, generator)
    sides: dict[str, Any] = {}
    for side in "wl"[: 1 + losers]:
        for kind in ("latents", "noise"):
            sides[f"{kind}_{side}"] = torch.randn(
                b, LATENT_CHANNELS, size, size, device=device, generator=generator
            )
        sides[f"conditioning_{side}"] = given
    t = (
        torch.linspace(1, 1000, b, device=device).round().long()
        if b > 1
        else torch.full((b,), 500, device=device)
    )
    pair_ids = tuple(f"pair-{i}" for i in range(b))
    return PairBatch(pair_ids=pair_ids, t=t, share=torch.ones(b, device=device), **sides)
