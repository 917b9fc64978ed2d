"""Shards: round trips, an order that depends on (seed, step) alone, and no dataset without a manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from dde_core.errors import ConfigError, DataError
from dde_core.latents.held_out import caption_keys, hold_out
from dde_core.latents.order import VisitOrder
from dde_core.latents.reader import LatentReader, LatentRows
from dde_core.latents.schema import MANIFEST, dataset_digest, pair_digest, pair_id
from tests.support.latent_shards import RecordingFiles, write_shards

SIZES, PAIRS = (10, 13), 23
MANY = (3, 1, 7, 4, 6, 2, 5, 3, 9, 1)
"""Rows of the shards of a dataset that is read in windows of 8 pairs."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "dataset", SIZES)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "many", MANY)


def reader(folder: Path, held_out_pairs: int = 0, **options) -> LatentReader:
    return LatentReader(
        fs.LocalFileSystem(), str(folder), held_out_pairs, cache=folder.parent / "cache", **options
    )


def numbers(rows: LatentRows) -> list[int]:
    """Which pairs these are."""
    return [int(name.removeprefix("pair-")) for name in rows.pair_ids]


def test_rows_come_back_as_they_were_written(folder: Path):
    batch = reader(folder).batch(seed=0, step=0, batch_size=PAIRS)
    for row, number in enumerate(numbers(batch)):
        assert (batch.latents_w[row] == number).all()
        assert (batch.latents_l[row] == -number).all()
        assert (batch.token_ids[row] == [[number], [number + 1]]).all()
        assert batch.sizes_w[row].tolist() == batch.sizes_l[row].tolist() == [number, number + 1]
        assert batch.crops_w[row].tolist() == batch.crops_l[row].tolist() == [number + 2, number + 3]
        assert (
            (batch.shards[row], batch.places[row]) == divmod(number, 10) if number < 10 else (1, number - 10)
        )
    assert batch.latents_w.shape == (PAIRS, 4, 2, 2)
    assert batch.latents_w.dtype == np.float16


def test_all_rows_of_a_shard_can_be_read_in_their_order(folder: Path):
    rows = reader(folder, 5).shard(1)
    assert numbers(rows) == list(range(10, PAIRS))
    assert rows.places.tolist() == rows.positions.tolist() == list(range(13))
    assert set(rows.shards.tolist()) == {1}
    assert set(rows.draws.tolist()) == {0}


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


def test_a_dataset_of_one_window_is_put_in_order_as_a_whole(folder: Path):
    key = hashlib.blake2b(json.dumps([7, "permutation", 1]).encode(), digest_size=16).digest()
    order = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).permutation(PAIRS)
    assert numbers(reader(folder).batch(seed=7, step=1, batch_size=PAIRS)) == order.tolist()


def test_an_epoch_of_many_windows_visits_every_pair_once_each_window_in_shards_of_its_own(many: Path):
    windows = reader(many, window_pairs=8)._order.windows(3, 0)
    assert [window.stop for window in windows] == [window.start for window in windows[1:]] + [sum(MANY)]
    assert all(8 <= window.stop - window.start < 8 + max(MANY) for window in windows[:-1])
    assert sorted(np.concatenate([window.shards for window in windows])) == list(range(len(MANY)))
    visited = reader(many, window_pairs=8).batch(seed=3, step=0, batch_size=sum(MANY))
    assert sorted(numbers(visited)) == list(range(sum(MANY)))
    for window in windows:
        assert sorted(set(visited.shards[window.start : window.stop])) == window.shards.tolist()


def test_shards_meet_others_in_each_epoch_and_with_each_seed(many: Path):
    order = reader(many, window_pairs=8)._order
    groups = [
        [window.shards.tolist() for window in order.windows(*which)] for which in ((0, 0), (0, 1), (1, 0))
    ]
    assert groups[0] != groups[1] != groups[2] != groups[0]


@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any),
    window_pairs=st.integers(1, 20),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_whatever_the_shards_and_the_held_out_pairs_an_epoch_visits_the_others_once(
    rows, window_pairs, seed, data
):
    held_out = np.array(
        data.draw(
            st.lists(st.booleans(), min_size=sum(rows), max_size=sum(rows)).filter(lambda h: not all(h))
        )
    )
    order = VisitOrder(rows, held_out, window_pairs)
    pairs = np.array([(shard, place) for shard, size in enumerate(rows) for place in range(size)])
    for epoch in range(2):
        visits = order.visits(seed, epoch * len(order) + np.arange(len(order)))
        found = [pair for _, _, *where in visits for pair in np.stack(where, axis=1).tolist()]
        assert sorted(found) == pairs[~held_out].tolist()
    assert order.held_out.T.tolist() == pairs[held_out].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 40])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(many: Path, world_size: int):
    for step in (0, 2, 5):  # 32 rows: several windows, and the end of an epoch of 41
        whole = reader(many, window_pairs=8).batch(1, step, 32)
        parts = [
            reader(many, window_pairs=8).batch(1, step, 32, rank, world_size) for rank in range(world_size)
        ]
        found = {
            int(place): row
            for part in parts
            for place, row in zip(part.positions, numbers(part), strict=True)
        }
        assert [found[place] for place in range(32)] == numbers(whole)


@pytest.mark.parametrize("window_pairs", [8, 65_536])
def test_a_step_is_the_same_after_all_steps_before_it_in_any_order_and_from_a_new_reader(
    many: Path, window_pairs: int
):
    went_on = reader(many, window_pairs=window_pairs)
    in_turn = [numbers(went_on.batch(5, step, 7)) for step in range(14)]
    for step in (13, 3, 4, 0, 9, 9, 8):
        assert numbers(went_on.batch(5, step, 7)) == in_turn[step]
        assert numbers(reader(many, window_pairs=window_pairs).batch(5, step, 7)) == in_turn[step]
    assert numbers(went_on.batch(6, 3, 7)) != in_turn[3]
    assert sorted(np.concatenate(in_turn)[: sum(MANY)]) == list(range(sum(MANY)))


def test_a_batch_that_crosses_an_epoch_takes_the_end_of_one_and_the_start_of_the_next(folder: Path):
    batch = reader(folder).batch(seed=1, step=1, batch_size=20)  # positions 20..39 of epochs of 23
    assert batch.draws.tolist() == [0] * 3 + [1] * 17


@pytest.mark.parametrize("window_pairs", [8, 65_536])
def test_held_out_captions_are_in_no_batch_and_do_not_depend_on_the_seed(many: Path, window_pairs: int):
    partly = reader(many, 5, window_pairs=window_pairs)
    kept = [number for part in range(3) for number in numbers(partly.held_out(part, 3))]
    assert len(kept) == len(set(kept)) == partly.num_held_out == 5
    assert numbers(partly.held_out()) == sorted(kept)
    trained = [
        number for step in range(4) for number in numbers(partly.batch(seed=4, step=step, batch_size=9))
    ]
    assert len(trained) == len(partly) == sum(MANY) - 5
    assert sorted(trained + kept) == list(range(sum(MANY)))
    assert numbers(reader(many, 5).held_out()) == sorted(kept)


def test_held_out_pairs_are_those_whose_captions_have_the_smallest_hashes(tmp_path: Path):
    folder = write_shards(tmp_path / "dataset", MANY, captions=12)
    tokens = [np.array([[i % 12] * 5, [i % 12 + 1] * 5], np.int32).tobytes() for i in range(sum(MANY))]
    by_hash, expected = sorted(set(tokens), key=lambda caption: hashlib.sha256(caption).hexdigest()), []
    while len(expected) < 6:
        caption = by_hash.pop(0)
        expected += [i for i, other in enumerate(tokens) if other == caption]
    assert numbers(reader(folder, 6).held_out()) == sorted(expected)


def test_choosing_held_out_pairs_reads_parts_of_the_shards_and_choosing_none_reads_nothing(many: Path):
    watched = RecordingFiles()
    filesystem = fs.PyFileSystem(watched)
    LatentReader(filesystem, str(many))
    assert (watched.read, watched.opened) == ([MANIFEST], [])
    LatentReader(filesystem, str(many), held_out_pairs=5)
    assert watched.read == [MANIFEST, MANIFEST]
    assert sorted(watched.opened) == sorted(path.name for path in many.glob("*.parquet"))


def test_a_caption_is_held_out_whole():
    captions = [b"a", b"b", b"a", b"c", b"b", b"d"]
    keys = caption_keys(np.array([[list(caption)] for caption in captions]))
    for wanted in range(7):
        out = hold_out(keys, wanted)
        assert out.sum() >= min(wanted, 6)
        assert {c for c, held in zip(captions, out, strict=True) if held}.isdisjoint(
            c for c, held in zip(captions, out, strict=True) if not held
        )
    assert hold_out(keys, 1).sum() <= 2


def test_holding_everything_out_is_refused(folder: Path):
    with pytest.raises(ConfigError, match="held_out_pairs leaves none of 23 pairs to train on, got 23"):
        reader(folder, 23)


@pytest.mark.parametrize("held_out_pairs", [0, 5])
def test_a_dataset_without_pairs_is_refused(tmp_path: Path, held_out_pairs: int):
    with pytest.raises(ConfigError, match="leaves none of 0 pairs"):
        reader(write_shards(tmp_path / "empty", ()), held_out_pairs)


def test_shards_without_a_manifest_do_not_exist(folder: Path):
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"holds no dataset"):
        reader(folder)


def test_a_dataset_that_lacks_a_shard_is_refused_at_once(folder: Path):
    next(folder.glob("shard-00001-*.parquet")).unlink()
    with pytest.raises(DataError, match=r"lacks 1 shards that its manifest.json names: shard-00001"):
        reader(folder)


def test_a_shard_that_is_no_parquet_is_refused_when_captions_are_read(folder: Path):
    next(folder.glob("shard-00001-*.parquet")).write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"shard-00001.* cannot be read"):
        reader(folder, 5)


def test_a_manifest_of_another_version_is_refused(folder: Path):
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 9}))
    with pytest.raises(DataError, match="schema_version 9"):
        reader(folder)


def test_the_digest_depends_on_content_and_not_on_order():
    pairs = [pair_digest("a", b"x", b"y", 1.0, "c"), pair_digest("b", b"z", b"y", 1.0, "c")]
    digest = dataset_digest({"resolution": 32}, "e", pairs)
    assert dataset_digest({"resolution": 32}, "e", pairs[::-1]) == digest
    assert dataset_digest({"resolution": 64}, "e", pairs) != digest
    assert dataset_digest({"resolution": 32}, "f", pairs) != digest
    assert (
        dataset_digest({"resolution": 32}, "e", [pair_digest("a", b"y", b"x", 1.0, "c"), pairs[1]]) != digest
    )
    assert (
        dataset_digest({"resolution": 32}, "e", [pair_digest("a", b"x", b"y", 1.0, "d"), pairs[1]]) != digest
    )


def test_pair_ids_keep_rows_apart():
    assert (
        len(
            {
                pair_id("a", "b", "c", "f:0:0"),
                pair_id("a", "b", "c", "f:0:1"),
                pair_id("ab", "", "c", "f:0:0"),
            }
        )
        == 3
    )
    assert len(pair_id("a", "b", "c", "f:0:0")) == 32
