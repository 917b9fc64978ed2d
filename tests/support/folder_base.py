"""A base model of real files that remembers what was done to it, and images of it and of its adapters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dde_core.config import SampleConfig
from dde_core.engine.model import BaseModel, Model, to_pixels
from dde_core.engine.sample import start
from dde_core.engine.turn import advance
from dde_core.models.folder import ModelFolder

SAMPLE = SampleConfig(steps=2)


class FolderBase(BaseModel):
    """``adapters`` has the folder of each loaded adapter, by its key."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ModelFolder(folder))
        self.folder = folder
        self.adapters: dict[str, Path] = {}
        self.is_closed = False

    def load_adapter(self, key: str, folder: Path) -> Model:
        assert not self.is_closed
        model = super().load_adapter(key, folder)
        self.adapters[key] = folder
        return model

    def unload_adapter(self, key: str) -> None:
        assert not self.is_closed
        super().unload_adapter(key)
        del self.adapters[key]

    def close(self) -> None:
        assert not self.is_closed
        assert not self.adapters, "parts go before what they are in"
        super().close()
        self.is_closed = True


def drawn(model: Model) -> np.ndarray:
    """An image, uint8 [1, h, w, 3]."""
    base = model.base
    encoded = base.encode(["a red circle", None], base.height_px, base.width_px)
    cond, uncond = ({name: row[i : i + 1] for name, row in encoded.items()} for i in range(2))
    sample = start(base, 3, SAMPLE, cond, uncond, model.adapter)
    while not sample.is_finished:
        advance(base, [sample])
    return to_pixels(base.decode(sample.latents))
