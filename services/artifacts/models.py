"""Models as files: the control plane writes their records; training, evaluation and Serve read them.

``models/{id}.json`` is a model's record; ``aliases/{name}.json`` maps a name to its current model.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from dde_core.config import SampleConfig
from dde_core.errors import ConfigError
from dde_core.models.configs import AutoencoderFields, sample_size
from dde_core.models.weight_files import Tensors, is_finite
from dde_core.node_cache import NodeCache
from services.api.records import ModelRecord
from services.api.requests import REFERENCE_PATTERN
from services.artifacts import proof
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
    """Undo publish and set_alias, and delete the images that evaluations drew with the model.

    Deletes the weights of an aligned model and keeps those of a base model.
    """
    alias = layout.alias_uri(root, record.name)
    if files.exists(alias) and files.read_json(alias)["model"] == record.id:
        files.delete_file(alias)
    files.delete_file(layout.model_record_uri(root, record.id))
    files.delete_folder(layout.images_of(layout.images_folder(root), identity(record)))
    if record.job is not None:
        files.delete_folder(layout.model_folder(root, record.id))


def identity(record: ModelRecord) -> str:
    """Equal for equal files: 32 hex digits of the model's digest and that of what its adapters modify."""
    digests = [each.digest for each in (record, record.adapter_of) if each]
    return hashlib.sha256("\0".join(digests).encode()).hexdigest()[:32]


def drawn_size(record: ModelRecord, sample: SampleConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that the model draws with these settings.

    Raises ConfigError for a size that its VAE's factor does not divide, ModelError or ConfigError for a
    folder that has changed since it was registered.
    """
    uri = (record.adapter_of or record).uri
    height, width = sample_size(proof.read_object(uri, "unet", "config.json"), record.family)
    vae = AutoencoderFields.read(proof.read_object(uri, "vae", "config.json"))
    factor = 1 << (len(vae.widths) - 1)
    size = (sample.height or height * factor, sample.width or width * factor)
    for name, value in zip(("height", "width"), size, strict=True):
        if value % factor:
            raise ConfigError(f"sample.{name}", value, f"must be a multiple of {factor} for {record.name}")
    return size


def find(root: str, name_or_id: str) -> ModelRecord:
    """The model with this name, name@alias or id. Raises NotFound if there is none."""
    model_id: str | None = None
    while re.fullmatch(REFERENCE_PATTERN, name_or_id):
        earlier = model_id
        try:
            model_id = files.read_json(layout.alias_uri(root, name_or_id))["model"]
        except FileNotFoundError:
            model_id = name_or_id
        if model_id == earlier:
            break
        try:
            return ModelRecord.model_validate_json(files.read_bytes(layout.model_record_uri(root, model_id)))
        except FileNotFoundError:
            pass  # deleted after the name was read: it may refer to another model by now
    raise NotFound(f"model {name_or_id!r} does not exist", param="model", code="model_not_found")


def unet_layers(uri: str) -> set[str]:
    """Names of the U-Net's linear and convolution layers, from safetensors headers: no weight is read."""
    return {
        name.removesuffix(".weight")
        for of_file in proof.tensors_of(uri, "unet").values()
        for name, tensor in of_file.items()
        if name.endswith(".weight") and len(tensor.shape) in (2, 4)
    }


def folder_digest(uri: str, weights: Mapping[str, Tensors] | None = None) -> str:
    """sha256 over the path and the sha256 of every file in a folder, sorted by path.

    The tensors of the files in ``weights`` are checked as they are read. Raises BadRequest for an infinite or
    NaN value.
    """
    digest = hashlib.sha256()
    for name in files.list_files(uri, recursive=True):
        found = file_digest(uri, name, (weights or {}).get(name))
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()


def file_digest(uri: str, name: str = "", tensors: Tensors | None = None) -> str:
    """sha256 of the file ``name`` in a folder, or of the file ``uri`` itself; checked as by folder_digest."""
    digest = hashlib.sha256()
    filesystem, path = files.resolve(files.join(uri, *filter(None, name.split("/"))))
    position = 0
    with filesystem.open_input_stream(path) as stream:
        for tensor, found in (tensors or {}).items():
            digest.update(stream.read(found.start - position))
            position = found.end
            for start in range(found.start, found.end, READ_BYTES):
                sources.check_time()
                block = stream.read(min(READ_BYTES, found.end - start))
                digest.update(block)
                if not is_finite(block, found.dtype):
                    message = f"uri {uri!r} cannot be aligned: {tensor} of {name} has infinite or NaN values"
                    raise BadRequest(message, param="uri", code="non_finite_weights")
        while block := stream.read(READ_BYTES):
            sources.check_time()
            digest.update(block)
    return digest.hexdigest()


def scheduler_config(uri: str) -> dict[str, Any]:
    """The contents of a diffusers folder's scheduler_config.json."""
    return proof.read_object(uri, "scheduler", "scheduler_config.json")


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
    return node_cache().hold_until_exit(record.digest, partial(_prepare_copy, record))


@contextmanager
def hold(record: ModelRecord) -> Iterator[Path]:
    """The local folder of the model's own files: of its LoRA adapters if it has them. Like ``fetch``, but a
    copy is held while the block runs, and may be evicted from the node later."""
    local = files.local_path(record.uri)
    if local is not None:
        yield local
        return
    with node_cache().hold(record.digest, partial(_prepare_copy, record)) as folder:
        yield folder


def node_cache() -> NodeCache:
    """This process's cache of models and scorers on its node. It holds those that the process has used."""
    return _cache_in(Path(tempfile.gettempdir()) / "dde-models")


@cache
def _cache_in(folder: Path) -> NodeCache:
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
