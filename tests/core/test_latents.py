"""Shards: what is written is read back, an order depends on (seed, step) alone, and nothing exists without a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from dde_core.errors import ConfigError, DataError
from dde_core.latents.reader import LatentReader, hold_out
from dde_core.latents.schema import MANIFEST, Manifest, dataset_digest, pair_id, shard_schema, token_columns
from dde_core.latents.writer import shard_table, write_shard

SHAPE, TOKENS, PAIRS = (4, 2, 2), 5, 23


def columns(numbers: range) -> dict[str, list]:
    rng = np.random.default_rng(0)
    found = {"pair_id": [f"pair-{i}" for i in numbers], "label": [1.0] * len(numbers)}
    found |= {name: [np.full(TOKENS, i + k, np.int32) for i in numbers] for k, name in enumerate(token_columns(2))}
    for side in "wl":
        found[f"uid_{side}"] = [f"{i}{side}" for i in numbers]
        found[f"latents_{side}"] = [(rng.standard_normal(16) + i).astype(np.float16) for i in numbers]
        found[f"size_{side}"] = found[f"crop_{side}"] = [[32, 32]] * len(numbers)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)

    schema = shard_schema(SHAPE, 2, TOKENS)
    shards = tuple(
        write_shard(n, shard_table(columns(part), schema), write) for n, part in enumerate((range(10), range(10, PAIRS)))
    )
    manifest = Manifest(
        digest="d",
        encoder_digest="e",
        settings={},
        latent_shape=SHAPE,
        num_tokenizers=2,
        num_tokens=TOKENS,
        counts={"pairs": PAIRS},
        shards=shards,
    )
    write(MANIFEST, manifest.to_json())
    return tmp_path


def reader(folder: Path) -> LatentReader:
    return LatentReader(fs.LocalFileSystem(), str(folder))


def test_rows_come_back_as_they_were_written(folder: Path):
    batch = reader(folder).batch(seed=0, step=0, batch_size=PAIRS)
    written = columns(range(10)), columns(range(10, PAIRS))
    for row, name in enumerate(batch.pair_ids):
        number = int(name.removeprefix("pair-"))
        part, place = (written[0], number) if number < 10 else (written[1], number - 10)
        assert (batch.latents_w[row].ravel() == part["latents_w"][place]).all()
        assert (batch.latents_l[row].ravel() == part["latents_l"][place]).all()
        assert (batch.token_ids[row] == [[number], [number + 1]]).all()
        assert (batch.sizes_w[row] == 32).all()
    assert batch.latents_w.dtype == np.float16


def test_plain_pyarrow_reads_a_shard(folder: Path):
    table = pq.read_table(next(folder.glob("shard-00000-*.parquet")))
    assert table.num_rows == 10
    assert table.schema.field("latents_w").type.list_size == 16


def test_an_epoch_visits_every_pair_once_and_the_next_one_in_another_order(folder: Path):
    epochs = [reader(folder).batch(seed=7, step=s, batch_size=PAIRS) for s in range(2)]
    assert sorted(epochs[0].pair_ids) == sorted(epochs[1].pair_ids)
    assert len(set(epochs[0].pair_ids)) == PAIRS
    assert epochs[0].pair_ids != epochs[1].pair_ids
    assert set(epochs[0].draws) == {0}
    assert set(epochs[1].draws) == {1}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(folder: Path, world_size: int):
    whole = reader(folder).batch(seed=1, step=2, batch_size=8)
    parts = [reader(folder).batch(1, 2, 8, rank, world_size) for rank in range(world_size)]
    found = {int(place): name for part in parts for place, name in zip(part.positions, part.pair_ids, strict=True)}
    assert [found[place] for place in range(8)] == list(whole.pair_ids)


def test_a_batch_that_crosses_an_epoch_takes_the_end_of_one_and_the_start_of_the_next(folder: Path):
    batch = reader(folder).batch(seed=1, step=1, batch_size=20)  # positions 20..39 of epochs of 23
    assert batch.draws.tolist() == [0] * 3 + [1] * 17


def test_held_out_captions_are_in_no_batch_and_do_not_depend_on_the_seed(folder: Path):
    partly = LatentReader(fs.LocalFileSystem(), str(folder), held_out_pairs=5)
    kept = {name for part in range(3) for name in partly.held_out(part, 3).pair_ids}
    assert len(kept) == partly.num_held_out == 5
    trained = {name for step in range(3) for name in partly.batch(seed=step, step=step, batch_size=18).pair_ids}
    assert len(trained) == len(partly) == PAIRS - 5
    assert not kept & trained


def test_a_caption_is_held_out_whole():
    captions = [b"a", b"b", b"a", b"c", b"b", b"d"]
    for wanted in range(7):
        out = hold_out(captions, wanted)
        assert out.sum() >= min(wanted, 6)
        assert {c for c, held in zip(captions, out, strict=True) if held}.isdisjoint(
            c for c, held in zip(captions, out, strict=True) if not held
        )
    assert hold_out(captions, 1).sum() <= 2


def test_holding_everything_out_is_refused(folder: Path):
    with pytest.raises(ConfigError, match="held_out_pairs leaves none of 23 pairs to train on, got 23"):
        LatentReader(fs.LocalFileSystem(), str(folder), held_out_pairs=23)


def test_shards_without_a_manifest_do_not_exist(folder: Path):
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"holds no dataset"):
        reader(folder)


def test_a_shard_that_was_changed_is_refused(folder: Path):
    shard = next(folder.glob("shard-00001-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"shard-00001.*sha256"):
        reader(folder)


def test_a_manifest_of_another_version_is_refused(folder: Path):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 9}))
    with pytest.raises(DataError, match="schema_version 9"):
        reader(folder)


def test_the_digest_depends_on_content_and_not_on_order():
    pairs = [("a", "x", "y", 1.0), ("b", "z", "y", 1.0)]
    digest = dataset_digest({"resolution": 32}, "e", pairs)
    assert dataset_digest({"resolution": 32}, "e", pairs[::-1]) == digest
    assert dataset_digest({"resolution": 64}, "e", pairs) != digest
    assert dataset_digest({"resolution": 32}, "f", pairs) != digest
    assert dataset_digest({"resolution": 32}, "e", [("a", "y", "x", 1.0), pairs[1]]) != digest


def test_pair_ids_keep_rows_apart():
    assert len({pair_id("a", "b", "c", "f:0:0"), pair_id("a", "b", "c", "f:0:1"), pair_id("ab", "", "c", "f:0:0")}) == 3
    assert len(pair_id("a", "b", "c", "f:0:0")) == 32
