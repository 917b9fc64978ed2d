"""Looking at a dataset before anything is spent: count every row, or read a sample with its images."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from itertools import islice
from statistics import median

from services.api.records import BadExample, BadRows, DatasetCounts, DatasetReport, PictureSizes
from services.errors import BadRequest
from services.pairs.images import BadImage, decode
from services.pairs.row import Row
from services.pairs.source import Source, Unit

SAMPLE_ROWS = 256
SAMPLE_SIZE_PX = 64
UNITS_AT_LEAST = 16
EXAMPLES = 3
DETAIL_CHARS = 200


def inspect(source: Source) -> tuple[DatasetCounts, str]:
    """Count a dataset's rows, and digest it. Raises BadRequest where a file cannot be used or no pair is decided."""
    summary = Summary(source)
    for unit in source.units():
        for _ in summary.over(source.rows(unit)):
            pass
    counts = summary.counts()
    if not counts.pairs:
        message = f"{counts.rows} rows, {counts.ties} ties, {counts.missing} without a label"
        bad = "".join(f", {count} {cause}" for cause, count in counts.bad.items())
        raise BadRequest(
            f"uri {source.uri!r} has no decided pair: {message}{bad}", param="uri", code="no_decided_pair"
        )
    return counts, summary.digest()


class Tally:
    """Rows by what they are."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.pairs, self._equal = 0, 0

    def add(self, row: Row) -> None:
        """Take note of one row."""
        self.kinds[row.kind] += 1
        if row.kind == "bad":
            self.bad[row.cause] += 1
        self.pairs, self._equal = self.pairs + len(row.preferences), self._equal + row.ties

    @property
    def ties(self) -> int:
        """Rows that are ties, and equal pairs of decided rankings."""
        return self.kinds["tie"] + self._equal


class Summary:
    """What is counted and digested while a source's rows go by, in their order. Memory does not grow with the rows."""

    def __init__(self, source: Source) -> None:
        self._source, self._tally, self._said = source, Tally(), hashlib.sha256()

    def over(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Hand rows on and take note of them."""
        for row in rows:
            self._tally.add(row)
            self._said.update(_said(row))
            yield row

    def counts(self) -> DatasetCounts:
        """Of the rows so far."""
        tally = self._tally
        return DatasetCounts(
            rows=tally.kinds.total(),
            pairs=tally.pairs,
            ties=tally.ties,
            missing=tally.kinds["missing"],
            bad=dict(sorted(tally.bad.items())),
        )

    def digest(self) -> str:
        """sha256 over what the rows say, and the source's fingerprint. Images are not read (a fingerprint shows when those
        inside of the files were replaced)."""
        digest = self._said.copy()
        digest.update(self._source.fingerprint())
        return digest.hexdigest()


def check_bad(bad_rows: int, rows: int, by_cause: Mapping[str, int], max_bad_fraction: float) -> None:
    """Raises BadRequest with the counts where too large a part of the rows is bad."""
    if bad_rows > max_bad_fraction * rows:
        counts = ", ".join(f"{cause} {count}" for cause, count in by_cause.items())
        message = f"{bad_rows} of {rows} rows are bad ({counts}): more than data.max_bad_fraction = {max_bad_fraction:g} allows"
        raise BadRequest(message, param="data.max_bad_fraction", code="too_many_bad_rows")


def _said(row: Row) -> bytes:
    """A row without its images, for the digest."""
    preferences = [astuple(preference) for preference in row.preferences]
    return (
        json.dumps([row.key, row.kind, row.cause, row.uids, row.caption, row.ties, preferences]).encode()
        + b"\n"
    )


def validate(source: Source, sample_rows: int = SAMPLE_ROWS) -> DatasetReport:
    """Read a sample that is spread over the source, decode its images, and tell what was found; nothing is kept."""
    units = list(source.units())
    kinds: Counter[str] = Counter()
    bad: dict[str, BadRows] = {}
    shorter_sides: list[int] = []
    for row in islice(_spread(source, units, sample_rows), sample_rows):
        cause, detail, sides = _look(source, row)
        kinds["bad" if cause else row.kind] += 1
        shorter_sides += sides
        if cause:
            rows = bad.setdefault(cause, BadRows(count=0, examples=[]))
            rows.count += 1
            if len(rows.examples) < EXAMPLES:
                rows.examples.append(BadExample(row=row.key, detail=detail))
    return DatasetReport(
        uri=source.uri,
        format=source.format,
        shape=source.shape,
        columns={str(name): own for name, own in source.columns.items()},
        columns_not_read=list(source.not_read),
        rows=_total(units),
        sampled={
            "rows": kinds.total(),
            **{kind: kinds[kind] for kind in ("decided", "tie", "missing", "bad")},
        },
        bad=dict(sorted(bad.items())),
        pictures=_sizes(shorter_sides),
    )


def _total(units: list[Unit]) -> int | None:
    """Rows of the source where every unit knows its own."""
    known = [unit.rows for unit in units if unit.rows is not None]
    return sum(known) if len(known) == len(units) else None


def _spread(source: Source, units: list[Unit], sample_rows: int) -> Iterator[Row]:
    """A share of the sample from the beginning of each unit, far units first (by the reversed bits of their numbers)."""
    bits = max(1, (len(units) - 1).bit_length())
    share = max(1, sample_rows // max(1, min(len(units), UNITS_AT_LEAST)))
    for number in sorted(range(len(units)), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2)):
        yield from source.rows(units[number], with_images=True, stop=share)


def _look(source: Source, row: Row) -> tuple[str, str, list[int]]:
    """Why a row is bad ("" where it is not) with what is known of it, and the shorter sides of its images in pixels."""
    if row.kind != "decided":
        return row.cause, row.caption[:DETAIL_CHARS], []
    sides = []
    for slot, image in enumerate(row.images):
        try:
            sides.append(min(decode(source.load(image), SAMPLE_SIZE_PX).size))
        except BadImage as error:
            where = image if isinstance(image, str) else f"image {slot}"
            return error.cause, f"{where}: {error.detail}"[:DETAIL_CHARS].removesuffix(": "), sides
    return "", "", sides


def _sizes(shorter_sides: list[int]) -> PictureSizes | None:
    if not shorter_sides:
        return None
    return PictureSizes(
        count=len(shorter_sides),
        min_px=min(shorter_sides),
        median_px=int(median(shorter_sides)),
        max_px=max(shorter_sides),
    )
