"""A random U-Net of the real class, small enough for a step in milliseconds."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

TEXT_WIDTH = 32


def tiny_unet() -> UNet2DConditionModel:
    """4 x 8 x 8 latents, text embeddings of width 32; the same weights at every call."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,  # with one channel a group the timestep would be normalized away
        attention_head_dim=8,
    )
