"""Model versions as files that diffusers loads unchanged. Safetensors, JSON and text: no pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dde_core.models.folder import LORA_WEIGHTS


def save_aligned(base: Path, unet: Path, target: Path) -> None:
    """A folder like ``base`` with another U-Net, for ``from_pretrained``. Taken over are the parts of model_index.json."""
    index = json.loads((base / "model_index.json").read_text())
    target.mkdir(parents=True)
    shutil.copyfile(base / "model_index.json", target / "model_index.json")
    ignored = shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
    for part in (name for name, kind in index.items() if isinstance(kind, list) and kind[0]):
        shutil.copytree(unet if part == "unet" else base / part, target / part, ignore=ignored)


def save_adapters(weights: Path, target: Path) -> None:
    """A folder of LoRA adapters, for ``load_lora_weights``."""
    target.mkdir(parents=True)
    shutil.copyfile(weights / LORA_WEIGHTS, target / LORA_WEIGHTS)
