"""The tensors that a config asks for are those of the classes that the libraries build from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dde_core.errors import ConfigError
from dde_core.models.tensor_shapes import Shapes, shapes_of
from dde_core.models.weight_files import library_name
from tests.support.unet_configs import SD15, SD15_VAE, SDXL, TINY
from tests.support.zero_folder import configs_of

CROSS_DOWN = "CrossAttnDownBlock2D"
CROSS_UP = "CrossAttnUpBlock2D"

UNETS: dict[str, dict[str, Any]] = {
    "every default": {},
    "Stable Diffusion 1.5": SD15,
    "Stable Diffusion 2.1": SD15
    | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "SDXL": SDXL,
    "tiny": TINY,
    "other arithmetic, same tensors": TINY | {"dropout": 0.1, "norm_eps": 1e-6, "upcast_attention": None},
    "without a middle": SD15 | {"mid_block_type": None, "layers_per_block": 1},
    "a middle without attention": SD15 | {"mid_block_type": "UNetMidBlock2D"},
    "layers of each block": SD15 | {"layers_per_block": [1, 3, 2, 1]},
    "layers and widths of each block": SD15
    | {"layers_per_block": [1, 2, 3, 1], "cross_attention_dim": [768, 512, 768, 640]},
    "transformers of each layer": SDXL
    | {
        "transformer_layers_per_block": [1, [2, 1], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 7], [2, 1, 1], 1],
    },
    "cross attention alone": SD15 | {"only_cross_attention": True},
    "cross attention alone in some blocks": SD15 | {"only_cross_attention": [True, False, True, False]},
    "other kernels and times": TINY
    | {
        "conv_in_kernel": 5,
        "conv_out_kernel": 1,
        "time_embedding_dim": 48,
        "in_channels": 16,
        "out_channels": 16,
    },
    "heads that do not divide the width": TINY | {"attention_head_dim": 5},
    "one level": TINY
    | {"block_out_channels": [32], "down_block_types": [CROSS_DOWN], "up_block_types": [CROSS_UP]},
    "the zero folder's": configs_of("sdxl")["unet"],
}

VAES: dict[str, dict[str, Any]] = {
    "every default": {},
    "Stable Diffusion": SD15_VAE,
    "without attention": SD15_VAE | {"mid_block_add_attention": False},
    "without convolutions of the latents": SD15_VAE | {"use_quant_conv": False, "use_post_quant_conv": False},
    "16 channels, one layer": SD15_VAE | {"latent_channels": 16, "layers_per_block": 1},
    "the zero folder's": configs_of("sd15")["vae"],
}

TEXT: dict[str, dict[str, Any]] = {
    "every default": {},
    "OpenCLIP bigG": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "the zero folder's": configs_of("sd15")["text_encoder"],
}


def built(kind: Any, config: dict[str, Any]) -> Shapes:
    """The tensors of a class, built without memory."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    with torch.device("meta"):
        model = (
            kind(CLIPTextConfig(**known))
            if issubclass(kind, CLIPTextModel | CLIPTextModelWithProjection)
            else kind(**known)
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", UNETS)
def test_a_unets_tensors_are_those_of_diffusers_class(name: str):
    config = UNETS[name]
    family = "sdxl" if config.get("addition_embed_type") else "sd15"
    assert shapes_of("unet", config, family) == built(UNet2DConditionModel, config)


@pytest.mark.parametrize("name", VAES)
def test_a_vaes_tensors_are_those_of_diffusers_class(name: str):
    assert shapes_of("vae", VAES[name], "sd15") == built(AutoencoderKL, VAES[name])


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize(
    ("part", "kind"), [("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)]
)
def test_a_text_encoders_tensors_are_those_of_transformers_class(name: str, part: str, kind: type):
    theirs = {library_name(part, tensor): shape for tensor, shape in built(kind, TEXT[name]).items()}
    assert shapes_of(part, TEXT[name], "sdxl") == theirs


@pytest.mark.parametrize(
    ("part", "config", "field", "value"),
    [
        ("unet", {"time_cond_proj_dim": 256}, "unet.time_cond_proj_dim", 256),
        ("unet", {"class_embed_type": "timestep"}, "unet.class_embed_type", "timestep"),
        ("unet", {"num_class_embeds": 1000}, "unet.num_class_embeds", 1000),
        ("unet", {"encoder_hid_dim_type": "text_proj"}, "unet.encoder_hid_dim_type", "text_proj"),
        ("unet", {"dual_cross_attention": True}, "unet.dual_cross_attention", True),
        ("unet", {"attention_type": "gated"}, "unet.attention_type", "gated"),
        ("unet", {"time_embedding_type": "fourier"}, "unet.time_embedding_type", "fourier"),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "unet.mid_block_type", None),
        ("unet", {"down_block_types": ["KDownBlock2D"] * 4}, "unet.down_block_types", None),
        ("unet", {"block_out_channels": "320"}, "unet.block_out_channels", "320"),
        ("unet", {"block_out_channels": [320, 0, 1, 1]}, "unet.block_out_channels", [320, 0, 1, 1]),
        ("unet", {"layers_per_block": 10**9}, "unet.layers_per_block", 10**9),
        ("unet", {"layers_per_block": [1, 2]}, "unet.layers_per_block", [1, 2]),
        ("unet", {"transformer_layers_per_block": 10**9}, "unet.transformer_layers_per_block", 10**9),
        ("unet", {"norm_num_groups": 33}, "unet.norm_num_groups", 33),
        ("unet", {"norm_num_groups": None}, "unet.norm_num_groups", None),
        ("unet", {"only_cross_attention": [True]}, "unet.only_cross_attention", [True]),
        ("unet", {"sample_size": [1, 2, 3]}, "unet.sample_size", [1, 2, 3]),
        ("unet", {"act_fn": "tanh"}, "unet.act_fn", "tanh"),
        ("unet", {"quantization_config": {"bits": 4}}, "unet.quantization_config", {"bits": 4}),
        ("vae", {"latents_mean": [0.0]}, "vae.latents_mean", [0.0]),
        ("vae", {"latents_std": [1.0]}, "vae.latents_std", [1.0]),
        ("vae", {"shift_factor": 0.1}, "vae.shift_factor", 0.1),
        ("vae", {"scaling_factor": 0}, "vae.scaling_factor", 0),
        ("vae", {"scaling_factor": 10**30}, "vae.scaling_factor", 10**30),
        ("vae", {"sample_size": "512"}, "vae.sample_size", "512"),
        ("unet", {"dropout": []}, "unet.dropout", []),
        ("unet", {"dropout": None}, "unet.dropout", None),
        ("text_encoder", {"layer_norm_eps": 1}, "text_encoder.layer_norm_eps", 1),
        ("text_encoder", {"dtype": "int4"}, "text_encoder.dtype", "int4"),
        ("vae", {"scaling_factor": "0.18"}, "vae.scaling_factor", "0.18"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae._class_name", "AutoencoderTiny"),
        ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"]}, "vae.down_block_types", None),
        ("text_encoder", {"model_type": "bert"}, "text_encoder.model_type", "bert"),
        ("text_encoder", {"num_attention_heads": 7}, "text_encoder.num_attention_heads", 7),
        ("text_encoder_2", {"projection_dim": None}, "text_encoder_2.projection_dim", None),
        ("text_encoder", {"num_hidden_layers": 10**9}, "text_encoder.num_hidden_layers", 10**9),
    ],
)
def test_a_config_that_asks_for_what_is_not_done_is_refused_by_field_and_value(part, config, field, value):
    with pytest.raises(ConfigError) as refusal:
        shapes_of(part, config, "sd15")
    assert refusal.value.field == field
    assert value is None or refusal.value.value == value


def test_a_long_value_is_shortened_in_the_error():
    with pytest.raises(ConfigError) as refusal:
        shapes_of("vae", {"latents_mean": [0.0] * 100_000}, "sd15")
    assert len(str(refusal.value)) < 500
