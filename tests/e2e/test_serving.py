"""Serving on real Ray Serve, through the control plane: OpenAI's client, mixed company, leaving, promotion.

Each image is compared with its solo run in this process; ``image_load.TOLERANCE`` is 1 of 255.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import ImageGenCompletedEvent

from dde_core.config import SampleConfig
from dde_core.shapes import MODEL_DIR
from services.api.records import ModelRecord
from services.api.requests import KeyCreate
from services.client.api import Client
from services.client.local import LocalSystem
from services.control.tables import new_id
from tests.support.image_load import (
    PATH,
    TOLERANCE,
    Senders,
    Wanted,
    decoded,
    distance,
    metric,
    publish_version,
    settled,
    solo_images,
    until,
)
from tests.support.tiny_folders import lora_folder, sd15_folder

PROMPTS = ("a large red circle", "a small blue square at the left", "two green triangles")
SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path | None]]:
    """The files of each model, base and adapters."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "serving-shapes": (MODEL_DIR, None),
        "serving-random": (sd15_folder(folder / "random"), None),
        "serving-lora": (MODEL_DIR, lora_folder(MODEL_DIR, folder / "lora")),
    }


@pytest.fixture(scope="module")
def served(
    system: LocalSystem, client: Client, folders: dict[str, tuple[Path, Path | None]]
) -> dict[str, tuple[Path, Path | None]]:
    """The same, registered."""
    for name in ("serving-shapes", "serving-random"):
        client.create_model(name, folders[name][0].as_uri())
    base = record(client, "serving-shapes")
    lora = folders["serving-lora"][1]
    assert lora is not None
    fields = {"family": "sd15", "digest": "lora", "base": base.id, "adapter_of": base, "created_at": 1}
    publish_version(system, ModelRecord(id=new_id("model"), name="serving-lora", uri=lora.as_uri(), **fields))
    return folders


def record(client: Client, registered: str, **changes: Any) -> ModelRecord:
    """The record of a registered model, changed."""
    model = client.model(registered)
    fields = {"uri": model.uri, "family": model.family, "digest": model.digest, "created_at": 1}
    return ModelRecord(**{"id": model.version, "name": model.name, **fields, **changes})


@pytest.fixture(scope="module")
def openai_client(system: LocalSystem) -> Iterator[OpenAI]:
    with OpenAI(api_key=system.key, base_url=f"{system.url}/v1", max_retries=0) as connected:
        yield connected


def test_openais_client_lists_models_and_draws_streams_and_links_the_same_image(
    openai_client: OpenAI, served: dict[str, tuple[Path, Path | None]]
):
    names = [model.id for model in openai_client.models.list()]
    assert set(served) <= set(names)
    assert openai_client.models.retrieve("serving-shapes").id == "serving-shapes"

    wanted = Wanted("serving-shapes", MODEL_DIR, seed=7, sample=SampleConfig(steps=6))
    alone = solo_images([wanted])[wanted]
    request: dict[str, Any] = {
        "model": wanted.model,
        "prompt": wanted.prompt,
        "extra_body": {"seed": 7, "num_inference_steps": 6},
    }
    answer = openai_client.images.generate(n=2, **request)
    assert [image.seed for image in answer.data] == [7, 8]
    assert distance(decoded(answer.data[0].b64_json), alone) <= TOLERANCE

    events = list(openai_client.images.generate(stream=True, partial_images=2, **request))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image"] * 2 + ["completed"]
    assert distance(decoded(events[-1].b64_json), alone) <= TOLERANCE
    assert distance(decoded(events[0].b64_json), alone) > TOLERANCE, "a preview is an estimate"

    link = openai_client.images.generate(response_format="url", **request).data[0].url
    file = httpx.get(link, trust_env=False)
    assert (file.status_code, file.headers["content-type"]) == (200, "image/png")
    unsigned = httpx.get(link.partition("&signature")[0], trust_env=False)
    assert unsigned.status_code in (400, 401, 403)

    first, second = (
        openai_client.images.generate(model=wanted.model, prompt=wanted.prompt, extra_body={"steps": 1})
        for _ in range(2)
    )
    assert first.data[0].seed != second.data[0].seed, "no seed means a fresh one"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "serving-nope"}, 404, "model"),
        ({"model": "serving-shapes@nope"}, 404, "model"),
        ({"size": "33x32"}, 400, "size"),
        ({"size": "2048x2048"}, 400, "size"),
        ({"output_format": "gif"}, 400, "output_format"),
        ({"background": "transparent"}, 400, "background"),
    ],
)
def test_openais_client_gets_an_error_that_names_the_field(
    openai_client: OpenAI, served: dict[str, Any], fields: dict[str, Any], status: int, param: str
):
    with pytest.raises(openai.APIStatusError) as refused:
        openai_client.images.generate(**{"model": "serving-shapes", "prompt": "a", **fields})
    assert (refused.value.status_code, refused.value.body["param"]) == (status, param)


STEPS, PREVIEW = 400, 100
"""The companion's first preview of three comes after 100 of its 400 steps."""


def test_a_client_that_leaves_through_the_control_plane_frees_the_engine_within_about_a_step(
    system: LocalSystem, client: Client, served: dict[str, Any]
):
    """Eight images leave when a companion, in the same calls, shows that 100 of 400 steps are done."""

    def turns() -> float:
        return metric(system, "step_seconds_count")

    def ended() -> float:
        return metric(system, "cancelled_total", reason="disconnected")

    turns_before, ended_before = settled(turns), ended()

    of_companion = client.create_key(KeyCreate(name="companion", scopes=["generate"])).key

    async def leave() -> None:
        url = f"{system.url}/v1"
        async with (
            AsyncOpenAI(api_key=system.key, base_url=url, max_retries=0) as leaving,
            AsyncOpenAI(api_key=of_companion, base_url=url, max_retries=0) as watching,
        ):
            fields = {"model": "serving-shapes", "prompt": PROMPTS[0]}
            body = {"seed": 0, "steps": STEPS}
            eight = asyncio.create_task(leaving.images.generate(n=8, extra_body=body, **fields))
            companion = await watching.images.generate(
                stream=True, partial_images=3, extra_body=body, **fields
            )
            await anext(aiter(companion))
            eight.cancel()
            await companion.close()
            await asyncio.gather(eight, return_exceptions=True)
            assert eight.cancelled(), "it was running when its client left"

    asyncio.run(leave())
    until(lambda: ended() == ended_before + 2)
    made = settled(turns) - turns_before
    print(f"{made:.0f} U-Net calls in all; the clients left after {PREVIEW} of {STEPS}")
    assert PREVIEW <= made < PREVIEW + 40


def test_40_mixed_requests_at_once_are_each_what_they_are_alone(
    system: LocalSystem, served: dict[str, tuple[Path, Path | None]]
):
    sizes = ((0, 0), (0, 0), (48, 32))
    wanted = []
    for i in range(40):
        model = list(served)[i % 3]
        height, width = sizes[i // 3 % 3]
        sample = SampleConfig(
            sampler=SAMPLERS[i % len(SAMPLERS)],
            steps=3 + i % 5,
            guidance_scale=(1.0, 3.0, 5.0)[i // 2 % 3],
            height=height,
            width=width,
        )
        wanted.append(Wanted(model, *served[model], PROMPTS[i // 5 % 3], seed=i, sample=sample))
    senders = Senders(system, solo_images(wanted))
    asyncio.run(senders.send_all(wanted, at_once=40))
    print(f"{dict(senders.counts)}; largest distance to a solo run {senders.largest_distance} of 255")
    assert not senders.wrong
    assert senders.counts == {"200": 40}


def test_a_promotion_and_its_roll_back_take_effect_at_the_next_request_and_spoil_none_that_runs(
    system: LocalSystem,
    client: Client,
    openai_client: OpenAI,
    served: dict[str, tuple[Path, Path | None]],
):
    name, alias = "serving-versions", "serving-versions@production"
    old = record(client, "serving-shapes", id=new_id("model"), name=name)
    new = record(client, "serving-random", id=new_id("model"), name=name)
    for version in (old, new):
        publish_version(system, version)
    client.promote(old.id)
    sample = SampleConfig(steps=160, guidance_scale=1.0)
    long = [Wanted(alias, MODEL_DIR, seed=seed, sample=sample) for seed in range(2)]
    short = [Wanted(alias, served[of][0], seed=9) for of in ("serving-random", "serving-shapes")]
    alone = solo_images([*long, *short])

    def next_id(wanted: Wanted) -> str:
        answer = httpx.post(f"{system.url}{PATH}", json=wanted.body(), headers=bearer, timeout=60)
        assert answer.status_code == 200, answer.text
        assert distance(decoded(answer.json()["data"][0]["b64_json"]), alone[wanted]) <= TOLERANCE
        found: str = answer.json()["model_id"]
        return found

    bearer = {"authorization": f"Bearer {system.key}"}
    begun = threading.Barrier(len(long) + 1)

    def draw(wanted: Wanted) -> tuple[ImageGenCompletedEvent, float]:
        """The last event and when it came; the first one passes the barrier."""
        own = {"seed": wanted.seed, "steps": sample.steps, "guidance_scale": sample.guidance_scale}
        fields = {"model": alias, "prompt": wanted.prompt, "extra_body": own}
        first, *_, last = announce(openai_client.images.generate(stream=True, partial_images=3, **fields))
        assert first.type == "image_generation.partial_image"
        assert last.type == "image_generation.completed"
        return last, time.monotonic()

    def announce(events: Iterable[Any]) -> Iterator[Any]:
        for number, event in enumerate(events):
            if number == 0:
                begun.wait(60)
            yield event

    next_id(short[1])
    with ThreadPoolExecutor(len(long)) as pool:
        running = [pool.submit(draw, wanted) for wanted in long]
        begun.wait(60)
        assert client.promote(new.id).aliases == ["production"]
        promoted = time.monotonic()
        assert next_id(short[0]) == new.id
        client.promote(old.id)
        assert next_id(short[1]) == old.id
        for wanted, future in zip(long, running, strict=True):
            last, ended = future.result()
            assert ended > promoted, "it was running when the alias moved"
            assert last.model_id == old.id
            assert distance(decoded(last.b64_json), alone[wanted]) <= TOLERANCE
