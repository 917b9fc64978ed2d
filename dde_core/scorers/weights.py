"""A checkpoint's tensors: first their names, types and shapes, which costs nothing, then their values.

Reads safetensors, and pickles of tensors alone: a pickle that runs code is refused.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dde_core.errors import ConfigError, DataError, ModelError
from dde_core.models.json_files import parse_object, refuse_pointer
from dde_core.models.weight_files import LENGTH_BYTES, header_bytes, parse_header, parse_index

Tensors = dict[str, Tensor]

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin")
START_BYTES = 64
"""Enough to recognize a Git LFS pointer."""


@dataclass(frozen=True)
class Weights:
    """The files of a checkpoint. ``key``: where a pickle keeps its tensors; "" is its top level."""

    files: tuple[Path, ...]
    key: str = ""

    @property
    def name(self) -> str:
        """The first file's name, for messages."""
        return self.files[0].name

    def headers(self) -> Tensors:
        """The tensors on the meta device: types and shapes without values. Raises DataError."""
        return self._read("meta")

    def values(self) -> Tensors:
        """The tensors on the CPU. Raises DataError."""
        return self._read("cpu")

    def _read(self, device: str) -> Tensors:
        found: Tensors = {}
        for path in self.files:
            read = _safetensors
            if path.suffix != SAFETENSORS:
                read = self._pickle
            of_file = read(path, device)
            if twice := sorted(set(found) & set(of_file)):
                raise DataError(f"{path.name} holds {twice[0]!r}, which another file of the checkpoint holds")
            found |= of_file
        return found

    def _pickle(self, path: Path, device: str) -> Tensors:
        with _data_errors(), path.open("rb") as file:
            refuse_pointer(file.read(START_BYTES), path.name)
        try:
            with warnings.catch_warnings(action="ignore"):  # torch warns of pickles that it then refuses
                loaded = torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = "it is a pickle that holds more than tensors, or is none, and is never run"
            raise DataError(f"{path.name} cannot be read: {reason}. Save its state_dict alone") from error
        except Exception as error:  # torch raises whatever its parsers do
            raise DataError(f"{path.name} cannot be read; it may be cut off: {error}") from error
        if self.key:
            if not isinstance(loaded, Mapping) or self.key not in loaded:
                raise DataError(f"{path.name} must hold the tensors under {self.key!r}; {_content(loaded)}")
            loaded = loaded[self.key]
        if not isinstance(loaded, Mapping) or not loaded:
            raise DataError(f"{path.name} must hold named tensors, got a {type(loaded).__name__}")
        for name, value in loaded.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise DataError(f"{path.name} must hold named tensors: {name!r} is a {type(value).__name__}")
        return dict(loaded)


def weights_at(checkpoint: Path, key: str = "") -> Weights:
    """The weights in a file, or in a folder that holds one file of weights. Raises DataError."""
    if checkpoint.is_dir():
        known = (SAFETENSORS, *PICKLES)
        files = sorted(path for path in checkpoint.iterdir() if path.suffix in known)
        if len(files) != 1:
            names = ", ".join(path.name for path in files) or "none"
            raise DataError(f"{checkpoint} must hold one file of weights, got {names}: name the file")
        checkpoint = files[0]
    if not checkpoint.is_file():
        raise DataError(f"{checkpoint} does not exist")
    if checkpoint.suffix not in (SAFETENSORS, *PICKLES):
        known_suffixes = ", ".join((SAFETENSORS, *PICKLES))
        raise DataError(f"{checkpoint.name} must end in one of {known_suffixes}")
    return Weights((checkpoint,), key if checkpoint.suffix in PICKLES else "")


def weights_of_folder(folder: Path) -> Weights:
    """The weights of a folder that transformers saved: one file, or the shards of an index.

    Raises DataError for a folder without weights.
    """
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    pickled = folder / "pytorch_model.bin"
    if whole.is_file():
        return Weights((whole,))
    if index.is_file():
        with _data_errors():
            names = sorted(set(parse_index(index.read_bytes(), index.name).values()))
        for name in names:
            if not (folder / name).is_file():
                raise DataError(f"{folder} lacks {name}, which {index.name} names")
        return Weights(tuple(folder / name for name in names))
    if pickled.is_file():
        return Weights((pickled,))
    raise DataError(f"{folder} lacks model.safetensors")


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises DataError if there is none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path.parent} lacks {path.name}") from error
    with _data_errors():
        return parse_object(data, path.name)


def check_tensors(name: str, owner: str, expected: Mapping[str, tuple[int, ...]], found: Tensors) -> None:
    """Raises DataError for the first tensor that is missing, of another shape or type, or unknown."""
    for key, shape in expected.items():
        if key not in found:
            raise DataError(f"{name} lacks {key!r}, which {owner} has")
        if tuple(found[key].shape) != shape:
            actual = list(found[key].shape)
            raise DataError(f"{name}: {key!r} must have shape {list(shape)}, got {actual}")
        if not found[key].is_floating_point():
            raise DataError(f"{name}: {key!r} must hold floating-point numbers, got {found[key].dtype}")
    for key in found:
        if key not in expected:
            raise DataError(f"{name} holds {key!r}, which {owner} does not have")


def shape_at(name: str, owner: str, found: Tensors, key: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor from which sizes are derived. Raises DataError."""
    if key not in found:
        raise DataError(f"{name} lacks {key!r}, which {owner} has")
    shape = tuple(found[key].shape)
    if len(shape) != dimensions or 0 in shape:
        raise DataError(f"{name}: {key!r} must have {dimensions} dimensions, none 0, got {list(shape)}")
    return shape


def _safetensors(path: Path, device: str) -> Tensors:
    file_bytes = path.stat().st_size
    with _data_errors(), path.open("rb") as file:
        length = header_bytes(file.read(max(LENGTH_BYTES, START_BYTES)), file_bytes, path.name)
        file.seek(LENGTH_BYTES)
        parse_header(file.read(length), file_bytes, path.name)
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            if device == "cpu":  # copies: the tensors would follow later changes of the file
                return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            return {name: _meta(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def _meta(part: object) -> Tensor:
    """A tensor without values. Types other than those of weights become int64."""
    dtype = _DTYPES.get(part.get_dtype(), torch.int64)  # type: ignore[attr-defined]
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")  # type: ignore[attr-defined]


def _content(loaded: object) -> str:
    if isinstance(loaded, Mapping):
        return f"it holds {', '.join(repr(key) for key in list(loaded)[:3])}"
    return f"it holds a {type(loaded).__name__}"


@contextmanager
def _data_errors() -> Iterator[None]:
    """A model's or config's error becomes a DataError: what concerns a scorer has one type."""
    try:
        yield
    except (ModelError, ConfigError) as error:
        raise DataError(str(error)) from error
