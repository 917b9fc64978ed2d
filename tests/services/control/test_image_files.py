"""Images by URL, and OpenAI's own client against the control plane, with a replica behind it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from openai.types import Model, ModelDeleted
from pydantic import SecretStr

from dde_core.config import SampleConfig
from services.control import image_files
from services.control.app import build_app
from services.settings import Settings
from services.stages import layout
from services.storage import files
from tests.services.control.conftest import KEY, Plane, write_base
from tests.services.control.fakes import FakeLauncher
from tests.services.control.test_streams import listening
from tests.services.serving.conftest import decoded, pixels, replica, text_of
from tests.support.fake_engine import drawn

IMAGE = {"model": "shapes", "prompt": "a red star"}


@dataclass(frozen=True)
class Front:
    """A control plane at ``url`` with a replica behind it; both have one storage."""

    url: str
    app: FastAPI
    base: str

    @property
    def settings(self) -> Settings:
        """Tests may replace them."""
        return self.app.state.settings

    def sweep(self) -> int:
        return image_files.sweep(self.settings, self.app.state.database)

    def stored(self, project: str = "default") -> list[str]:
        """Names of the files that can be fetched."""
        root = layout.project_root(self.settings.storage_uri, project)
        return files.list_files(layout.generated_folder(root))

    def post(self, path: str, body: dict[str, Any], key: str = KEY) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}{path}", json=body, headers={"authorization": f"Bearer {key}"})
        answer.raise_for_status()
        return answer.json()


def settings_in(folder: Path, database_url: str, serve_url: str) -> Settings:
    return Settings(
        api_key=SecretStr(KEY),
        storage_uri=files.as_uri(folder / "store"),
        database_url=database_url,
        serve_url=serve_url,
    )


@pytest.fixture
def front(tmp_path: Path, migrated_url: str) -> Iterator[Front]:
    base = write_base(tmp_path / "base")
    with replica(tmp_path / "store") as running:
        settings = settings_in(tmp_path, migrated_url, running.url)
        app = build_app(settings, FakeLauncher(), reconcile=False)
        with listening(app) as url:
            started = Front(url, app, base)
            started.post("/v1/models", {"name": "shapes", "uri": base})
            yield started


@contextmanager
def connected(front: Front, key: str = KEY) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{front.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the control plane's clock for URLs be ahead."""
    monkeypatch.setattr(image_files, "time", SimpleNamespace(time=lambda: time.time() + seconds))


def fail(error: Exception) -> None:
    raise error


def changed(url: str, **query: Any) -> str:
    """The URL with other values in its query."""
    parts = urlsplit(url)
    values = {name: value for name, (value,) in parse_qs(parts.query).items()} | query
    return str(httpx.URL(urlunsplit(parts._replace(query=""))).copy_with(params=values))


# ---- images by URL


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_each_image_has_a_url_that_whoever_has_it_can_fetch(front: Front, output_format: str):
    with connected(front) as client:
        answer = client.images.generate(**IMAGE, n=2, response_format="url", output_format=output_format)
    assert [image.b64_json for image in answer.data] == [None, None]
    for image in answer.data:
        assert image.url.startswith(f"{front.url}/v1/images/files/img_")
        fetched = httpx.get(image.url)
        assert fetched.status_code == 200
        assert fetched.headers["content-type"] == f"image/{output_format}"
        assert fetched.headers["x-content-type-options"] == "nosniff"
        assert decoded(fetched.content).format == output_format.upper()
        if output_format != "jpeg":
            exact = drawn(IMAGE["prompt"], image.seed, SampleConfig())
            np.testing.assert_array_equal(pixels(fetched.content), exact)
    assert len(front.stored()) == 2


def test_a_url_that_has_expired_says_so_and_its_file_is_deleted(front: Front, monkeypatch):
    with connected(front) as client:
        (image,) = client.images.generate(**IMAGE, response_format="url").data
        settings = front.settings
        later(monkeypatch, settings.image_url_s - 10)
        assert front.sweep() == 0
        assert httpx.get(image.url).status_code == 200
        later(monkeypatch, settings.image_url_s + 1)
        answer = httpx.get(image.url)
        assert answer.status_code == 410
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("url_expired", "expires")
        kept = files.join(layout.generated_folder(settings.storage_uri), "notes.txt")
        files.write_bytes(kept, b"not an image")
        assert front.sweep() == 1
        assert front.stored() == ["notes.txt"]


def test_a_control_plane_sweeps_while_it_runs_also_after_an_error(
    tmp_path: Path, sqlite_url: str, monkeypatch, caplog
):
    sweep = image_files.sweep
    failures = [OSError("the disk is away")]
    monkeypatch.setattr(image_files, "SWEEP_S", 0.02)
    monkeypatch.setattr(
        image_files, "sweep", lambda *args: fail(failures.pop()) if failures else sweep(*args)
    )
    settings = settings_in(tmp_path, sqlite_url, "http://127.0.0.1:1")
    expired = layout.generated_uri(settings.storage_uri, 1, "img.png")
    files.write_bytes(expired, b"")
    with listening(build_app(settings, FakeLauncher(), reconcile=False)):
        deadline = time.monotonic() + 10
        while files.exists(expired):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "the disk is away" in caplog.text


def test_a_sweep_deletes_at_most_so_many_files_and_the_oldest_first(front: Front, monkeypatch):
    settings = front.settings
    for expires in (3, 1, 2):
        files.write_bytes(layout.generated_uri(settings.storage_uri, expires, f"img-{expires}.png"), b"")
    monkeypatch.setattr(image_files, "MAX_SWEPT", 2)
    assert front.sweep() == 2
    assert front.stored() == ["0000000003-img-3.png"]
    assert front.sweep() == 1
    assert front.stored() == []


def test_a_url_that_was_changed_is_forbidden(front: Front):
    with connected(front) as client:
        (image,) = client.images.generate(**IMAGE, response_format="url").data
    query = parse_qs(urlsplit(image.url).query)
    digit = image.url.split("img_")[1][0]
    other_set = image.url.replace(f"img_{digit}", f"img_{'0' if digit != '0' else '1'}", 1)
    for url in (
        other_set,
        changed(image.url, expires=int(query["expires"][0]) + 1),
        changed(image.url, project="team-a"),
        changed(image.url, signature="0" * 64),
        changed(image.url, signature="é"),
    ):
        answer = httpx.get(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "invalid_signature"), url


def test_an_image_that_does_not_exist_is_not_found_and_a_bad_query_is_refused(front: Front):
    with connected(front) as client:
        (image,) = client.images.generate(**IMAGE, response_format="url").data
    assert httpx.get(image.url.replace("-0.png", "-1.png")).status_code == 404
    for name in ("..%2F..%2Fmodels", "img_1-0.png", "img_" + "0" * 32 + "-0.svg"):
        answer = httpx.get(f"{front.url}/v1/images/files/{name}?project=default&expires=1&signature=x")
        assert answer.status_code == 404
    for name, value in (("project", "../x"), ("expires", "soon"), ("expires", 10**13)):
        answer = httpx.get(changed(image.url, **{name: value}))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    files.delete_file(files.join(layout.generated_folder(front.settings.storage_uri), *front.stored()))
    answer = httpx.get(image.url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "image_not_found")


def test_images_of_a_project_are_stored_in_its_folder(front: Front):
    key = front.post("/v1/keys", {"name": "k", "project": "team-a"})["key"]
    front.post("/v1/models", {"name": "shapes", "uri": front.base}, key)
    with connected(front, key) as client:
        (image,) = client.images.generate(**IMAGE, response_format="url").data
    assert httpx.get(image.url).status_code == 200
    assert (len(front.stored("team-a")), front.stored()) == (1, [])


def test_urls_are_at_the_public_address_and_no_caller_chooses_another(front: Front):
    front.app.state.settings = front.settings.model_copy(update={"public_url": "https://images.example.org/"})
    spoofed = '{"base_url": "http://elsewhere"}'
    with connected(front) as client:
        answer = client.images.generate(
            **IMAGE, response_format="url", extra_headers={"x-dde-image-urls": spoofed}
        )
    assert answer.data[0].url.startswith("https://images.example.org/v1/images/files/img_")
    path = answer.data[0].url.removeprefix("https://images.example.org")
    assert text_of(httpx.get(front.url + path).content)["seed"] == answer.data[0].seed


def test_urls_of_another_operator_key_are_forbidden(front: Front):
    with connected(front) as client:
        (image,) = client.images.generate(**IMAGE, response_format="url").data
    front.app.state.settings = front.settings.model_copy(update={"api_key": SecretStr("sk-other")})
    assert httpx.get(image.url).status_code == 403


# ---- OpenAI's client


def test_models_are_listed_and_found_as_the_client_reads_them(front: Front):
    front.post("/v1/models", {"name": "rival", "uri": front.base})
    front.post("/v1/models/rival/promote", {})
    with connected(front) as client:
        listed = list(client.models.list())
        assert [model.id for model in listed] == ["rival", "shapes"]
        found = [client.models.retrieve(name) for name in ("rival", "rival@production", listed[0].version)]
        for model in (*listed, *found):
            Model.model_validate(model.to_dict())
            assert (model.object, model.owned_by) == ("model", "dde")
            assert abs(model.created - time.time()) < 60
        assert {model.version for model in found} == {listed[0].version}
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("nope")
        assert missing.value.code == "model_not_found"


def test_a_list_of_models_has_pages_that_the_client_can_ask_for(front: Front):
    for number in range(3):
        front.post("/v1/models", {"name": f"m{number}", "uri": front.base})
    with connected(front) as client:
        first = client.models.list(extra_query={"limit": 2})
        assert ([model.id for model in first.data], first.has_more) == (["m2", "m1"], True)
        rest = client.models.list(extra_query={"limit": 2, "after": first.data[-1].id})
        assert ([model.id for model in rest.data], rest.has_more) == (["m0", "shapes"], False)


def test_a_model_is_deleted_as_the_client_reads_it(front: Front):
    front.post("/v1/models", {"name": "rival", "uri": front.base})
    with connected(front) as client:
        deleted = client.models.delete("rival")
        ModelDeleted.model_validate(deleted.to_dict())
        assert [model.id for model in client.models.list()] == ["shapes"]


def test_images_come_through_the_control_plane_with_every_field(front: Front):
    own = {"seed": 4, "steps": 3, "guidance_scale": 2, "negative_prompt": "text", "sampler": "lcm"}
    with connected(front) as client:
        answer = client.images.generate(**IMAGE, size="64x48", user="u", quality="high", extra_body=own)
    sample = SampleConfig(sampler="lcm", steps=3, guidance_scale=2.0, width=64, height=48)
    exact = drawn(IMAGE["prompt"], 4, sample, "text")
    np.testing.assert_array_equal(pixels(answer.data[0].b64_json), exact)


def test_a_stream_comes_through_the_control_plane(front: Front):
    with connected(front) as client:
        *previews, last = client.images.generate(
            **IMAGE, stream=True, partial_images=2, extra_body={"seed": 4}
        )
    assert [(event.type, event.partial_image_index) for event in previews] == [
        ("image_generation.partial_image", 0),
        ("image_generation.partial_image", 1),
    ]
    assert (last.type, last.seed) == ("image_generation.completed", 4)
    exact = drawn(IMAGE["prompt"], 4, SampleConfig())
    np.testing.assert_array_equal(pixels(last.b64_json), exact)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"size": "60x33"}, "size", "size: height must be a multiple of 8, got '60x33'"),
        ({"svg": {"model": "x"}}, "svg", "svg: is for SVG and GIF files; leave it out"),
        ({"n": 2, "stream": True}, "n", "n: a stream has one image; send a request for each, got 2"),
        ({"partial_images": 1}, "partial_images", "partial_images: needs stream true, got 1"),
        ({"output_compression": 9}, "output_compression", "output_compression: PNG takes 100 only"),
        ({"steps": 5, "num_inference_steps": 6}, "steps", "steps: is an alias of"),
        ({"guidance_scale": -1}, "guidance_scale", "guidance_scale: Input should be greater"),
        ({"cfg": 1}, "cfg", "cfg: Extra inputs are not permitted, got 1"),
    ],
)
def test_the_control_plane_refuses_by_field_before_it_asks_a_replica(
    plane: Plane, fields: dict[str, Any], param: str, says: str
):
    """Its Serve is at an address where nobody answers: that would be a 503."""
    error = plane.error("/v1/images/generations", {**IMAGE, **fields})
    assert error["param"] == param
    assert error["message"].startswith(says)


def test_a_wrong_key_is_an_authentication_error(front: Front):
    with connected(front, "sk-wrong") as client, pytest.raises(openai.AuthenticationError) as refused:
        client.images.generate(**IMAGE)
    assert refused.value.code == "invalid_api_key"
