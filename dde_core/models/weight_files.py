"""The weights of a model folder's parts as files: which ones are loaded, and what a safetensors file holds.

Imports no torch: the control plane proves weights from the files' headers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dde_core.errors import IncompleteModelError, ModelError
from dde_core.models.json_files import MAX_SHOWN, parse_object, refuse_pointer, shown
from dde_core.models.tensor_shapes import Shapes

STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""How the weight files of each part begin: diffusers' name or transformers'."""

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its JSON header, little-endian."""
MAX_HEADER_BYTES = 1 << 24
"""Far above the header of any model of these families. The format allows 100 MB."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of weights that are loaded as float32."""
_OTHER_TYPES = {
    1: ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"),
    2: ("I16", "U16"),
    4: ("I32", "U32"),
    8: ("I64", "U64"),
}
OTHER_BYTES = {name: size for size, names in _OTHER_TYPES.items() for name in names}
"""Other types of the format, such as that of position ids."""
MAX_NAMED = 3


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of a part are: in one file, or in the shards that an index names.

    ``variant`` is None for the names that are loaded by default, or such as "fp16".
    """

    file: str | None
    index: str | None
    variant: str | None


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file, whose bytes are ``start`` to ``end`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


Tensors = dict[str, Tensor]
"""The tensors of a safetensors file by name, in the order of their bytes."""


def find_weights(part: str, names: Collection[str]) -> WeightFiles:
    """The weights of a part that are loaded, among the names of the files in its folder.

    A variant such as fp16 is taken if there is nothing else. Raises ModelError for a part without weights,
    with several variants, with shards but no index, or with a pickle only.
    """
    stem = STEMS[part]
    variants = variants_of(stem, names)
    chosen = "" if "" in variants else min(variants, default="")
    if chosen in variants and (chosen == "" or len(variants) == 1):
        file, index = files_of(stem, chosen)
        # diffusers prefers an index of shards to a single file, transformers the single file.
        is_sharded = index in names and (stem == STEMS["unet"] or file not in names)
        return WeightFiles(None if is_sharded else file, index if is_sharded else None, chosen or None)
    expected = f"{part}/{stem}.safetensors"
    if variants:
        raise ModelError(
            f"{part} has several variants and none by default: {', '.join(sorted(variants))}. Keep one"
        )
    if any(re.search(r"-\d{5}-of-\d{5}", name) for name in names):
        raise IncompleteModelError(
            f"{part} has shards of weights, but lacks their index {expected}.index.json"
        )
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise IncompleteModelError(
            f"{part} lacks {expected}: {pickles[0]} is a pickle, which is never loaded. Convert it with "
            "diffusers: from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise IncompleteModelError(f"{part} lacks {expected}")


def variants_of(stem: str, names: Collection[str]) -> set[str]:
    """The variants of weights among file names; "" stands for the names that are loaded by default."""
    pattern = rf"{stem}(?:\.(\w+))?\.safetensors|{stem}\.safetensors\.index(?:\.(\w+))?\.json"
    matches = filter(None, (re.fullmatch(pattern, name) for name in names))
    return {match[1] or match[2] or "" for match in matches}


def files_of(stem: str, variant: str) -> tuple[str, str]:
    """The names of a variant's single file and of its index of shards."""
    infix = f".{variant}" if variant else ""
    return f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"


def parse_index(data: bytes, name: str) -> dict[str, str]:
    """The file of each tensor, by an index of shards. Raises ModelError."""
    index = parse_object(data, name)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(index.get("metadata"), dict) or not weight_map:
        raise ModelError(f"{name} must hold the objects metadata and weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{name} must name a file in its own folder for {shown(tensor)}, got {shown(file)}"
            )
    return weight_map


def header_bytes(start: bytes, file_bytes: int, name: str) -> int:
    """The length of a safetensors file's header, from its first bytes. Raises ModelError."""
    refuse_pointer(start, name)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise ModelError(f"{name} is not a safetensors file")
    if LENGTH_BYTES + length > file_bytes:
        raise ModelError(f"{name} is cut off: its header alone is longer than the file's {file_bytes} bytes")
    return length


def parse_header(header: bytes, file_bytes: int, name: str) -> Tensors:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises ModelError unless their bytes follow one another to the end of the file.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {tensor: _tensor(entry, LENGTH_BYTES + len(header)) for tensor, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{name} is not a safetensors file: its header cannot be read") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = LENGTH_BYTES + len(header)
    for tensor, found in ordered.items():
        item_bytes = (ITEM_BYTES | OTHER_BYTES).get(found.dtype)
        if item_bytes is None:
            reason = f"as {shown(found.dtype)}, which is not supported"
            raise ModelError(f"{name} holds {_some([tensor])} {reason}")
        if found.start != position or found.end - found.start != item_bytes * math.prod(found.shape):
            raise ModelError(f"{name} is damaged: the bytes of {_some([tensor])} do not fit its header")
        position = found.end
    if position > file_bytes:
        raise ModelError(f"{name} is cut off: it has {file_bytes} of {position} bytes")
    if position < file_bytes:
        raise ModelError(f"{name} is damaged: {file_bytes - position} bytes follow its last tensor")
    return ordered


def _tensor(entry: Any, data_start: int) -> Tensor:
    """Raises KeyError, TypeError or ValueError for an entry that is none."""
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(each, int) and each >= 0 for each in (start, end, *shape)):
        raise ValueError("sizes must be whole numbers")
    return Tensor(str(entry["dtype"]), shape, data_start + start, data_start + end)


EXPONENTS = {
    "F64": (np.uint64, 0x7FF << 52),
    "F32": (np.uint32, 0xFF << 23),
    "F16": (np.uint16, 0x1F << 10),
    "BF16": (np.uint16, 0xFF << 7),
}
"""The bits of the exponent, all of which are set in an infinite or NaN number."""


def is_finite(data: bytes, dtype: str) -> bool:
    """Whether all numbers of a tensor, or of a part of one, are finite."""
    if dtype not in EXPONENTS:
        return True
    kind, exponent = EXPONENTS[dtype]
    mask = kind(exponent)
    return bool(((np.frombuffer(data, kind) & mask) != mask).all())


# ---- the tensors of a part


IGNORED = {
    "unet": r"$^",
    "vae": r"$^",
    "text_encoder": r"embeddings\.position_ids|text_projection\.weight|logit_scale|vis(ion|ual)_.*",
    "text_encoder_2": r"embeddings\.position_ids|logit_scale|vis(ion|ual)_.*",
}
"""Tensors that files may hold beside those of their part: computed ones, and those of CLIP's other half."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def library_name(part: str, name: str) -> str:
    """The name under which the part's library loads a tensor."""
    if part == "vae" and (match := re.fullmatch(r"(.*attentions\.\d+)\.(\w+)\.(weight|bias)", name)):
        return f"{match[1]}.{_OLD_ATTENTION.get(match[2], match[2])}.{match[3]}"
    return name.removeprefix("text_model.") if part.startswith("text_encoder") else name


def check_tensors(part: str, expected: Shapes, found: Tensors) -> None:
    """Raises ModelError unless a part's files hold the tensors that its config asks for, and no others."""
    by_name = {library_name(part, name): tensor for name, tensor in found.items()}
    if len(by_name) < len(found):
        twice = [
            name for name, count in Counter(library_name(part, name) for name in found).items() if count > 1
        ]
        raise ModelError(f"{part} holds {_some(twice)} twice, under an old and a new name")
    asked = "that its config.json asks for"
    missing = [name for name in expected if name not in by_name]
    if missing:
        hint = "" if len(missing) < len(expected) else f"; its files hold {_some(found)}"
        raise IncompleteModelError(
            f"{part} lacks {len(missing)} of {len(expected)} tensors {asked}: {_some(missing)}{hint}"
        )
    for name, shape in expected.items():
        if by_name[name].shape != shape:
            reason = f"has shape {list(by_name[name].shape)}, its config.json asks for {list(shape)}"
            raise ModelError(f"{part}: {name} {reason}")
        if by_name[name].dtype not in ITEM_BYTES:
            raise ModelError(
                f"{part}: {name} must be one of {', '.join(ITEM_BYTES)} to be loaded as float32, "
                f"got {by_name[name].dtype}"
            )
    others = [name for name in by_name if name not in expected and not re.fullmatch(IGNORED[part], name)]
    if others:
        raise ModelError(
            f"{part} holds {len(others)} tensors that its config.json does not ask for: {_some(others)}"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = ", ..." if len(names) > MAX_NAMED else ""
    return ", ".join(name[:MAX_SHOWN] for name in names[:MAX_NAMED]) + more
