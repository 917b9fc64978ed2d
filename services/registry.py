"""Models as files: what the control plane writes, and what training, evaluation and Serve read.

``models/{id}.json`` is a model's record, ``aliases/{name}.json`` says which model a name means now.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import uuid
from pathlib import Path

from services import storage
from services.contracts import NAME_PATTERN, Family, ModelRecord
from services.errors import BadRequest, NotFound

COMPONENTS: dict[Family, tuple[str, ...]] = {
    "sd15": ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
}
WITH_WEIGHTS = ("unet", "vae", "text_encoder")


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
    if re.fullmatch(NAME_PATTERN, name_or_id):
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
    files = storage.list_files(uri, recursive=True)
    lacking = [name for name in COMPONENTS[family] if not any(file.startswith(f"{name}/") for file in files)]
    lacking += [f"{name}/*.safetensors" for name in WITH_WEIGHTS if not any(_is_weights(file, name) for file in files)]
    if lacking:
        raise BadRequest(f"uri {uri!r} lacks {', '.join(lacking)}", param="uri", code="missing_components")


def _is_weights(file: str, part: str) -> bool:
    return file.startswith(f"{part}/") and file.endswith(".safetensors")


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


def num_train_timesteps(record: ModelRecord) -> int:
    """T of the model's noise schedule."""
    return int(storage.read_json(storage.join(record.uri, "scheduler", "scheduler_config.json"))["num_train_timesteps"])


def fetch(record: ModelRecord) -> Path:
    """A local folder with the model's files: itself where it is local, else a copy kept by digest on this node.

    Raises BadRequest where the copy is not what was registered.
    """
    filesystem, path = storage.resolve(record.uri)
    if filesystem.type_name == "local":
        return Path(path)
    cache = Path(tempfile.gettempdir()) / "dde-models"
    target = cache / record.digest
    if not target.exists():
        beside = cache / f"{record.digest}.{uuid.uuid4().hex}.part"
        try:
            storage.copy_folder(record.uri, storage.as_uri(beside))
            check_digest(record, storage.as_uri(beside))
            beside.rename(target)
        except OSError:
            if not target.exists():  # else another process on this node was faster
                raise
        finally:
            storage.delete_folder(storage.as_uri(beside))
    return target


def check_digest(record: ModelRecord, uri: str) -> None:
    """Refuse files that are not those that were registered."""
    if (found := folder_digest(uri)) != record.digest:
        message = (
            f"the files of model {record.name} at {record.uri!r} have changed: digest {found}, registered as {record.digest}"
        )
        raise BadRequest(message, param="model", code="model_changed")
