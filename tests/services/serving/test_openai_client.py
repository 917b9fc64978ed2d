"""OpenAI's own client, unchanged, against a replica: every field that it can send works or is refused by
name.
"""

from __future__ import annotations

import asyncio
import inspect
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.resources.images import Images as OpenAIImages
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse

from dde_core.config import SampleConfig
from dde_core.errors import NonFiniteError
from dde_core.shapes import MODEL_DIR
from services.api.images import MAX_SEED, ImageRequest
from tests.services.serving.conftest import RECORD, Replica, decoded, pixels, replica, text_of
from tests.support.fake_engine import drawn

PROMPT = "a red star"
NOT_OF_THE_BODY = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with replica(tmp_path_factory.mktemp("replica")) as started:
        yield started


@pytest.fixture(scope="module")
def client(running: Replica):
    with connected(running) as connection:
        yield connection


def connected(running: Replica) -> OpenAI:
    return OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0)


def expected(seed: int, prompt: str = PROMPT, negative_prompt: str = "", **sample: Any) -> np.ndarray:
    return drawn(prompt, seed, SampleConfig(**sample), negative_prompt)


def generate(client: OpenAI, **fields: Any) -> ImagesResponse:
    return client.images.generate(**{"model": "shapes", "prompt": PROMPT} | fields)


# ---- fields that work

WORKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"prompt": "p" * 32_000}, {"prompt": "p" * 32_000}),
    ({"n": 1}, {}),
    ({"n": 16}, {}),
    ({"n": None}, {}),
    ({"size": "auto"}, {}),
    ({"size": None}, {}),
    ({"size": "64x48"}, {"width": 64, "height": 48}),
    ({"size": "256x256"}, {"width": 256, "height": 256}),
    *(
        ({"quality": each}, {})
        for each in ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")
    ),
    *(({"background": each}, {}) for each in ("auto", "opaque", None)),
    *(({"moderation": each}, {}) for each in ("auto", "low", None)),
    *(({"style": each}, {}) for each in ("vivid", "natural", None)),
    *(({"complexity": each}, {}) for each in ("low", "medium", "high", None)),
    *(({"output_format": each}, {}) for each in ("png", "webp", None)),
    ({"output_format": "webp", "output_compression": 100}, {}),
    ({"output_compression": 100}, {}),
    ({"output_compression": None}, {}),
    ({"response_format": "b64_json"}, {}),
    ({"response_format": None}, {}),
    ({"stream": False}, {}),
    ({"stream": None}, {}),
    ({"partial_images": 0}, {}),
    ({"partial_images": None}, {}),
    ({"user": "u-1"}, {}),
    ({"safety_identifier": "s-1"}, {}),
    ({"safety_identifier": None}, {}),
    ({"svg": None, "frame_count": None, "frame_duration_ms": None}, {}),
    ({"extra_body": {"num_inference_steps": 7}}, {"steps": 7}),
    ({"extra_body": {"steps": 7}}, {"steps": 7}),
    ({"extra_body": {"steps": 7, "num_inference_steps": 7}}, {"steps": 7}),
    ({"extra_body": {"guidance_scale": 7}}, {"guidance_scale": 7.0}),
    ({"extra_body": {"guidance_scale": 0.0}}, {"guidance_scale": 0.0}),
    ({"extra_body": {"negative_prompt": "text"}}, {"negative_prompt": "text"}),
    ({"extra_body": {"sampler": "dpmpp_2m_karras"}}, {"sampler": "dpmpp_2m_karras"}),
    ({"extra_body": {"metadata": False}}, {}),
    ({"extra_body": {"seed": MAX_SEED}}, {}),
]


def name_of(case: Any) -> str:
    return str(case)[:70]


@pytest.mark.parametrize(("fields", "sample"), WORKS, ids=name_of)
def test_a_field_of_the_client_works(client: OpenAI, fields: dict[str, Any], sample: dict[str, Any]):
    answer = generate(client, **fields)
    ImagesResponse.model_validate(answer.to_dict())
    assert answer.data is not None
    assert len(answer.data) == (fields.get("n") or 1)
    for image in answer.data:
        np.testing.assert_array_equal(pixels(image.b64_json), expected(image.seed, **sample))
    width, height = decoded(answer.data[0].b64_json).size
    assert answer.size == f"{width}x{height}"
    assert answer.output_format == (fields.get("output_format") or "png")
    assert answer.background == "opaque"
    assert abs(answer.created - time.time()) < 60
    assert (answer.model, answer.model_id, answer.model_digest) == ("shapes", "model_1", "d1")


def test_the_table_has_every_field_that_the_client_can_send():
    """A new release of the client with a new field fails here."""
    fields = set(inspect.signature(OpenAIImages.generate).parameters) - NOT_OF_THE_BODY
    assert fields <= set(ImageRequest.model_fields)
    tried = {name for case, _ in WORKS for name in case} | {"model"}
    assert fields <= tried
    own = {name for case, _ in WORKS for name in case.get("extra_body", {})}
    assert own == set(ImageRequest.model_fields) - fields


def test_jpeg_and_webp_are_compressed_as_requested(client: OpenAI):
    same = {"size": "256x256", "extra_body": {"seed": 3}}
    exact = expected(3, width=256, height=256).astype(int)
    for output_format in ("jpeg", "webp"):
        files = {
            quality: generate(client, output_format=output_format, output_compression=quality, **same)
            for quality in (0, 50, 100)
        }
        images = {quality: answer.data[0].b64_json for quality, answer in files.items()}
        assert decoded(images[50]).format == output_format.upper()
        assert len(images[0]) < len(images[50]) < len(images[100])
        errors = {
            quality: np.abs(pixels(image).astype(int) - exact).mean() for quality, image in images.items()
        }
        assert errors[100] < errors[50] < errors[0]
        assert errors[100] < 5


def test_images_of_a_request_have_the_seeds_from_its_own_on(client: OpenAI):
    answer = generate(client, n=3, extra_body={"seed": 41})
    assert [image.seed for image in answer.data] == [41, 42, 43]


def test_without_a_seed_each_call_draws_from_a_fresh_one_that_repeats_it(client: OpenAI):
    first, second = generate(client), generate(client)
    assert first.data[0].seed != second.data[0].seed
    again = generate(client, extra_body={"seed": first.data[0].seed})
    assert again.data[0].b64_json == first.data[0].b64_json


def test_a_png_file_says_what_determines_it_unless_metadata_is_false(client: OpenAI):
    own = {"seed": 5, "sampler": "euler", "steps": 4, "guidance_scale": 2.5, "negative_prompt": "grün"}
    image = generate(client, n=2, prompt="ein Stern ★", extra_body=own).data[1]
    assert text_of(image.b64_json) == {
        "model": "shapes",
        "model_id": "model_1",
        "model_digest": "d1",
        "prompt": "ein Stern ★",
        "negative_prompt": "grün",
        "seed": 6,
        "sampler": "euler",
        "num_inference_steps": 4,
        "guidance_scale": 2.5,
        "size": "32x32",
    }
    assert text_of(generate(client, extra_body={"metadata": False}).data[0].b64_json) is None
    assert decoded(generate(client, output_format="jpeg").data[0].b64_json).getexif() == {}


def test_usage_counts_tokens_that_are_read_and_patches_of_16_px(client: OpenAI):
    usage = generate(client, n=2, size="64x48").usage
    assert usage.output_tokens == usage.output_tokens_details.image_tokens == 2 * 4 * 3
    assert usage.input_tokens == usage.input_tokens_details.text_tokens == 6
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert generate(client, extra_body={"negative_prompt": "text"}).usage.input_tokens > 6


def test_the_answer_warns_of_prompts_that_are_cut(client: OpenAI):
    long = " ".join(["red"] * 500)
    (warning, _) = generate(client, prompt=long).warnings
    limit = generate(client, prompt=long).usage.input_tokens
    assert warning == f"prompt: the text encoder reads the first {limit} of 500 tokens"
    (warning, _) = generate(client, extra_body={"negative_prompt": long}).warnings
    assert warning == f"negative_prompt: the text encoder reads the first {limit} of 500 tokens"
    (warning, _) = generate(client, extra_body={"negative_prompt": "text", "guidance_scale": 1}).warnings
    assert warning == "negative_prompt: is read only if guidance_scale is above 1"


def test_the_answer_names_fields_without_effect(client: OpenAI):
    answer = generate(client, quality="high", style="vivid", moderation="low", complexity="low")
    assert answer.quality == "high"
    names = ("quality", "moderation", "style", "complexity")
    assert answer.warnings[:-1] == [f"{name}: has no effect here" for name in names]
    assert generate(client, quality="auto", user="u", safety_identifier="s").warnings[:-1] == []


def test_the_answer_says_that_no_safety_checker_runs(client: OpenAI, tmp_path):
    assert generate(client).warnings == ["no safety checker: images are not checked"]
    shutil.copytree(MODEL_DIR / "tokenizer", tmp_path / "model" / "tokenizer")
    (tmp_path / "model" / "safety_checker").mkdir()
    record = RECORD.model_copy(update={"uri": (tmp_path / "model").as_uri()})
    with replica(tmp_path, record) as checked, connected(checked) as connection:
        (warning,) = generate(connection).warnings
    assert warning.startswith("safety_checker: the model's folder has one, which is not run")


def test_the_asynchronous_client_works_too(running: Replica):
    async def draw() -> list[ImagesResponse]:
        async with AsyncOpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client:
            calls = (
                client.images.generate(model="shapes", prompt=PROMPT, extra_body={"seed": i})
                for i in range(8)
            )
            return await asyncio.gather(*calls)

    for seed, answer in enumerate(asyncio.run(draw())):
        np.testing.assert_array_equal(pixels(answer.data[0].b64_json), expected(seed))


# ---- fields that are refused

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": "p" * 32_001}, "prompt", "at most 32000 characters"),
    ({"n": 0}, "n", "greater than 0, got 0"),
    ({"n": 17}, "n", "less than or equal to 16, got 17"),
    ({"size": "big"}, "size", "got 'big'"),
    ({"size": "60x33"}, "size", "must be a multiple of 8, got '60x33'"),
    ({"size": "2056x8"}, "size", "width must be at most 2048, got '2056x8'"),
    ({"size": "40x32"}, "size", "width must be a multiple of 16 for this model, got '40x32'"),
    ({"quality": "ultra"}, "quality", "got 'ultra'"),
    ({"background": "transparent"}, "background", "'auto' or 'opaque', got 'transparent'"),
    ({"moderation": "high"}, "moderation", "got 'high'"),
    ({"style": "oil"}, "style", "got 'oil'"),
    ({"complexity": "max"}, "complexity", "got 'max'"),
    ({"output_format": "svg"}, "output_format", "'png', 'jpeg' or 'webp', got 'svg'"),
    ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp', got 'gif'"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "equal to 100, got 101"),
    ({"output_compression": 50}, "output_compression", "PNG takes 100 only; use output_format jpeg or webp"),
    ({"response_format": "path"}, "response_format", "got 'path'"),
    ({"response_format": "url"}, "response_format", "URLs come from the control plane"),
    ({"partial_images": 2}, "partial_images", "needs stream true, got 2"),
    ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3, got 4"),
    ({"stream": True, "n": 2}, "n", "a stream has one image"),
    ({"stream": True, "response_format": "url"}, "response_format", "events have b64_json"),
    ({"stream": True, "size": "40x32"}, "size", "width must be a multiple of 16 for this model, got '40x32'"),
    ({"svg": {"model": "author"}}, "svg", "leave it out and use output_format png, jpeg or webp"),
    ({"frame_count": 9}, "frame_count", "leave it out and use output_format png, jpeg or webp, got 9"),
    ({"frame_duration_ms": 200}, "frame_duration_ms", "use output_format png, jpeg or webp, got 200"),
    ({"user": 5}, "user", "valid string, got 5"),
    ({"safety_identifier": "s" * 513}, "safety_identifier", "at most 512 characters"),
    ({"extra_body": {"seed": -1}}, "seed", "greater than or equal to 0, got -1"),
    ({"extra_body": {"seed": MAX_SEED + 1}}, "seed", f"got {MAX_SEED + 1}"),
    ({"n": 2, "extra_body": {"seed": MAX_SEED}}, "seed", f"at most {MAX_SEED}; got {MAX_SEED} for 2"),
    ({"extra_body": {"steps": 0}}, "steps", "greater than 0, got 0"),
    ({"extra_body": {"num_inference_steps": 1001}}, "num_inference_steps", "equal to 1000, got 1001"),
    (
        {"extra_body": {"steps": 5, "num_inference_steps": 6}},
        "steps",
        "is an alias of num_inference_steps, which is 6; give one of them, got 5",
    ),
    ({"extra_body": {"guidance_scale": -0.5}}, "guidance_scale", "greater than or equal to 0, got -0.5"),
    ({"extra_body": {"guidance_scale": 1e9}}, "guidance_scale", "equal to 100, got 1000000000"),
    ({"extra_body": {"guidance_scale": "5"}}, "guidance_scale", "got '5'"),
    ({"extra_body": {"negative_prompt": "p" * 32_001}}, "negative_prompt", "at most 32000 characters"),
    ({"extra_body": {"sampler": "heun"}}, "sampler", "got 'heun'"),
    ({"extra_body": {"metadata": "no"}}, "metadata", "valid boolean, got 'no'"),
    ({"extra_body": {"cfg_scale": 5}}, "cfg_scale", "not permitted, got 5"),
]


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=name_of)
def test_what_cannot_be_drawn_is_refused_by_field_and_value(
    client: OpenAI, running: Replica, fields: dict[str, Any], param: str, says: str
):
    before = len(running.engine.generations)
    with pytest.raises(openai.BadRequestError) as refused:
        generate(client, **fields)
    error = refused.value
    assert (error.param, error.type) == (param, "invalid_request_error")
    assert error.body["message"].startswith(f"{param}: ")
    assert says in error.body["message"]
    assert len(error.body["message"]) < 500
    assert len(running.engine.generations) == before
    until(lambda: running.models.leases == 0)


def test_a_model_that_does_not_exist_is_not_found_by_name(client: OpenAI):
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as refused:
            generate(client, model="nope", stream=stream)
        assert (refused.value.param, refused.value.code) == ("model", "model_not_found")
        assert "'nope'" in refused.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT)
    assert refused.value.param == "model"


# ---- streams


def test_a_stream_has_previews_and_then_the_image_as_the_client_reads_them(client: OpenAI):
    events = list(generate(client, stream=True, partial_images=3, quality="hd", extra_body={"seed": 9}))
    *previews, last = events
    assert [type(event) for event in previews] == [ImageGenPartialImageEvent] * 3
    assert type(last) is ImageGenCompletedEvent
    for event in events:
        type(event).model_validate(event.to_dict())
        assert (event.background, event.output_format, event.quality) == ("opaque", "png", "auto")
        assert event.size == "32x32"
        assert abs(event.created_at - time.time()) < 60
    sample = SampleConfig()
    for number, (preview, step) in enumerate(zip(previews, (6, 12, 18), strict=True)):
        assert preview.partial_image_index == number
        np.testing.assert_array_equal(pixels(preview.b64_json), drawn(PROMPT, 9, sample, step=step))
    np.testing.assert_array_equal(pixels(last.b64_json), expected(9))
    assert text_of(last.b64_json)["seed"] == last.seed == 9
    assert (last.usage.input_tokens, last.usage.output_tokens, last.usage.total_tokens) == (6, 4, 10)
    assert last.warnings == ["quality: has no effect here", "no safety checker: images are not checked"]
    assert (last.model, last.model_id, last.model_digest) == ("shapes", "model_1", "d1")


def test_a_stream_without_previews_has_the_image_alone(client: OpenAI):
    (event,) = generate(client, stream=True, output_format="webp", quality="max")
    assert (event.type, event.output_format, event.quality) == ("image_generation.completed", "webp", "max")
    assert decoded(event.b64_json).format == "WEBP"


def test_previews_come_as_they_are_drawn(tmp_path):
    with replica(tmp_path, paused=True) as running, connected(running) as connection:
        running.engine.turn(2)
        stream = generate(connection, stream=True, partial_images=1, extra_body={"steps": 4})
        assert next(stream).type == "image_generation.partial_image"
        running.engine.turn(2)
        assert next(stream).type == "image_generation.completed"


def test_a_client_that_leaves_a_stream_frees_its_image_and_its_model(tmp_path):
    with replica(tmp_path, paused=True) as running, connected(running) as connection:
        running.engine.turn(6)
        stream = generate(connection, stream=True, partial_images=3)
        next(stream)
        (generation,) = running.engine.generations
        assert (generation.cancels, running.models.leases) == (0, 1)
        stream.close()
        until(lambda: generation.cancels > 0)
        running.engine.turn()
        until(lambda: running.models.leases == 0)


# ---- failures


def test_a_failure_in_a_stream_is_its_last_event(tmp_path):
    with replica(tmp_path, paused=True) as running, connected(running) as connection:
        running.engine.turn(6)
        stream = generate(connection, stream=True, partial_images=3)
        next(stream)
        running.engine.failure = NonFiniteError("latents are not finite")
        running.engine.turn()
        with pytest.raises(openai.APIError, match="model 'shapes' gives no images: latents") as failed:
            next(stream)
        assert (failed.value.code, failed.value.param) == ("model_unusable", "model")


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (
            NonFiniteError("latents are not finite"),
            "model_unusable",
            "model 'shapes' gives no images: latents",
        ),
        (
            RuntimeError("out of memory\nin 12 frames"),
            "server_error",
            "the request failed: RuntimeError: out",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_a_server_error_with_its_cause(
    client: OpenAI, running: Replica, failure: Exception, code: str, says: str, stream: bool
):
    running.engine.failure = failure
    with pytest.raises(openai.InternalServerError) as failed:
        generate(client, stream=stream)
    assert (failed.value.status_code, failed.value.code) == (500, code)
    assert failed.value.body["message"].startswith(says)
    assert "12 frames" not in failed.value.message
    assert generate(client).data, "the next request is answered"


def test_a_replica_that_ends_says_that_another_can_answer(tmp_path):
    with replica(tmp_path, paused=True) as running, connected(running) as connection:
        running.engine.turn(6)
        streaming = generate(connection, stream=True, partial_images=3)
        next(streaming)
        with ThreadPoolExecutor() as threads:
            waiting = [threads.submit(generate, connection, stream=stream) for stream in (False, True)]
            until(lambda: len(running.engine.generations) == 3)
            running.engine.close()
        with pytest.raises(openai.APIError, match="the replica is shutting down") as failed:
            next(streaming)
        assert failed.value.code == "shutting_down"
        for each in waiting:
            with pytest.raises(openai.InternalServerError) as refused:
                each.result()
            assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
            assert refused.value.response.headers["retry-after"] == "2"


def until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.01)
