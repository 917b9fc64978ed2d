"""The shapes world's scorers on tensors: the same formulas as scorers.py, with gradients by the pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dde_core.errors import DataError
from dde_core.shapes.scenes import SIZE_PX, Scene, parse
from dde_core.shapes.scorers import (
    FIDELITY_MSE,
    SOFTMAX_MSE,
    match_of_scenes,
    rendered_scenes,
    taste_of_scenes,
)

_OF_SCENES: dict[str, Callable[[Scene], np.ndarray]] = {"match": match_of_scenes, "taste": taste_of_scenes}


def differentiable(
    name: str, images: Float[Tensor, "n 3 height width"], captions: Sequence[str]
) -> Float[Tensor, " n"]:
    """Scores of images with values in 0..1 against n captions, in float64.

    Raises DataError for images of another size, and for a caption outside the world's grammar.
    """
    if tuple(images.shape) != (len(captions), 3, SIZE_PX, SIZE_PX):
        raise DataError(
            f"images must be [{len(captions)}, 3, {SIZE_PX}, {SIZE_PX}], got {list(images.shape)}"
        )
    flat = images.double().permute(0, 2, 3, 1).flatten(1).clamp(0, 1)
    scenes, norms = (torch.from_numpy(each).to(flat.device) for each in rendered_scenes())
    mse = (flat.square().sum(1, keepdim=True) - 2 * flat @ scenes.T + norms).clamp(min=0) / flat.shape[1]
    nearest = mse.min(dim=1).values
    if name == "fidelity":
        return torch.exp(-nearest / FIDELITY_MSE)
    probability = torch.softmax(-mse / SOFTMAX_MSE, dim=1)
    values = np.stack([_OF_SCENES[name](parse(text)) for text in captions])
    return (probability * torch.from_numpy(values).to(flat)).sum(1)
