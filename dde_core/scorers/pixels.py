"""From images to the pixel tensors that a scorer's model reads, as its authors do it.

PIL alone does the resizing of ``Crop``, so scores do not depend on whether torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from dde_core.errors import ConfigError, DataError
from dde_core.models.json_files import Fields
from dde_core.scorers.weights import read_object

Device = torch.device | str
Resize = Literal["antialiased", "aliased"]
RESIZES: tuple[Resize, ...] = ("antialiased", "aliased")

THREADS = 8
"""That resize images for a GPU."""

MAX_ASPECT = 50
"""Greatest ratio of an image's sides: beyond, resizing leaves less than a few pixels, or needs gigabytes."""

Numbers = tuple[float, float, float]
MEAN: Numbers = tuple(OPENAI_CLIP_MEAN)
STD: Numbers = tuple(OPENAI_CLIP_STD)

_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "CLIPFeatureExtractor",
)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """CLIP's: the shorter side becomes ``shortest`` px (bicubic, antialiased, uint8), then the center is cut
    out.

    ``center``: where half a pixel of the margin goes. transformers rounds down, torchvision to the even
    number.
    """

    side: int
    shortest: int
    center: Literal["down", "even"] = "down"
    mean: Numbers = MEAN
    std: Numbers = STD

    def __call__(
        self, images: UInt8[np.ndarray, "n h w 3"], device: Device = "cpu"
    ) -> Float32[Tensor, "n 3 side side"]:
        """Pixels on a device, which normalizes them. A GPU would wait for one thread: several resize."""
        threads = THREADS
        if torch.device(device).type == "cpu":
            threads = 1
        with ThreadPoolExecutor(threads) as pool:
            parts = np.array_split(images, min(len(images), threads))
            found = np.concatenate(list(pool.map(self._resized, parts)))
        top, left = (self._margin(length) for length in found.shape[2:])
        cut = found[:, :, top : top + self.side, left : left + self.side]
        pixels = torch.from_numpy(np.ascontiguousarray(cut)).to(device)
        return _normalize(pixels.float() / 255, self.mean, self.std)

    def differentiable(self, images: Float32[Tensor, "n 3 height width"]) -> Float32[Tensor, "n 3 side side"]:
        """The same for a tensor with values in 0..1: resized in float, with gradients."""
        height, width = images.shape[2:]
        scale = self.shortest / min(height, width)
        size = [
            self.shortest if side == min(height, width) else int(side * scale) for side in (height, width)
        ]
        pixels = _product_resized(images, size)
        top, left = (self._margin(length) for length in size)
        return _normalize(pixels[:, :, top : top + self.side, left : left + self.side], self.mean, self.std)

    def _resized(self, images: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n 3 height width"]:
        """Scaled by PIL, which leaves the interpreter to other threads meanwhile."""
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": self.shortest}, do_center_crop=False, do_rescale=False, do_normalize=False
        )
        pixels: UInt8[np.ndarray, "n 3 height width"] = processor(
            [Image.fromarray(image) for image in images], return_tensors="np"
        )["pixel_values"]
        return pixels

    def _margin(self, length: int) -> int:
        margin = length - self.side
        if self.center == "even":
            return round(margin / 2)
        return margin // 2

    def describe(self) -> dict[str, Any]:
        """What distinguishes this preprocessing, as JSON values."""
        return {"mode": "crop", "interpolation": "bicubic", "resize": "antialiased", **_values(self)}


@dataclass(frozen=True, kw_only=True)
class Pad:
    """HPS's: the longer side becomes ``side`` px, and black fills the image up to a square; nothing is cut.

    A float tensor is resized, so values beyond 0..1 stay. ``resize`` is what torchvision does to a tensor:
    "aliased" before its version 0.17, "antialiased" from then on.
    """

    side: int
    resize: Resize = "antialiased"
    mean: Numbers = MEAN
    std: Numbers = STD

    def __call__(
        self, images: UInt8[np.ndarray, "n h w 3"], device: Device = "cpu"
    ) -> Float32[Tensor, "n 3 side side"]:
        """Pixels on a device, which resizes, pads and normalizes them."""
        return self.differentiable(torch.tensor(images, device=device).permute(0, 3, 1, 2).float() / 255)

    def differentiable(self, images: Float32[Tensor, "n 3 height width"]) -> Float32[Tensor, "n 3 side side"]:
        """The same for a tensor with values in 0..1, with gradients."""
        scale = self.side / max(images.shape[2:])
        height, width = (round(length * scale) for length in images.shape[2:])
        pixels = _interpolated(images, [height, width], antialias=self.resize == "antialiased")
        top = (self.side - height) // 2
        left = (self.side - width) // 2
        around = (left, self.side - width - left, top, self.side - height - top)
        return _normalize(torch.nn.functional.pad(pixels, around), self.mean, self.std)

    def describe(self) -> dict[str, Any]:
        """What distinguishes this preprocessing, as JSON values."""
        return {"mode": "pad", "interpolation": "bicubic", **_values(self)}


def _interpolated(
    pixels: Float32[Tensor, "n 3 h w"], size: list[int], antialias: bool
) -> Float32[Tensor, "n 3 height width"]:
    """Bicubic; unchanged if it has the size (height, width) already."""
    if list(pixels.shape[2:]) == size:
        return pixels
    return torch.nn.functional.interpolate(
        pixels, size=size, mode="bicubic", align_corners=False, antialias=antialias
    )


def _product_resized(
    pixels: Float32[Tensor, "n 3 h w"], size: list[int]
) -> Float32[Tensor, "n 3 height width"]:
    """``_interpolated`` with antialiasing as a product with a matrix for each axis.

    The gradient of torch's own has no deterministic kernel on CUDA.
    """
    for axis, length in zip((2, 3), size, strict=True):
        before = pixels.shape[axis]
        if before != length:
            unit = torch.eye(before).expand(1, 3, before, before)
            weights = _interpolated(unit, [length, before], antialias=True)[0, 0].to(pixels.device)
            pixels = torch.tensordot(pixels, weights, dims=([axis], [1])).movedim(-1, axis)
    return pixels


def _normalize(pixels: Float32[Tensor, "n 3 h w"], mean: Numbers, std: Numbers) -> Float32[Tensor, "n 3 h w"]:
    center = torch.tensor(mean, device=pixels.device).view(3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(3, 1, 1)
    return (pixels - center) / scale


def _values(settings: Crop | Pad) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()
    }


def check_size(height: int, width: int) -> None:
    """Raises DataError for a size in pixels that cannot be resized."""
    if min(height, width) < 1:
        raise DataError(f"images must be at least 1 px high and wide, got {height} x {width}")
    if max(height, width) > MAX_ASPECT * min(height, width):
        reason = f"must be at most {MAX_ASPECT} times as long as the other"
        raise DataError(f"images are {height} x {width} px: a side {reason}")


def read_crop(folder: Path, side: int, center: Literal["down", "even"] = "down") -> Crop:
    """The preprocessing that a CLIP folder's files ask for. ``side``: what its model reads, in pixels.

    Raises DataError for files that are missing or ask for anything else than ``Crop``.
    """
    name = "preprocessor_config.json"
    values: Mapping[str, Any] = {}
    if (folder / name).is_file():
        values = read_object(folder / name)
    elif (folder / "processor_config.json").is_file():
        name = "processor_config.json"
        nested = read_object(folder / name).get("image_processor")
        if not isinstance(nested, dict):
            raise DataError(f"{name} must hold image_processor, an object")
        values = nested
    else:
        raise DataError(f"{folder} lacks {name}, which says how images are prepared")
    try:
        return replace(_crop(Fields(name, values), side), center=center)
    except ConfigError as error:
        raise DataError(str(error)) from error


def _crop(fields: Fields, side: int) -> Crop:
    kind = fields.get("image_processor_type", fields.get("feature_extractor_type", _PROCESSORS[0]))
    if kind not in _PROCESSORS:
        raise fields.refusal("image_processor_type", f"must be one of {', '.join(_PROCESSORS)}")
    for name in ("do_resize", "do_center_crop", "do_normalize", "do_rescale"):
        fields.must_be(name, True)
    fields.must_be("resample", int(PILImageResampling.BICUBIC), ", bicubic")
    if abs(fields.number("rescale_factor", 1 / 255, above=0) * 255 - 1) > 1e-6:
        raise fields.refusal("rescale_factor", "must be 1/255")
    shortest = _length(fields, "size", ("shortest_edge",), side)
    crop = _length(fields, "crop_size", ("height", "width"), side)
    if crop != side:
        raise fields.refusal("crop_size", f"must be {side}, the image_size of the vision encoder")
    if shortest < side:
        raise fields.refusal("size", f"must be at least crop_size = {side}")
    return Crop(
        side=side,
        shortest=shortest,
        mean=_three(fields, "image_mean", MEAN),
        std=_three(fields, "image_std", STD, above=0),
    )


def _length(fields: Fields, name: str, keys: tuple[str, ...], default: int) -> int:
    """A length in pixels: a whole number, or an object that holds it under each of ``keys``."""
    value = fields.get(name, default)
    given: dict[str, Any] = dict.fromkeys(keys, value)
    if isinstance(value, dict):
        given = value
    found: list[Any] = [given.get(key) for key in keys]
    if set(given) - set(keys) or not all(type(each) is int for each in found):
        raise fields.refusal(name, f"must be a whole number, or hold {' and '.join(keys)}")
    if len(set(found)) != 1:
        raise fields.refusal(name, "must be a square")
    return int(found[0])


def _three(fields: Fields, name: str, default: Numbers, above: float = -1e9) -> Numbers:
    value = fields.get(name, default)
    is_three = isinstance(value, list | tuple) and len(value) == 3
    if not is_three or not all(type(each) in (int, float) and above < each < 1e9 for each in value):
        raise fields.refusal(name, f"must be three numbers above {above:g}")
    first, second, third = value
    return float(first), float(second), float(third)
