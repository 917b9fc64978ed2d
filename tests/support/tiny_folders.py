"""Small diffusers folders of both families: the shapes model's VAE and tokenizer, all else random."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dde_core.config import LoraConfig, TrainConfig
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.models.saving import save_adapters
from dde_core.shapes import MODEL_DIR

WIDTH = 32


def sd15_folder(target: Path, prediction_type: str = "epsilon") -> Path:
    """A model like Stable Diffusion 1.5: one text encoder."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(),
        unet=_unet(cross_attention_dim=WIDTH),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.save_pretrained(target)
    return target


def sdxl_folder(target: Path, prediction_type: str = "epsilon", zeros: bool = True) -> Path:
    """A model like SDXL: two text encoders, pooled text, time ids, transformers of several layers."""
    torch.manual_seed(0)
    second = _text_config(hidden_size=48, projection_dim=24)
    unet = _unet(
        cross_attention_dim=WIDTH + 48,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(prediction_type),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(target)
    return target


FOLDERS = {"sd15": sd15_folder, "sdxl": sdxl_folder}


def _vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(MODEL_DIR / "vae", local_files_only=True)


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer", local_files_only=True)


def _scheduler(prediction_type: str) -> DDIMScheduler:
    config = json.loads((MODEL_DIR / "scheduler" / "scheduler_config.json").read_text())
    return DDIMScheduler.from_config(config | {"prediction_type": prediction_type})


def _text_config(hidden_size: int = WIDTH, **more) -> CLIPTextConfig:
    """A small encoder with the shapes model's vocabulary."""
    known = json.loads((MODEL_DIR / "text_encoder" / "config.json").read_text())
    names = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: known[name] for name in names if name in known}
    return CLIPTextConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        **shared,
        **more,
    )


def _unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        **more,
    )


def lora_folder(base: Path, target: Path, seed: int = 0) -> Path:
    """Random LoRA adapters of a base, in the file that diffusers' ``load_lora_weights`` reads."""
    training = TrainConfig(lora=LoraConfig(rank=4, alpha=8))
    policy = Policy(ModelFolder(base), training)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with tempfile.TemporaryDirectory() as weights:
        policy.write(policy.weights(), Path(weights))
        save_adapters(Path(weights), target)
    return target
