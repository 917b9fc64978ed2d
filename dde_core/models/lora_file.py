"""The file of LoRA adapters that diffusers' ``load_lora_weights`` reads from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dde_core.errors import ModelError

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"

_METADATA = "lora_adapter_metadata"
"""Where diffusers stores peft's config in the file."""


def read_lora(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors by peft's names, in order of these, and the file's peft config, None if it has none.

    Names and fields of the config begin with the model's part: ``unet.{layer}.lora_A.weight``. diffusers'
    older names (``lora.down``) are renamed one by one: diffusers itself looks at the first alone, and would
    lose layers of a file with both. Raises ModelError for a file that is missing or damaged.
    """
    try:
        with safe_open(Path(folder) / LORA_WEIGHTS, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(_METADATA, "null"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"adapters of {str(folder)!r} cannot be loaded: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise ModelError(f"adapters of {str(folder)!r} cannot be loaded: {_METADATA} is no JSON object")
    renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(weights)
    return dict(sorted(renamed.items())), config
