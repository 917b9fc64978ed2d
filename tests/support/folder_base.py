"""A base model of real files that draws one request at a time (``services.serving.contract.Base``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from dde_core.generation import TextToImage
from dde_core.models.folder import LORA_WEIGHTS, ModelFolder, copy_weights


class FolderBase:
    """A folder's model, and one more with each adapter merged in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapters: dict[str, FolderAdapter] = {}
        self.is_closed = False
        self.model = self
        self.draw = TextToImage(ModelFolder(folder))
        parts = [self.draw._unet, self.draw._vae, *self.draw._text_encoders.encoders]
        for part in parts:
            copy_weights(part)
        self.num_bytes = sum(_bytes(part) for part in parts)

    def load_adapter(self, key: str, folder: Path) -> FolderAdapter:
        assert not self.is_closed
        assert key not in self.adapters
        self.adapters[key] = FolderAdapter(self, folder)
        return self.adapters[key]

    def unload_adapter(self, key: str) -> None:
        assert not self.is_closed
        del self.adapters[key]

    def close(self) -> None:
        assert not self.is_closed
        assert not self.adapters
        self.is_closed = True


class FolderAdapter:
    """A base with an adapter. ``num_bytes`` are those of the adapter's tensors as float32."""

    def __init__(self, base: FolderBase, folder: Path) -> None:
        self.base = base
        self.folder = folder
        self.draw = TextToImage(ModelFolder(base.folder, folder))
        with safe_open(folder / LORA_WEIGHTS, framework="np") as file:
            self.num_bytes = sum(4 * file.get_tensor(name).size for name in file.keys())  # noqa: SIM118


def _bytes(part: nn.Module) -> int:
    tensors: list[Any] = [*part.parameters(), *part.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
