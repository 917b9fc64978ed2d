"""Check a dataset before a job spends compute on it: count every row, or read a sample with its images."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import islice
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.api.records import (
    BadExample,
    BadRows,
    DatasetCounts,
    DatasetReport,
    DecidedExample,
    PictureSizes,
)
from services.errors import BadRequest
from services.pairs.columnar import Unit
from services.pairs.images import BadImage, decode
from services.pairs.pair_counts import PairTally
from services.pairs.row import SLOTS, Row
from services.pairs.source import Source
from services.pairs.uids import COMPARED_SIZE_PX, UidCheck, differ, repeats_a_uid, uid_column

SAMPLE_ROWS = 256
MIN_SAMPLED_UNITS = 16
MAX_EXAMPLES = 3
MAX_DETAIL_CHARS = 200


class Inspection(NamedTuple):
    """What is registered of a dataset. ``example`` is its first decided row, to check the direction."""

    counts: DatasetCounts
    digest: str
    example: DecidedExample


def inspect(source: Source) -> Inspection:
    """Read every row without its images, and the first decided row with them.

    Raises BadRequest where a file is unusable, no pair is decided, rows are of several splits, or a uid names
    several images.
    """
    source.check_split_columns(source.units())
    summary = Summary(source)
    uids = UidCheck(source)
    pairs = PairTally()
    details: dict[str, str] = {}
    first_decided: tuple[Unit, int] | None = None
    for unit in source.units():
        for number, row in enumerate(uids.observe(unit, summary.observe(source.rows(unit)))):
            pairs.add(row)
            if row.kind == "decided" and first_decided is None:
                first_decided = (unit, number)
            if row.kind == "bad":
                details.setdefault(row.cause, f"{source.row_name(row.key)}: {row.detail}")
    uids.check()
    tally = summary.tally
    counts = DatasetCounts(
        **pairs.counts().model_dump(),
        rows=tally.kinds.total(),
        ties=tally.ties,
        missing=tally.kinds["missing"],
        bad=dict(sorted(tally.bad.items())),
    )
    if first_decided is None:
        found = f"{counts.rows} rows, {counts.ties} ties, {counts.missing} without a label"
        found += "".join(f", {count} {cause} ({details[cause]})" for cause, count in counts.bad.items())
        message = f"uri {source.uri!r} has no decided pair: {found}"
        raise BadRequest(message, param="uri", code="no_decided_pair")
    unit, number = first_decided
    shown = next(source.rows(unit, with_images=True, start=number, stop=number + 1))
    return Inspection(counts, summary.digest(), _example(source, shown))


def _example(source: Source, row: Row) -> DecidedExample:
    """A decided row with its images, in words."""
    preference = row.preferences[0]
    return DecidedExample(
        row=source.row_name(row.key),
        chosen=_image_name(source, row, preference.winner),
        rejected=_image_name(source, row, preference.loser),
        caption=row.caption[:MAX_DETAIL_CHARS],
    )


def _image_name(source: Source, row: Row, slot: int) -> str:
    """An image's path or URI; of one without, its column and its uid."""
    image = row.images[slot]
    if isinstance(image, str):
        return image[:MAX_DETAIL_CHARS]
    if source.shape == "ranking":
        column = f"{source.columns['images']}[{slot}]"
    else:
        column = source.columns[SLOTS[source.shape][slot][0]]  # type: ignore[index]  # names are of Column
    uid = row.uids[slot]
    return column if uid == f"{row.key}:{slot}" else f"{column}, uid {uid}"[:MAX_DETAIL_CHARS]


class RowTally:
    """Counts rows by kind and cause."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self._equal_pairs = 0

    def add(self, row: Row) -> None:
        """Count one row."""
        self.kinds[row.kind] += 1
        if row.kind == "bad":
            self.bad[row.cause] += 1
        self._equal_pairs += row.ties

    @property
    def ties(self) -> int:
        """Rows that are ties, plus the equal pairs of decided rankings."""
        return self.kinds["tie"] + self._equal_pairs


class Summary:
    """Counts and digest of a source's rows, in their order. Memory does not grow with the rows."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.tally = RowTally()
        self._rows_digest = hashlib.sha256()

    def observe(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows unchanged, counting and digesting each."""
        for row in rows:
            self.tally.add(row)
            self._rows_digest.update(_digest_line(row))
            yield row

    def digest(self) -> str:
        """sha256 of the rows so far, without images, and of the source's fingerprint.

        Images are not read; the fingerprint changes when images inside the files are replaced.
        """
        digest = self._rows_digest.copy()
        digest.update(self._source.fingerprint())
        return digest.hexdigest()

    def check_digest(self, registered: str, param: str) -> None:
        """Raises BadRequest, naming ``param``, where the rows are not those that were registered."""
        digest = self.digest()
        if digest != registered:
            message = (
                f"dataset {self._source.uri!r} has changed: digest {digest}, registered as {registered}; "
                "register it again (a registration by an earlier version may have another digest, too)"
            )
            raise BadRequest(message, param=param, code="dataset_changed")


def captions_of(source: Source, digest: str, param: str) -> Counter[str]:
    """How many decided pairs each caption has, in the order of the rows.

    Raises BadRequest, naming ``param``, where the rows are not those that were registered with ``digest``.
    """
    summary = Summary(source)
    captions: Counter[str] = Counter()
    for unit in source.units():
        for row in summary.observe(source.rows(unit)):
            captions[row.caption] += len(row.preferences)
    summary.check_digest(digest, param)
    return +captions


def check_bad(bad_rows: int, rows: int, by_cause: Mapping[str, int], max_bad_fraction: float) -> None:
    """Raises BadRequest with the counts where a larger fraction of the rows is bad than allowed."""
    if bad_rows > max_bad_fraction * rows:
        counts = ", ".join(f"{cause} {count}" for cause, count in by_cause.items())
        limit = f"more than data.max_bad_fraction = {max_bad_fraction:g} allows"
        message = f"{bad_rows} of {rows} rows are bad ({counts}): {limit}"
        raise BadRequest(message, param="data.max_bad_fraction", code="too_many_bad_rows")


def _digest_line(row: Row) -> bytes:
    """What the digest covers of a row: everything but the images."""
    preferences = [astuple(preference) for preference in row.preferences]
    content = [row.key, row.kind, row.cause, row.uids, row.caption, row.ties, preferences]
    return json.dumps(content).encode() + b"\n"


def validate(source: Source, sample_rows: int = SAMPLE_ROWS) -> DatasetReport:
    """Report on a sample of rows, spread over the source, whose images are decoded. Stores nothing."""
    units = list(source.units())
    source.check_split_columns(units, sample_rows)
    kinds: Counter[str] = Counter()
    bad: dict[str, BadRows] = {}
    examiner = _Examiner(source)
    pairs = PairTally()
    images: list[_Image] = []
    example: DecidedExample | None = None
    for row in islice(_spread(source, units, sample_rows), sample_rows):
        cause, detail, row_images = examiner.examine(row)
        kinds["bad" if cause else row.kind] += 1
        images += row_images
        if example is None and row.kind == "decided":
            example = _example(source, row)
        if not cause:
            pairs.add(row, [image.sha256 for image in row_images])
        else:
            bad_rows = bad.setdefault(cause, BadRows(count=0, examples=[]))
            bad_rows.count += 1
            if len(bad_rows.examples) < MAX_EXAMPLES:
                bad_rows.examples.append(BadExample(row=source.row_name(row.key), detail=detail))
    sampled = {"rows": kinds.total()}
    sampled |= {kind: kinds[kind] for kind in ("decided", "tie", "missing", "bad")}
    return DatasetReport(
        uri=source.uri,
        format=source.format,
        shape=source.shape,
        split=source.split,
        columns={str(column): name for column, name in source.columns.items()},
        columns_not_read=list(source.unused_columns),
        files_not_read=source.files_not_read,
        parts_missing=source.parts_missing,
        rows=_total_rows(units),
        sampled=sampled,
        example=example,
        pairs=pairs.counts(),
        bad=dict(sorted(bad.items())),
        pictures=_sizes(images),
    )


def _total_rows(units: list[Unit]) -> int | None:
    """The number of rows; None where a unit does not know its own."""
    known = [unit.rows for unit in units if unit.rows is not None]
    return sum(known) if len(known) == len(units) else None


def _spread(source: Source, units: list[Unit], sample_rows: int) -> Iterator[Row]:
    """The first rows of each unit. Units come by their reversed bits, so that any prefix is spread."""
    bits = max(1, (len(units) - 1).bit_length())
    sampled_units = max(1, min(len(units), MIN_SAMPLED_UNITS))
    rows_per_unit = max(1, sample_rows // sampled_units)

    def reversed_bits(number: int) -> int:
        return int(f"{number:0{bits}b}"[::-1], 2)

    for number in sorted(range(len(units)), key=reversed_bits):
        yield from source.rows(units[number], with_images=True, stop=rows_per_unit)


@dataclass(frozen=True)
class _Image:
    """A decoded image: its shorter side in pixels, whether the background shows, and its file's digest."""

    side_px: int
    transparent: bool
    sha256: str


class _Examiner:
    """Decodes the images of sampled rows, and compares those of one uid."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._seen: dict[str, tuple[str, NDArray[np.uint8]]] = {}
        """By uid: its first row and its pixels."""

    def examine(self, row: Row) -> tuple[str, str, list[_Image]]:
        """(cause, detail, images that are used). The cause is "" where the row is not bad."""
        if row.kind != "decided" and not repeats_a_uid(row):
            return row.cause, row.detail, []
        images: list[_Image] = []
        for slot, (uid, image) in enumerate(zip(row.uids, row.images, strict=True)):
            try:
                data = self._source.load(image)
                decoded = decode(data, COMPARED_SIZE_PX)
            except BadImage as error:
                if row.kind != "decided":  # no image of a tie is used
                    return "", "", []
                name = image if isinstance(image, str) else _image_name(self._source, row, slot)
                detail = f"{name}: {error.detail}"[:MAX_DETAIL_CHARS].removesuffix(": ")
                return error.cause, detail, images
            if row.kind == "decided":
                sha256 = hashlib.sha256(data or b"").hexdigest()
                images.append(_Image(min(decoded.size), decoded.transparent, sha256))
            first, pixels = self._seen.setdefault(uid, (row.key, decoded.pixels))
            if differ(pixels, decoded.pixels):
                place = f"another image than in row {self._source.row_name(first)}"
                column = uid_column(self._source, slot)
                detail = f"{column} {uid!r} names {place}; {column}= leaves it out"
                return "uid_conflict", detail, images
        return "", "", images


def _sizes(images: list[_Image]) -> PictureSizes | None:
    if not images:
        return None
    shorter_sides = [image.side_px for image in images]
    return PictureSizes(
        count=len(images),
        min_px=min(shorter_sides),
        median_px=int(median(shorter_sides)),
        max_px=max(shorter_sides),
        transparent=sum(image.transparent for image in images),
    )
