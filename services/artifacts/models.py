"""Models as files: what the control plane writes, and what training, evaluation and Serve read.

``models/{id}.json`` is a model's record, ``aliases/{name}.json`` says which model a name means now.
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
from services.storage import files

CACHE_BYTES = 100_000_000_000
"""For copies of models on a node: the least recently used ones that no process holds are evicted."""


def publish(root: str, record: ModelRecord) -> None:
    """Make a model known to Serve under its id."""
    files.write_json(layout.model_record_uri(root, record.id), record.model_dump())


def set_alias(root: str, name: str, model_id: str) -> None:
    """Make a name refer to this model."""
    files.write_json(layout.alias_uri(root, name), {"model": model_id})


def retract(root: str, record: ModelRecord) -> None:
    """Undo publish and set_alias: Serve forgets the model. Weights that a job made are deleted, a base's files stay."""
    alias = layout.alias_uri(root, record.name)
    if files.exists(alias) and files.read_json(alias)["model"] == record.id:
        files.delete_file(alias)
    files.delete_file(layout.model_record_uri(root, record.id))
    if record.job is not None:
        files.delete_folder(layout.model_folder(root, record.id))


def find(root: str, name_or_id: str) -> ModelRecord:
    """The model of an id or a name. Raises NotFound, naming it."""
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
    """The family of a diffusers folder, detected from its JSON files and names, before anything is spent.

    Raises BadRequest for another pipeline or family than requested, missing parts or weights, a schedule that cannot be used.
    """
    try:
        index = files.read_json(files.join(uri, "model_index.json"))
        found = family_of(index)
        missing = missing_components(index)
    except (OSError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, ModelError) else "model_index.json cannot be read"
        raise BadRequest(
            f"uri {uri!r} is not a diffusers folder that can be aligned: {why}", param="uri"
        ) from error
    if family not in (None, found):
        raise BadRequest(
            f"family: model_index.json of {uri!r} says {found!r}, got {family!r}", param="family"
        )
    if missing:
        message = f"uri {uri!r} is not of family {found!r}: model_index.json lacks {', '.join(missing)}"
        raise BadRequest(message, param="family" if family else "uri", code="missing_components")
    paths = files.list_files(uri, recursive=True)
    lacking = [name for name in COMPONENTS[found] if not any(file.startswith(f"{name}/") for file in paths)]
    with_weights = [name for name in WITH_WEIGHTS if name in COMPONENTS[found]]
    lacking += [
        f"{name}/*.safetensors" for name in with_weights if not any(_is_weights(file, name) for file in paths)
    ]
    if lacking:
        raise BadRequest(f"uri {uri!r} lacks {', '.join(lacking)}", param="uri", code="missing_components")
    try:
        check_scheduler(scheduler_config(uri))
        check_unet(files.read_json(files.join(uri, "unet", "config.json")), found)
    except (FileNotFoundError, ConfigError) as error:
        raise BadRequest(
            f"uri {uri!r} cannot be aligned: {error}", param="uri", code="unsupported_model"
        ) from error
    return found


def _is_weights(file: str, part: str) -> bool:
    """Under the names that are loaded by default, in one file or several: not a variant as .fp16.safetensors."""
    return (
        re.fullmatch(rf"{part}/(diffusion_pytorch_)?model(-\d{{5}}-of-\d{{5}})?\.safetensors", file)
        is not None
    )


def unet_layers(uri: str) -> set[str]:
    """Names of the U-Net's linear and convolution layers, from the headers of its safetensors: no weight is read."""
    layers: set[str] = set()
    paths = [file for file in files.list_files(uri, recursive=True) if _is_weights(file, "unet")]
    for file in paths:
        filesystem, path = files.resolve(files.join(uri, file))
        with filesystem.open_input_file(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        tensors = {name: len(about["shape"]) for name, about in header.items() if name != "__metadata__"}
        layers |= {
            name.removesuffix(".weight")
            for name, rank in tensors.items()
            if name.endswith(".weight") and rank in (2, 4)
        }
    return layers


def folder_digest(uri: str) -> str:
    """sha256 over the sorted (path, sha256 of the file) below a folder."""
    digest = hashlib.sha256()
    for name in files.list_files(uri, recursive=True):
        digest.update(f"{name}\0{_file_digest(files.join(uri, name))}\n".encode())
    return digest.hexdigest()


def _file_digest(uri: str) -> str:
    digest = hashlib.sha256()
    filesystem, path = files.resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def scheduler_config(uri: str) -> dict[str, Any]:
    """The contents of a diffusers folder's scheduler_config.json."""
    return files.read_json(files.join(uri, "scheduler", "scheduler_config.json"))


def num_train_timesteps(record: ModelRecord) -> int:
    """T of the model's noise schedule."""
    return int(scheduler_config((record.adapter_of or record).uri)["num_train_timesteps"])


def fetch(record: ModelRecord) -> tuple[Path, Path | None]:
    """Local folders with the model's files: a diffusers folder and, for LoRA adapters on it, theirs.

    A folder that is local is used where it is, others are copied once, by digest, to this node. Raises BadRequest where the
    copy is not what was registered.
    """
    if record.adapter_of is None:
        return _fetch(record), None
    return _fetch(record.adapter_of), _fetch(record)


def _fetch(record: ModelRecord) -> Path:
    if (local := files.local_path(record.uri)) is not None:
        return local
    node_cache = _node_cache(Path(tempfile.gettempdir()) / "dde-models")
    return node_cache.hold_until_exit(record.digest, partial(_prepare_copy, record))


@cache
def _node_cache(folder: Path) -> NodeCache:
    """This process's view of the models on its node; it holds those that it has used."""
    return NodeCache(folder, CACHE_BYTES)


def _prepare_copy(record: ModelRecord) -> tuple[int, Callable[[Path], None]]:
    return files.folder_bytes(record.uri), partial(_copy, record)


def _copy(record: ModelRecord, folder: Path) -> None:
    files.copy_folder(record.uri, files.as_uri(folder))
    check_digest(record, files.as_uri(folder))


def check_digests(record: ModelRecord) -> None:
    """Refuse local files of a model, adapters and what they work on, that are not those that were registered."""
    for each in filter(None, (record.adapter_of, record)):
        check_digest(each, files.as_uri(_fetch(each)))


def check_digest(record: ModelRecord, uri: str) -> None:
    """Refuse files that are not those that were registered."""
    if (found := folder_digest(uri)) != record.digest:
        message = (
            f"the files of model {record.name} at {record.uri!r} have changed: "
            f"digest {found}, registered as {record.digest}"
        )
        raise BadRequest(message, param="model", code="model_changed")
