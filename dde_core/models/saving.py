"""Write model versions that diffusers loads unchanged, as safetensors, JSON and text: no pickle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dde_core.models.lora_file import LORA_WEIGHTS
from dde_core.models.weight_files import STEMS, files_of, variants_of

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def save_aligned(base: Path, unet: Path, target: Path) -> None:
    """Write a copy of the folder ``base`` with another U-Net, for ``from_pretrained``.

    It has the parts that model_index.json names. Weights that exist as a variant only, such as fp16, get the
    names that are loaded by default. A part that is missing, or has its weights only as a pickle
    (old safety checkers), becomes null in the new index: it is not needed to use the aligned model.
    """
    index = json.loads((base / "model_index.json").read_text())
    target.mkdir(parents=True)
    for part in [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]:
        source = unet if part == "unet" else base / part
        if source.is_dir() and not _is_pickled(source):
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns(*PICKLES))
            _drop_variant(target / part)
        else:
            index[part] = [None, None]
    (target / "model_index.json").write_text(json.dumps(index, indent=2))


def _is_pickled(part: Path) -> bool:
    has_pickle = any(any(part.glob(pattern)) for pattern in PICKLES)
    return has_pickle and not any(part.glob("*.safetensors"))


def _drop_variant(part: Path) -> None:
    """Rename the only variant of a part's weights, such as ``model.fp16.safetensors``, to the default."""
    for stem in set(STEMS.values()):
        variants = variants_of(stem, [path.name for path in part.iterdir()])
        if len(variants) != 1 or "" in variants:
            continue
        files = files_of(stem, variants.pop())
        for name, default in zip(files, files_of(stem, ""), strict=True):
            if (part / name).exists():
                (part / name).rename(part / default)


def save_adapters(weights: Path, target: Path) -> None:
    """Write a folder of LoRA adapters, for ``load_lora_weights``."""
    target.mkdir(parents=True)
    shutil.copyfile(weights / LORA_WEIGHTS, target / LORA_WEIGHTS)
