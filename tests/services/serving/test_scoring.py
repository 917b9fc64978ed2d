"""Scores over HTTP: every call looks its scorers up; they share memory with the models."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dde_core.scorers import load as loading
from dde_core.shapes.scenes import parse, render
from dde_core.shapes.scorers import ShapesScorer
from services.api.images import ScoreRequest
from services.api.records import ScorerRecord
from services.artifacts import scorers
from services.errors import BadRequest, NotFound, ServiceError, Unavailable
from services.serving.images import as_service_error
from services.serving.memory import Memory
from services.serving.scoring import Scored, Scoring
from services.stages import layout
from services.storage import files
from tests.support.blocks import Device
from tests.support.pairs_file import png
from tests.support.scorers import write_tiny

TEXT = "a large red circle at the centre on a black background"
AMPLE = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> str:
    return files.as_uri(tmp_path / "storage")


def score(root: str, request: ScoreRequest, project: str = "default") -> Scored:
    return asyncio.run(Scoring(root, Memory(AMPLE)).score(request, project))


def test_scores_are_those_of_the_images(root: str):
    image = base64.b64encode(png(render(parse(TEXT)))).decode()
    scores = score(root, ScoreRequest(images=[image, image], prompts=[TEXT, "a blue cross"])).scores
    assert scores["match"][0] > 0.99
    assert scores["match"][1] < 0.01
    assert set(scores) == {"match", "taste", "fidelity"}


def test_a_transparent_image_is_scored_on_the_background(root: str):
    pixels = render(parse(TEXT))
    hidden = np.zeros((32, 32, 4), np.uint8)
    hidden[..., :3] = pixels
    hidden[16:, :, 3] = 255

    def scores(image: np.ndarray, **background) -> dict[str, list[float]]:
        data = base64.b64encode(png(image)).decode()
        return score(root, ScoreRequest(images=[data], prompts=[TEXT], **background)).scores

    for background, level in (("white", 255), ("black", 0)):
        seen = pixels.copy()
        seen[:16] = level
        assert scores(hidden, background=background) == scores(seen)
    assert scores(hidden) == scores(hidden, background="white") != scores(pixels)


def test_an_image_that_no_dataset_may_hold_is_not_scored_either(root: str):
    data = base64.b64encode(png(np.zeros((32, 32, 4), np.uint8))).decode()
    with pytest.raises(BadRequest, match=r"images\[0\] cannot be scored: image_transparent") as refused:
        score(root, ScoreRequest(images=[data], prompts=[TEXT]))
    assert (refused.value.param, refused.value.code) == ("images[0]", "image_transparent")


def test_images_of_another_size_are_refused_naming_the_field_images(root: str):
    large = base64.b64encode(png(np.zeros((64, 64, 3), np.uint8))).decode()
    with pytest.raises(
        BadRequest, match="images must be 32 x 32 px for these scorers, got 64 x 64"
    ) as refused:
        score(root, ScoreRequest(images=[large], prompts=[TEXT]))
    assert refused.value.param == "images"


@pytest.mark.parametrize(
    ("images", "prompts", "field"),
    [(["@@"], [TEXT], "images[0]"), (["eA=="], [TEXT], "images[0]"), (["eA=="], [TEXT, TEXT], "prompts")],
)
def test_bad_score_requests_name_the_entry(root: str, images, prompts, field):
    with pytest.raises(BadRequest) as refused:
        score(root, ScoreRequest(images=images, prompts=prompts))
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
    found = score(root, score_request("ours"))
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
    found = score(root, ScoreRequest(images=[image], prompts=[TEXT], scorers=["taste", "ours"]))
    assert list(found.scores) == list(found.scorers) == ["taste", "ours"]
    assert found.scorers["taste"]["digest"] == "taste"
    with pytest.raises(BadRequest, match="images must be 32 x 32 px"):
        score(root, score_request("ours", "taste"))


@pytest.mark.parametrize("kind", ["diversity", "drift"])
def test_a_scorer_of_sets_of_images_is_refused_by_name_with_the_reason(root: str, tmp_path, kind):
    publish_scorer(root, tmp_path / kind, kind=kind)
    memory = Memory(AMPLE)
    with pytest.raises(BadRequest) as refused:
        asyncio.run(Scoring(root, memory).score(score_request("ours")))
    assert (refused.value.param, refused.value.code) == ("scorers", "scorer_of_sets")
    assert f"'ours' is of kind {kind}, which has no number for a single image" in str(refused.value)
    assert not memory.keys, "nothing was loaded"


def test_a_project_scores_with_its_own_scorers_alone(root: str, tmp_path):
    publish_scorer(layout.project_root(root, "team-a"), tmp_path / "clip")
    assert score(root, score_request("ours"), "team-a").scores["ours"]
    for name in ("ours", "../projects/team-a/scorers/ours"):
        with pytest.raises(NotFound, match="does not exist"):
            score(root, ScoreRequest.model_construct(**dict(score_request("ours")) | {"scorers": [name]}))


def test_a_scorer_whose_files_changed_or_are_not_finite_is_an_error_and_no_number(root: str, tmp_path):
    record = publish_scorer(root, tmp_path / "clip")
    weights = tmp_path / "clip" / "clip" / "model.safetensors"
    tensors = load_file(weights)
    tensors["visual_projection.weight"][0, 0] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(BadRequest, match="have changed"):
        score(root, score_request("ours"))
    scorers.publish(root, record.model_copy(update={"digest": scorers.digest_of(str(record.uri), None)}))
    with pytest.raises(ServiceError, match=r"scorer 'ours' gives no scores: .*not finite") as failure:
        score(root, score_request("ours"))
    assert (failure.value.param, failure.value.code) == ("scorers", "scorer_unusable")


def test_the_aesthetic_scorer_reads_images_alone(root: str, tmp_path):
    publish_scorer(root, tmp_path / "head", kind="aesthetic")
    found = score(root, score_request("ours"))
    assert found.scorers["ours"]["token_limit"] is None
    assert len(set(found.scores["ours"])) == 2


# ---- memory and threads


def test_scorers_share_memory_with_the_models_and_count_their_weights(root: str, tmp_path):
    first = publish_scorer(root, tmp_path / "a", name="a")
    clip = loading.load("clip", tmp_path / "a" / "clip").model
    weights = sum(each.numel() * each.element_size() for each in (*clip.parameters(), *clip.buffers()))
    device = Device()
    model = device.wanted("model", weights)

    async def main() -> None:
        memory = Memory(weights * 5 // 2)
        scoring = Scoring(root, memory)
        async with memory.hold(model):
            found = await scoring.score(score_request("a"))
            assert memory.num_bytes == 2 * weights
            again = await scoring.score(score_request("a"))
            assert (again, len(memory.keys)) == (found, 2), "it was in memory"
            publish_scorer(root, tmp_path / "a", name="b")
            assert (await scoring.score(score_request("b"))).scores["b"] == found.scores["a"]
            assert len(memory.keys) == 2, "equal files are loaded once"
            changed = publish_scorer(root, tmp_path / "c", kind="aesthetic", name="a")
            assert (await scoring.score(score_request("a"))).scorers["a"]["digest"] == changed.digest
            assert not any(first.digest in key for key in memory.keys), "the unused one made room"
        await memory.close()
        assert not any(entry.uses for entry in memory._entries.values())

    asyncio.run(main())
    assert device.num_bytes == 0


def test_a_scorer_that_can_never_fit_is_refused_with_its_size(root: str, tmp_path):
    publish_scorer(root, tmp_path / "clip")
    message = (
        r"scorer 'ours' cannot be loaded now: .* bytes of the scorer are more than the 1000 of max_bytes"
    )
    with pytest.raises(Unavailable, match=message) as refused:
        asyncio.run(Scoring(root, Memory(1000)).score(score_request("ours")))
    assert refused.value.param == "scorers"


def test_a_damaged_scorer_is_an_error_by_its_name(root: str, tmp_path):
    record = publish_scorer(root, tmp_path / "clip")
    weights = tmp_path / "clip" / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    scorers.publish(root, record.model_copy(update={"digest": scorers.digest_of(str(record.uri), None)}))
    with pytest.raises(ServiceError, match=r"scorer 'ours' cannot be loaded: .*cut off") as failure:
        score(root, score_request("ours"))
    assert (failure.value.status, failure.value.code) == (500, "scorer_unusable")


@pytest.mark.parametrize("kind", ["clip", "hps", "aesthetic", "imagereward"])
def test_files_that_are_overwritten_do_not_change_a_loaded_scorer(root: str, tmp_path, kind):
    publish_scorer(root, tmp_path / "scorer", kind=kind)
    scorer = scorers.load(scorers.find(root, "ours"))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    wanted = scorer(images, ["a red star", "on the text"])
    overwritten = 0
    for path in (tmp_path / "scorer").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            with path.open("r+b") as file:
                file.write(b"\xff" * (path.stat().st_size // 2))
                file.truncate()
            overwritten += 1
    assert overwritten
    assert np.array_equal(scorer(images, ["a red star", "on the text"]), wanted)


class SlowScorer(ShapesScorer):
    """A scorer of the shapes world that waits until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__("match")
        self.calls = 0
        self.begun = threading.Event()
        self.gate = threading.Event()

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        self.calls += 1
        self.begun.set()
        assert self.gate.wait(30)
        return super().__call__(images, prompts)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowScorer:
    scorer = SlowScorer()
    monkeypatch.setattr(scorers, "load", lambda record, device: scorer)
    return scorer


def shapes_request() -> ScoreRequest:
    image = base64.b64encode(png(render(parse(TEXT)))).decode()
    return ScoreRequest(images=[image], prompts=[TEXT], scorers=["match"])


def test_the_event_loop_runs_on_while_a_scorer_does(root: str, slow: SlowScorer):
    async def main() -> Scored:
        running = asyncio.ensure_future(Scoring(root, Memory(AMPLE)).score(shapes_request()))
        await asyncio.to_thread(slow.begun.wait, 30)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not running.done()
        slow.gate.set()
        return await running

    assert asyncio.run(main()).scores["match"][0] > 0.99


def test_a_caller_who_leaves_ends_what_has_not_begun_and_keeps_what_runs_in_memory(
    root: str, slow: SlowScorer
):
    async def main() -> None:
        memory = Memory(AMPLE)
        scoring = Scoring(root, memory)
        running, waiting = (asyncio.ensure_future(scoring.score(shapes_request())) for _ in range(2))
        await asyncio.to_thread(slow.begun.wait, 30)
        while len(scoring._running) < 2:
            await asyncio.sleep(0.001)
        for task in (running, waiting):
            task.cancel()
        await asyncio.wait([running, waiting])
        (entry,) = memory._entries.values()
        assert entry.uses, "the thread still scores with it"
        slow.gate.set()
        async with asyncio.timeout(30):
            while scoring._running:
                await asyncio.sleep(0.001)
        assert not entry.uses
        assert slow.calls == 1
        await memory.close()

    asyncio.run(main())


def test_an_error_that_nobody_expected_is_answered_with_its_cause(root: str, slow: SlowScorer, monkeypatch):
    slow.gate.set()
    monkeypatch.setattr(ShapesScorer, "__call__", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError) as failure:
        score(root, shapes_request())
    error = as_service_error(failure.value)
    assert str(error) == "the request failed: ZeroDivisionError: integer division or modulo by zero"
