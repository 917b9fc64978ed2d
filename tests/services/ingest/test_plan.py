"""A plan cuts rows into pieces that depend on the source alone, and has every image encoded once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.plan import Plan, Planner
from services.pairs.row import Preference, Row


@dataclass(frozen=True)
class FakeUnit:
    """In place of a source's unit."""

    name: str


def decided(key: str, *uids: str) -> Row:
    preference = Preference(winner=0, loser=len(uids) - 1, label=1.0, pair_id=f"id-{key}")
    return Row(key=key, kind="decided", uids=uids, caption="text", preferences=(preference,))


def undecided(key: str, kind: str, cause: str = "") -> Row:
    return Row(key=key, kind=kind, uids=("x", "y"), caption="text", cause=cause)


def planned(units: list[list[Row]], images_per_block: int = 4) -> Plan:
    planner = Planner(images_per_block)
    for number, rows in enumerate(units):
        planner.add(FakeUnit(str(number)), iter(rows))
    return planner.plan()


def encoded_by(plan: Plan, units: list[list[Row]]) -> dict[str, list[int]]:
    """For each uid the blocks that encode it, as a reader would find them."""
    found: dict[str, list[int]] = {}
    for block in plan.blocks:
        rows = [row for row in units[block.unit][block.start : block.stop] if row.kind == "decided"]
        uids = [uid for row in rows for uid in row.uids]
        for uid, wanted in zip(uids, plan.is_first[block.slots], strict=True):
            found.setdefault(uid, [])
            if wanted:
                found[uid].append(block.number)
    return found


ROWS = st.lists(
    st.one_of(
        st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=5).map(lambda uids: decided("k", *uids)),
        st.sampled_from(
            [undecided("k", "tie"), undecided("k", "missing"), undecided("k", "bad", "label_nan")]
        ),
    ),
    max_size=12,
)


@given(st.lists(ROWS, max_size=4), st.integers(1, 9))
def test_every_image_is_encoded_once_and_every_row_is_in_one_block(
    units: list[list[Row]], images_per_block: int
):
    plan = planned(units, images_per_block)
    found = encoded_by(plan, units)
    assert all(len(blocks) == 1 for blocks in found.values())
    assert plan.num_images == len(found)
    for number, rows in enumerate(units):
        ranges = [(block.start, block.stop) for block in plan.blocks if block.unit == number]
        assert [row for start, stop in ranges for row in range(start, stop)] == list(range(len(rows)))
    slots = [uid for rows in units for row in rows if row.kind == "decided" for uid in row.uids]
    assert [found[uid][0] for uid in slots] == plan.block_of_slot.tolist(), (
        "a slot names the block that encodes its image"
    )
    assert len({(uid, number) for uid, number in zip(slots, plan.images.tolist(), strict=True)}) == len(
        set(slots)
    )


@given(st.lists(ROWS, max_size=4), st.integers(1, 9), st.integers(1, 7))
def test_shards_hold_every_block_with_pairs_in_order(
    units: list[list[Row]], images_per_block: int, pairs_per_shard: int
):
    plan = planned(units, images_per_block)
    shards = list(plan.shards(pairs_per_shard))
    assert [block for shard in shards for block in shard] == [block for block in plan.blocks if block.pairs]
    assert all(len(shard) == 1 or sum(block.pairs for block in shard) <= pairs_per_shard for shard in shards)


def test_a_block_exceeds_its_limit_of_images_only_for_one_row():
    rows = [decided("a", "1", "2"), decided("b", "3", "4"), decided("c", *"56789"), decided("d", "0", "1")]
    assert [(block.start, block.stop) for block in planned([rows]).blocks] == [(0, 2), (2, 3), (3, 4)]


def test_what_is_done_is_not_pending():
    plan = planned(
        [[decided("a", "1", "2"), decided("b", "3", "4")], [decided("c", "1", "3")]], images_per_block=2
    )
    assert [(unit.name, [block.number for block in blocks]) for unit, blocks in plan.pending(set())] == [
        ("0", [0, 1])
    ]
    assert [block.number for _, blocks in plan.pending({0}) for block in blocks] == [1]
    assert list(plan.pending({0, 1})) == [], "the last block's images are in the first two"


def test_rows_are_counted_by_kind():
    rows = [decided("a", "1", "2"), decided("b", "1", "2"), decided("c", "2", "1"), undecided("d", "tie")]
    rows += [
        undecided("e", "missing"),
        undecided("f", "bad", "label_nan"),
        undecided("g", "bad", "label_nan"),
    ]
    counts = planned([rows]).counts
    assert (counts.rows, counts.decided, counts.ties, counts.missing) == (7, 3, 1, 1)
    assert (counts.bad, counts.pairs) == ({"label_nan": 2}, 3)


def test_rows_that_hold_a_bad_image_are_found_in_every_block():
    plan = planned(
        [[decided("a", "1", "2"), decided("b", "3", "4"), decided("c", "5", "1")]], images_per_block=2
    )
    number = plan.images[0]
    assert plan.rows_with(np.array([number])).tolist() == [True, False, True]
    assert not plan.rows_with(np.array([], np.int32)).any()
