"""The engine without Serve: every call looks its name up; generation stops when the caller disconnects."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from dde_core.errors import ConfigError
from dde_core.scorers import load as loading
from dde_core.shapes import MODEL_DIR
from dde_core.shapes.scenes import parse, render
from services.api.images import ImageRequest, ScoreRequest
from services.api.records import ModelRecord, ScorerRecord
from services.artifacts import models, scorers
from services.errors import BadRequest, NotFound, ServiceError
from services.serving.app import in_thread
from services.serving.engine import CallerDisconnected, Engine
from services.stages import layout
from services.storage import files
from tests.support.pairs_file import png
from tests.support.scorers import write_tiny

TEXT = "a large red circle at the centre on a black background"


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


def test_scores_are_those_of_the_images(root: str):
    image = base64.b64encode(png(render(parse(TEXT)))).decode()
    scores = Engine(root).score(ScoreRequest(images=[image, image], prompts=[TEXT, "a blue cross"])).scores
    assert scores["match"][0] > 0.99
    assert scores["match"][1] < 0.01
    assert set(scores) == {"match", "taste", "fidelity"}


def test_a_transparent_image_is_scored_on_the_background(root: str):
    pixels = render(parse(TEXT))
    hidden = np.zeros((32, 32, 4), np.uint8)
    hidden[..., :3] = pixels
    hidden[16:, :, 3] = 255
    engine = Engine(root)

    def scores(image: np.ndarray, **background) -> dict[str, list[float]]:
        data = base64.b64encode(png(image)).decode()
        return engine.score(ScoreRequest(images=[data], prompts=[TEXT], **background)).scores

    for background, level in (("white", 255), ("black", 0)):
        seen = pixels.copy()
        seen[:16] = level
        assert scores(hidden, background=background) == scores(seen)
    assert scores(hidden) == scores(hidden, background="white") != scores(pixels)


def test_an_image_that_no_dataset_may_hold_is_not_scored_either(root: str):
    data = base64.b64encode(png(np.zeros((32, 32, 4), np.uint8))).decode()
    with pytest.raises(BadRequest, match=r"images\[0\] cannot be scored: image_transparent") as refused:
        Engine(root).score(ScoreRequest(images=[data], prompts=[TEXT]))
    assert (refused.value.param, refused.value.code) == ("images[0]", "image_transparent")


def test_images_of_another_size_are_refused_naming_the_field_images(root: str):
    large = base64.b64encode(png(np.zeros((64, 64, 3), np.uint8))).decode()
    with pytest.raises(
        BadRequest, match="images must be 32 x 32 px for these scorers, got 64 x 64"
    ) as refused:
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


# ---- registered scorers


def publish_scorer(root: str, folder: Path, kind: str = "clip", name: str = "ours", **fields) -> ScorerRecord:
    checkpoint, processor = write_tiny(kind, folder)
    uri = checkpoint.as_uri()
    digest = scorers.digest_of(uri, processor and processor.as_uri())
    fields = {"processor": processor and processor.as_uri(), "digest": digest} | fields
    record = ScorerRecord(id=f"scorer_{folder.name}", name=name, kind=kind, uri=uri, created_at=0, **fields)
    scorers.publish(root, record)
    return record


def score_request(*names: str, side: int = 64) -> ScoreRequest:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    images = [base64.b64encode(png(image)).decode() for image in (pixels, pixels[::-1].copy())]
    return ScoreRequest(images=images, prompts=["a red star", "on the text"], scorers=list(names))


def test_a_registered_scorer_scores_images_of_any_size_and_says_how(root: str, tmp_path):
    record = publish_scorer(root, tmp_path / "clip")
    found = Engine(root).score(score_request("ours"))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    scorer = loading.load("clip", tmp_path / "clip" / "clip")
    wanted = scorer(np.stack([pixels, pixels[::-1]]), ["a red star", "on the text"])
    assert found.scores == {"ours": wanted.tolist()}
    about = found.scorers["ours"]
    assert about == {**scorer.description, "digest": record.digest}
    assert (about["kind"], about["scale"], about["dtype"]) == ("clip", "cosine, -1 to 1", "float32")
    assert about["preprocessing"]


def test_an_answer_describes_every_scorer_and_a_built_in_one_still_limits_the_size(root: str, tmp_path):
    publish_scorer(root, tmp_path / "clip")
    image = base64.b64encode(png(render(parse(TEXT)))).decode()
    found = Engine(root).score(ScoreRequest(images=[image], prompts=[TEXT], scorers=["taste", "ours"]))
    assert list(found.scores) == list(found.scorers) == ["taste", "ours"]
    assert found.scorers["taste"]["digest"] == "taste"
    with pytest.raises(BadRequest, match="images must be 32 x 32 px"):
        Engine(root).score(score_request("ours", "taste"))


def test_models_and_scorers_share_the_engines_memory(root: str, tmp_path):
    publish_scorer(root, tmp_path / "a", name="a")
    publish_scorer(root, tmp_path / "b", kind="drift", name="set")
    engine = Engine(root, max_models=2)
    engine.generate(request())
    engine.score(score_request("a"))
    assert list(engine._models) == ["model_a", "scorer_a"]
    again = publish_scorer(root, tmp_path / "c", name="a")
    engine.score(score_request("a"))
    assert list(engine._models) == ["scorer_a", again.id], "a name registered anew is another scorer"


@pytest.mark.parametrize("kind", ["diversity", "drift"])
def test_a_scorer_of_sets_of_images_is_refused_by_name_with_the_reason(root: str, tmp_path, kind):
    publish_scorer(root, tmp_path / kind, kind=kind)
    engine = Engine(root)
    with pytest.raises(BadRequest) as refused:
        engine.score(score_request("ours"))
    assert (refused.value.param, refused.value.code) == ("scorers", "scorer_of_sets")
    assert f"'ours' is of kind {kind}, which has no number for a single image" in str(refused.value)
    assert not engine._models, "nothing was loaded"


def test_a_project_scores_with_its_own_scorers_alone(root: str, tmp_path):
    publish_scorer(layout.project_root(root, "team-a"), tmp_path / "clip")
    assert Engine(root).score(score_request("ours"), "team-a").scores["ours"]
    for name in ("ours", "../projects/team-a/scorers/ours"):
        with pytest.raises(NotFound, match="does not exist"):
            Engine(root).score(
                ScoreRequest.model_construct(**dict(score_request("ours")) | {"scorers": [name]})
            )


def test_a_scorer_whose_files_changed_or_are_not_finite_is_an_error_and_no_number(root: str, tmp_path):
    record = publish_scorer(root, tmp_path / "clip")
    weights = tmp_path / "clip" / "clip" / "model.safetensors"
    tensors = load_file(weights)
    tensors["visual_projection.weight"][0, 0] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BadRequest, match="have changed"):
        Engine(root).score(score_request("ours"))
    scorers.publish(root, record.model_copy(update={"digest": scorers.digest_of(str(record.uri), None)}))
    with pytest.raises(ServiceError, match=r"scorer 'ours' gives no scores: .*not finite") as failure:
        Engine(root).score(score_request("ours"))
    assert (failure.value.param, failure.value.code) == ("scorers", "scorer_unusable")


def test_the_aesthetic_scorer_reads_images_alone(root: str, tmp_path):
    publish_scorer(root, tmp_path / "head", kind="aesthetic")
    found = Engine(root).score(score_request("ours"))
    assert found.scorers["ours"]["token_limit"] is None
    assert len(set(found.scores["ours"])) == 2
