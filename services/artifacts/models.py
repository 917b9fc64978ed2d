"""Models as files: the control plane writes their records; training, evaluation and Serve read them.

``models/{id}.json`` is a model's record; ``aliases/{name}.json`` maps a name to its current model.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from dde_core.errors import ConfigError, ModelError
from dde_core.family import (
    COMPONENTS,
    WITH_WEIGHTS,
    Family,
    check_scheduler,
    check_unet,
    family_of,
    missing_components,
)
from dde_core.node_cache import NodeCache
from services.api.records import ModelRecord
from services.api.requests import NAME_PATTERN
from services.errors import BadRequest, NotFound
from services.stages import layout
from services.storage import files, sources

CACHE_BYTES = 100_000_000_000
"""Limit for copies of models on a node. The least recently used ones that no process holds are evicted."""

READ_BYTES = 1 << 22


def publish(root: str, record: ModelRecord) -> None:
    """Let Serve find a model under its id."""
    files.write_json(layout.model_record_uri(root, record.id), record.model_dump())


def set_alias(root: str, name: str, model_id: str) -> None:
    """Make a name refer to this model."""
    files.write_json(layout.alias_uri(root, name), {"model": model_id})


def retract(root: str, record: ModelRecord) -> None:
    """Undo publish and set_alias. Deletes the weights of an aligned model and keeps those of a base model."""
    alias = layout.alias_uri(root, record.name)
    if files.exists(alias) and files.read_json(alias)["model"] == record.id:
        files.delete_file(alias)
    files.delete_file(layout.model_record_uri(root, record.id))
    if record.job is not None:
        files.delete_folder(layout.model_folder(root, record.id))


def find(root: str, name_or_id: str) -> ModelRecord:
    """The model with this name or id. Raises NotFound if there is none."""
    if re.fullmatch(NAME_PATTERN, name_or_id):
        try:
            model_id = files.read_json(layout.alias_uri(root, name_or_id))["model"]
        except FileNotFoundError:
            model_id = name_or_id
        try:
            return ModelRecord.model_validate_json(files.read_bytes(layout.model_record_uri(root, model_id)))
        except FileNotFoundError:
            pass
    raise NotFound(f"model {name_or_id!r} does not exist", param="model", code="model_not_found")


def check_components(uri: str, family: Family | None) -> Family:
    """The family of a diffusers folder, from its JSON files and file names alone.

    Raises BadRequest for a pipeline that cannot be aligned, a family other than ``family``, missing
    components or weights, and an unusable noise schedule or U-Net.
    """
    found = _check_index(uri, family)
    _check_files(uri, found)
    try:
        check_scheduler(scheduler_config(uri))
        check_unet(_read_object(uri, "unet", "config.json"), found)
    except (FileNotFoundError, ConfigError, ModelError) as error:
        message = f"uri {uri!r} cannot be aligned: {error}"
        raise BadRequest(message, param="uri", code="unsupported_model") from error
    return found


def _check_index(uri: str, family: Family | None) -> Family:
    """The family, from model_index.json."""
    try:
        index = _read_object(uri, "model_index.json")
        found = family_of(index)
        missing = missing_components(index)
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, ModelError) else "model_index.json cannot be read"
        message = f"uri {uri!r} is not a diffusers folder that can be aligned: {reason}"
        raise BadRequest(message, param="uri") from error
    if family not in (None, found):
        message = f"family: model_index.json of {uri!r} says {found!r}, got {family!r}"
        raise BadRequest(message, param="family")
    if missing:
        message = f"uri {uri!r} is not of family {found!r}: model_index.json lacks {', '.join(missing)}"
        raise BadRequest(message, param="family" if family else "uri", code="missing_components")
    return found


def _check_files(uri: str, family: Family) -> None:
    """Each component has a folder with files, and weights if it needs them."""
    paths = files.list_files(uri, recursive=True)
    components = COMPONENTS[family]
    missing = [name for name in components if not any(path.startswith(f"{name}/") for path in paths)]
    for name in WITH_WEIGHTS:
        if name in components and not any(_is_weights(path, name) for path in paths):
            missing.append(f"{name}/*.safetensors")
    if missing:
        raise BadRequest(f"uri {uri!r} lacks {', '.join(missing)}", param="uri", code="missing_components")


def _is_weights(path: str, component: str) -> bool:
    """A name that is loaded by default, in one file or several; not a variant such as .fp16.safetensors."""
    pattern = rf"{component}/(diffusion_pytorch_)?model(-\d{{5}}-of-\d{{5}})?\.safetensors"
    return re.fullmatch(pattern, path) is not None


def unet_layers(uri: str) -> set[str]:
    """Names of the U-Net's linear and convolution layers, from safetensors headers: no weight is read."""
    layers: set[str] = set()
    for path in files.list_files(uri, recursive=True):
        if _is_weights(path, "unet"):
            layers |= _layers_in(files.join(uri, path))
    return layers


def _layers_in(uri: str) -> set[str]:
    """Layers whose weight is a matrix or a convolution kernel."""
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_file(path) as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    return {
        name.removesuffix(".weight")
        for name, tensor in header.items()
        if name.endswith(".weight") and len(tensor["shape"]) in (2, 4)
    }


def folder_digest(uri: str) -> str:
    """sha256 over the path and the sha256 of every file in a folder, sorted by path."""
    digest = hashlib.sha256()
    for name in files.list_files(uri, recursive=True):
        digest.update(f"{name}\0{_file_digest(files.join(uri, name))}\n".encode())
    return digest.hexdigest()


def _file_digest(uri: str) -> str:
    digest = hashlib.sha256()
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(READ_BYTES):
            sources.check_time()
            digest.update(block)
    return digest.hexdigest()


def scheduler_config(uri: str) -> dict[str, Any]:
    """The contents of a diffusers folder's scheduler_config.json."""
    return _read_object(uri, "scheduler", "scheduler_config.json")


def _read_object(uri: str, *path: str) -> dict[str, Any]:
    """A JSON file of a diffusers folder. Raises ModelError if it holds no JSON object."""
    data = files.read_bytes(files.join(uri, *path))
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ModelError(f"{'/'.join(path)} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{'/'.join(path)} must hold a JSON object, got a {type(value).__name__}")
    return value


def num_train_timesteps(record: ModelRecord) -> int:
    """T, the number of timesteps of the model's noise schedule."""
    return int(scheduler_config((record.adapter_of or record).uri)["num_train_timesteps"])


def fetch(record: ModelRecord) -> tuple[Path, Path | None]:
    """Local folders of the model: the diffusers folder, and that of its LoRA adapters if it has them.

    A local folder is used in place. A remote one is copied to this node once, under its digest. Raises
    BadRequest if the copy differs from the registered digest.
    """
    if record.adapter_of is None:
        return _fetch(record), None
    return _fetch(record.adapter_of), _fetch(record)


def _fetch(record: ModelRecord) -> Path:
    local = files.local_path(record.uri)
    if local is not None:
        return local
    node_cache = _node_cache(Path(tempfile.gettempdir()) / "dde-models")
    return node_cache.hold_until_exit(record.digest, partial(_prepare_copy, record))


@cache
def _node_cache(folder: Path) -> NodeCache:
    """This process's cache of models on its node. It holds those that the process has used."""
    return NodeCache(folder, CACHE_BYTES)


def _prepare_copy(record: ModelRecord) -> tuple[int, Callable[[Path], None]]:
    return files.folder_bytes(record.uri), partial(_copy, record)


def _copy(record: ModelRecord, folder: Path) -> None:
    files.copy_folder(record.uri, files.as_uri(folder))
    check_digest(record, files.as_uri(folder))


def check_digests(record: ModelRecord) -> None:
    """Raise BadRequest if the files of the model or of its base have changed since registration."""
    for each in filter(None, (record.adapter_of, record)):
        check_digest(each, files.as_uri(_fetch(each)))


def check_digest(record: ModelRecord, uri: str) -> None:
    """Raise BadRequest if the folder at ``uri`` differs from the model's registered digest."""
    found = folder_digest(uri)
    if found != record.digest:
        message = (
            f"the files of model {record.name} at {record.uri!r} have changed: "
            f"digest {found}, registered as {record.digest}"
        )
        raise BadRequest(message, param="model", code="model_changed")
