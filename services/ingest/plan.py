"""What is encoded and written, and in which pieces: one pass over a source's rows, without images.

A **block** is a stretch of a unit's rows; the images that stand first in it are encoded and committed together. After a
kill a block is there or not. A **shard** is a stretch of blocks, whose pairs become one file. Both depend on the source and the
settings alone, so a run that was killed goes on with the same pieces.

A decided row has a **slot** for each of its images. Of a slot are kept its image's number and the block that encodes it:
about 40 bytes a row, whatever the images weigh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby

import numpy as np

from services.pairs.columnar import Unit
from services.pairs.row import Row
from services.pairs.validation import Tally

KEY_BYTES = 16
PIXEL_BYTES = 6 * 1024**2
"""Decoded images of a block are at most this large together, where that is at least the fewest."""
FEWEST_IMAGES, MOST_IMAGES = 16, 1024
ROWS_PER_SHARD = 20_000
"""A shard looks through so many rows at most, however few of them are decided."""


def images_per_block(size: int) -> int:
    """How many images of size x size pixels a block holds at most: 32 of 256 px, 16 of 512 px: a slice of the VAE."""
    return max(FEWEST_IMAGES, min(MOST_IMAGES, PIXEL_BYTES // (3 * size**2)))


@dataclass(frozen=True)
class Block:
    """Rows ``start``..``stop`` of a unit; ``slots`` of the plan's arrays belong to them. ``pairs`` they decide."""

    number: int
    unit: int
    start: int
    stop: int
    slots: slice
    pairs: int


@dataclass(frozen=True)
class Counts:
    """Of rows: all of them, decided, ties, without a label, bad by cause. Of the decided: pairs, repeated pairs."""

    rows: int
    decided: int
    ties: int
    missing: int
    bad: Counter[str]
    pairs: int
    duplicates: int


@dataclass(frozen=True, eq=False)
class Plan:
    """``images`` [slots] numbers images by their uid, ``homes`` [slots] says which block encodes it, ``first`` [slots]
    whether this is where it is read; ``row_slots`` [decided rows] counts a row's slots."""

    units: list[Unit]
    blocks: list[Block]
    images: np.ndarray
    homes: np.ndarray
    first: np.ndarray
    row_slots: np.ndarray
    counts: Counts

    @property
    def num_images(self) -> int:
        """How many images are encoded."""
        return int(self.first.sum())

    def shards(self, pairs_per_shard: int) -> Iterator[list[Block]]:
        """Blocks with pairs in order, together so many pairs at most (one block at least)."""
        shard: list[Block] = []
        pairs = rows = 0
        for block in (block for block in self.blocks if block.pairs):
            pairs, rows = pairs + block.pairs, rows + block.stop - block.start
            if shard and (pairs > pairs_per_shard or rows > ROWS_PER_SHARD):
                yield shard
                shard, pairs, rows = [], block.pairs, block.stop - block.start
            shard.append(block)
        if shard:
            yield shard

    def pending(self, done: set[int]) -> Iterator[tuple[Unit, list[Block]]]:
        """Units with the blocks in which something is left to encode."""
        left = (block for block in self.blocks if block.number not in done and self.first[block.slots].any())
        for unit, blocks in groupby(left, key=lambda block: block.unit):
            yield self.units[unit], list(blocks)

    def rows_with(self, bad_images: np.ndarray) -> np.ndarray:
        """bool [decided rows]: which hold one of these images."""
        row_of_slot = np.repeat(np.arange(len(self.row_slots)), self.row_slots)
        found = np.zeros(len(self.row_slots), bool)
        found[row_of_slot[np.isin(self.images, bad_images)]] = True
        return found


class Planner:
    """Cuts units into blocks of at most ``images_per_block`` slots (one row at least), a row at a time."""

    def __init__(self, images_per_block: int) -> None:
        self._images_per_block = images_per_block
        self._units: list[Unit] = []
        self._blocks: list[Block] = []
        self._keys, self._pair_keys, self._row_slots = bytearray(), bytearray(), bytearray()
        self._tally = Tally()

    def add(self, unit: Unit, rows: Iterable[Row]) -> None:
        """One unit's rows, in their order."""
        start, first_slot, pairs, number = 0, self._num_slots, 0, -1
        for number, row in enumerate(rows):
            slots = len(row.uids) if row.kind == "decided" else 0
            if self._num_slots > first_slot and self._num_slots + slots - first_slot > self._images_per_block:
                self._close(start, number, first_slot, pairs)
                start, first_slot, pairs = number, self._num_slots, 0
            self._count(row)
            if slots:
                self._keys += b"".join(
                    blake2b(uid.encode(), digest_size=KEY_BYTES).digest() for uid in row.uids
                )
                self._row_slots.append(slots)
                pairs += len(row.preferences)
        if number >= start:
            self._close(start, number + 1, first_slot, pairs)
        self._units.append(unit)

    def plan(self) -> Plan:
        """What the units that were added come to."""
        keys = np.frombuffer(bytes(self._keys), np.uint64).reshape(-1, 2)
        images, first_slot = _numbered(keys)
        block_of_slot = np.repeat(
            np.arange(len(self._blocks), dtype=np.int32),
            [each.slots.stop - each.slots.start for each in self._blocks],
        )
        first = np.zeros(len(keys), bool)
        first[first_slot] = True
        return Plan(
            units=self._units,
            blocks=self._blocks,
            images=images,
            homes=block_of_slot[first_slot[images]],
            first=first,
            row_slots=np.frombuffer(bytes(self._row_slots), np.uint8),
            counts=self._counts(),
        )

    @property
    def _num_slots(self) -> int:
        return len(self._keys) // KEY_BYTES

    def _close(self, start: int, stop: int, first_slot: int, pairs: int) -> None:
        slots = slice(first_slot, self._num_slots)
        self._blocks.append(Block(len(self._blocks), len(self._units), start, stop, slots, pairs))

    def _count(self, row: Row) -> None:
        self._tally.add(row)
        for each in row.preferences:
            content = "\0".join((row.uids[each.winner], row.uids[each.loser], row.caption))
            self._pair_keys += blake2b(content.encode(), digest_size=8).digest()

    def _counts(self) -> Counts:
        tally, pairs = self._tally, np.frombuffer(bytes(self._pair_keys), np.uint64)
        return Counts(
            rows=tally.kinds.total(),
            decided=tally.kinds["decided"],
            ties=tally.ties,
            missing=tally.kinds["missing"],
            bad=tally.bad,
            pairs=tally.pairs,
            duplicates=len(pairs) - len(np.unique(pairs)),
        )


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For keys uint64 [n 2]: a number for each (int32 [n], the same where keys are equal), and where a number stands first."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in their order
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    images = np.empty(len(keys), np.int32)
    images[order] = np.cumsum(new) - 1
    return images, order[new]
