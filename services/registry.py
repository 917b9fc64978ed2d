"""Models as files: what the control plane writes, and what training, evaluation and Serve read.

``models/{id}.json`` is a model's record, ``aliases/{name}.json`` says which model a name means now.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from pathlib import Path

from services import storage
from services.contracts import Family, ModelRecord
from services.errors import BadRequest, NotFound

COMPONENTS: dict[Family, tuple[str, ...]] = {
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
}


def model_uri(root: str, model_id: str) -> str:
    """Where an aligned model's weights lie."""
    return storage.join(root, "models", model_id)


def publish(root: str, record: ModelRecord) -> None:
    """Make a model known to Serve under its id."""
    storage.write_json(storage.join(root, "models", f"{record.id}.json"), record.model_dump())


def point(root: str, name: str, model_id: str) -> None:
    """Let a name mean this model from now on."""
    storage.write_json(storage.join(root, "aliases", f"{name}.json"), {"model": model_id})


def retract(root: str, record: ModelRecord) -> None:
    """Undo publish and point: Serve forgets the model. Weights that a job made are deleted, a base's files stay."""
    alias = storage.join(root, "aliases", f"{record.name}.json")
    if storage.exists(alias) and storage.read_json(alias)["model"] == record.id:
        storage.delete_file(alias)
    storage.delete_file(storage.join(root, "models", f"{record.id}.json"))
    if record.job is not None:
        storage.delete_folder(model_uri(root, record.id))


def find(root: str, name_or_id: str) -> ModelRecord:
    """The model of an id or a name. Raises NotFound, naming it."""
    if "/" not in name_or_id:
        try:
            model_id = storage.read_json(storage.join(root, "aliases", f"{name_or_id}.json"))["model"]
        except FileNotFoundError:
            model_id = name_or_id
        try:
            return ModelRecord.model_validate_json(storage.read_bytes(storage.join(root, "models", f"{model_id}.json")))
        except FileNotFoundError:
            pass
    raise NotFound(f"model {name_or_id!r} does not exist", param="model", code="model_not_found")


def check_components(uri: str, family: Family) -> None:
    """Refuse a folder that is not a diffusers pipeline of this family, before anything is spent."""
    try:
        index = storage.read_json(storage.join(uri, "model_index.json"))
        parts = {name: part for name, part in index.items() if isinstance(part, list) and part and part[0] is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise BadRequest(f"uri {uri!r} is not a diffusers folder: model_index.json cannot be read", param="uri") from error
    missing = [name for name in COMPONENTS[family] if name not in parts]
    if missing:
        raise BadRequest(
            f"uri {uri!r} is not of family {family!r}: model_index.json lacks {', '.join(missing)}", param="family"
        )


def folder_digest(uri: str) -> str:
    """sha256 over the sorted (path, sha256 of the file) below a folder."""
    digest = hashlib.sha256()
    for name in storage.list_files(uri, recursive=True):
        digest.update(f"{name}\0{_file_digest(storage.join(uri, name))}\n".encode())
    return digest.hexdigest()


def _file_digest(uri: str) -> str:
    digest = hashlib.sha256()
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def fetch(record: ModelRecord) -> Path:
    """A local folder with the model's files: itself where it is local, else a copy kept by digest on this node."""
    filesystem, path = storage.resolve(record.uri)
    if filesystem.type_name == "local":
        return Path(path)
    cache = Path(tempfile.gettempdir()) / "dde-models"
    target = cache / record.digest
    if not target.exists():
        beside = cache / f"{record.digest}.{uuid.uuid4().hex}.part"
        storage.copy_folder(record.uri, storage.as_uri(beside))
        try:
            beside.rename(target)
        except OSError:  # another process on this node was faster
            storage.delete_folder(storage.as_uri(beside))
    return target
