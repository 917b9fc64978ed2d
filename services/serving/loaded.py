"""The registry's models in memory: names are looked up at each lease, bases are shared by their adapters."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dde_core.config import SampleConfig
from dde_core.errors import DdeError
from dde_core.models.weight_files import IGNORED, STEMS, Tensors, library_name
from services.api.records import ModelRecord
from services.api.requests import DEFAULT_PROJECT
from services.artifacts import models, proof
from services.errors import ServiceError, Unavailable
from services.serving.contract import Adapter, Base
from services.serving.memory import LoadFailed, Memory, Wanted
from services.serving.names import Names
from services.stages import layout
from services.storage import files

log = logging.getLogger("ray.serve")

Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelLease:
    """A model that stays in memory while the lease lasts (``services.serving.contract.LoadedModel``)."""

    model: Any
    record: ModelRecord

    @property
    def has_safety_checker(self) -> bool:
        """See ``services.serving.contract.LoadedModel``."""
        return bool(self.model.base.has_safety_checker)

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """See ``services.serving.contract.LoadedModel``."""
        tokens, limit = self.model.base.count_tokens(prompt)
        return tokens, limit


class _InMemory(Protocol):
    """What a lease takes its model from."""

    @property
    def model(self) -> Any: ...

    @property
    def num_bytes(self) -> int: ...

    def close(self) -> None: ...


class _Base:
    """A base."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model = base.model
        self.num_bytes = base.num_bytes

    def close(self) -> None:
        self.base.close()


class _Adapter:
    """An adapter of a base."""

    def __init__(self, owner: _Base, key: str, folder: Path) -> None:
        self._owner = owner
        self._key = key
        self.model: Adapter = owner.base.load_adapter(key, folder)
        self.num_bytes = self.model.num_bytes

    def close(self) -> None:
        self._owner.base.unload_adapter(self._key)


class LoadedModels:
    """Leases the models of all projects (``services.serving.contract.LoadedModels``).

    ``load`` makes a base of a diffusers folder, in a thread. Equal files are loaded once, whatever their
    models are called. ``value_bytes`` is the size of a weight in memory, for estimates.
    """

    def __init__(
        self, storage_uri: str, memory: Memory, load: Callable[[Path], Base], value_bytes: int = 4
    ) -> None:
        self._storage = storage_uri
        self._memory = memory
        self._load = load
        self._value_bytes = value_bytes
        self._loads = itertools.count()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._names = Names()

    async def native_size(self, project: str, name: str) -> tuple[int, int]:
        """See ``services.serving.contract.LoadedModels``."""
        root = layout.project_root(self._storage, project)
        record = await self._names.find(root, name)
        key = _key(record)
        if key not in self._sizes:
            height, width = await asyncio.to_thread(models.drawn_size, record, SampleConfig())
            self._sizes[key] = (width, height)
        return self._sizes[key]

    @asynccontextmanager
    async def lease(self, project: str, name: str) -> AsyncIterator[ModelLease]:
        """The model that a name, id or ``name@alias`` refers to now, in memory while the block runs.

        A running lease keeps its model, whatever becomes of the name and the files. One that waits for a load
        that fails is looked up again, and takes the model that the name refers to by then. While storage does
        not answer, a name refers to what it did before, and what is in memory is used.

        Raises NotFound for a name that the project does not have, Unavailable where storage does not answer
        or no room can be made, ServiceError (model_unusable) for a model that cannot be loaded.
        """
        root = layout.project_root(self._storage, project)
        record = await self._names.find(root, name)
        async with AsyncExitStack() as stack:
            while True:
                try:
                    found = await stack.enter_async_context(self._memory.hold(self._wanted(record)))
                    break
                except LoadFailed as failure:
                    if isinstance(failure.error, Unavailable):
                        raise _unavailable(record, failure.error) from failure
                    current = await self._names.find(root, name)
                    if current == record:
                        raise _unusable(record, failure.error) from failure
                    record = current
                except Unavailable as error:
                    raise _unavailable(record, error) from error
            yield ModelLease(found.model, record)

    async def preload(self, names: Sequence[str]) -> None:
        """Load models, each ``name`` or ``project/name``, one after the other.

        Those that cannot be loaded, and those that the later ones left no room for, are logged.
        """
        loaded: dict[str, str] = {}
        for name in names:
            project, _, model = name.rpartition("/")
            try:
                async with self.lease(project or DEFAULT_PROJECT, model) as lease:
                    loaded[name] = _key(lease.record)
            except ServiceError as error:
                log.error("preload: %s: %s", name, error)
            except Exception:
                log.exception("preload: %s", name)
        for name, key in loaded.items():
            if key not in self._memory.keys:
                log.error(
                    "preload: %s made room for those after it: raise max_bytes or shorten the list", name
                )

    def _wanted(self, record: ModelRecord) -> Wanted[_InMemory]:
        base = record.adapter_of or record
        of_base: Wanted[_InMemory] = Wanted(
            _key(base),
            "model",
            lambda: _with_files(base, partial(weight_bytes, value_bytes=self._value_bytes)),
            lambda _: _with_files(base, lambda folder: _Base(self._load(folder))),
        )
        if record.adapter_of is None:
            return of_base
        # A key of its own for each load: the same adapter may still be unloaded while it is loaded anew.
        key = f"{record.digest}-{next(self._loads)}"
        return Wanted(
            _key(record),
            "adapter",
            lambda: _with_files(record, partial(adapter_bytes, value_bytes=self._value_bytes)),
            lambda owner: _with_files(record, partial(_Adapter, owner, key)),
            of_base,
        )


def weight_bytes(folder: Path, value_bytes: int = 4) -> int:
    """Bytes that the weights of a diffusers folder take in memory, from the headers of their files.

    Raises ModelError for files that are missing or damaged.
    """
    uri = files.as_uri(folder)
    parts = [part for part in STEMS if (folder / part).is_dir()]
    found = {part: proof.tensors_of(uri, part) for part in parts}
    return sum(
        _bytes(tensors, value_bytes, part) for part, of_part in found.items() for tensors in of_part.values()
    )


def adapter_bytes(folder: Path, value_bytes: int = 4) -> int:
    """Bytes that LoRA adapters take in memory. Raises ModelError for files that are missing or damaged."""
    uri = files.as_uri(folder)
    names = [name for name in files.list_files(uri) if name.endswith(".safetensors")]
    return sum(_bytes(proof.read_header(uri, name), value_bytes) for name in names)


def _bytes(tensors: Tensors, value_bytes: int, part: str | None = None) -> int:
    loaded = [
        tensor
        for name, tensor in tensors.items()
        if part is None or not re.fullmatch(IGNORED[part], library_name(part, name))
    ]
    return sum(math.prod(tensor.shape) for tensor in loaded) * value_bytes


def _with_files(record: ModelRecord, work: Callable[[Path], Result]) -> Result:
    """What ``work`` makes of the model's own folder, which is on this node meanwhile."""
    with models.hold(record) as folder:
        return work(folder)


def _key(record: ModelRecord) -> str:
    """Equal for equal files in one place, those of the base included."""
    return " ".join(f"{each.uri} {each.digest}" for each in (record.adapter_of, record) if each)


def _unavailable(record: ModelRecord, error: Unavailable) -> Unavailable:
    message = f"model {record.name!r} cannot be loaded now: {error}"
    return Unavailable(message, param="model", code=error.code)


def _unusable(record: ModelRecord, error: Exception) -> ServiceError:
    """An error that lies in the model, not in the request."""
    is_known = isinstance(error, DdeError | ServiceError)
    reason = str(error) if is_known else f"{type(error).__name__}: {error}"
    message = f"model {record.name!r} cannot be loaded: {reason}"
    return ServiceError(message, param="model", code="model_unusable")
