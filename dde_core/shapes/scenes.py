"""The shapes world: scenes of one shape on a plain background, their captions and their renderer.

A scene has five attributes. A caption always states color and shape; it may omit size, place and background,
which leaves room for taste. ``parse`` inverts ``caption``. Everything here is numpy and deterministic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from itertools import product

import numpy as np
from jaxtyping import Float64, UInt8

from dde_core.errors import DataError

SIZE_PX = 32
"""Images are 32 x 32 RGB."""

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
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
    """One drawable scene, or the attributes that a caption states ("" for omitted ones)."""

    shape: str
    color: str
    size: str = ""
    place: str = ""
    background: str = ""

    def stated(self) -> dict[str, str]:
        """The stated attributes by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every complete scene, in a fixed order (1,800 of them)."""
    return tuple(
        Scene(shape=s, color=c, size=r, place=p, background=b)
        for s, c, r, p, b in product(SHAPES, COLORS, RADII_PX, PLACES, BACKGROUNDS)
    )


@cache
def all_captions() -> tuple[str, ...]:
    """Every caption of the world, in a fixed order (3,456 of them)."""
    parts = product(SHAPES, COLORS, ("", *RADII_PX), ("", *PLACES), ("", *BACKGROUNDS))
    return tuple(caption(Scene(shape=s, color=c, size=r, place=p, background=b)) for s, c, r, p, b in parts)


def caption(scene: Scene) -> str:
    """The caption of a scene's stated attributes: "a small red circle at the left on a navy background"."""
    words = [scene.size, scene.color, scene.shape]
    if scene.place:
        words += ["at the", scene.place]
    if scene.background:
        words += ["on a", scene.background, "background"]
    text = " ".join(word for word in words if word)
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


_CAPTION = re.compile(
    rf"an? (?:(?P<size>{'|'.join(RADII_PX)}) )?(?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: at the (?P<place>{'|'.join(PLACES)}))?"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def parse(text: str) -> Scene:
    """The attributes that a caption states. Raises DataError for a caption outside the world's grammar."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        example = all_captions()[-1]
        raise DataError(f"caption {text!r} is not a sentence of the shapes world, such as {example!r}")
    return Scene(**match.groupdict(default=""))


def omit_attributes(scene: Scene, rng: np.random.Generator, probability: float = 0.5) -> Scene:
    """Omit size, place and background of a scene, each with ``probability``."""
    size_u, place_u, background_u = rng.random(3)
    return Scene(
        shape=scene.shape,
        color=scene.color,
        size=scene.size if size_u >= probability else "",
        place=scene.place if place_u >= probability else "",
        background=scene.background if background_u >= probability else "",
    )


def render(scene: Scene, rng: np.random.Generator | None = None) -> UInt8[np.ndarray, "32 32 3"]:
    """Draw a complete scene. With ``rng``, place (by 0.6 px) and radius (by 4%) vary a little."""
    dx, dy, dr = rng.uniform(-1, 1, 3) if rng is not None else (0.0, 0.0, 0.0)
    x0, y0 = PLACES[scene.place]
    radius = RADII_PX[scene.size] * (1 + 0.04 * dr)
    axis = np.arange(SIZE_PX) + 0.5
    x = axis[None, :] - x0 - 0.6 * dx
    y = axis[:, None] - y0 - 0.6 * dy
    inside = np.clip(0.5 - _signed_distance(scene.shape, x, y, radius), 0, 1)[..., None]
    color = np.asarray(COLORS[scene.color], float)
    background = np.asarray(BACKGROUNDS[scene.background], float)
    image = inside * color + (1 - inside) * background
    pixels: UInt8[np.ndarray, "32 32 3"] = np.round(image).astype(np.uint8)
    return pixels


def _signed_distance(
    shape: str, x: Float64[np.ndarray, "1 32"], y: Float64[np.ndarray, "32 1"], radius: float
) -> Float64[np.ndarray, "32 32"]:
    """Distance in pixels to the outline of a shape (negative inside), from offsets to its center."""
    distance: np.ndarray
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    elif shape == "cross":
        arm = 0.32 * radius
        reach = 1.05 * radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - reach)
        distance = np.minimum(upright, np.maximum(np.abs(x) - reach, np.abs(y) - arm))
    else:  # triangle: apex up, as wide as it is high
        slope = np.hypot(2.0, 1.0)
        distance = np.maximum(y - 0.9 * radius, (2.0 * np.abs(x) - y - 1.1 * radius) / slope)
    return distance
