"""Encoding keeps pairs as they are, encodes every image once, keeps committed blocks and reports bad rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dde_core.errors import DataError
from dde_core.latents.reader import LatentReader
from dde_core.latents.schema import SCHEMA_VERSION, dataset_digest, pair_digest
from dde_core.models.folder import ModelFolder, encode_images
from dde_core.shapes import MODEL_DIR
from services.api.records import EncodeResult
from services.api.requests import DatasetSource
from services.errors import BadRequest
from services.ingest import encode as ingest
from services.ingest import plan
from services.ingest.committed import commit
from services.ingest.pipelines import segments
from services.ingest.plan import Planner
from services.ingest.reading import read_images
from services.pairs.columnar import Unit
from services.pairs.images import decode
from services.pairs.row import Preference, Row
from services.pairs.source import open_source
from services.stages.journal import read_journal
from services.storage import files
from tests.support.encode_here import EncodeHere
from tests.support.pairs_file import pair_rows, png, write_pairs


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EncodeHere:
    """Blocks of at most 8 images, shards of at most 6 pairs."""
    monkeypatch.setattr(plan, "MIN_BLOCK_IMAGES", 1)
    monkeypatch.setattr(plan, "MAX_BLOCK_IMAGES", 8)
    monkeypatch.setattr(ingest, "PAIRS_PER_SHARD", 6)
    return EncodeHere(monkeypatch, ModelFolder(MODEL_DIR), tmp_path / "encoded")


def rows_of(result: EncodeResult) -> dict[str, dict]:
    """The pairs of a dataset by their caption."""
    reader = LatentReader(*files.resolve(result.dataset))
    tables = [files.read_bytes(files.join(result.dataset, shard.name)) for shard in reader.manifest.shards]
    rows = [row for table in tables for row in pq.read_table(pa.BufferReader(table)).to_pylist()]
    return {row["pair_id"]: row for row in rows}


def events(encode: EncodeHere, attempt: int) -> list[str]:
    prefix = (encode.folder / f"a{attempt}").as_uri()
    return [entry.message for _, some in read_journal(prefix, 0) for entry in some if entry.message]


def test_every_pair_has_the_latents_of_its_own_two_images(encode: EncodeHere, tmp_path: Path):
    rows = pair_rows(20)  # two ties among them
    rows[7]["image_1_uid"], rows[7]["jpg_1"] = rows[1]["image_0_uid"], rows[1]["jpg_0"]  # of an earlier block
    rows[15]["image_0_uid"], rows[15]["jpg_0"] = rows[14]["image_0_uid"], rows[14]["jpg_0"]
    path = write_pairs(tmp_path / "pairs.parquet", rows, row_group_size=6)
    result = encode(path)
    assert result.counts == {
        "rows": 20, "pairs": 18, "ties": 2, "missing": 0, "bad": 0, "duplicates": 0, "images": 34,
        "soft": 0, "contradicting": 0, "long_captions": 0, "transparent": 0,
    }  # fmt: skip
    source = open_source(DatasetSource(uri=path.as_uri()))
    vae = ModelFolder(MODEL_DIR).vae()
    found = rows_of(result)
    by_uid = {row[f"image_{side}_uid"]: row[f"jpg_{side}"] for row in rows for side in (0, 1)}
    decided = [row for unit in source.units() for row in source.rows(unit) if row.kind == "decided"]
    assert set(found) == {row.preferences[0].pair_id for row in decided}
    for row in decided:
        preference = row.preferences[0]
        shard_row = found[preference.pair_id]
        for side, slot in (("w", preference.winner), ("l", preference.loser)):
            uid = row.uids[slot]
            assert shard_row[f"uid_{side}"] == uid
            expected = encode_images(vae, decode(by_uid[uid], 32).pixels[None])[0].ravel()
            np.testing.assert_allclose(
                np.array(shard_row[f"latents_{side}"], np.float16), expected, atol=0.01
            )


def test_a_ranking_becomes_every_pair_of_unequal_rank(encode: EncodeHere, tmp_path: Path):
    images = [row["jpg_0"] for row in pair_rows(4)]
    table = pa.table({"images": [images], "ranks": [[2, 1, 2, 3]], "caption": ["a red circle"]})
    pq.write_table(table, tmp_path / "rankings.parquet")
    result = encode(tmp_path / "rankings.parquet")
    assert (result.counts["pairs"], result.counts["images"], result.counts["ties"]) == (5, 4, 1)


def test_flip_and_resolution_make_another_dataset(encode: EncodeHere, tmp_path: Path):
    path = write_pairs(tmp_path / "pairs.parquet", pair_rows(6))
    results = [
        encode(path),
        encode(path, flip="all"),
        encode(path, resolution=64),
        encode(path, max_bad_fraction=0.5),
    ]
    assert len({result.dataset for result in results}) == 3
    assert [result.reused for result in results] == [False, False, False, True]
    assert LatentReader(*files.resolve(results[2].dataset)).manifest.latent_shape == (4, 16, 16)
    straight, mirrored = (rows_of(result) for result in results[:2])
    assert straight.keys() == mirrored.keys()
    assert all(straight[name]["latents_w"] != mirrored[name]["latents_w"] for name in straight)


def test_transparent_images_are_encoded_on_the_background_and_counted(encode: EncodeHere, tmp_path: Path):
    rows = pair_rows(6)
    hidden = np.full((32, 32, 4), 255, np.uint8)
    hidden[..., :3] = decode(rows[2]["jpg_1"], 32).pixels
    hidden[:16, :, 3] = 0
    rows[2]["jpg_1"] = png(hidden)
    path = write_pairs(tmp_path / "pairs.parquet", rows)
    vae = ModelFolder(MODEL_DIR).vae()
    winner_is_second = rows[2]["label_1"] > rows[2]["label_0"]
    digests = set()
    for run, (background, level) in enumerate((("white", 255), ("black", 0)), 1):
        result = encode(path, background=background)
        assert result.counts["transparent"] == 1
        assert f"1 of 6 pairs have a transparent image: it shows {background} (data.background)" in events(
            encode, run
        )
        seen = hidden[..., :3].copy()
        seen[:16] = level
        (row,) = [row for row in rows_of(result).values() if "0-2-1" in (row["uid_w"], row["uid_l"])]
        expected = encode_images(vae, seen[None])[0].ravel()
        found = np.array(row["latents_w" if winner_is_second else "latents_l"], np.float16)
        np.testing.assert_allclose(found, expected, atol=0.01)
        digests.add(result.digest)
    assert len(digests) == 2


def test_sampled_latents_are_another_dataset_and_the_same_at_every_encoding(
    encode: EncodeHere, tmp_path: Path
):
    rows = pair_rows(8)
    rows[7]["image_0_uid"], rows[7]["jpg_0"] = "a copy", rows[1]["jpg_0"]
    path = write_pairs(tmp_path / "pairs.parquet", rows, row_group_size=3)
    means, samples = encode(path), encode(path, posterior="sampled")
    assert means.dataset != samples.dataset
    assert means.digest != samples.digest
    manifests = [LatentReader(*files.resolve(result.dataset)).manifest for result in (means, samples)]
    assert [manifest.settings["posterior"] for manifest in manifests] == ["mean", "sampled"]
    assert len({manifest.latents for manifest in manifests}) == 2
    found = rows_of(samples)
    assert all(found[name]["latents_w"] != row["latents_w"] for name, row in rows_of(means).items())
    by_uid = {row[f"uid_{side}"]: row[f"latents_{side}"] for row in found.values() for side in "wl"}
    np.testing.assert_allclose(by_uid["a copy"], by_uid[rows[1]["image_0_uid"]], atol=0.01)
    encode.folder = tmp_path / "elsewhere"
    again = encode(path, posterior="sampled")
    assert again.reused is False
    assert rows_of(again) == found


def test_datasets_that_were_encoded_before_the_posterior_was_a_setting_keep_their_keys(
    encode: EncodeHere, tmp_path: Path
):
    result = encode(write_pairs(tmp_path / "pairs.parquet", pair_rows(6)))
    manifest = LatentReader(*files.resolve(result.dataset)).manifest
    before = {name: value for name, value in manifest.settings.items() if name != "posterior"}
    assert before.keys() == {"resolution", "crop", "flip", "background"}
    source_digest = encode.spec(tmp_path / "pairs.parquet").source_digest
    identity = [SCHEMA_VERSION, source_digest, manifest.encoder_digest, before, plan.images_per_block(32)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    assert result.dataset.endswith(f"/{key}")
    assert replace(manifest, settings=before).latents == manifest.latents


def test_the_background_changes_the_digest_only_where_it_is_seen(encode: EncodeHere, tmp_path: Path):
    path = write_pairs(tmp_path / "pairs.parquet", pair_rows(6))
    white, black = (encode(path, background=background) for background in ("white", "black"))
    assert white.dataset != black.dataset, "before the images are read nobody knows"
    assert white.digest == black.digest
    manifest = LatentReader(*files.resolve(white.dataset)).manifest
    source = open_source(DatasetSource(uri=path.as_uri()))
    rows = [row for unit in source.units() for row in source.rows(unit, with_images=True)]
    earlier = {"resolution": 32, "crop": "centre", "flip": "none"}
    digests = [_pair_digest(row) for row in rows]
    assert white.digest == dataset_digest(earlier, manifest.encoder_digest, digests), "as before this setting"


def _pair_digest(row: Row) -> bytes:
    (preference,) = row.preferences
    sides = (row.images[preference.winner], row.images[preference.loser])
    sha256_w, sha256_l = (hashlib.sha256(image).digest() for image in sides)
    return pair_digest(preference.pair_id, sha256_w, sha256_l, preference.label, row.caption)


def test_soft_labels_are_stored_and_odd_pairs_are_counted_by_the_content_of_their_images(
    encode: EncodeHere, tmp_path: Path
):
    rows = pair_rows(6)
    rows[0] |= {"label_0": 3.0, "label_1": 1.0}
    rows[1] |= {"label_0": 0.33, "label_1": 0.66}
    rows[2]["caption"] = "red " * 20
    rows[4] = rows[3] | {"image_0_uid": "other-0", "image_1_uid": "other-1"}
    turned = {"label_0": rows[5]["label_1"], "label_1": rows[5]["label_0"]}
    rows.append(rows[5] | turned | {"image_0_uid": "turned-0", "image_1_uid": "turned-1"})
    result = encode(write_pairs(tmp_path / "pairs.parquet", rows))
    labels = sorted(row["label"] for row in rows_of(result).values())
    assert labels == [*np.float32([2 / 3, 0.75]).tolist(), 1.0, 1.0, 1.0, 1.0, 1.0]
    expected = {"soft": 2, "duplicates": 1, "contradicting": 2, "long_captions": 1, "transparent": 0}
    assert {name: result.counts[name] for name in expected} == expected
    text = "\n".join(events(encode, 1))
    assert "2 of 7 pairs have a soft label: objective.label decides" in text
    assert "1 of 7 pairs repeat an earlier pair" in text
    assert "2 of 7 pairs are contradicted by another pair" in text
    assert "1 of 7 pairs have a caption of more than 16 tokens: the rest is not read" in text
    assert "transparent image" not in text


def test_an_interrupted_run_is_resumed_and_ends_with_the_same_manifest(
    encode: EncodeHere, tmp_path: Path, monkeypatch
):
    rows = pair_rows(30)
    rows[2]["jpg_0"] = b"no image"
    path = write_pairs(tmp_path / "pairs.parquet", rows, row_group_size=10)
    whole = EncodeHere(monkeypatch, ModelFolder(MODEL_DIR), tmp_path / "whole")(path, max_bad_fraction=0.1)

    dataset = interrupted(encode, path, monkeypatch, blocks=3)
    before = {file: file.stat().st_mtime_ns for file in dataset.glob("blocks/*")}
    assert len(before) == 3
    after: dict[Path, int] = {}
    monkeypatch.setattr(
        ingest.committed,
        "clear",
        lambda folder: after.update({file: file.stat().st_mtime_ns for file in before}),
    )
    again = encode(path, max_bad_fraction=0.1)
    assert after == before, "what was committed is not encoded again"
    assert "17 already encoded by an earlier run" in events(encode, 2)[0]
    manifests = [files.read_bytes(files.join(result.dataset, "manifest.json")) for result in (whole, again)]
    assert manifests[0] == manifests[1]
    assert again.bad == {"image_not_an_image": 1}


def interrupted(encode: EncodeHere, path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int) -> Path:
    """The folder of a dataset whose run was interrupted after so many blocks."""

    def interrupting(*arguments, **more):
        for number, row in enumerate(encode_blocks(*arguments, **more)):
            yield row
            if number + 1 == blocks:
                raise KeyboardInterrupt

    encode_blocks = ingest.encode_blocks
    monkeypatch.setattr(ingest, "encode_blocks", interrupting)
    with pytest.raises(KeyboardInterrupt):
        encode(path, max_bad_fraction=0.1)
    monkeypatch.setattr(ingest, "encode_blocks", encode_blocks)
    (dataset,) = (encode.folder / "datasets").iterdir()
    return dataset


def test_a_block_that_lacks_an_image_is_an_error_and_no_bad_image(
    encode: EncodeHere, tmp_path: Path, monkeypatch
):
    path = write_pairs(tmp_path / "pairs.parquet", pair_rows(20))
    dataset = interrupted(encode, path, monkeypatch, blocks=2)
    commit({"block": 0, "latents": b"", "metadata": "[]", "bad": "{}"}, dataset.as_uri())
    with pytest.raises(DataError, match=r"block 0 of .* lacks 8 images that were encoded"):
        encode(path)
    assert not (dataset / "manifest.json").exists()


def test_bad_images_of_an_uncommitted_block_are_deleted(encode: EncodeHere, tmp_path: Path, monkeypatch):
    path = write_pairs(tmp_path / "pairs.parquet", pair_rows(20))
    dataset = interrupted(encode, path, monkeypatch, blocks=2)
    (dataset / "bad").mkdir()
    (dataset / "bad" / "00000003.json").write_text('{"0": "image_missing"}')
    (dataset / "blocks" / ".nfs0001").write_bytes(b"")
    assert encode(path).counts["bad"] == 0


def test_a_run_that_another_run_has_overtaken_uses_its_manifest(
    encode: EncodeHere, tmp_path: Path, monkeypatch
):
    path = write_pairs(tmp_path / "pairs.parquet", pair_rows(20))
    results: list[EncodeResult] = []

    def overtaken(work, actors, **shared):
        monkeypatch.setattr(ingest, "join_shards", join_shards)
        results.append(encode(path))
        yield from join_shards(work, actors, **shared)

    join_shards = ingest.join_shards
    monkeypatch.setattr(ingest, "join_shards", overtaken)
    slow = encode(path)
    assert (slow.digest, slow.dataset) == (results[0].digest, results[0].dataset)


def test_units_are_split_only_where_they_are_too_few_for_the_readers():
    def cut(units: int, readers: int) -> list[int]:
        planner = Planner(images_per_block=2)
        for unit in range(units):
            rows = [
                Row(f"{unit}:{n}", (f"{unit}-{n}-a", f"{unit}-{n}-b"), "text", (Preference(0, 1, 1.0, "p"),))
                for n in range(12)
            ]
            planner.add(Unit("", unit, 12), rows)
        return [len(work["blocks"]) for work in segments(planner.plan(), set(), readers)]

    assert cut(units=1, readers=2) == [3, 3, 3, 3]
    assert cut(units=2, readers=2) == [6, 6, 6, 6]
    assert cut(units=8, readers=4) == [12] * 8


def test_committed_blocks_in_between_are_skipped(tmp_path: Path):
    rows = pair_rows(20)
    source = open_source(DatasetSource(uri=write_pairs(tmp_path / "pairs.parquet", rows).as_uri()))
    planner = Planner(images_per_block=6)
    for unit in source.units():
        planner.add(unit, source.rows(unit))
    planned = planner.plan()
    settings = {"resolution": 32, "flip": "none", "background": "white"}
    all_rows = {
        row["block"]: row
        for work in segments(planned, set(), 1)
        for row in read_images(work, source, settings)
    }
    some = {
        row["block"]: row
        for work in segments(planned, {0, 2, 3}, 1)
        for row in read_images(work, source, settings)
    }
    assert some == {number: row for number, row in all_rows.items() if number not in (0, 2, 3)}
    assert sum(len(json.loads(row["metadata"])) for row in all_rows.values()) == planned.num_images


def test_bad_rows_and_bad_images_are_quarantined_by_row_and_cause(encode: EncodeHere, tmp_path: Path):
    rows = pair_rows(20)
    rows[0]["caption"] = "x\0y"
    rows[3]["jpg_0"] = b"no image"
    rows[4]["image_1_uid"] = rows[3]["image_0_uid"]  # the same uid: its image is the one that occurs first
    result = encode(write_pairs(tmp_path / "pairs.parquet", rows), max_bad_fraction=0.2)
    lines = files.read_bytes(files.join(result.dataset, "quarantine.jsonl")).decode().splitlines()
    quarantined = {line["row"].rsplit(":", 1)[1]: line for line in map(json.loads, lines)}
    assert {row: line["cause"] for row, line in quarantined.items()} == {
        "0": "caption_null_byte", "3": "image_not_an_image", "4": "image_not_an_image"
    }  # fmt: skip
    assert quarantined["0"]["detail"] == "caption = 'x\\x00y'"
    assert quarantined["4"]["pictures"] == {rows[3]["image_0_uid"]: "image_not_an_image"}
    assert result.bad == {"caption_null_byte": 1, "image_not_an_image": 2}
    assert result.counts["pairs"] == 18 - 3


def test_more_bad_rows_than_allowed_fail_with_their_counts_also_where_the_shards_exist(
    encode: EncodeHere, tmp_path: Path
):
    rows = pair_rows(20)
    for number in (1, 2, 3):
        rows[number]["jpg_1"] = b""
    path = write_pairs(tmp_path / "pairs.parquet", rows)
    with pytest.raises(
        BadRequest, match=r"3 of 20 rows are bad \(image_empty 3\).*max_bad_fraction = 0\.1"
    ) as refused:
        encode(path, max_bad_fraction=0.1)
    assert (refused.value.code, refused.value.param) == ("too_many_bad_rows", "data.max_bad_fraction")
    assert encode(path, max_bad_fraction=0.15).counts["bad"] == 3
    with pytest.raises(BadRequest, match="3 of 20 rows are bad"):
        encode(path, max_bad_fraction=0.1)


def test_a_dataset_without_a_usable_pair_is_refused(encode: EncodeHere, tmp_path: Path):
    rows = [{**row, "jpg_0": b"broken"} for row in pair_rows(4)]
    with pytest.raises(DataError, match="has no pair left"):
        encode(write_pairs(tmp_path / "pairs.parquet", rows), max_bad_fraction=1.0)


def test_a_source_that_has_changed_since_it_was_registered_is_refused(encode: EncodeHere, tmp_path: Path):
    path = write_pairs(tmp_path / "pairs.parquet", pair_rows(6))
    spec = encode.spec(path)
    write_pairs(path, pair_rows(6, seed=1))
    with pytest.raises(BadRequest, match=r"has changed: digest .* registered as") as refused:
        encode.run(spec)
    assert refused.value.code == "dataset_changed"


def test_progress_reports_rows_images_and_the_time_left(encode: EncodeHere, tmp_path: Path):
    encode(write_pairs(tmp_path / "pairs.parquet", pair_rows(20)))
    entries = [entry for _, some in read_journal((encode.folder / "a1").as_uri(), 0) for entry in some]
    last = [entry.metrics for entry in entries if entry.metrics][-1]
    assert (last["images"], last["images_total"], last["rows"], last["rows_total"]) == (36, 36, 20, 20)
    assert last["images_per_s"] > 0
    assert (last["eta_s"], last["quarantined"]) == (0, 0)
    assert any(
        "36 of 36 images encoded (20 of 20 rows)" in entry.message for entry in entries if entry.message
    )
