"""What the parts of Serve ask of one another, and of the engine's models. Imports no torch and no Ray."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from services.api.records import ModelRecord


class Lease(Protocol):
    """A model that stays in memory while the lease lasts. ``model`` is what ``Engine.submit`` takes."""

    @property
    def model(self) -> Any: ...

    @property
    def record(self) -> ModelRecord: ...


class Models(Protocol):
    """The registry's models, in memory."""

    def lease(self, project: str, name: str) -> AbstractAsyncContextManager[Lease]:
        """The model that a name, id or ``name@alias`` refers to now, loaded unless it is in memory.

        Raises NotFound for a name that the project does not have, Unavailable where storage does not answer
        or no room can be made, ServiceError (model_unusable) for a model that cannot be loaded.
        """
        ...


class Adapter(Protocol):
    """A base model with one of its adapters, as the engine takes it."""

    @property
    def num_bytes(self) -> int:
        """The memory that the adapter takes beside its base."""


class Base(Protocol):
    """A loaded diffusers folder (``dde_core.engine.model.BaseModel``) and the adapters loaded into it.

    Adapters are loaded and unloaded in a thread while the engine draws with the base and with others of its
    adapters, never with this one. ``close`` is called when the engine uses none of them.
    """

    @property
    def model(self) -> Any:
        """The base without an adapter, as the engine takes it."""

    @property
    def num_bytes(self) -> int:
        """The memory that the base takes, without adapters."""

    def load_adapter(self, key: str, folder: Path) -> Adapter:
        """Load LoRA adapters from their folder. Raises ModelError for those of another base."""

    def unload_adapter(self, key: str) -> None:
        """Free the adapter's memory."""

    def close(self) -> None:
        """Free the memory."""
