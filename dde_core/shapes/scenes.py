"""The shapes world: scenes of one shape on a plain ground, the captions that describe them, and their renderer.

A scene has five attributes. A caption always states colour and shape and may leave size, place and background unsaid,
so there is room for taste. ``parse`` inverts ``caption``. Everything here is numpy and deterministic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from itertools import product

import numpy as np

from dde_core.errors import DataError

SIZE_PX = 32
"""Pictures are 32 x 32 RGB."""

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 92, 224),
    "yellow": (246, 208, 40),
    "purple": (138, 56, 190),
    "orange": (244, 128, 24),
}
RADII_PX = {"small": 3.6, "medium": 6.0, "large": 9.0}
PLACES = {
    "left": (9.0, 16.0),
    "right": (23.0, 16.0),
    "top": (16.0, 9.0),
    "bottom": (16.0, 23.0),
    "centre": (16.0, 16.0),
}
BACKGROUNDS = {
    "black": (14, 14, 18),
    "white": (246, 246, 244),
    "grey": (128, 130, 134),
    "navy": (16, 30, 92),
    "pink": (248, 172, 196),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One drawable scene, or (with "" for what is left unsaid) what a caption states."""

    shape: str
    colour: str
    size: str = ""
    place: str = ""
    background: str = ""

    def stated(self) -> dict[str, str]:
        """The attributes that are said, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every complete scene, in a fixed order (1,800 of them)."""
    return tuple(
        Scene(shape=s, colour=c, size=r, place=p, background=b)
        for s, c, r, p, b in product(SHAPES, COLOURS, RADII_PX, PLACES, BACKGROUNDS)
    )


@cache
def all_captions() -> tuple[str, ...]:
    """Every caption of the world, in a fixed order (3,456 of them)."""
    parts = product(SHAPES, COLOURS, ("", *RADII_PX), ("", *PLACES), ("", *BACKGROUNDS))
    return tuple(caption(Scene(shape=s, colour=c, size=r, place=p, background=b)) for s, c, r, p, b in parts)


def caption(scene: Scene) -> str:
    """The sentence for what a scene states: "a small red circle at the left on a navy background"."""
    words = [scene.size, scene.colour, scene.shape]
    if scene.place:
        words += ["at the", scene.place]
    if scene.background:
        words += ["on a", scene.background, "background"]
    text = " ".join(word for word in words if word)
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


_CAPTION = re.compile(
    rf"an? (?:(?P<size>{'|'.join(RADII_PX)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: at the (?P<place>{'|'.join(PLACES)}))?(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def parse(text: str) -> Scene:
    """What a caption states. Raises DataError for a sentence outside the world's grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise DataError(
            f"caption {text!r} is not a sentence of the shapes world, such as {all_captions()[-1]!r}"
        )
    return Scene(**match.groupdict(default=""))


def leave_unsaid(scene: Scene, rng: np.random.Generator, probability: float = 0.5) -> Scene:
    """Drop size, place and background from a scene, each with ``probability``."""
    keep = {
        n: getattr(scene, n)
        for n, u in zip(("size", "place", "background"), rng.random(3), strict=True)
        if u >= probability
    }
    return Scene(shape=scene.shape, colour=scene.colour, **keep)


def render(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draw a complete scene as uint8 [32, 32, 3]. With ``rng``, place (0.6 px) and radius (4%) vary a little."""
    dx, dy, dr = rng.uniform(-1, 1, 3) if rng is not None else (0.0, 0.0, 0.0)
    x0, y0 = PLACES[scene.place]
    radius = RADII_PX[scene.size] * (1 + 0.04 * dr)
    axis = np.arange(SIZE_PX) + 0.5
    distance = _signed_distance(
        scene.shape, axis[None, :] - x0 - 0.6 * dx, axis[:, None] - y0 - 0.6 * dy, radius
    )
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    shape, ground = np.asarray(COLOURS[scene.colour], float), np.asarray(BACKGROUNDS[scene.background], float)
    picture = inside * shape + (1 - inside) * ground
    return np.round(picture).astype(np.uint8)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline of a shape (negative inside)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "cross":
        arm, reach = 0.32 * radius, 1.05 * radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - reach)
        return np.minimum(upright, np.maximum(np.abs(x) - reach, np.abs(y) - arm))
    slope = np.hypot(2.0, 1.0)  # triangle: apex up, as wide as it is high
    return np.maximum(y - 0.9 * radius, (2.0 * np.abs(x) - y - 1.1 * radius) / slope)
