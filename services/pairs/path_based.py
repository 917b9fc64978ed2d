"""Readers of rows that name their images by path: JSON lines, and folders of winners and losers."""

from __future__ import annotations

import json
import posixpath
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from services.errors import BadRequest
from services.pairs.column_types import ColumnMap, FileColumns
from services.pairs.columnar import (
    STREAM_BYTES,
    Cells,
    Format,
    Unit,
    Unreadable,
    compression_of,
    full_uri,
    name_and_size,
    open_decompressed,
    open_file,
)
from services.pairs.row import MAX_CAPTION_CHARS
from services.storage import sources

RANGE_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 22
LINES_FOR_COLUMNS = 1000
STEMS_PER_UNIT = 500
SIDES: tuple[tuple[str, str], ...] = (
    ("win", "lose"),
    ("chosen", "rejected"),
    ("winner", "loser"),
    ("winners", "losers"),
    ("preferred", "rejected"),
)
"""Names of the two folders, in any case."""
ALL_SIDES = frozenset(name for sides in SIDES for name in sides)
CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of caption files, in any case; the first that exists is read."""
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", "")
)
"""Suffixes of files that are tried as images, in any case. Some tools name images without a suffix."""
CAPTION_THREADS = 8
_MASK = re.compile(r"(?:masks?/)?(.+?)(?:[-_. ](?:mask|masklabel|condlabel))?", re.IGNORECASE)
"""The stem of a mask, with that of its image."""


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; any other line is a bad row. A unit is the lines that begin in a byte range.

    A compressed file is one unit.
    """

    uri: str
    files: tuple[str, ...]
    format: Format = "jsonl"

    def columns(self) -> FileColumns:
        """The keys of the first lines. Raises BadRequest where none of them is an object."""
        rows = (row for unit in self.units() for row in self._objects(unit))
        return keys_of(self.uri, rows, "holds no line that is a JSON object", "not_jsonl")

    def units(self) -> Iterator[Unit]:
        for file in self.files:
            with open_file(self.uri, file) as stream:
                size = stream.size()
                compression = compression_of(stream)
            if compression:
                yield Unit(file, stop=sys.maxsize)
                continue
            for group, start in enumerate(range(0, size, RANGE_BYTES)):
                yield Unit(file, group, start=start, stop=min(start + RANGE_BYTES, size))

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        yield from cells_of(islice(self._objects(unit), start, stop), columns)

    def identity(self) -> Iterator[bytes]:
        yield from (name_and_size(self.uri, file) for file in self.files)

    def _objects(self, unit: Unit) -> Iterator[dict[str, Any] | Unreadable]:
        """Each line's object, or why it has none."""
        with open_decompressed(self.uri, unit.file) as reader:
            for position, line in _lines(reader, unit.start, unit.stop):
                if line is None:
                    yield Unreadable(
                        "line_too_long", f"the line at byte {position:,} is over {MAX_LINE_BYTES:,}"
                    )
                elif not line.isspace():
                    yield _parse(line, position)


def keys_of(uri: str, rows: Iterable[dict[str, Any] | Unreadable], why: str, code: str) -> FileColumns:
    """The keys of the first rows. Raises BadRequest where none of them is an object."""
    columns: FileColumns = {}
    for row in islice(rows, LINES_FOR_COLUMNS):
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
    if not columns:
        raise BadRequest(f"uri {uri!r} {why}", param="uri", code=code)
    return columns


def cells_of(rows: Iterable[dict[str, Any] | Unreadable], columns: ColumnMap) -> Iterator[Cells | Unreadable]:
    """The rows by canonical name; an absent key is null."""
    for row in rows:
        if isinstance(row, Unreadable):
            yield row
        else:
            yield {column: row.get(key) for column, key in columns.items()}


def _lines(reader: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in bytes ``start..stop``, with their positions; None for one over MAX_LINE_BYTES.

    At most MAX_LINE_BYTES of a line are in memory.
    """
    position = reader.seek(start - 1) if start else 0  # a compressed file cannot seek
    if start:  # the line of the byte before began in an earlier range
        position = _skip_line(reader, position, stop)
    while position < stop and (line := reader.readline(MAX_LINE_BYTES)):
        begin = position
        position += len(line)
        if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES:
            yield begin, line
        else:
            yield begin, None
            position = _skip_line(reader, position, stop)


def _skip_line(reader: BinaryIO, position: int, stop: int) -> int:
    """Read to the end of the line, or to ``stop``. Returns the position."""
    while position < stop and (piece := reader.readline(STREAM_BYTES)):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _parse(line: bytes, position: int) -> dict[str, Any] | Unreadable:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        return Unreadable("json_broken", f"the line at byte {position:,} is nested too deeply")
    except ValueError as error:
        return Unreadable("json_broken", f"the line at byte {position:,}: {why_broken(error)}")
    return value if isinstance(value, dict) else not_an_object(value, f"the line at byte {position:,}")


def why_broken(error: ValueError) -> str:
    """What is wrong with JSON text, without quoting it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number too long to read"


def not_an_object(value: object, where: str) -> Unreadable:
    """The bad row for a JSON value that is no object."""
    return Unreadable("json_broken", f"{where} is {json_type(value)}, must be an object")


def json_type(value: object) -> str:
    """What JSON calls a value's type."""
    names = {bool: "a boolean", list: "a list", str: "a string", type(None): "null", dict: "an object"}
    return names.get(type(value), "a number")


@dataclass(frozen=True)
class WinLose:
    """Two folders of images, winners and losers, paired by stem. A unit is a slice of the sorted stems.

    ``folder`` holds the two; it is "" or the folder of a split. A stem is a path below its side without the
    suffix, in Unicode's composed form: file systems store either form of an accent. The caption is
    ``{stem}.txt`` or ``.caption`` beside the winner, beside the loser or in the parent folder. Other files
    are not read, nor is an image's mask. Memory holds all names, no image.
    """

    uri: str
    sides: tuple[str, str]
    folder: str = ""
    format: Format = "folders"

    def columns(self) -> FileColumns:
        """Raises BadRequest where a side holds no image."""
        for side in self.sides:
            self._check_side(side)
        return dict.fromkeys(("caption", "chosen", "rejected"))

    def units(self) -> Iterator[Unit]:
        names = iter(self._names())
        parts = iter(lambda: tuple(islice(names, STEMS_PER_UNIT)), ())
        for group, part in enumerate(parts):
            yield Unit(self.folder, group, len(part), names=part)

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        names = unit.names[start:stop]
        caption_files = [file for *_, one, other in names for file in (one, other)]
        with sources.in_threads(self._caption, caption_files, CAPTION_THREADS) as captions:
            for cause, detail, winner, loser, file, other in names:
                caption, again = next(captions), next(captions)
                if cause:
                    yield Unreadable(cause, detail)
                elif other and again != caption:
                    yield Unreadable("captions_differ", f"{file} and {other} hold different captions")
                else:
                    cells = {"caption": caption, "chosen": winner, "rejected": loser}
                    yield _bad_caption(file, caption) or cells

    def identity(self) -> Iterator[bytes]:
        for folder in ("", *self.sides):
            for name, size in sorted(self._listed(folder).items()):
                yield f"{folder}/{name}\0{size}\0".encode()

    def not_read(self) -> Counter[str]:
        """How many files of either side are no image and no caption of one, by suffix."""
        counts: Counter[str] = Counter()
        for side in self.sides:
            names = self._listed(side)
            images = _Images(names)
            captions = {name for stem, name in _captions(names).items() if stem in images.by_stem}
            others = [name for name in names if not images.holds(name) and name not in captions]
            counts.update(_kind_of(name, images) for name in others)
        return counts

    def _check_side(self, side: str) -> None:
        names = self._listed(side)
        if names and not _Images(names).by_stem:
            found = ", ".join(f"{count} {kind}" for kind, count in sorted(self.not_read().items()))
            message = (
                f"uri {full_uri(self.uri, self._path(side))!r} holds no image; found: {found or 'captions'}; "
                "images that can be read are JPEG, PNG, WebP, GIF, BMP and TIFF: convert others to PNG"
            )
            raise BadRequest(message, param="uri", code="no_image")

    def _names(self) -> Iterator[tuple[str, ...]]:
        """(cause, detail, winner, loser, caption, the loser's caption beside the winner's) of every stem.

        "" stands for an absent one.
        """
        win, lose = self.sides
        win_files, lose_files, parent_files = (self._listed(folder) for folder in (win, lose, ""))
        captions = [(win, _captions(win_files)), (lose, _captions(lose_files)), ("", _captions(parent_files))]
        winners_of, losers_of = _Images(win_files).by_stem, _Images(lose_files).by_stem
        for stem in sorted(winners_of.keys() | losers_of.keys()):
            winners = [self._path(win, name) for name in winners_of.get(stem, [])]
            losers = [self._path(lose, name) for name in losers_of.get(stem, [])]
            caption, *others = [self._path(side, of[stem]) for side, of in captions if stem in of] or [""]
            other = next((file for file in others if file.startswith(f"{self._path(lose)}/")), "")
            cause, detail = _cause(winners, losers, stem, (self._path(win), self._path(lose)))
            if not cause and not caption:
                cause, detail = "caption_missing", f"{self._path(win, stem)}.txt does not exist"
            winner = winners[0] if winners else ""
            yield cause, detail, winner, losers[0] if losers else "", caption, other

    def _path(self, *parts: str) -> str:
        """The path of a file relative to the dataset's URI."""
        return posixpath.join(self.folder, *parts)

    def _listed(self, side: str) -> dict[str, int]:
        """Sizes of the files below a side, or in the folder itself, by relative path, without hidden ones."""
        uri = full_uri(self.uri, self._path(side))
        if not side:
            sizes = {info.base_name: info.size for info in sources.entries(uri) if info.is_file}
        else:
            sizes = sources.sizes_below(uri)
        return {name: size for name, size in sizes.items() if not is_hidden(name)}

    def _caption(self, file: str) -> str | bytes | None:
        """The text of a caption file; empty bytes where it is not UTF-8."""
        if not file:
            return None
        max_bytes = 4 * MAX_CAPTION_CHARS
        with open_file(self.uri, file) as stream:
            content: bytes = stream.read(max_bytes + 8)
        try:
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            # A longer caption may end within a character; it is too long in any case.
            return content.decode(errors="ignore") if len(content) > max_bytes else b""


def sides_among(folders: Iterable[str]) -> tuple[str, str] | None:
    """The two of these folders that hold winners and losers."""
    names = {folder.lower(): folder for folder in sorted(folders)}
    return next(((names[win], names[lose]) for win, lose in SIDES if win in names and lose in names), None)


def is_hidden(name: str) -> bool:
    """Whether a relative path, or a folder in it, is hidden."""
    return name.startswith(".") or "/." in name


class _Images:
    """The images among a side's files, by stem. The mask of an image is none of them."""

    def __init__(self, names: Iterable[str]) -> None:
        named: dict[str, list[str]] = {}
        for name in sorted(names):
            stem, suffix = _split(name)
            if suffix in IMAGE_SUFFIXES:
                named.setdefault(stem, []).append(name)
        self.by_stem = {stem: group for stem, group in named.items() if not self._is_mask(stem, named)}
        self._names = {name for group in self.by_stem.values() for name in group}

    def holds(self, name: str) -> bool:
        return name in self._names

    @staticmethod
    def _is_mask(stem: str, stems: Container[str]) -> bool:
        match = _MASK.fullmatch(stem)
        return match is not None and match[1] != stem and match[1] in stems


def _split(name: str) -> tuple[str, str]:
    """The stem in Unicode's composed form, and the suffix in small letters."""
    stem, suffix = posixpath.splitext(name)
    return unicodedata.normalize("NFC", stem), suffix.lower()


def _is_caption(name: str) -> bool:
    return _split(name)[1] in CAPTION_SUFFIXES


def _kind_of(name: str, images: _Images) -> str:
    """A suffix, or "masks", to count files that are not read."""
    suffix = _split(name)[1]
    return "masks" if suffix in IMAGE_SUFFIXES and not images.holds(name) else suffix


def _captions(names: Iterable[str]) -> dict[str, str]:
    """Caption files by stem; of several the one whose suffix comes first in CAPTION_SUFFIXES."""
    found = [name for name in sorted(names) if _is_caption(name)]
    ordered = sorted(found, key=lambda name: CAPTION_SUFFIXES.index(_split(name)[1]), reverse=True)
    return {_split(name)[0]: name for name in ordered}


def _cause(winners: list[str], losers: list[str], stem: str, sides: tuple[str, str]) -> tuple[str, str]:
    """Why the images of a stem are not a pair, and which files say so; "" where they are."""
    if not winners or not losers:
        absent = sides[1] if winners else sides[0]
        return "partner_missing", f"{(winners + losers)[0]}: no image {stem!r} in {absent}"
    if len(winners) + len(losers) > 2:
        return "stem_twice", ", ".join(winners + losers)
    return "", ""


def _bad_caption(file: str, caption: str | bytes | None) -> Unreadable | None:
    """What is wrong with a caption file; None where it can be used."""
    if isinstance(caption, bytes):
        return Unreadable("not_unicode", f"{file} is not UTF-8")
    if not caption:
        return Unreadable("caption_missing", f"{file} is empty")
    if len(caption) > MAX_CAPTION_CHARS:
        return Unreadable("caption_too_long", f"{file} has more than {MAX_CAPTION_CHARS:,} characters")
    return Unreadable("caption_null_byte", f"{file} holds a null byte") if "\0" in caption else None
