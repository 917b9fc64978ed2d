"""The three ground-truth scorers of the shapes world, each 0 to 1 for one picture and its caption.

All three read one thing: the distance of a picture to every drawable scene. A softmax over it says which scene the
picture probably shows, so the scores vary smoothly between pictures.

- ``match``: how many of the attributes that the caption states are there (mean over the stated ones).
- ``taste``: the annotator's utility without noise: over the five attributes, a stated one counts if it is there, an
  unsaid one counts by liking (large, centred, high contrast).
- ``fidelity``: how near the picture is to the nearest drawable scene. Gaming taste by spoiling pictures shows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from dde_core.errors import DataError
from dde_core.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RADII_PX,
    SIZE_PX,
    Scene,
    all_scenes,
    parse,
    render,
)

NAMES = ("match", "taste", "fidelity")
ATTRIBUTES = ("shape", "colour", "size", "place", "background")

SOFTMAX_MSE = 0.0005
"""Mean squared error (pixels in 0..1) that makes a scene e times less probable."""
FIDELITY_MSE = 0.02
"""Mean squared error (pixels in 0..1) to the nearest scene at which fidelity is 1/e."""


def check(captions: Sequence[str], height: int, width: int) -> None:
    """Can pictures of this size (in pixels; 0: the model's own) be scored against these captions? Raises DataError."""
    for name, value in (("height", height), ("width", width)):
        if value not in (0, SIZE_PX):
            raise DataError(
                f"{name} must be {SIZE_PX} (or 0) for the scorers {', '.join(NAMES)}, got {value}"
            )
    for text in captions:
        parse(text)


def score(pictures: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Score uint8 pictures [n, 32, 32, 3] against n captions: {"match", "taste", "fidelity"}, each float64 [n].

    Raises DataError where sizes disagree or a caption is outside the world's grammar.
    """
    if pictures.dtype != np.uint8 or pictures.shape != (len(captions), SIZE_PX, SIZE_PX, 3):
        raise DataError(
            f"pictures must be uint8 [{len(captions)}, {SIZE_PX}, {SIZE_PX}, 3], got {pictures.dtype} {list(pictures.shape)}"
        )
    mse = _distances(pictures)
    nearest = mse.min(axis=1)
    probability = np.exp(-(mse - nearest[:, None]) / SOFTMAX_MSE)
    probability /= probability.sum(axis=1, keepdims=True)
    wanted = [parse(text) for text in captions]
    match = [p @ _match_of_scenes(scene) for p, scene in zip(probability, wanted, strict=True)]
    taste = [p @ _taste_of_scenes(scene) for p, scene in zip(probability, wanted, strict=True)]
    return {"match": np.array(match), "taste": np.array(taste), "fidelity": np.exp(-nearest / FIDELITY_MSE)}


def _distances(pictures: np.ndarray) -> np.ndarray:
    """Mean squared error of n pictures to every scene, pixels in 0..1: float64 [n, 1800]."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float64) / 255
    bank, norms = _bank()
    return np.maximum((flat**2).sum(1, keepdims=True) - 2 * flat @ bank.T + norms, 0) / flat.shape[1]


@cache
def _bank() -> tuple[np.ndarray, np.ndarray]:
    bank = (
        np.stack([render(scene) for scene in all_scenes()]).reshape(len(all_scenes()), -1).astype(np.float64)
        / 255
    )
    return bank, (bank**2).sum(axis=1)


@cache
def _values() -> dict[str, np.ndarray]:
    return {name: np.array([getattr(scene, name) for scene in all_scenes()]) for name in ATTRIBUTES}


@cache
def _match_of_scenes(wanted: Scene) -> np.ndarray:
    """Fraction of the stated attributes that each of the 1,800 scenes has."""
    return np.mean([_values()[name] == value for name, value in wanted.stated().items()], axis=0)


@cache
def _taste_of_scenes(wanted: Scene) -> np.ndarray:
    """The annotator's utility of each of the 1,800 scenes for a caption."""
    stated = wanted.stated()
    return np.mean([_values()[n] == stated[n] if n in stated else _liking()[n] for n in ATTRIBUTES], axis=0)


@cache
def _liking() -> dict[str, np.ndarray]:
    """How much the annotator likes each scene's value of an attribute that the caption leaves unsaid, 0 to 1."""
    size = {name: i / (len(RADII_PX) - 1) for i, name in enumerate(RADII_PX)}
    place = {name: float(name == "centre") for name in PLACES}
    contrast = {
        (c, b): np.linalg.norm(np.subtract(COLOURS[c], BACKGROUNDS[b])) for c in COLOURS for b in BACKGROUNDS
    }
    most = {c: max(contrast[c, b] for b in BACKGROUNDS) for c in COLOURS}
    least = {c: min(contrast[c, b] for b in BACKGROUNDS) for c in COLOURS}
    return {
        "size": np.array([size[s.size] for s in all_scenes()]),
        "place": np.array([place[s.place] for s in all_scenes()]),
        "background": np.array(
            [
                (contrast[s.colour, s.background] - least[s.colour]) / (most[s.colour] - least[s.colour])
                for s in all_scenes()
            ]
        ),
    }
