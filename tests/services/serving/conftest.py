"""Replicas without Ray and torch: the routes of images over real HTTP, and a fake engine behind them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from PIL import Image

from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord
from services.api.requests import DEFAULT_PROJECT
from services.serving.images import Images
from services.serving.routes import image_routes, install_errors
from services.storage import files
from tests.services.control.test_streams import listening
from tests.support.fake_engine import FakeEngine, FakeModels

RECORD = ModelRecord(
    id="model_1", name="shapes", uri=MODEL_DIR.as_uri(), family="sd15", digest="d1", created_at=0
)


@dataclass(frozen=True)
class Replica:
    """A replica that answers at ``url``; the control plane is not in front of it."""

    url: str
    engine: FakeEngine
    models: FakeModels
    root: Path


@contextmanager
def replica(folder: Path, record: ModelRecord = RECORD, *, paused: bool = False) -> Iterator[Replica]:
    """A replica that knows ``record`` by its name, in the default project and in team-a."""
    engine = FakeEngine(paused=paused)
    models = FakeModels({(project, record.name): record for project in (DEFAULT_PROJECT, "team-a")})
    api = FastAPI()
    install_errors(api)
    api.include_router(image_routes(Images(engine, models, files.as_uri(folder))))
    try:
        with listening(api) as url:
            yield Replica(url, engine, models, folder)
    finally:
        engine.close()


def decoded(data: str | bytes | None) -> Image.Image:
    """An image file, or one in base64."""
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def pixels(data: str | bytes | None) -> np.ndarray:
    return np.asarray(decoded(data))


def text_of(data: str | bytes | None) -> dict[str, Any] | None:
    """What the text chunk of a PNG file says."""
    chunk = decoded(data).info.get("dde")
    return None if chunk is None else json.loads(chunk)
