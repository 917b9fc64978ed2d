"""What a replica does, without Ray Serve: keep models in memory, generate images, score images."""

from __future__ import annotations

import base64
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from dde_core.config import Background
from dde_core.errors import DataError, DdeError, NonFiniteError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.scorers.kinds import KINDS, Scorer
from dde_core.shapes.scenes import SIZE_PX
from services.api.images import ImageRequest, ScoreRequest
from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import DEFAULT_PROJECT
from services.artifacts import models, scorers
from services.errors import BadRequest, ServiceError
from services.pairs.images import BadImage, decode_whole, to_png
from services.stages import layout

Loaded = TypeVar("Loaded", TextToImage, Scorer)


class CallerDisconnected(Exception):
    """Nobody waits for the images any more, so the generation stopped."""


@dataclass(frozen=True)
class Scored:
    """One number per scorer and image; each scorer's description and digest."""

    scores: dict[str, list[float]]
    scorers: dict[str, dict[str, Any]]


class Engine:
    """Generates and scores with the registry's models and scorers, one request at a time.

    It keeps the ``max_models`` last used of both.
    """

    def __init__(self, storage_uri: str, max_models: int = 4, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        self._root = storage_uri
        self._max_models = max_models
        self._device = device
        self._models: OrderedDict[str, Any] = OrderedDict()
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

    def score(self, request: ScoreRequest, project: str = DEFAULT_PROJECT) -> Scored:
        """One number per scorer and pair of image and prompt.

        Raises BadRequest, naming the entry, NotFound for a scorer that the project does not have, and
        ServiceError for one that cannot be loaded or gives values that are not finite.
        """
        request.check_lengths()
        root = layout.project_root(self._root, project)
        records = [scorers.find(root, name) for name in request.scorers]
        for record in records:
            _check_level(record)
        images = _stack(
            [from_base64(data, f"images[{i}]", request.background) for i, data in enumerate(request.images)]
        )
        height, width = images.shape[1:3]
        if any(KINDS[record.kind].is_built_in for record in records) and (width, height) != (
            SIZE_PX,
            SIZE_PX,
        ):
            message = f"images must be {SIZE_PX} x {SIZE_PX} px for these scorers, got {width} x {height}"
            raise BadRequest(message, param="images")
        found = Scored({}, {})
        for record in records:
            with self._lock:
                scorer = self._load_scorer(record)
                found.scores[record.name] = _scores(record, scorer, images, request.prompts)
            found.scorers[record.name] = {**scorer.description, "digest": record.digest}
        return found

    def _load_model(self, record: ModelRecord) -> TextToImage:
        def load() -> TextToImage:
            try:
                return TextToImage(ModelFolder(*models.fetch(record)), self._device)
            except DdeError as error:
                raise _model_error(record, f"cannot be loaded: {error}") from error

        return self._load(record.id, load)

    def _load_scorer(self, record: ScorerRecord) -> Scorer:
        def load() -> Scorer:
            try:
                return scorers.load(record, self._device)
            except DdeError as error:
                raise _scorer_error(record, f"cannot be loaded: {error}") from error

        return self._load(record.id, load)

    def _load(self, record_id: str, load: Callable[[], Loaded]) -> Loaded:
        """What is in memory under this id, loaded where it is not; the least recently used makes room."""
        if record_id not in self._models:
            self._models[record_id] = load()
            while len(self._models) > self._max_models:
                self._models.popitem(last=False)
        self._models.move_to_end(record_id)
        loaded: Loaded = self._models[record_id]
        return loaded


def _model_error(record: ModelRecord, reason: str) -> ServiceError:
    """An error that lies in the model, not in the request."""
    return ServiceError(f"model {record.name!r} {reason}", param="model", code="model_unusable")


def _scorer_error(record: ScorerRecord, reason: str) -> ServiceError:
    """An error that lies in the scorer, not in the request."""
    return ServiceError(f"scorer {record.name!r} {reason}", param="scorers", code="scorer_unusable")


def _check_level(record: ScorerRecord) -> None:
    """Refuse a scorer that has no number for a single image."""
    kind = KINDS[record.kind]
    if kind.level != "image":
        message = f"scorers: {record.name!r} is of kind {kind.name}, which has no number for a single image: "
        raise BadRequest(f"{message}{kind.scale}", param="scorers", code="scorer_of_sets")


def _scores(record: ScorerRecord, scorer: Scorer, images: np.ndarray, prompts: list[str]) -> list[float]:
    try:
        scores: list[float] = scorer(images, prompts).tolist()
    except DataError as error:
        raise BadRequest(str(error), param="prompts") from error
    except NonFiniteError as error:
        raise _scorer_error(record, f"gives no scores: {error}") from error
    return scores


def from_base64(data: str, field: str, background: Background = "white") -> np.ndarray:
    """A base64 image file as uint8 [h, w, 3], read as those of a dataset. Raises BadRequest, naming the
    field."""
    try:
        return decode_whole(base64.b64decode(data, validate=True), background)
    except BadImage as error:
        raise BadRequest(f"{field} cannot be scored: {error}", param=field, code=error.cause) from error
    except ValueError as error:
        raise BadRequest(f"{field} is not base64: {data[:40]!r}", param=field) from error


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise BadRequest(f"images must all have one size, got {sorted(shapes)}", param="images")
    return np.stack(images)
