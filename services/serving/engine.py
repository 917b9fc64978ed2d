"""What a replica does, without Ray Serve: keep the models that are asked for, draw pictures, score pictures."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from dde_core.errors import DataError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes.scorers import score
from services.api.requests import ImageRequest, ScoreRequest
from services.artifacts import models
from services.errors import BadRequest


class Stopped(Exception):
    """The caller is gone; the rest of a generation is not worth drawing."""


class Engine:
    """Models by name from the registry in storage, the ``max_models`` last used kept. Calls are made one at a time."""

    def __init__(self, storage_uri: str, max_models: int = 4, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        self._root, self._max_models, self._device = storage_uri, max_models, device
        self._models: OrderedDict[str, TextToImage] = OrderedDict()
        self._lock = threading.Lock()

    def generate(self, request: ImageRequest, stopped: Callable[[], bool] = lambda: False) -> list[bytes]:
        """Draw a request's pictures as PNG. A name that was pointed at another model means that one from then on.

        Raises NotFound for an unknown model, ConfigError for a size it cannot draw, Stopped when ``stopped()``.
        """
        record, sample = models.find(self._root, request.model), request.sample()

        def stop_if_gone(step: int, steps: int) -> None:
            if stopped():
                raise Stopped

        with self._lock:
            stop_if_gone(0, sample.steps)
            if record.id not in self._models:
                self._models[record.id] = TextToImage(ModelFolder(*models.fetch(record)), self._device)
                while len(self._models) > self._max_models:
                    self._models.popitem(last=False)
            self._models.move_to_end(record.id)
            seeds = [request.seed + i for i in range(request.n)]
            pictures = self._models[record.id]([request.prompt] * request.n, seeds, sample, stop_if_gone)
        return [to_png(picture) for picture in pictures]

    def score(self, request: ScoreRequest) -> dict[str, list[float]]:
        """Score pictures against prompts, for each scorer one number a picture. Raises BadRequest, naming the entry."""
        if len(request.images) != len(request.prompts):
            message = f"images holds {len(request.images)} entries, prompts {len(request.prompts)}"
            raise BadRequest(message, param="prompts")
        pictures = [from_base64(data, f"images[{i}]") for i, data in enumerate(request.images)]
        try:
            scores = score(_stack(pictures), request.prompts)
        except DataError as error:
            raise BadRequest(
                str(error), param="images" if str(error).startswith("pictures") else "prompts"
            ) from error
        return {name: scores[name].tolist() for name in request.scorers}


def to_png(picture: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as PNG."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


def from_base64(data: str, field: str) -> np.ndarray:
    """A base64 picture file as uint8 [h, w, 3]. Raises BadRequest, naming the field."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            return np.asarray(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRequest(f"{field} is not a base64 picture: {data[:40]!r}", param=field) from error


def _stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise BadRequest(f"images must have one size, got {sorted(shapes)}", param="images")
    return np.stack(pictures)
