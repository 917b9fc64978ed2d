"""Proves a diffusers folder when it is registered, before anything is spent on it.

It reads the folder's JSON files and the headers of its weights, and compares the names and shapes of all
tensors with those that each part's config asks for. No weight is read and no torch is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyarrow import fs

from dde_core.errors import ConfigError, IncompleteModelError, ModelError
from dde_core.family import COMPONENTS, WITH_WEIGHTS, Family, check_classes, family_of, missing_components
from dde_core.models import weight_files
from dde_core.models.configs import (
    AutoencoderFields,
    TextEncoderFields,
    UNetFields,
    check_fit,
)
from dde_core.models.json_files import GIT_LFS, parse_object
from dde_core.models.scheduler_config import check_scheduler
from dde_core.models.tensor_shapes import shapes_of
from dde_core.models.vocabulary import TOKENIZER_OF, check_tokenizer
from dde_core.models.weight_files import Tensors, WeightFiles, find_weights
from services.errors import BadRequest, NotFound
from services.storage import files, sources

MAX_JSON_BYTES = 16 << 20
"""Far above any vocabulary or index of shards."""

_DOWNLOAD = "download it first, such as by `hf download REPOSITORY --local-dir FOLDER`, and register FOLDER"
_CONVERT = (
    "convert it with diffusers: StableDiffusionPipeline (or StableDiffusionXLPipeline)"
    ".from_single_file(FILE).save_pretrained(FOLDER), and register FOLDER"
)


@dataclass(frozen=True)
class Proof:
    """What was found. ``tensors`` are those of each weight file, by its path in the folder.

    ``variants`` are parts whose weights exist as a variant only, such as fp16; they are loaded as float32.
    """

    family: Family
    tensors: dict[str, Tensors] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)

    def lineage(self) -> dict[str, Any]:
        """What the record of a base model says of its files; empty for a folder with weights by default."""
        said = {part: f"variant {name}, loaded as float32" for part, name in self.variants.items()}
        return {"weights": said} if said else {}


def prove(uri: str, family: Family | None = None) -> Proof:
    """Prove the folder at ``uri``.

    Raises BadRequest for what is no diffusers folder, a pipeline that cannot be aligned, a family other than
    ``family``, missing or damaged files, weights that do not fit their config, and a config that asks for
    arithmetic that is not done. Raises OSError for files that cannot be read.
    """
    _check_place(uri)
    _check_folder(uri)
    proof = Proof(_check_index(uri, family))
    try:
        _check_parts(uri, proof)
    except (ConfigError, ModelError) as error:
        code = "missing_components" if isinstance(error, IncompleteModelError) else "unsupported_model"
        raise BadRequest(f"uri {uri!r} cannot be aligned: {error}", param="uri", code=code) from error
    return proof


def _check_place(uri: str) -> None:
    """Refuse what people have in place of a folder, with the way to get one."""
    reason = None
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if re.search(r"\.(safetensors|ckpt|pt|pth|bin|gguf)$", uri):
        reason = f"is a single file: {_CONVERT}"
    elif scheme not in ("", *files.SCHEMES):
        reason = f"is not a local folder or one in S3: {_DOWNLOAD}"
    if reason:
        raise _no_folder(uri, reason)


def _check_folder(uri: str) -> None:
    """Refuse what may not be opened, what is no folder, and a folder without an index."""
    hint = f"To register a model of a hub, {_DOWNLOAD}"
    try:
        sources.check_folder(uri)
    except NotFound as error:
        raise NotFound(f"{error}. {hint}", param="uri", code="no_diffusers_folder") from error
    if not files.exists(files.join(uri, "model_index.json")):
        raise _no_folder(uri, f"has no model_index.json. {hint}")


def _no_folder(uri: str, reason: str) -> BadRequest:
    message = f"uri {uri!r} is not a diffusers folder that can be aligned: it {reason}"
    return BadRequest(message, param="uri", code="no_diffusers_folder")


def _check_index(uri: str, family: Family | None) -> Family:
    """The family, from model_index.json."""
    try:
        index = read_object(uri, "model_index.json")
        found = family_of(index)
        missing = missing_components(index)
        if not missing:
            check_classes(index)
    except ModelError as error:
        message = f"uri {uri!r} is not a diffusers folder that can be aligned: {error}"
        raise BadRequest(message, param="uri", code="unsupported_model") from error
    if family not in (None, found):
        message = f"family: model_index.json of {uri!r} says {found!r}, got {family!r}"
        raise BadRequest(message, param="family")
    if missing:
        message = f"uri {uri!r} is not of family {found!r}: model_index.json lacks {', '.join(missing)}"
        raise BadRequest(message, param="family" if family else "uri", code="missing_components")
    return found


def read_object(uri: str, *path: str) -> dict[str, Any]:
    """A JSON file of a diffusers folder. Raises ModelError if it is missing or holds no JSON object."""
    data = _read(uri, *path)
    if data is None:
        raise IncompleteModelError(f"it lacks {'/'.join(path)}")
    return parse_object(data, "/".join(path))


def _read(uri: str, *path: str) -> bytes | None:
    """A small file of a diffusers folder; None if there is none. Raises ModelError for a large one."""
    place = files.join(uri, *path)
    found = file_bytes(place)
    if found is None:
        return None
    if found > MAX_JSON_BYTES:
        raise ModelError(f"{'/'.join(path)} must have at most {MAX_JSON_BYTES} bytes, got {found}")
    return files.read_bytes(place)


def file_bytes(uri: str) -> int | None:
    """The size of a regular file; None if there is none."""
    filesystem, path = files.resolve(uri)
    info = filesystem.get_file_info(path)
    return info.size if info.type == fs.FileType.File else None


def tensors_of(uri: str, part: str) -> dict[str, Tensors]:
    """The tensors of each file with weights of a part, by the file's path. Raises ModelError."""
    return _tensors_in(uri, part, _weights_of(uri, part))


def _weights_of(uri: str, part: str) -> WeightFiles:
    return find_weights(part, files.list_files(files.join(uri, part)))


def _tensors_in(uri: str, part: str, found: WeightFiles) -> dict[str, Tensors]:
    if found.file is not None:
        return {f"{part}/{found.file}": read_header(uri, part, found.file)}
    assert found.index is not None
    data = _read(uri, part, found.index) or b""
    places = weight_files.parse_index(data, f"{part}/{found.index}")
    shards = {f"{part}/{shard}": read_header(uri, part, shard) for shard in sorted(set(places.values()))}
    for tensor, shard in places.items():
        if tensor not in shards[f"{part}/{shard}"]:
            raise IncompleteModelError(f"{part}/{shard} lacks {tensor}, which {found.index} says it holds")
    return shards


def read_header(uri: str, *path: str) -> Tensors:
    """The tensors of a safetensors file, from its header and size. Raises ModelError."""
    name = "/".join(path)
    place = files.join(uri, *path)
    size = file_bytes(place)
    if size is None:
        raise IncompleteModelError(f"it lacks {name}")
    filesystem, local = files.resolve(place)
    with filesystem.open_input_file(local) as stream:
        start = stream.read(len(GIT_LFS))
        length = weight_files.header_bytes(start, size, name)
        stream.seek(weight_files.LENGTH_BYTES)
        return weight_files.parse_header(stream.read(length), size, name)


def _check_parts(uri: str, proof: Proof) -> None:
    check_scheduler(read_object(uri, "scheduler", "scheduler_config.json"))
    parts = [part for part in COMPONENTS[proof.family] if part in WITH_WEIGHTS]
    configs = {part: read_object(uri, part, "config.json") for part in parts}
    encoders = {
        part: TextEncoderFields.read(part, config) for part, config in configs.items() if part in TOKENIZER_OF
    }
    unet = UNetFields.read(configs["unet"], proof.family)
    check_fit(unet, AutoencoderFields.read(configs["vae"]), list(encoders.values()))
    for part, encoder in encoders.items():
        tokenizer = TOKENIZER_OF[part]
        check_tokenizer(tokenizer, partial(_read, uri, tokenizer), encoder)
    for part, config in configs.items():
        found = _weights_of(uri, part)
        tensors = _tensors_in(uri, part, found)
        proof.tensors.update(tensors)
        if found.variant:
            proof.variants[part] = found.variant
        held: Tensors = {}
        for path, of_file in tensors.items():
            if twice := held.keys() & of_file:
                raise ModelError(f"{path} holds {min(twice)}, which another shard holds as well")
            held |= of_file
        weight_files.check_tensors(part, shapes_of(part, config, proof.family), held)
