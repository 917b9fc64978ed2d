"""An evaluation draws each image once, survives damage and kills, and compares any number of models."""

from __future__ import annotations

import html
import io
import json
import random
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dde_core.config import SampleConfig
from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.generation import TextToImage
from dde_core.metrics import beat_ratio, paired_difference
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from dde_core.shapes.scorers import score
from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import CompareSettings, EvaluationCreate, ImageFolder, NamedModel
from services.artifacts import image_cache, models
from services.artifacts.prompts import read_prompts
from services.artifacts.scorers import digest_of
from services.errors import BadRequest, Forbidden, ServiceError
from services.evaluation import chunks
from services.evaluation.chunks import seed_of
from services.storage import files, sources
from services.storage.sources import SourceRules
from tests.support.evaluate_here import SAMPLE, EvaluateHere, record_of
from tests.support.pairs_file import png
from tests.support.scorers import write_tiny
from tests.support.tiny_folders import sd15_folder


@pytest.fixture(scope="module")
def shapes() -> ModelRecord:
    return record_of("shapes", MODEL_DIR)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ModelRecord:
    """A model of random weights with the same size of images."""
    return record_of("other", sd15_folder(tmp_path_factory.mktemp("models") / "other"))


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EvaluateHere:
    """Chunks of two prompts."""
    monkeypatch.setattr(chunks, "PROMPTS_PER_CHUNK", 2)
    return EvaluateHere(monkeypatch, tmp_path)


def report_of(result) -> dict:
    return files.read_json(result.report)


def scores_of(result) -> dict:
    """Every score of the report, by prompt, scorer, model and image."""
    report = report_of(result)
    return {
        row["text"]: {
            scorer: {model: of_model[i] for model, of_model in zip(report["models"], scores, strict=True)}
            for scorer, scores in report["scores"].items()
        }
        for i, row in enumerate(report["prompts"])
    }


def prompts(num: int) -> list[str]:
    return [prompt.text for prompt in read_prompts(PROMPTS_FILE.as_uri(), num)]


def write_images(folder: Path, images: list[list[np.ndarray]]) -> ImageFolder:
    """Image j of prompt i under its number."""
    folder.mkdir()
    for i, of_prompt in enumerate(images):
        for j, image in enumerate(of_prompt):
            (folder / f"{i:05d}-{j}.png").write_bytes(png(image))
    return ImageFolder(name=folder.name, images_uri=folder.as_uri())


def random_images(num: int, per_prompt: int, side: int = 32) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (num, per_prompt, side, side, 3), np.uint8))


# ---- numbers


def test_image_j_of_prompt_i_has_a_seed_of_its_own_that_is_seed_plus_i_for_one_image():
    assert [seed_of(7, i, 0) for i in range(3)] == [7, 8, 9]
    seeds = {seed_of(7, i, j) for i in (0, 1, 50_000, 99_999) for j in range(64)}
    assert len(seeds) == 4 * 64


def test_the_numbers_are_those_of_images_drawn_and_scored_by_hand(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord
):
    result = evaluate(shapes, other, num_prompts=4, images_per_prompt=2, seed=5)
    assert (result.base, result.num_prompts, result.images_per_prompt) == ("shapes", 4, 2)
    assert result.images_drawn == 16
    texts = prompts(4)
    by_hand = {}
    for record in (shapes, other):
        model = TextToImage(ModelFolder(*models.fetch(record)))
        columns = []
        for j in range(2):
            halves = [
                model(texts[i : i + 2], [5 + i + 100_000 * j, 6 + i + 100_000 * j], SAMPLE) for i in (0, 2)
            ]
            columns.append(score(np.concatenate(halves), texts))
        by_hand[record.name] = {name: np.stack([c[name] for c in columns], axis=1) for name in columns[0]}
    found = scores_of(result)
    for i, text in enumerate(texts):
        for scorer in ("match", "taste", "fidelity"):
            for name in ("shapes", "other"):
                assert found[text][scorer][name] == by_hand[name][scorer][i].tolist()
    base, candidate = (by_hand[name]["taste"].mean(axis=1) for name in ("shapes", "other"))
    numbers = result.scores["taste"]["other"]
    assert (numbers.base, numbers.candidate) == (base.mean(), candidate.mean())
    difference = paired_difference(candidate, base)
    assert numbers.difference.value == pytest.approx(difference.value)
    assert (numbers.difference.low, numbers.difference.high) == pytest.approx(
        (difference.low, difference.high)
    )
    images = beat_ratio(by_hand["other"]["taste"], by_hand["shapes"]["taste"])
    assert numbers.beat_ratio.value == images.value


def test_three_models_are_each_compared_with_the_base_that_the_request_names(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord
):
    third = shapes.model_copy(
        update={"id": "model_third", "name": "third", "digest": other.digest, "uri": other.uri}
    )
    result = evaluate(third, other, shapes, base="shapes")
    assert list(result.scores["match"]) == ["third", "other"]
    assert result.scores["match"]["third"] == result.scores["match"]["other"], "equal files, equal numbers"
    assert result.images_drawn == 8, "equal files are drawn once"
    report = report_of(result)
    assert report["models"] == ["shapes", "third", "other"]
    grid = Image.open(io.BytesIO(files.read_bytes(result.grid)))
    assert grid.width > 3 * 4 * 128


def test_images_of_prompts_that_no_scorer_knows_are_drawn_without_scores(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, tmp_path: Path
):
    (tmp_path / "own.txt").write_text("a photo of an astronaut\nan oil painting of a lighthouse\n")
    own = (tmp_path / "own.txt").as_uri()
    result = evaluate(shapes, other, prompts_uri=own, num_prompts=2, scorers=[])
    assert (result.scores, result.images_drawn) == ({}, 4)
    assert Image.open(io.BytesIO(files.read_bytes(result.grid))).format == "PNG"


def test_categories_are_reported_with_the_difference_on_their_prompts(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, tmp_path: Path
):
    rows = [f"{text}\t{category}\t\t" for text, category in zip(prompts(4), "abba", strict=True)]
    (tmp_path / "p.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]))
    result = evaluate(shapes, other, prompts_uri=(tmp_path / "p.tsv").as_uri(), images_per_prompt=2)
    report = report_of(result)
    assert [row["category"] for row in report["prompts"]] == ["a", "b", "b", "a"]
    base, candidate = np.array(report["scores"]["taste"])[:, 1:3].mean(axis=(1, 2))
    (category,) = (
        each for each in report["categories"] if (each["category"], each["scorer"]) == ("b", "taste")
    )
    assert (category["num_prompts"], category["candidate"]) == (2, "other")
    assert category["difference"]["value"] == pytest.approx(candidate - base)


def test_the_page_shows_the_verdict_the_images_and_the_request_that_repeats_the_evaluation(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord
):
    result = evaluate(shapes, other, images_per_prompt=2)
    page = files.read_bytes(result.page).decode()
    assert result.summary[0] in page
    assert page.count("data:image/png;base64,") >= 16
    command = report_of(result)["provenance"]["command"]
    assert html.escape(command, quote=False)[:60] in page.replace("&#34;", '"').replace("&#39;", "'")
    body = json.loads(shlex.split(command)[-1])
    request = EvaluationCreate.model_validate_json(json.dumps(body))
    named = [NamedModel(name=model.name, model=model.id) for model in (shapes, other)]
    assert (request.models, request.base) == (named, "shapes")
    assert request.images_per_prompt == 2
    digests = report_of(result)["provenance"]["digests"]
    assert digests["model shapes"] == shapes.digest


def test_diversity_and_drift_are_made_of_features_of_all_images(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, tmp_path: Path
):
    clip, processor = write_tiny("clip", tmp_path)
    scorers = [
        ScorerRecord(
            id=f"scorer_{kind}", name=kind, kind=kind, uri=clip.as_uri(), created_at=0,
            digest=digest_of(clip.as_uri(), None),
        )
        for kind in ("diversity", "drift")
    ]  # fmt: skip
    assert processor is None
    limits = {"compare": CompareSettings(drift_limits={"drift": 1e-9})}
    result = evaluate(shapes, other, shapes.model_copy(update={"name": "twin"}), records=scorers,
                      images_per_prompt=3, **limits)  # fmt: skip
    assert result.scores["diversity"]["twin"].difference.value == 0
    assert result.drift["drift"]["twin"].value == pytest.approx(0, abs=1e-9)
    assert result.drift["drift"]["other"].value > 0
    assert result.drift["drift"]["other"].is_beyond
    assert report_of(result)["drift"][0]["between_seeds"] > 0


# ---- reuse and resumption


def test_a_second_evaluation_draws_and_scores_nothing_and_finds_the_same_numbers(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord
):
    first = evaluate(shapes, other)
    assert (first.images_drawn, len(evaluate.drawn)) == (8, 8)
    written = {path: path.stat().st_mtime_ns for path in evaluate.stored()}
    again = evaluate(other, shapes)
    assert (again.images_drawn, evaluate.drawn) == (0, [])
    assert {path: path.stat().st_mtime_ns for path in evaluate.stored()} == written
    assert scores_of(again) == scores_of(first)
    assert evaluate.metrics()["score_s"] == evaluate.metrics()["draw_s"] == 0


def test_more_prompts_and_more_images_of_each_draw_only_what_is_new(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord
):
    evaluate(shapes, other, num_prompts=4)
    assert evaluate(shapes, other, num_prompts=6).images_drawn == 4
    assert evaluate(shapes, other, num_prompts=4, images_per_prompt=3).images_drawn == 16


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"sample": replace(SAMPLE, steps=3)}, {"sample": replace(SAMPLE, guidance_scale=2.0)}],
    ids=["seed", "steps", "guidance"],
)
def test_other_settings_draw_other_images(evaluate: EvaluateHere, shapes, other, change):
    evaluate(shapes, other)
    assert evaluate(shapes, other, **change).images_drawn == 8


def test_the_models_own_size_and_the_same_size_by_request_are_one(evaluate: EvaluateHere, shapes, other):
    evaluate(shapes, other)
    explicit = replace(SAMPLE, height=32, width=32)
    assert evaluate(shapes, other, sample=explicit).images_drawn == 0


def test_a_changed_model_is_refused_instead_of_stored_under_its_old_digest(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path
):
    changed = record_of("changed", sd15_folder(tmp_path / "changed"))
    (tmp_path / "changed" / "unet" / "extra.txt").write_text("x")
    with pytest.raises(BadRequest, match=r"the files of model changed .* have changed"):
        evaluate(shapes, changed)
    assert not list(tmp_path.glob(f"images/{models.identity(changed)}/*"))


def flip_a_bit(path: Path, rng: random.Random) -> None:
    """Among the values: Parquet's footer also has bytes that nobody reads."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data) // 4, len(data) // 2)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_damaged_images_and_scores_are_made_again_with_a_warning(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, damage
):
    first = evaluate(shapes, other)
    whole = {path: path.read_bytes() for path in evaluate.stored()}
    rng = random.Random(0)
    for path in whole:
        damage(path, rng)
    again = evaluate(shapes, other)
    assert scores_of(again) == scores_of(first)
    assert files.read_bytes(again.grid) == files.read_bytes(first.grid)
    found = {path: path.read_bytes() for path in evaluate.stored()}
    images = [path for path in whole if "-" not in path.name]
    repaired = {path for path in whole if found[path] == whole[path]}
    assert set(images) <= repaired
    warnings = evaluate.warnings()
    assert len(warnings) >= len(images)
    assert "is damaged" in warnings[0]
    assert any("images of shapes are drawn again" in warning for warning in warnings)
    assert any("scores are computed again" in warning for warning in warnings)


def test_a_chunk_of_images_is_read_once_for_the_grid_and_the_page(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, monkeypatch
):
    read_images = image_cache.read_images
    reads: Counter[str] = Counter()

    def counted(uri: str) -> list[bytes] | None:
        found = read_images(uri)
        reads[uri] += found is not None
        return found

    monkeypatch.setattr(image_cache, "read_images", counted)
    found = evaluate(shapes, other, images_per_prompt=2)
    assert files.read_bytes(found.page).decode().count("<img") > 8, "more images than chunks"
    assert set(reads.values()) == {1}
    assert len(reads) == 8


class Killed(BaseException):
    """Ends a run between any two writes."""


def test_a_run_killed_at_every_write_in_turn_ends_with_the_same_bytes(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, tmp_path: Path, monkeypatch
):
    calm = EvaluateHere(monkeypatch, tmp_path / "calm")
    expected = calm(shapes, other)
    stored = {path.relative_to(calm.root): path.read_bytes() for path in calm.stored()}
    write = files.write_bytes
    left = 0

    def writes_that_end(uri: str, data: bytes) -> None:
        nonlocal left
        if "/images/" in uri and left == 0:
            raise Killed
        left -= "/images/" in uri
        write(uri, data)

    monkeypatch.setattr(files, "write_bytes", writes_that_end)
    here = EvaluateHere(monkeypatch, tmp_path / "killed")
    kills = 0
    while True:
        left = 3
        try:
            result = here(shapes, other)
            break
        except Killed:
            kills += 1
    assert kills == (len(stored) - 1) // 3
    assert {path.relative_to(here.root): path.read_bytes() for path in here.stored()} == stored
    assert result.scores == expected.scores
    assert files.read_bytes(result.grid) == files.read_bytes(expected.grid)


def test_the_order_of_chunks_changes_nothing(
    evaluate: EvaluateHere, shapes, other, tmp_path: Path, monkeypatch
):
    first = evaluate(shapes, other)
    backwards = EvaluateHere(monkeypatch, tmp_path / "backwards")
    backwards.order = lambda work: list(work)[::-1]
    second = backwards(shapes, other)
    assert second.scores == first.scores
    assert files.read_bytes(second.grid) == files.read_bytes(first.grid)


def test_a_full_disk_ends_the_run_with_its_cause_and_leaves_nothing_half_written(
    evaluate: EvaluateHere, shapes, other, monkeypatch
):
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.endswith(".part") and "images" in path.parts:
            write(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        evaluate(shapes, other)
    assert evaluate.stored("*/*") == []


def test_images_that_are_deleted_while_a_run_reads_them_are_drawn_again(
    evaluate: EvaluateHere, shapes, other, monkeypatch
):
    first = evaluate(shapes, other)
    actor_ends = evaluate._score_chunks

    def then_deleted(spec, work):
        yield from actor_ends(spec, work)
        if len(work) > 1:
            for path in evaluate.stored(f"{models.identity(other)}/*"):
                path.unlink()

    monkeypatch.setattr("services.evaluation.drawing.score_chunks", then_deleted)
    second = evaluate(shapes, other)
    assert files.read_bytes(second.grid) == files.read_bytes(first.grid)


def test_a_model_that_gives_nan_is_named(evaluate: EvaluateHere, shapes, other, monkeypatch):
    def nan(*arguments):
        raise NonFiniteError("images have infinite or NaN values")

    monkeypatch.setattr("dde_core.generation.TextToImage.__call__", nan)
    with pytest.raises(NonFiniteError, match="model shapes: images have infinite or NaN values"):
        evaluate(shapes, other)
    assert evaluate.stored() == []


def test_progress_counts_images_and_tells_the_time_left_and_what_it_was_spent_on(
    evaluate: EvaluateHere, shapes, other
):
    evaluate(shapes, other)
    metrics = evaluate.metrics()
    assert (metrics["pictures"], metrics["pictures_total"], metrics["pictures_drawn"]) == (8, 8, 8)
    assert metrics["eta_s"] == 0
    assert 0 < metrics["draw_s"] + metrics["score_s"] < metrics["total_s"]


# ---- images drawn elsewhere


def test_images_drawn_elsewhere_have_the_numbers_of_the_model_that_drew_them(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, tmp_path: Path
):
    model = TextToImage(ModelFolder(*models.fetch(other)))
    texts = prompts(4)
    halves = [model(texts[i : i + 2], [i, i + 1], SAMPLE) for i in (0, 2)]
    folder = write_images(tmp_path / "elsewhere", [[image] for image in np.concatenate(halves)])
    result = evaluate(shapes, other, folder)
    assert result.images_drawn == 8
    assert result.scores["taste"]["elsewhere"] == result.scores["taste"]["other"]
    found = scores_of(result)[texts[0]]["match"]
    assert found["elsewhere"] == found["other"] != found["shapes"]


def test_an_object_store_may_hold_the_images_of_models_and_those_drawn_elsewhere(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path, bucket: str
):
    local = write_images(tmp_path / "elsewhere", random_images(4, 2))
    files.copy_folder(local.images_uri, f"{bucket}/elsewhere")
    remote = local.model_copy(update={"images_uri": f"{bucket}/elsewhere"})
    expected = evaluate(shapes, local, images_per_prompt=2)
    given = evaluate.spec([shapes, remote], images_per_prompt=2)
    for drawn in (8, 0):
        found = evaluate.run(given.model_copy(update={"images": f"{bucket}/images"}))
        assert (found.images_drawn, found.scores) == (drawn, expected.scores)
    files.delete_file(f"{bucket}/elsewhere/00003-1.png")
    with pytest.raises(BadRequest, match="lacks 1 of 8 images, the first is 00003-1"):
        evaluate.run(given)


def test_images_outside_of_the_allowed_sources_are_forbidden(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path
):
    folder = write_images(tmp_path / "elsewhere", random_images(4, 1))
    sources.hold_to(SourceRules((str(tmp_path / "another"),)))
    with pytest.raises(Forbidden, match="elsewhere"):
        evaluate(shapes, folder)
    sources.hold_to(SourceRules((folder.images_uri,)))
    (tmp_path / "secret.png").write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
    (tmp_path / "elsewhere" / "00001-0.png").unlink()
    (tmp_path / "elsewhere" / "00001-0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ServiceError, match=r"00001-0\.png"):
        evaluate(shapes, folder)
    assert evaluate.drawn == []


def test_a_folder_may_be_the_base_and_a_manifest_may_name_its_files(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path
):
    numbered = write_images(tmp_path / "numbered", random_images(4, 2))
    named = write_images(tmp_path / "named", [])
    rows = []
    for i, text in reversed(list(enumerate(prompts(4)))):
        for j in range(2):
            (tmp_path / "named" / f"deep {i}").mkdir(exist_ok=True)
            image = (tmp_path / "numbered" / f"{i:05d}-{j}.png").read_bytes()
            (tmp_path / "named" / f"deep {i}" / f"{j}.png").write_bytes(image)
            rows.append({"file": f"deep {i}/{j}.png", "prompt": text})
    (tmp_path / "named" / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = evaluate(shapes, numbered, named, base="numbered", images_per_prompt=2)
    difference = result.scores["fidelity"]["named"].difference
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert result.scores["fidelity"]["shapes"].difference.value > 0
    (tmp_path / "named" / "images.jsonl").write_text("\n".join(map(json.dumps, rows[::-1])))
    swapped = evaluate(shapes, numbered, named, base="numbered", images_per_prompt=2)
    texts = prompts(4)
    before, after = (scores_of(each)[texts[1]]["fidelity"]["named"] for each in (result, swapped))
    assert before == after[::-1], "the files of a prompt are its images in the order of the lines"


def test_equal_prompts_have_images_of_their_own_in_a_manifest(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path
):
    text = prompts(1)[0]
    (tmp_path / "p.txt").write_text(f"{text}\n{text}\n")
    folder = write_images(tmp_path / "named", random_images(1, 2))
    rows = [{"file": f"00000-{j}.png", "prompt": text} for j in range(2)]
    (tmp_path / "named" / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = evaluate(shapes, folder, num_prompts=2, prompts_uri=(tmp_path / "p.txt").as_uri())
    _, of_folder = report_of(result)["scores"]["fidelity"]
    assert of_folder[0] != of_folder[1]


def test_changed_images_are_scored_anew(evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path):
    images = random_images(4, 1)
    folder = write_images(tmp_path / "elsewhere", images)
    first = evaluate(shapes, folder)
    (tmp_path / "elsewhere" / "00001-0.png").write_bytes(png(images[0][0]))
    second = evaluate(shapes, folder)
    texts = prompts(4)
    before, after = (scores_of(each) for each in (first, second))
    assert before[texts[1]]["fidelity"]["elsewhere"] != after[texts[1]]["fidelity"]["elsewhere"]
    assert before[texts[2]] == after[texts[2]]


def missing(folder: Path) -> None:
    (folder / "00002-0.png").unlink()


def no_image(folder: Path) -> None:
    (folder / "00002-0.png").write_bytes(b"not an image")


def another_size(folder: Path) -> None:
    (folder / "00002-0.png").write_bytes(png(np.zeros((32, 40, 3), np.uint8)))


def all_of_another_size(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(png(np.zeros((64, 64, 3), np.uint8)))


def manifest(*lines: str):
    def write(folder: Path) -> None:
        (folder / "images.jsonl").write_text("\n".join(lines))

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, "lacks 1 of 4 images, the first is 00002-0.png"),
        (no_image, "00002-0.png is no image"),
        (another_size, "must have one size, got 32x32 px in 00000-0.png and 40x32 px in 00002-0.png"),
        (
            all_of_another_size,
            "models: images must have one size, got 32x32 px of shapes and 64x64 px of elsewhere: "
            "set sample.height and sample.width",
        ),
        (manifest("{"), "images.jsonl line 1 is no JSON"),
        (manifest('{"file": "a.png"}'), "images.jsonl line 1 must have a string as field 'prompt'"),
        (manifest("3"), "images.jsonl line 1 must have a string as field 'file'"),
        (
            manifest('{"file": "../a.png", "prompt": "a"}'),
            "images.jsonl line 1 field 'file' must be a path in the folder, got '../a.png'",
        ),
        (manifest('{"file": "00000-0.png", "prompt": "nobody asked"}'), "has 0 of 1 images of prompt 0, "),
    ],
)
def test_images_that_are_not_all_there_are_refused_before_anything_is_drawn(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path, spoil, message
):
    folder = write_images(tmp_path / "elsewhere", random_images(4, 1))
    spoil(tmp_path / "elsewhere")
    with pytest.raises(BadRequest) as refused:
        evaluate(shapes, folder)
    assert message in str(refused.value)
    assert "elsewhere" in str(refused.value)
    assert (evaluate.drawn, evaluate.stored()) == ([], [])


def test_an_image_that_is_cut_off_behind_its_header_is_named(
    evaluate: EvaluateHere, shapes: ModelRecord, tmp_path: Path
):
    folder = write_images(tmp_path / "elsewhere", random_images(4, 1))
    path = tmp_path / "elsewhere" / "00003-0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"image 00003-0\.png of elsewhere cannot be read: image_"):
        evaluate(shapes, folder)


def test_a_size_that_a_model_cannot_draw_is_refused_before_anything_is_drawn(
    evaluate: EvaluateHere, shapes: ModelRecord, other: ModelRecord, monkeypatch
):
    monkeypatch.setattr("services.artifacts.models.proof.read_object", _with_factor_16)
    with pytest.raises(ConfigError, match=r"sample\.height must be a multiple of 16 for shapes, got 40"):
        evaluate(shapes, other, scorers=[], sample=SampleConfig(steps=1, height=40, width=32))


def _with_factor_16(uri: str, *path: str) -> dict:
    config = json.loads((MODEL_DIR.joinpath(*path)).read_text())
    if path[0] == "vae":
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            config[name] = config[name][:1] * 5
    return config
