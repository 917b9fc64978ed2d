"""The smallest diffusers folders that can be registered: every file of a real one, with all weights zero.

They are written in milliseconds, without torch. Their tensors are those of
`dde_core/models/tensor_shapes.py`, which tests/core/test_tensor_shapes.py compares with the classes of
diffusers and transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dde_core.family import CLASSES, COMPONENTS, PIPELINES, Family
from dde_core.models.tensor_shapes import shapes_of
from dde_core.models.weight_files import STEMS
from dde_core.shapes import MODEL_DIR

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "block_out_channels": [4, 8],
    "norm_num_groups": 2,
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [4, 4],
    "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
_TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": 152,
    "max_position_embeddings": 16,
    "hidden_size": 4,
    "intermediate_size": 8,
    "projection_dim": 6,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "eos_token_id": 151,
}
_SDXL: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 2,
    "projection_class_embeddings_input_dim": 6 + 6 * 2,
}


def configs_of(family: Family) -> dict[str, dict[str, Any]]:
    """The config.json of each part with weights."""
    encoders = {part: _TEXT for part in COMPONENTS[family] if part.startswith("text_encoder")}
    added = _SDXL if family == "sdxl" else {}
    unet = _UNET | added | {"cross_attention_dim": 4 * len(encoders)}
    return {"unet": unet, "vae": _VAE, **encoders}


def write_zero_folder(folder: Path, family: Family = "sd15") -> Path:
    """Write such a folder, over the files of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    for part, config in configs_of(family).items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        shapes = shapes_of(part, config, family)
        zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        save_file(zeros, folder / part / f"{STEMS[part]}.safetensors")
    for part in COMPONENTS[family]:
        if part.startswith("tokenizer"):
            shutil.copytree(MODEL_DIR / "tokenizer", folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    pipeline = next(name for name, its_family in PIPELINES.items() if its_family == family)
    classes = {part: ["diffusers", CLASSES.get(part, "DDIMScheduler")] for part in COMPONENTS[family]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **classes}))
    return folder


def change(folder: Path, path: str, **fields: Any) -> None:
    """Set fields of a JSON file of the folder; None deletes one."""
    file = folder / path
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
