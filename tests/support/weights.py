"""The weights of a trained model, and the distance of two updates of the shapes model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dde_core.shapes import MODEL_DIR
from services.stages.specs import TrainSpec
from services.storage import files

WEIGHTS = "diffusion_pytorch_model.safetensors"
Weights = dict[str, np.ndarray]


def base_weights() -> Weights:
    """The weights of the shapes model, before training."""
    return load_file(MODEL_DIR / "unet" / WEIGHTS)


def weights_of(spec: TrainSpec) -> Weights:
    """The weights of the model that a run has trained."""
    return load_file(Path(files.resolve(spec.output)[1]) / "unet" / WEIGHTS)


def update_distance(a: Weights, b: Weights, start: Weights) -> float:
    """Relative L2 distance of the updates ``a - start`` and ``b - start``."""
    apart = sum(float(((a[n].astype(np.float64) - b[n]) ** 2).sum()) for n in start)
    length = sum(float(((a[n].astype(np.float64) - start[n]) ** 2).sum()) for n in start)
    assert length > 0
    return (apart / length) ** 0.5


def same_bits(a: Weights, b: Weights) -> bool:
    """Whether all weights are equal, to the bit."""
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
