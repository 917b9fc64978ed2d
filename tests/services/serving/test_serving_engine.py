"""The engine without Serve: every call looks its name up; generation stops when the caller disconnects."""

from __future__ import annotations

import asyncio
import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from dde_core.errors import ConfigError
from dde_core.shapes import MODEL_DIR
from services.api.images import ImageRequest
from services.api.records import ModelRecord
from services.artifacts import models
from services.errors import NotFound, ServiceError
from services.serving.app import in_thread
from services.serving.engine import CallerDisconnected, Engine
from services.stages import layout
from services.storage import files


def publish(root: str, model_id: str, uri: str = MODEL_DIR.as_uri()) -> ModelRecord:
    record = ModelRecord(id=model_id, name="m", uri=uri, family="sd15", digest=model_id, created_at=0)
    models.publish(root, record)
    return record


@pytest.fixture
def root(tmp_path) -> str:
    uri = files.as_uri(tmp_path)
    publish(uri, "model_a")
    models.set_alias(uri, "named", "model_a")
    return uri


def request(**changes) -> ImageRequest:
    return ImageRequest(**{"model": "named", "prompt": "a red circle", "steps": 2, **changes})


def test_images_depend_on_prompt_and_seed(root: str):
    engine = Engine(root)
    first, second = engine.generate(request(n=2, seed=5))
    assert engine.generate(request(seed=6)) == [second]
    assert first != second
    assert np.asarray(Image.open(io.BytesIO(first))).shape == (32, 32, 3)


def test_a_project_draws_with_its_own_models_alone(root: str):
    theirs = layout.project_root(root, "team-a")
    publish(theirs, "model_b")
    models.set_alias(theirs, "named", "model_b")
    engine = Engine(root)
    engine.generate(request(), project="team-a")
    assert list(engine._models) == ["model_b"]
    for name in ("model_a", "../../models/model_a"):
        with pytest.raises(NotFound):
            engine.generate(request(model=name), project="team-a")
    with pytest.raises(NotFound):
        engine.generate(request(model="model_b"))


def test_an_alias_takes_effect_at_the_next_call(root: str):
    engine = Engine(root, max_models=1)
    engine.generate(request())
    publish(root, "model_b")
    models.set_alias(root, "named", "model_b")
    engine.generate(request())
    assert list(engine._models) == ["model_b"], "the engine keeps the most recently used model"


@pytest.mark.parametrize(
    "name", ["nope", "../secrets", "..%2Fsecrets", "my model", "50%", "a?b", "model_zzz"]
)
def test_an_unknown_model_is_refused_by_name(root: str, name: str):
    with pytest.raises(NotFound) as refused:
        Engine(root).generate(request(model=name))
    assert repr(name) in str(refused.value)


def test_a_size_that_the_model_cannot_generate_is_refused(root: str):
    with pytest.raises(ConfigError, match="size width must be a multiple of 8, got '33x32'"):
        Engine(root).generate(request(size="33x32"))


def broken(root: str, folder: Path) -> Path:
    """A copy of the shipped model under the name that requests use."""
    shutil.copytree(MODEL_DIR, folder)
    publish(root, "model_b", folder.as_uri())
    models.set_alias(root, "named", "model_b")
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_one_nan_weight_is_an_error_and_no_black_image(root: str, tmp_path):
    weights = broken(root, tmp_path / "model")
    tensors = load_file(weights)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ServiceError, match="model 'm' gives no images: latents are not finite in 2 of 2"):
        Engine(root).generate(request(n=2))


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_cause(root: str, tmp_path):
    weights = broken(root, tmp_path / "model")
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ServiceError, match=r"model 'm' cannot be loaded: unet of .*") as failure:
        Engine(root).generate(request())
    assert (failure.value.status, failure.value.code, failure.value.param) == (500, "model_unusable", "model")


def test_an_error_that_nobody_expected_is_answered_with_its_cause_and_logged(caplog):
    def fail() -> None:
        raise RuntimeError("out of memory\nin 12 frames")

    logging.getLogger("ray.serve").addHandler(caplog.handler)
    with pytest.raises(ServiceError, match=r"^the request failed: RuntimeError: out of memory$"):
        asyncio.run(in_thread(fail))
    assert "in 12 frames" in caplog.text


def test_generation_stops_when_the_caller_disconnects(root: str):
    engine = Engine(root)
    calls: list[int] = []

    def disconnects_after_three_calls() -> bool:
        calls.append(1)
        return len(calls) > 3

    with pytest.raises(CallerDisconnected):
        engine.generate(request(steps=50), disconnects_after_three_calls)
    assert len(calls) == 4
    assert engine.generate(request()), "the engine serves the next request"
