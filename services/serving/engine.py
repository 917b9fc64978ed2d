"""What a replica does, without Ray Serve: keep models in memory and generate images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from dde_core.errors import DdeError, NonFiniteError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from services.api.images import ImageRequest
from services.api.records import ModelRecord
from services.api.requests import DEFAULT_PROJECT
from services.artifacts import models
from services.errors import ServiceError
from services.pairs.images import to_png
from services.stages import layout


class CallerDisconnected(Exception):
    """Nobody waits for the images any more, so the generation stopped."""


class Engine:
    """Generates with the registry's models, one request at a time. It keeps the ``max_models`` last used."""

    def __init__(self, storage_uri: str, max_models: int = 4, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        self._root = storage_uri
        self._max_models = max_models
        self._device = device
        self._models: OrderedDict[str, TextToImage] = OrderedDict()
        self._lock = threading.Lock()

    def generate(
        self,
        request: ImageRequest,
        is_disconnected: Callable[[], bool] = lambda: False,
        project: str = DEFAULT_PROJECT,
    ) -> list[bytes]:
        """A request's images as PNG files. Each call reads the registry, so a new alias applies at once.

        Raises NotFound for a model that the project does not have, ConfigError for a size that the model
        cannot generate, ServiceError for a model that cannot be loaded or gives values that are not finite,
        and CallerDisconnected as soon as ``is_disconnected()``, which is called at every sampling step.
        """
        record = models.find(layout.project_root(self._root, project), request.model)
        sample = request.sample()
        seeds = request.seeds()

        def stop_if_disconnected(step: int, steps: int) -> None:
            if is_disconnected():
                raise CallerDisconnected

        with self._lock:
            stop_if_disconnected(0, sample.steps)
            model = self._load_model(record)
            try:
                images = model([request.prompt] * request.n, seeds, sample, stop_if_disconnected)
            except NonFiniteError as error:
                raise _model_error(record, f"gives no images: {error}") from error
        return [to_png(image) for image in images]

    def _load_model(self, record: ModelRecord) -> TextToImage:
        def load() -> TextToImage:
            try:
                return TextToImage(ModelFolder(*models.fetch(record)), self._device)
            except DdeError as error:
                raise _model_error(record, f"cannot be loaded: {error}") from error

        return self._load(record.id, load)

    def _load(self, record_id: str, load: Callable[[], TextToImage]) -> TextToImage:
        """What is in memory under this id, loaded where it is not; the least recently used makes room."""
        if record_id not in self._models:
            self._models[record_id] = load()
            while len(self._models) > self._max_models:
                self._models.popitem(last=False)
        self._models.move_to_end(record_id)
        return self._models[record_id]


def _model_error(record: ModelRecord, reason: str) -> ServiceError:
    """An error that lies in the model, not in the request."""
    return ServiceError(f"model {record.name!r} {reason}", param="model", code="model_unusable")
