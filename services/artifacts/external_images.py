"""Images that were drawn elsewhere: which file is image j of prompt i, and the proof that all are there.

``services.api.requests.ImageFolder`` documents the two forms of a folder.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from dde_core.errors import DataError
from services.api.requests import ImageFolder
from services.errors import BadRequest, NotFound
from services.pairs.images import FORMATS, MAX_FILE_BYTES, MAX_PIXELS, BadImage, decode_whole
from services.storage import files, sources

MANIFEST = "images.jsonl"
MAX_MANIFEST_BYTES = 1 << 30
READ_THREADS = 16
Names = list[list[str]]
"""Paths in the folder: image j of prompt i is ``names[i][j]``."""


def find_images(folder: ImageFolder, prompts: Sequence[str], images_per_prompt: int) -> Names:
    """The files of the images. Raises BadRequest, or NotFound, where one is missing.

    Equal prompts have images of their own: a prompt's second occurrence has those after the first one's.
    """
    try:
        present = set(sources.list_files(folder.images_uri, sources.MAX_ENTRIES))
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"images of {folder.name}: {folder.images_uri!r} is no folder"
        raise NotFound(message, param="images_uri") from error
    if MANIFEST in present:
        names = _from_manifest(folder, prompts, images_per_prompt)
    else:
        names = [[f"{i:05d}-{j}.png" for j in range(images_per_prompt)] for i in range(len(prompts))]
    missing = [name for of_prompt in names for name in of_prompt if name not in present]
    if missing:
        count = f"{len(missing)} of {len(prompts) * images_per_prompt} images"
        _refuse(folder, f"lacks {count}, the first is {missing[0]}", "missing_images")
    return names


def check_images(folder: ImageFolder, names: Sequence[str]) -> tuple[int, int]:
    """The height and width that all these images have by their headers.

    Raises BadRequest for a file that is no image, and for images of several sizes.
    """
    size: tuple[int, int] | None = None
    first_name = ""
    with sources.in_threads(partial(_header_size, folder), names, READ_THREADS) as headers:
        for name, found in zip(names, headers, strict=True):
            if size is None:
                size = found
                first_name = name
            elif found != size:
                sizes = f"{_px(size)} in {first_name} and {_px(found)} in {name}"
                _refuse(folder, f"must have one size, got {sizes}", "image_sizes")
    assert size is not None
    return size


def read_images(folder: ImageFolder, names: Sequence[str]) -> tuple[list[bytes], np.ndarray]:
    """The files' contents, and their pixels: uint8 [n, h, w, 3], upright, on a white background.

    Raises DataError for a file that has changed so that it is no image of the others' size.
    """
    contents: list[bytes] = []
    pixels: list[np.ndarray] = []
    for name in names:
        try:
            data = sources.read_bytes(_uri(folder, name), MAX_FILE_BYTES)
            image = decode_whole(data)
        except (BadImage, BadRequest, FileNotFoundError) as error:
            raise DataError(f"image {name} of {folder.name} cannot be read: {error}") from error
        if pixels and image.shape != pixels[0].shape:
            sizes = f"{_px(image.shape[:2])}, {names[0]} has {_px(pixels[0].shape[:2])}"
            raise DataError(f"image {name} of {folder.name} has {sizes}")
        contents.append(data)
        pixels.append(image)
    return contents, np.stack(pixels)


def one_size(sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """The height and width that the images of all models have. Raises BadRequest, naming two that differ."""
    (first, size), *others = sizes.items()
    for name, found in others:
        if found != size:
            message = (
                f"models: images must have one size, got {_px(size)} of {first} and "
                f"{_px(found)} of {name}: set sample.height and sample.width"
            )
            raise BadRequest(message, param="models", code="image_sizes")
    return size


def _from_manifest(folder: ImageFolder, prompts: Sequence[str], images_per_prompt: int) -> Names:
    listed: dict[str, list[str]] = defaultdict(list)
    uri = files.join(folder.images_uri, MANIFEST)
    try:
        lines = sources.read_bytes(uri, MAX_MANIFEST_BYTES).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        _refuse(folder, f"{MANIFEST} is not UTF-8 text (byte {error.start})", "manifest")
    for number, line in enumerate(lines, 1):
        if line.strip():
            file, prompt = _manifest_row(folder, number, line)
            listed[prompt].append(file)
    names: Names = []
    used: dict[str, int] = defaultdict(int)
    for i, prompt in enumerate(prompts):
        start = used[prompt]
        found = listed.get(prompt, [])[start : start + images_per_prompt]
        if len(found) < images_per_prompt:
            why = f"{MANIFEST} has {len(found)} of {images_per_prompt} images of prompt {i}, {prompt!r}"
            _refuse(folder, why[:500], "missing_images")
        used[prompt] = start + images_per_prompt
        names.append(found)
    return names


def _manifest_row(folder: ImageFolder, number: int, line: str) -> tuple[str, str]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse(folder, f"{MANIFEST} line {number} is no JSON: {error}", "manifest")
    for field in ("file", "prompt"):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            _refuse(folder, f"{MANIFEST} line {number} must have a string as field {field!r}", "manifest")
    if any(part in ("", ".", "..") for part in row["file"].split("/")):
        why = f"field 'file' must be a path in the folder, got {row['file']!r}"
        _refuse(folder, f"{MANIFEST} line {number} {why}", "manifest")
    return row["file"], row["prompt"].strip()


def _header_size(folder: ImageFolder, name: str) -> tuple[int, int]:
    sources.check_time()
    try:
        with sources.open_file(_uri(folder, name)) as stream, Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
    except FileNotFoundError:
        _refuse(folder, f"lacks {name}", "missing_images")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        _refuse(folder, f"{name} is no image: {type(error).__name__}", "no_image")
    if width * height > MAX_PIXELS:
        _refuse(folder, f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}", "no_image")
    return height, width


def _uri(folder: ImageFolder, name: str) -> str:
    return files.join(folder.images_uri, *name.split("/"))


def _px(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]} px"


def _refuse(folder: ImageFolder, why: str, code: str) -> NoReturn:
    message = f"images of {folder.name}: {folder.images_uri!r} {why}"
    raise BadRequest(message, param="images_uri", code=code)
