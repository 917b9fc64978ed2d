"""The engine without Serve: names are looked up at every call, a caller that leaves stops its generation."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dde_core.errors import ConfigError
from dde_core.shapes import MODEL_DIR
from dde_core.shapes.scenes import parse, render
from services.api.records import ModelRecord
from services.api.requests import ImageRequest, ScoreRequest
from services.artifacts import models
from services.errors import BadRequest, NotFound
from services.serving.engine import Engine, Stopped
from services.storage import files
from tests.support.pairs_file import png

TEXT = "a large red circle at the centre on a black background"


def publish(root: str, model_id: str) -> ModelRecord:
    record = ModelRecord(
        id=model_id, name="m", uri=MODEL_DIR.as_uri(), family="sd15", digest=model_id, created_at=0
    )
    models.publish(root, record)
    return record


@pytest.fixture
def root(tmp_path) -> str:
    uri = files.as_uri(tmp_path)
    publish(uri, "model_a")
    models.point(uri, "named", "model_a")
    return uri


def asked(**changes) -> ImageRequest:
    return ImageRequest(**{"model": "named", "prompt": "a red circle", "steps": 2, **changes})


def test_pictures_follow_prompt_and_seed(root: str):
    engine = Engine(root)
    first, second = engine.generate(asked(n=2, seed=5))
    assert engine.generate(asked(seed=6)) == [second]
    assert first != second
    assert np.asarray(Image.open(io.BytesIO(first))).shape == (32, 32, 3)


def test_a_name_means_another_model_as_soon_as_it_is_pointed_there(root: str):
    engine = Engine(root, max_models=1)
    engine.generate(asked())
    publish(root, "model_b")
    models.point(root, "named", "model_b")
    engine.generate(asked())
    assert list(engine._models) == ["model_b"], "the last one used is kept, the other is dropped"


@pytest.mark.parametrize(
    "name", ["nope", "../secrets", "..%2Fsecrets", "my model", "50%", "a?b", "model_zzz"]
)
def test_an_unknown_model_is_refused_by_name(root: str, name: str):
    with pytest.raises(NotFound) as refused:
        Engine(root).generate(asked(model=name))
    assert repr(name) in str(refused.value)


def test_a_size_that_cannot_be_drawn_is_refused(root: str):
    with pytest.raises(ConfigError, match="size width must be a multiple of 8, got '33x32'"):
        Engine(root).generate(asked(size="33x32"))


def test_a_caller_that_leaves_stops_its_generation(root: str):
    engine, calls = Engine(root), []

    def leaves_after_three_looks() -> bool:
        calls.append(1)
        return len(calls) > 3

    with pytest.raises(Stopped):
        engine.generate(asked(steps=50), leaves_after_three_looks)
    assert len(calls) == 4
    assert engine.generate(asked()), "and the engine goes on"


def test_scores_are_those_of_the_pictures(root: str):
    image = base64.b64encode(png(render(parse(TEXT)))).decode()
    scores = Engine(root).score(ScoreRequest(images=[image, image], prompts=[TEXT, "a blue cross"]))
    assert scores["match"][0] > 0.99
    assert scores["match"][1] < 0.01
    assert set(scores) == {"match", "taste", "fidelity"}


def test_pictures_that_the_scorers_do_not_know_are_refused_as_such(root: str):
    large = base64.b64encode(png(np.zeros((64, 64, 3), np.uint8))).decode()
    with pytest.raises(BadRequest, match="64, 64") as refused:
        Engine(root).score(ScoreRequest(images=[large], prompts=[TEXT]))
    assert refused.value.param == "images"


@pytest.mark.parametrize(
    ("images", "prompts", "field"),
    [(["@@"], [TEXT], "images[0]"), (["eA=="], [TEXT], "images[0]"), (["eA=="], [TEXT, TEXT], "prompts")],
)
def test_bad_score_requests_name_the_entry(root: str, images, prompts, field):
    with pytest.raises(BadRequest) as refused:
        Engine(root).score(ScoreRequest(images=images, prompts=prompts))
    assert refused.value.param == field
