"""Rows that name their images by path: JSON lines, and folders of winners and losers. Readers as in columnar.py."""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, cast

from pyarrow import fs

from services.errors import BadRequest
from services.pairs.column_types import Columns, Found
from services.pairs.columnar import STREAM_BYTES, Cells, Format, Unit, full_uri, name_and_size, open_file
from services.pairs.row import MAX_CAPTION_CHARS
from services.storage import files

RANGE_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 22
LINES_LOOKED_AT = 1000
FOLDER_ROWS = 500
SIDES = (("win", "lose"), ("chosen", "rejected"))
CAPTION = ".txt"
CAPTIONS_AT_ONCE = 8


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; any other line is a bad row. A unit is the lines that begin within a range of bytes."""

    uri: str
    files: tuple[str, ...]
    format: Format = "jsonl"

    def columns(self) -> Found:
        """The keys of the first lines. Raises BadRequest where none of them is an object."""
        rows = (row for unit in self.units() for row in self._objects(unit))
        objects = (row for row in islice(rows, LINES_LOOKED_AT) if isinstance(row, dict))
        found: Found = {key: None for row in objects for key in row}
        if not found:
            raise BadRequest(
                f"uri {self.uri!r} holds no line that is a JSON object", param="uri", code="not_jsonl"
            )
        return found

    def units(self) -> Iterator[Unit]:
        for file in self.files:
            with open_file(self.uri, file) as stream:
                size = stream.size()
            for group, start in enumerate(range(0, size, RANGE_BYTES)):
                yield Unit(file, group, start=start, stop=min(start + RANGE_BYTES, size))

    def rows(
        self, unit: Unit, columns: Columns, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]:
        for row in islice(self._objects(unit), start, stop):
            yield row if isinstance(row, str) else {name: row.get(own) for name, own in columns.items()}

    def identity(self) -> Iterator[bytes]:
        yield from (name_and_size(self.uri, file) for file in self.files)

    def _objects(self, unit: Unit) -> Iterator[dict[str, Any] | str]:
        stream = open_file(self.uri, unit.file)
        with io.BufferedReader(cast(io.RawIOBase, stream), STREAM_BYTES) as reader:
            for line in _lines(reader, unit.start, unit.stop):
                if line is None:
                    yield "line_too_long"
                elif not line.isspace():
                    yield _parse(line)


def _lines(reader: BinaryIO, start: int, stop: int) -> Iterator[bytes | None]:
    """The lines that begin in bytes start..stop; None for one longer than MAX_LINE_BYTES, of which no more is held."""
    position = reader.seek(max(0, start - 1))
    if start:
        position = _skip_line(reader, position, stop)
    while position < stop and (line := reader.readline(MAX_LINE_BYTES)):
        position += len(line)
        if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES:
            yield line
        else:
            yield None
            position = _skip_line(reader, position, stop)


def _skip_line(reader: BinaryIO, position: int, stop: int) -> int:
    """Read on to the end of a line, or to ``stop``; returns the position."""
    while position < stop and (piece := reader.readline(STREAM_BYTES)):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _parse(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return "json_broken"
    return value if isinstance(value, dict) else "json_broken"


@dataclass(frozen=True)
class WinLose:
    """Two folders with images of equal stems, the winners and the losers; a unit is a slice of the sorted stems.

    The caption is ``{stem}.txt`` beside the winner or in the folder above. Names of all files are held, images are not.
    """

    uri: str
    sides: tuple[str, str]
    format: Format = "folders"

    def columns(self) -> Found:
        return dict.fromkeys(("caption", "chosen", "rejected"))

    def units(self) -> Iterator[Unit]:
        names = iter(self._names())
        for group, part in enumerate(iter(lambda: tuple(islice(names, FOLDER_ROWS)), ())):
            yield Unit("", group, len(part), names=part)

    def rows(
        self, unit: Unit, columns: Columns, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]:
        names = unit.names[start:stop]
        with ThreadPoolExecutor(CAPTIONS_AT_ONCE) as pool:
            captions = pool.map(self._caption, [caption for *_, caption in names])
            for (cause, winner, loser, _), caption in zip(names, captions, strict=True):
                yield cause or {"caption": caption, "chosen": winner, "rejected": loser}

    def identity(self) -> Iterator[bytes]:
        for folder in ("", *self.sides):
            yield from (
                f"{folder}/{name}\0{size}\0".encode() for name, size in sorted(self._listed(folder).items())
            )

    def _names(self) -> Iterator[tuple[str, ...]]:
        """(cause, winner, loser, caption) of every stem; "" for what is not there."""
        above, win, lose = (self._listed(folder) for folder in ("", *self.sides))
        sides = tuple(_by_stem(names) for names in (win, lose))
        for stem in sorted(sides[0] | sides[1]):
            winners, losers = (side.get(stem, []) for side in sides)
            text = f"{stem}{CAPTION}"
            caption = f"{self.sides[0]}/{text}" if text in win else text if text in above else ""
            cause = (
                "partner_missing"
                if not (winners and losers)
                else "stem_twice"
                if len(winners + losers) > 2
                else ""
            )
            images = [
                f"{side}/{names[0]}" if names else ""
                for side, names in zip(self.sides, (winners, losers), strict=True)
            ]
            yield cause, *images, caption

    def _listed(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder, hidden ones left out."""
        filesystem, path = files.resolve(full_uri(self.uri, folder))
        infos = filesystem.get_file_info(fs.FileSelector(path))
        return {
            info.base_name: info.size for info in infos if info.is_file and not info.base_name.startswith(".")
        }

    def _caption(self, file: str) -> str | bytes | None:
        """The text of a caption's file; empty bytes where it is not UTF-8."""
        if not file:
            return None
        with open_file(self.uri, file) as stream:
            content = stream.read(4 * MAX_CAPTION_CHARS + 8)
        try:
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            return content.decode(errors="ignore") if len(content) > 4 * MAX_CAPTION_CHARS else b""


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Images by the stem of their names: every file that is no caption."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        if suffix != CAPTION:
            found.setdefault(stem, []).append(name)
    return found
