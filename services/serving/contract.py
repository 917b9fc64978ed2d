"""What requests for images need of loaded models, and these of the engine's. Imports no torch and no Ray."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from services.api.records import ModelRecord


class LoadedModel(Protocol):
    """A model in memory. It stays there while it is leased."""

    @property
    def model(self) -> Any:
        """What ``dde_core.engine.contract.Engine.submit`` takes."""

    @property
    def record(self) -> ModelRecord:
        """The version that the requested name referred to when the lease began."""

    @property
    def has_safety_checker(self) -> bool:
        """Whether the model's folder has one. It is not run."""

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        """A prompt's tokens, and how many of them the text encoders read at most. In any thread."""


class LoadedModels(Protocol):
    """The models of a replica, by the names of a project's registry."""

    async def native_size(self, project: str, name: str) -> tuple[int, int]:
        """Width and height in pixels that the model was made for. Loads nothing. Raises NotFound."""

    def lease(self, project: str, name: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Look the name up and hold its model in memory until the context is left; load it if need be.

        The context may be left in another task than the one that entered it. Entering it raises NotFound for
        a model that the project does not have and ServiceError for one that cannot be loaded; it may be
        cancelled.
        """


class Adapter(Protocol):
    """A base model with one of its adapters: what the engine takes."""

    @property
    def num_bytes(self) -> int:
        """The memory that the adapter takes beside its base."""


class Base(Protocol):
    """A loaded diffusers folder (``dde_core.engine.model.BaseModel``) and the adapters loaded into it.

    One thread loads, unloads and closes. Meanwhile the engine draws with other bases, with this one and with
    its other adapters, never with the adapter that is loaded or unloaded. ``close`` is called when the engine
    uses none of them. A loaded base or adapter reads its files no more.
    """

    @property
    def model(self) -> Any:
        """The base without an adapter: what the engine takes."""

    @property
    def num_bytes(self) -> int:
        """The memory that the base takes, without adapters."""

    def load_adapter(self, key: str, folder: Path) -> Adapter:
        """Load LoRA adapters from their folder. Raises ModelError for those of another base."""

    def unload_adapter(self, key: str) -> None:
        """Free the adapter's memory."""

    def close(self) -> None:
        """Free the memory."""
