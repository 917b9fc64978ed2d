"""What is encoded and written, and in which pieces. Planned in one pass over a source's rows, without images.

A **block** is a range of a unit's rows. The images that occur first in it are encoded and committed together,
whole or not at all. A **shard** is a sequence of blocks whose pairs become one file. Both depend only on the
source and the settings, so a resumed run has the same pieces.

Each image of a decided row has a **slot**. The plan stores the slot's image number and the block that encodes
it: about 40 bytes a row, whatever the size of the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from services.pairs.columnar import Unit
from services.pairs.row import Row
from services.pairs.validation import RowTally

IMAGE_KEY_BYTES = 16
MAX_BLOCK_PIXEL_BYTES = 6 * 1024**2
"""The decoded images of a block; MIN_BLOCK_IMAGES may exceed it."""
MIN_BLOCK_IMAGES = 16
MAX_BLOCK_IMAGES = 1024
MAX_SHARD_ROWS = 20_000
"""Rows that a shard covers, however few of them are decided."""


def images_per_block(size: int) -> int:
    """The most images of ``size`` x ``size`` pixels in a block: 32 of 256 px, 16 of 512 px."""
    fitting = MAX_BLOCK_PIXEL_BYTES // (3 * size**2)
    return max(MIN_BLOCK_IMAGES, min(MAX_BLOCK_IMAGES, fitting))


@dataclass(frozen=True)
class Block:
    """Rows ``start`` to ``stop`` of unit number ``unit``, with their ``slots`` in the plan's arrays."""

    number: int
    unit: int
    start: int
    stop: int
    slots: slice
    pairs: int


@dataclass(frozen=True)
class Counts:
    """Rows: all, decided, ties, without a label (``missing``), bad by cause. Pairs."""

    rows: int
    decided: int
    ties: int
    missing: int
    bad: Counter[str]
    pairs: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Arrays over slots, in the order of the rows.

    ``images`` int32 [slots] is the number of the slot's image: equal where the uids are. ``block_of_slot``
    int32 [slots] is the block that encodes it. ``is_first`` bool [slots] marks where it occurs first, and so
    is read. ``slots_per_row`` uint8 [decided rows].
    """

    units: list[Unit]
    blocks: list[Block]
    images: NDArray[np.int32]
    block_of_slot: NDArray[np.int32]
    is_first: NDArray[np.bool_]
    slots_per_row: NDArray[np.uint8]
    counts: Counts

    @property
    def num_images(self) -> int:
        """The number of images to encode."""
        return int(self.is_first.sum())

    def num_first(self, block: Block) -> int:
        """The number of images that this block encodes."""
        return int(self.is_first[block.slots].sum())

    def shards(self, pairs_per_shard: int) -> Iterator[list[Block]]:
        """Blocks with pairs, in order, grouped to at most so many pairs (at least one block) a shard."""
        shard: list[Block] = []
        pairs = 0
        rows = 0
        for block in self.blocks:
            if not block.pairs:
                continue
            block_rows = block.stop - block.start
            pairs += block.pairs
            rows += block_rows
            if shard and (pairs > pairs_per_shard or rows > MAX_SHARD_ROWS):
                yield shard
                shard = []
                pairs = block.pairs
                rows = block_rows
            shard.append(block)
        if shard:
            yield shard

    def pending(self, done: set[int]) -> Iterator[tuple[Unit, list[Block]]]:
        """Units with their blocks that have images to encode and are not ``done``."""
        blocks = (block for block in self.blocks if block.number not in done and self.num_first(block))
        for unit, unit_blocks in groupby(blocks, key=lambda block: block.unit):
            yield self.units[unit], list(unit_blocks)

    def rows_with(self, images: NDArray[np.int32]) -> NDArray[np.bool_]:
        """bool [decided rows]: whether the row holds one of these images."""
        row_of_slot = np.repeat(np.arange(len(self.slots_per_row)), self.slots_per_row)
        is_holder = np.zeros(len(self.slots_per_row), np.bool_)
        is_holder[row_of_slot[np.isin(self.images, images)]] = True
        return is_holder


class Planner:
    """Cuts units into blocks of at most ``images_per_block`` slots (at least one row), a row at a time."""

    def __init__(self, images_per_block: int) -> None:
        self._images_per_block = images_per_block
        self._units: list[Unit] = []
        self._blocks: list[Block] = []
        self._image_keys = bytearray()
        self._slots_per_row = bytearray()
        self._tally = RowTally()

    def add(self, unit: Unit, rows: Iterable[Row]) -> None:
        """Add a unit's rows, in their order."""
        start = 0
        first_slot = self._num_slots
        pairs = 0
        num_rows = 0
        for number, row in enumerate(rows):
            slots = len(row.uids) if row.kind == "decided" else 0
            has_images = self._num_slots > first_slot
            if has_images and self._num_slots - first_slot + slots > self._images_per_block:
                self._close_block(start, number, first_slot, pairs)
                start = number
                first_slot = self._num_slots
                pairs = 0
            self._tally.add(row)
            if slots:
                for uid in row.uids:
                    self._image_keys += blake2b(uid.encode(), digest_size=IMAGE_KEY_BYTES).digest()
                self._slots_per_row.append(slots)
                pairs += len(row.preferences)
            num_rows = number + 1
        if num_rows > start:
            self._close_block(start, num_rows, first_slot, pairs)
        self._units.append(unit)

    def plan(self) -> Plan:
        """The plan of the units added so far."""
        keys = np.frombuffer(bytes(self._image_keys), np.uint64).reshape(-1, 2)
        images, first_slot = _number_keys(keys)
        block_of_slot = np.repeat(
            np.arange(len(self._blocks), dtype=np.int32),
            [block.slots.stop - block.slots.start for block in self._blocks],
        )
        is_first = np.zeros(len(keys), np.bool_)
        is_first[first_slot] = True
        return Plan(
            units=self._units,
            blocks=self._blocks,
            images=images,
            block_of_slot=block_of_slot[first_slot[images]],
            is_first=is_first,
            slots_per_row=np.frombuffer(bytes(self._slots_per_row), np.uint8),
            counts=self._counts(),
        )

    @property
    def _num_slots(self) -> int:
        return len(self._image_keys) // IMAGE_KEY_BYTES

    def _close_block(self, start: int, stop: int, first_slot: int, pairs: int) -> None:
        slots = slice(first_slot, self._num_slots)
        self._blocks.append(Block(len(self._blocks), len(self._units), start, stop, slots, pairs))

    def _counts(self) -> Counts:
        tally = self._tally
        return Counts(
            rows=tally.kinds.total(),
            decided=tally.kinds["decided"],
            ties=tally.ties,
            missing=tally.kinds["missing"],
            bad=tally.bad,
            pairs=sum(block.pairs for block in self._blocks),
        )


def _number_keys(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """Number distinct keys. ``keys`` is uint64 [n 2].

    Returns each key's number (int32 [n], equal for equal keys) and the index where each number occurs first.
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys keep their order
    ordered = keys[order]
    is_new = np.ones(len(keys), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.empty(len(keys), np.int32)
    numbers[order] = np.cumsum(is_new) - 1
    return numbers, order[is_new]
