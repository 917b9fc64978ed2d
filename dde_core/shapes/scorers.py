"""The three ground-truth scorers of the shapes world, each 0 to 1 for one image and its caption.

All are functions of the distances of an image to every drawable scene. A softmax over them is the probability
that the image shows each scene, so scores vary smoothly between images.

- ``match``: the fraction of the caption's stated attributes that the image shows.
- ``taste``: the annotator's utility without noise, a mean over the five attributes. A stated one counts if
  the image
  shows it, an omitted one by how much the annotator likes its value (large, centered, high contrast).
- ``fidelity``: how near the image is to the nearest drawable scene. It falls if taste is gamed by spoiling
  images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

from dde_core.errors import DataError
from dde_core.scorers.kinds import KINDS
from dde_core.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    RADII_PX,
    SIZE_PX,
    Scene,
    all_scenes,
    parse,
    render,
)

NAMES = ("match", "taste", "fidelity")
ATTRIBUTES = ("shape", "color", "size", "place", "background")

SOFTMAX_MSE = 0.0005
"""Mean squared error (pixels in 0..1) that makes a scene e times less probable."""
FIDELITY_MSE = 0.02
"""Mean squared error (pixels in 0..1) to the nearest scene at which fidelity is 1/e."""


def check(captions: Sequence[str], height: int, width: int) -> None:
    """Raises DataError if images of this size (in pixels; 0: the model's own) cannot be scored for these
    captions."""
    for name, value in (("height", height), ("width", width)):
        if value not in (0, SIZE_PX):
            raise DataError(
                f"{name} must be {SIZE_PX} (or 0) for the scorers {', '.join(NAMES)}, got {value}"
            )
    for text in captions:
        parse(text)


def score(images: np.ndarray, captions: Sequence[str]) -> dict[str, Float64[np.ndarray, " n"]]:
    """Score uint8 images [n, 32, 32, 3] against n captions: {"match", "taste", "fidelity"}.

    Raises DataError for images of another shape or type, and for a caption outside the world's grammar.
    """
    if images.dtype != np.uint8 or images.shape != (len(captions), SIZE_PX, SIZE_PX, 3):
        expected = f"uint8 [{len(captions)}, {SIZE_PX}, {SIZE_PX}, 3]"
        raise DataError(f"images must be {expected}, got {images.dtype} {list(images.shape)}")
    mse = _distances(images)
    nearest = mse.min(axis=1)
    probability = np.exp(-(mse - nearest[:, None]) / SOFTMAX_MSE)
    probability /= probability.sum(axis=1, keepdims=True)
    wanted = [parse(text) for text in captions]
    match = [p @ match_of_scenes(scene) for p, scene in zip(probability, wanted, strict=True)]
    taste = [p @ taste_of_scenes(scene) for p, scene in zip(probability, wanted, strict=True)]
    return {"match": np.array(match), "taste": np.array(taste), "fidelity": np.exp(-nearest / FIDELITY_MSE)}


class ShapesScorer:
    """One of the three as a scorer like any other (``dde_core.scorers.kinds.Scorer``)."""

    def __init__(self, name: str) -> None:
        self.kind = KINDS[name]
        self.description: dict[str, Any] = {
            "kind": name,
            "scale": self.kind.scale,
            "preprocessing": {"size_px": SIZE_PX},
            "token_limit": None,
            "dtype": "float64",
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return score(images, prompts)[self.kind.name]

    def differentiable(self, images: Any, prompts: Sequence[str]) -> Any:
        """Scores float64 [n], with gradients, of a tensor of images [n, 3, 32, 32] with values in 0..1."""
        from dde_core.shapes.gradients import differentiable  # only here: it loads torch

        return differentiable(self.kind.name, images, prompts)

    def check(self, prompts: Sequence[str], height: int, width: int) -> None:
        check(prompts, height, width)

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        return []


def _distances(images: UInt8[np.ndarray, "n 32 32 3"]) -> Float64[np.ndarray, "n scenes"]:
    """Mean squared error of each image to every scene, with pixels in 0..1."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    scenes, norms = rendered_scenes()
    squared: np.ndarray = (flat**2).sum(1, keepdims=True) - 2 * flat @ scenes.T + norms
    distances: Float64[np.ndarray, "n scenes"] = np.maximum(squared, 0) / flat.shape[1]
    return distances


@cache
def rendered_scenes() -> tuple[Float64[np.ndarray, "scenes pixels"], Float64[np.ndarray, " scenes"]]:
    """All scenes with pixels in 0..1, and their squared norms."""
    images = np.stack([render(scene) for scene in all_scenes()])
    scenes = images.reshape(len(images), -1).astype(np.float64) / 255
    return scenes, (scenes**2).sum(axis=1)


@cache
def _values() -> dict[str, np.ndarray]:
    return {name: np.array([getattr(scene, name) for scene in all_scenes()]) for name in ATTRIBUTES}


@cache
def match_of_scenes(wanted: Scene) -> np.ndarray:
    """The fraction of the stated attributes that each of the 1,800 scenes has."""
    matches = [_values()[name] == value for name, value in wanted.stated().items()]
    return np.asarray(np.mean(matches, axis=0))


@cache
def taste_of_scenes(wanted: Scene) -> np.ndarray:
    """The annotator's utility of each of the 1,800 scenes for a caption."""
    stated = wanted.stated()
    utilities = [_values()[n] == stated[n] if n in stated else _liking()[n] for n in ATTRIBUTES]
    return np.asarray(np.mean(utilities, axis=0))


@cache
def _liking() -> dict[str, np.ndarray]:
    """How much the annotator likes each scene's value of an omitted attribute, 0 to 1."""
    size = {name: i / (len(RADII_PX) - 1) for i, name in enumerate(RADII_PX)}
    place = {name: float(name == "centre") for name in PLACES}
    contrast = {
        (c, b): np.linalg.norm(np.subtract(COLORS[c], BACKGROUNDS[b])) for c in COLORS for b in BACKGROUNDS
    }
    most = {c: max(contrast[c, b] for b in BACKGROUNDS) for c in COLORS}
    least = {c: min(contrast[c, b] for b in BACKGROUNDS) for c in COLORS}
    return {
        "size": np.array([size[s.size] for s in all_scenes()]),
        "place": np.array([place[s.place] for s in all_scenes()]),
        "background": np.array(
            [
                (contrast[s.color, s.background] - least[s.color]) / (most[s.color] - least[s.color])
                for s in all_scenes()
            ]
        ),
    }
