"""A whole replica over real HTTP, without Ray: the registry, real models, the engine, and who may enter."""

from __future__ import annotations

import base64
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dde_core.config import SampleConfig
from dde_core.engine.contract import Turn
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord
from services.api.requests import KEY_HEADER, PROJECT_HEADER, TIMEOUT_HEADER
from services.artifacts import models
from services.serving.args import ServeArgs
from services.serving.metrics import Unmeasured
from services.serving.replica import Replica
from services.stages import layout
from services.storage import files
from tests.services.control.test_streams import listening
from tests.services.serving.conftest import pixels, text_of
from tests.support.tiny_folders import sd15_folder

PROMPT = "a small red circle at the left"


class Counts(Unmeasured):
    """What a replica measured."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.loads = 0
        self.evictions = 0
        self.ended: list[str] = []

    def turn(self, turn: Turn) -> None:
        self.turns.append(turn)

    def loaded(self, seconds: float) -> None:
        self.loads += 1

    def evicted(self) -> None:
        self.evictions += 1

    def cancelled(self, reason: str) -> None:
        self.ended.append(reason)


class Running:
    """A replica that answers over HTTP."""

    def __init__(self, url: str, counts: Counts) -> None:
        self.url = url
        self.counts = counts

    def post(self, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        wanted = {"model": "named", "prompt": PROMPT, "steps": 2, "seed": 0, **body}
        return httpx.post(f"{self.url}/v1/images/generations", json=wanted, headers=headers, timeout=120)

    def images(self, **body: Any) -> list[np.ndarray]:
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return [pixels(each["b64_json"]) for each in answer.json()["data"]]


def publish(root: str, model_id: str, uri: str = MODEL_DIR.as_uri(), name: str = "named") -> ModelRecord:
    record = ModelRecord(id=model_id, name=name, uri=uri, family="sd15", digest=model_id, created_at=0)
    models.publish(root, record)
    models.set_alias(root, name, model_id)
    return record


@contextmanager
def replica(root: str, **args: Any) -> Iterator[Running]:
    counts = Counts()
    api = Replica(ServeArgs(storage_uri=root, **args), counts).api()
    with listening(api) as url:
        yield Running(url, counts)


@pytest.fixture
def root(tmp_path: Path) -> str:
    uri = files.as_uri(tmp_path / "root")
    publish(uri, "model_a")
    return uri


def until(is_true: Callable[[], bool], seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def solo(folder: Path, seed: int, steps: int, guidance: float) -> np.ndarray:
    sample = SampleConfig(steps=steps, guidance_scale=guidance)
    return TextToImage(ModelFolder(folder))([PROMPT], [seed], sample)[0]


def test_mixed_requests_at_once_are_each_what_they_are_alone(root: str, tmp_path: Path):
    publish(root, "model_b", sd15_folder(tmp_path / "b").as_uri(), "other")
    wanted = [
        {"model": ["named", "other"][i % 4 == 3], "seed": i, "steps": 2 + i % 3, "guidance_scale": 1 + i % 2}
        for i in range(12)
    ]
    with replica(root) as running, ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(lambda body: running.images(**body)[0], wanted))
        turns = running.counts.turns
    for body, image in zip(wanted, answers, strict=True):
        folder = MODEL_DIR if body["model"] == "named" else tmp_path / "b"
        alone = solo(folder, body["seed"], body["steps"], body["guidance_scale"])
        assert np.abs(image.astype(int) - alone).max() <= 1
    assert max(turn.samples for turn in turns) > 1, "requests share calls"


def test_an_answer_names_what_repeats_it(root: str):
    with replica(root) as running:
        answer = running.post(n=2, seed=None).json()
        data = answer["data"]
        assert answer["model_id"] == "model_a"
        again = running.images(seed=data[1]["seed"])[0]
    assert (pixels(data[1]["b64_json"]) == again).all()
    text = text_of(data[1]["b64_json"])
    assert text is not None
    assert (text["seed"], text["model_digest"]) == (data[1]["seed"], "model_a")


def test_a_project_draws_with_its_own_models_alone(root: str):
    publish(layout.project_root(root, "team-a"), "model_b")
    with replica(root) as running:
        mine = running.post({PROJECT_HEADER: "team-a"})
        assert mine.json()["model_id"] == "model_b"
        for name in ("model_a", "model_zzz"):
            refused = running.post({PROJECT_HEADER: "team-a"}, model=name)
            assert refused.status_code == 404
            assert repr(name) in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["nope", "../secrets", "..%2Fsecrets", "my model", "50%", "a?b"])
def test_an_unknown_model_is_refused_by_name(root: str, name: str):
    with replica(root) as running:
        answer = running.post(model=name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert repr(name) in answer.json()["error"]["message"]


def test_an_alias_takes_effect_at_the_next_request_and_spoils_none_that_runs(root: str, tmp_path: Path):
    other = sd15_folder(tmp_path / "b")
    with replica(root) as running, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(running.images, steps=60, seed=3)
        until(lambda: len(running.counts.turns) > 2)
        publish(root, "model_b", other.as_uri())
        assert running.post().json()["model_id"] == "model_b"
        image = slow.result()[0]
    assert np.abs(image.astype(int) - solo(MODEL_DIR, 3, 60, 5.0)).max() <= 1


def test_models_are_evicted_when_others_need_the_room_and_come_back(root: str, tmp_path: Path):
    copy = shutil.copytree(MODEL_DIR, tmp_path / "copy")
    publish(root, "model_b", copy.as_uri(), "other")
    with replica(root, max_bytes=20 << 20) as running:
        first = running.images()[0]
        running.images(model="other")
        assert (running.images()[0] == first).all()
        assert running.counts.evictions >= 2
        assert running.counts.loads == 3


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"size": "33x32"}, 400, "size"),
        ({"size": "1536x1536"}, 400, "size"),
        ({"steps": 1000}, 400, "num_inference_steps"),
        ({"sampler": "lcm", "steps": 100}, 400, "num_inference_steps"),
        ({"guidance_scale": -1}, 400, "guidance_scale"),
        ({"guidance_scale": 1e9}, 400, "guidance_scale"),
    ],
)
def test_what_the_model_cannot_draw_is_refused_by_field(
    root: str, body: dict[str, Any], status: int, param: str
):
    with replica(root) as running:
        answer = running.post(**body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_a_request_of_too_much_work_and_a_key_with_too_much_are_refused(root: str):
    limits = {"max_work_per_request": 32 * 32 * 2 * 8.0, "max_work_per_key": 32 * 32 * 2 * 8.0}
    with replica(root, limits=limits) as running:
        answer = running.post(n=8, steps=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_much_work")
        running.images(n=4, steps=2)


def broken(root: str, folder: Path) -> Path:
    """A copy of the shipped model under the name "broken"; returns its U-Net's weights."""
    shutil.copytree(MODEL_DIR, folder)
    publish(root, "model_x", folder.as_uri(), "broken")
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def test_a_model_with_a_nan_is_an_error_by_name_and_the_others_go_on(root: str, tmp_path: Path):
    weights = broken(root, tmp_path / "model")
    tensors = load_file(weights)
    tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with replica(root) as running, ThreadPoolExecutor(2) as pool:
        good = pool.submit(running.images, steps=4)
        answer = running.post(model="broken", n=2)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_unusable")
        assert "model 'broken' gives no images" in answer.json()["error"]["message"]
        assert good.result()


def test_a_damaged_file_is_an_error_by_name_and_the_others_go_on(root: str, tmp_path: Path):
    weights = broken(root, tmp_path / "model")
    weights.write_bytes(weights.read_bytes()[:-8])
    with replica(root) as running:
        answer = running.post(model="broken")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_unusable")
        assert "model 'broken' cannot be loaded" in answer.json()["error"]["message"]
        assert running.images()


def test_a_deadline_ends_a_request(root: str):
    with replica(root) as running:
        running.images()
        answer = running.post({TIMEOUT_HEADER: "0.5"}, steps=400, n=8)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert running.counts.ended == ["deadline"]
        assert running.images()


def test_a_deadline_while_the_model_is_loaded_is_counted_too(root: str):
    with replica(root) as running:
        assert running.post({TIMEOUT_HEADER: "0.01"}).status_code == 504
        assert running.counts.ended == ["deadline"]
        assert running.images()


def test_200_requests_at_once_are_answered_or_told_when_to_come_again(root: str):
    with replica(root, limits={"max_requests": 40}) as running:
        running.images()
        started = threading.Barrier(200)

        def send(i: int) -> httpx.Response:
            started.wait()
            return running.post({KEY_HEADER: f"key-{i % 10}"}, seed=i)

        with ThreadPoolExecutor(200) as pool:
            answers = list(pool.map(send, range(200)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 40
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
    drawn = {i: answer for i, answer in enumerate(answers) if answer.status_code == 200}
    for i in list(drawn)[:5]:
        image = pixels(drawn[i].json()["data"][0]["b64_json"])
        assert np.abs(image.astype(int) - solo(MODEL_DIR, i, 2, 5.0)).max() <= 1


def test_a_stream_shows_previews_and_the_same_image(root: str):
    with replica(root) as running:
        answer = running.post(stream=True, partial_images=2, steps=6)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.count("event: image_generation.partial_image") == 2
        assert answer.text.count("event: image_generation.completed") == 1
        image = running.images(steps=6)[0]
    last = answer.text.split('"b64_json":"')[-1].split('"')[0]
    assert base64.b64decode(last)
    assert (pixels(last) == image).all()
