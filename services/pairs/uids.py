"""Whether a uid names one image wherever it occurs: an image is encoded once for each uid.

A dataset whose uids count within each row ("0" and "1") would be trained on the first row's images alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.errors import BadRequest
from services.pairs.columnar import Unit
from services.pairs.images import BadImage, decode
from services.pairs.row import SLOTS, Row
from services.pairs.source import Source

MAX_UIDS = 10_000
MAX_COMPARED = 16
MAX_UNITS = 4
"""Uids that are remembered, repeated ones that are compared, and units that are read for it."""
ALL_UIDS = ("image_0_uid", "image_1_uid", "chosen_uid", "rejected_uid", "image_uids")
COMPARED_SIZE_PX = 64
MAX_DIFFERENCE = 8.0
"""The mean difference, of 255, of two files that may hold one image: a JPEG and its PNG."""


@dataclass(frozen=True)
class _Place:
    unit: Unit
    row: int
    slot: int


class UidCheck:
    """Remembers where uids occur first and again, then compares their images."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._first: dict[str, _Place] = {}
        self._again: dict[str, _Place] = {}
        self._units: set[tuple[str, int]] = set()

    def observe(self, unit: Unit, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield a unit's rows unchanged."""
        for number, row in enumerate(rows):
            if (row.kind == "decided" or repeats_a_uid(row)) and len(self._again) < MAX_COMPARED:
                for slot, uid in enumerate(row.uids):
                    self._add(uid, _Place(unit, number, slot))
            yield row

    def _add(self, uid: str, place: _Place) -> None:
        first = self._first.get(uid)
        if first is None:
            if len(self._first) < MAX_UIDS:
                self._first[uid] = place
        elif uid not in self._again:
            units = self._units | {(each.unit.file, each.unit.group) for each in (first, place)}
            if len(units) <= MAX_UNITS:
                self._units = units
                self._again[uid] = place

    def check(self) -> None:
        """Raises BadRequest with the uid and the two rows where it names different images."""
        places = [place for uid in self._again for place in (self._first[uid], self._again[uid])]
        images = self._images(places)
        for uid, again in self._again.items():
            first = self._first[uid]
            if self._differ(images[first], images[again]):
                raise BadRequest(self._message(uid, first, again), param="columns", code="uid_conflict")

    def _images(self, places: list[_Place]) -> dict[_Place, bytes | str | None]:
        """The images at these places, each unit read once."""
        wanted: dict[tuple[str, int], list[_Place]] = {}
        for place in places:
            wanted.setdefault((place.unit.file, place.unit.group), []).append(place)
        images: dict[_Place, bytes | str | None] = {}
        for group in wanted.values():
            start = min(place.row for place in group)
            stop = max(place.row for place in group) + 1
            rows = self._source.rows(group[0].unit, with_images=True, start=start, stop=stop)
            for number, row in enumerate(rows, start):
                images |= {place: row.images[place.slot] for place in group if place.row == number}
        return images

    def _differ(self, first: bytes | str | None, again: bytes | str | None) -> bool:
        """Whether both can be decoded and are different images."""
        if isinstance(first, str) and first == again:
            return False
        try:
            one, other = self._source.load(first), self._source.load(again)
            return one != other and differ(_pixels(one), _pixels(other))
        except BadImage:  # found and counted when it is encoded
            return False

    def _message(self, uid: str, first: _Place, again: _Place) -> str:
        source = self._source
        column = uid_column(source, again.slot)
        rows = " and ".join(
            source.row_name(f"{place.unit.file}:{place.unit.group}:{place.row}") for place in (first, again)
        )
        mapped = [name for name in ALL_UIDS if name in source.columns]
        remedy = "correct it, or leave it out: " + " ".join(f"--column {name}=" for name in mapped)
        return (
            f"uri {source.uri!r}: {column} {uid!r} names different images in the rows {rows}; a uid must "
            f"name one image in the whole dataset; {remedy}"
        )


def repeats_a_uid(row: Row) -> bool:
    """Whether a row names one image twice: it is a tie then, if the image is one."""
    return len(set(row.uids)) < len(row.uids)


def _pixels(data: bytes | None) -> NDArray[np.uint8]:
    return decode(data, COMPARED_SIZE_PX).pixels


def differ(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two images, uint8 of one shape, are of different content."""
    return float(np.abs(one.astype(np.int16) - other).mean()) > MAX_DIFFERENCE


def uid_column(source: Source, slot: int) -> str:
    """The canonical name of the column that holds the uid of a slot's image."""
    return "image_uids" if source.shape == "ranking" else SLOTS[source.shape][slot][1]
