"""Pairs from scorers: drawn or labeled anew, in chunks that a killed run keeps, and read like anybody's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dde_core.errors import DataError, NonFiniteError
from dde_core.shapes import PROMPTS_FILE
from dde_core.shapes.scorers import ShapesScorer, score
from services.api.requests import DatasetSource
from services.errors import BadRequest
from services.ingest import scored, scoring
from services.pairs.images import decode_whole
from services.pairs.source import open_source
from services.pairs.validation import inspect, validate
from services.stages.specs import GenerateSpec, RelabelSpec
from services.storage import files
from tests.support.make_here import Killed, MakeHere
from tests.support.pairs_file import pair_rows, png, write_pairs

FAST = {"sample": {"steps": 2, "guidance_scale": 1.0}}
PICK_A_PIC = {
    "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "caption", "image_0_uid", "image_1_uid", "pair_id",
}  # fmt: skip


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeHere:
    """Chunks of at most 8 images."""
    monkeypatch.setattr(scored, "CHUNK_IMAGES", 8)
    return MakeHere(monkeypatch, tmp_path)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes(PROMPTS_FILE.read_bytes())
    return path


def drawn_spec(make: MakeHere, prompts: Path, output: str = "made", **fields) -> GenerateSpec:
    body = {"num_prompts": 5, "images_per_prompt": 3, "scorers": {"taste": 1.0}, "seed": 7}
    spec = make.generate_spec(prompts, output, **body | fields)
    sample = spec.generate.sample.__class__(**FAST["sample"])
    return spec.model_copy(update={"generate": spec.generate.model_copy(update={"sample": sample})})


def rows_of(spec: GenerateSpec | RelabelSpec) -> list[dict]:
    folder = files.local_path(spec.output)
    assert folder is not None
    return [row for path in sorted((folder / "pairs").iterdir()) for row in pq.read_table(path).to_pylist()]


def contents(spec: GenerateSpec | RelabelSpec) -> dict[str, str]:
    """The sha256 of every file of pairs."""
    folder = files.local_path(spec.output)
    assert folder is not None
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "pairs").iterdir()}


def test_the_winner_of_every_pair_has_the_higher_score_and_the_scores_are_those_of_its_images(make, prompts):
    spec = drawn_spec(make, prompts)
    result = make.run(spec)
    rows = rows_of(spec)
    assert (result.prompts, result.images, len(rows)) == (5, 15, result.counts.pairs)
    assert result.counts.pairs + result.prompts_without_pair == 5
    assert {"margin", "score_0_taste", "score_1_taste"} | PICK_A_PIC == set(rows[0])
    for row in rows:
        images = np.stack([decode_whole(row[f"jpg_{side}"]) for side in (0, 1)])
        taste = score(images, [row["caption"]] * 2)["taste"]
        np.testing.assert_allclose(taste, [row["score_0_taste"], row["score_1_taste"]], rtol=0, atol=1e-12)
        assert (row["label_0"], row["label_1"]) == ((1.0, 0.0) if taste[0] > taste[1] else (0.0, 1.0))
        np.testing.assert_allclose(row["margin"], abs(taste[0] - taste[1]) / result.spreads["taste"])
    assert result.agreement is None


def test_images_are_those_of_their_prompt_and_seed(make, prompts):
    spec = drawn_spec(make, prompts, keep="all_pairs")
    make.run(spec)
    drawer = scoring.Drawer(spec)
    captions = [line.strip() for line in prompts.read_text().splitlines()[:5]]
    uids = {row[f"image_{side}_uid"] for row in rows_of(spec) for side in (0, 1)}
    for i in (0, 4):
        images = drawer._model([captions[i]] * 3, [7 + 3 * i + j for j in range(3)], spec.generate.sample)
        assert {scoring._file(image)["uid"] for image in images} <= uids


def test_all_pairs_and_a_margin_keep_what_differs_by_more(make, prompts):
    every = drawn_spec(make, prompts, "every", keep="all_pairs")
    wide = drawn_spec(make, prompts, "wide", keep="all_pairs", margin=1.0)
    all_of_them, kept = make.run(every), make.run(wide)
    assert all_of_them.counts.pairs + all_of_them.ties == 15
    assert kept.ties == 15 - kept.counts.pairs
    expected = [row["pair_id"] for row in rows_of(every) if row["margin"] > 1.0]
    assert [row["pair_id"] for row in rows_of(wide)] == expected
    assert 0 < len(expected) < all_of_them.counts.pairs
    assert {row["label_0"] for row in rows_of(every)} == {0.0, 1.0}, "the winner is on either side"


def test_several_scorers_count_by_weight_in_units_of_their_spreads(make, prompts):
    spec = drawn_spec(make, prompts, scorers={"taste": 1.0, "fidelity": 3.0}, keep="all_pairs")
    result = make.run(spec)
    assert set(result.spreads) == {"taste", "fidelity"}
    for row in rows_of(spec):
        images = np.stack([decode_whole(row[f"jpg_{side}"]) for side in (0, 1)])
        for name, scores in score(images, [row["caption"]] * 2).items():
            if name in result.spreads:
                np.testing.assert_allclose(scores, [row[f"score_{side}_{name}"] for side in (0, 1)])
        difference = {name: row[f"score_0_{name}"] - row[f"score_1_{name}"] for name in result.spreads}
        spread = result.spreads
        utility = (
            difference["taste"] / spread["taste"] + 3 * difference["fidelity"] / spread["fidelity"]
        ) / 4
        assert row["label_0"] == float(utility > 0)
        np.testing.assert_allclose(row["margin"], abs(utility))


def test_the_result_is_what_registration_finds(make, prompts):
    spec = drawn_spec(make, prompts)
    result = make.run(spec)
    source = open_source(DatasetSource(uri=files.join(spec.output, "pairs")))
    assert (result.counts, result.digest, result.example) == inspect(source)
    report = validate(source)
    assert report.columns_not_read == ["margin", "score_0_taste", "score_1_taste"]
    assert report.sampled["decided"] == result.counts.pairs
    assert report.bad == {}


@pytest.mark.parametrize("kill_after", [0, 1, 2])
def test_a_killed_run_keeps_its_chunks_and_ends_with_the_same_files(make, prompts, kill_after):
    whole = drawn_spec(make, prompts, "whole")
    expected = make.run(whole)
    num_chunks = len(make.scored)
    assert num_chunks == 3
    make.scored.clear()
    spec = drawn_spec(make, prompts, "killed")
    make.kill_after = kill_after
    with pytest.raises(Killed):
        make.run(spec)
    assert not files.exists(files.join(spec.output, "record.json"))
    make.kill_after = None
    result = make.run(spec)
    assert sorted(make.scored) == list(range(num_chunks)), "no chunk is drawn twice"
    assert contents(spec) == contents(whole)
    assert result.model_dump(exclude={"seconds", "digest"}) == expected.model_dump(
        exclude={"seconds", "digest"}
    )
    assert result.digest == expected.digest


def test_a_run_killed_after_the_commit_repeats_the_result_and_draws_nothing(make, prompts):
    spec = drawn_spec(make, prompts)
    expected = make.run(spec)
    scored.commit(spec.output, 0, [], {})  # as if it had been killed before this was deleted
    make.scored.clear()
    assert make.run(spec) == expected
    assert make.scored == []
    assert files.list_files(files.join(spec.output, "scored")) == []


def test_chunks_of_another_size_than_an_earlier_version_wrote_are_refused(make, prompts, monkeypatch):
    spec = drawn_spec(make, prompts)
    make.kill_after = 1
    with pytest.raises(Killed):
        make.run(spec)
    make.kill_after = None
    monkeypatch.setattr(scored, "CHUNK_IMAGES", 3)
    with pytest.raises(DataError, match="18 images are scored and 0 pairs are bad, 15 images were expected"):
        make.run(spec)


def test_prompts_that_change_after_the_request_end_the_run(make, prompts):
    spec = drawn_spec(make, prompts)
    prompts.write_text("a red circle\n" * 10)
    with pytest.raises(BadRequest, match="has changed since") as caught:
        make.run(spec)
    assert caught.value.code == "prompts_changed"


def test_a_margin_that_leaves_no_pair_ends_the_run_with_words(make, prompts):
    with pytest.raises(
        DataError, match=r"no pair is left of 5: 5 differ by at most the margin 100, in units"
    ):
        make.run(drawn_spec(make, prompts, margin=100.0))


def test_a_score_that_is_not_finite_ends_the_run_naming_scorer_and_prompt(make, prompts, monkeypatch):
    class Broken(ShapesScorer):
        def __call__(self, images, texts):
            return np.where(np.arange(len(texts)) == 4, np.nan, super().__call__(images, texts))

    monkeypatch.setattr(scoring.scorers, "load", lambda record, device: Broken(record.kind))
    with pytest.raises(NonFiniteError, match="scorer taste gives nan for the prompt 'a red triangle on"):
        make.run(drawn_spec(make, prompts))


# ---- relabel


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.parquet", pair_rows(20), row_group_size=9)


def test_a_scorers_labels_replace_those_of_people_and_everything_else_stays(make, pairs):
    spec = make.relabel_spec(pairs, scorer="match")
    result = make.run(spec)
    source = open_source(DatasetSource(uri=pairs.as_uri()))
    before = {
        row.preferences[0].pair_id: row
        for unit in source.units()
        for row in source.rows(unit, with_images=True)
        if row.kind == "decided"
    }
    rows = rows_of(spec)
    assert len(before) == 18 == result.counts.pairs + result.ties
    agreed = 0
    for row in rows:
        old = before[row["pair_id"]]
        assert (row["jpg_0"], row["jpg_1"]) == old.images
        assert (row["image_0_uid"], row["image_1_uid"]) == old.uids
        assert row["caption"] == old.caption
        images = np.stack([decode_whole(image) for image in old.images])
        match = score(images, [old.caption] * 2)["match"]
        assert row["label_0"] == float(match[0] > match[1])
        agreed += old.preferences[0].winner == int(match[1] > match[0])
    assert result.agreement == agreed / len(rows)
    assert result.agreement > 0.9, "in these pairs the winner shows the caption"
    again = open_source(DatasetSource(uri=files.join(spec.output, "pairs")))
    kept = {row.preferences[0].pair_id for unit in again.units() for row in again.rows(unit)}
    assert kept == {row["pair_id"] for row in rows} <= set(before)
    assert any(f"{result.agreement:.1%}" in event for event in make.events())


def test_ties_within_the_margin_are_dropped_and_counted(make, pairs):
    result = make.run(make.relabel_spec(pairs, scorer="match", margin=1.0))
    rows = rows_of(make.relabel_spec(pairs, scorer="match"))
    assert result.ties + result.counts.pairs == 18
    assert result.ties > 0
    assert all(row["margin"] > 1.0 for row in rows)


def test_a_ranking_becomes_its_pairs_with_the_scorers_labels(make, tmp_path):
    images = [row["jpg_0"] for row in pair_rows(4)]
    table = pa.table({"images": [images], "ranks": [[2, 1, 2, 3]], "caption": ["a red circle"]})
    pq.write_table(table, tmp_path / "rankings.parquet")
    spec = make.relabel_spec(tmp_path / "rankings.parquet", scorer="taste")
    result = make.run(spec)
    assert (result.prompts, result.images) == (5, 10)
    assert result.counts.pairs == len(rows_of(spec)) == 5 - result.ties


@pytest.mark.parametrize("kill_after", [0, 2])
def test_a_killed_relabeling_keeps_its_chunks(make, pairs, kill_after):
    whole = make.relabel_spec(pairs, "whole", scorer="taste")
    make.run(whole)
    num_chunks = len(make.scored)
    make.scored.clear()
    spec = make.relabel_spec(pairs, "killed", scorer="taste")
    make.kill_after = kill_after
    with pytest.raises(Killed):
        make.run(spec)
    make.kill_after = None
    make.run(spec)
    assert sorted(make.scored) == list(range(num_chunks))
    assert contents(spec) == contents(whole)


def test_pairs_with_an_unusable_image_are_left_out_and_counted(make, tmp_path):
    rows = pair_rows(10)
    rows[0]["jpg_0"] = b"no image"
    rows[3]["jpg_1"] = None
    rows[4]["label_0"] = float("nan")
    path = write_pairs(tmp_path / "some_bad.parquet", rows)
    result = make.run(make.relabel_spec(path, scorer="match"))
    assert result.bad == {"image_missing": 1, "image_not_an_image": 1, "label_nan": 1}
    assert result.counts.pairs + result.ties == 6
    assert "left out" in make.events()[-1]


def test_a_dataset_that_changed_is_not_labeled(make, pairs):
    spec = make.relabel_spec(pairs, scorer="match")
    write_pairs(pairs, pair_rows(20, seed=3))
    with pytest.raises(BadRequest, match="has changed") as caught:
        make.run(spec)
    assert caught.value.code == "dataset_changed"


def test_images_that_the_scorer_cannot_score_end_the_run(make, tmp_path):
    rows = pair_rows(4)
    rows[0]["jpg_0"] = png(np.zeros((40, 48, 3), np.uint8))
    path = write_pairs(tmp_path / "large.parquet", rows)
    with pytest.raises(DataError, match=r"got uint8 \[1, 40, 48, 3\]"):
        make.run(make.relabel_spec(path, scorer="match"))
