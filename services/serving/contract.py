"""What requests for images need of loaded models. Imports no torch and no Ray."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
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


class LoadedModels(Protocol):
    """The models of a replica, by the names of a project's registry."""

    def lease(self, project: str, name: str) -> AbstractAsyncContextManager[LoadedModel]:
        """Look the name up and hold its model in memory until the context is left; load it if need be.

        The context may be left in another task than the one that entered it. Entering it raises NotFound for
        a model that the project does not have and ServiceError for one that cannot be loaded; it may be
        cancelled.
        """
