"""Readers of rows that name their images by path: JSON lines, and folders of winners and losers."""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, cast

from services.errors import BadRequest
from services.pairs.column_types import ColumnMap, FileColumns
from services.pairs.columnar import STREAM_BYTES, Cells, Format, Unit, full_uri, name_and_size, open_file
from services.pairs.row import MAX_CAPTION_CHARS
from services.storage import sources

RANGE_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 22
LINES_FOR_COLUMNS = 1000
STEMS_PER_UNIT = 500
SIDES: tuple[tuple[str, str], ...] = (("win", "lose"), ("chosen", "rejected"))
CAPTION_SUFFIX = ".txt"
CAPTION_THREADS = 8


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; any other line is a bad row. A unit is the lines that begin in a byte range."""

    uri: str
    files: tuple[str, ...]
    format: Format = "jsonl"

    def columns(self) -> FileColumns:
        """The keys of the first lines. Raises BadRequest where none of them is an object."""
        rows = (row for unit in self.units() for row in self._objects(unit))
        columns: FileColumns = {}
        for row in islice(rows, LINES_FOR_COLUMNS):
            if isinstance(row, dict):
                columns |= dict.fromkeys(row)
        if not columns:
            message = f"uri {self.uri!r} holds no line that is a JSON object"
            raise BadRequest(message, param="uri", code="not_jsonl")
        return columns

    def units(self) -> Iterator[Unit]:
        for file in self.files:
            with open_file(self.uri, file) as stream:
                size = stream.size()
            for group, start in enumerate(range(0, size, RANGE_BYTES)):
                yield Unit(file, group, start=start, stop=min(start + RANGE_BYTES, size))

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]:
        for row in islice(self._objects(unit), start, stop):
            if isinstance(row, str):
                yield row
            else:
                yield {column: row.get(key) for column, key in columns.items()}

    def identity(self) -> Iterator[bytes]:
        yield from (name_and_size(self.uri, file) for file in self.files)

    def _objects(self, unit: Unit) -> Iterator[dict[str, Any] | str]:
        """Each line's object, or why it has none."""
        stream = open_file(self.uri, unit.file)
        with io.BufferedReader(cast(io.RawIOBase, stream), STREAM_BYTES) as reader:
            for line in _lines(reader, unit.start, unit.stop):
                if line is None:
                    yield "line_too_long"
                elif not line.isspace():
                    yield _parse(line)


def _lines(reader: BinaryIO, start: int, stop: int) -> Iterator[bytes | None]:
    """The lines that begin in bytes ``start..stop``; None for a line longer than MAX_LINE_BYTES.

    At most MAX_LINE_BYTES of a line are in memory.
    """
    position = reader.seek(max(0, start - 1))
    if start:  # the line of the byte before began in an earlier range
        position = _skip_line(reader, position, stop)
    while position < stop and (line := reader.readline(MAX_LINE_BYTES)):
        position += len(line)
        if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES:
            yield line
        else:
            yield None
            position = _skip_line(reader, position, stop)


def _skip_line(reader: BinaryIO, position: int, stop: int) -> int:
    """Read to the end of the line, or to ``stop``. Returns the position."""
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
    """Two folders of images, winners and losers, paired by stem. A unit is a slice of the sorted stems.

    The caption is ``{stem}.txt`` beside the winner or in the parent folder. Memory holds all names, no image.
    """

    uri: str
    sides: tuple[str, str]
    format: Format = "folders"

    def columns(self) -> FileColumns:
        return dict.fromkeys(("caption", "chosen", "rejected"))

    def units(self) -> Iterator[Unit]:
        names = iter(self._names())
        parts = iter(lambda: tuple(islice(names, STEMS_PER_UNIT)), ())
        for group, part in enumerate(parts):
            yield Unit("", group, len(part), names=part)

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | str]:
        names = unit.names[start:stop]
        with ThreadPoolExecutor(CAPTION_THREADS) as pool:
            captions = pool.map(self._caption, [caption for *_, caption in names])
            for (cause, winner, loser, _), caption in zip(names, captions, strict=True):
                if cause:
                    yield cause
                else:
                    yield {"caption": caption, "chosen": winner, "rejected": loser}

    def identity(self) -> Iterator[bytes]:
        for folder in ("", *self.sides):
            for name, size in sorted(self._listed(folder).items()):
                yield f"{folder}/{name}\0{size}\0".encode()

    def _names(self) -> Iterator[tuple[str, ...]]:
        """(cause, winner, loser, caption) of every stem; "" for an absent one."""
        win_folder, lose_folder = self.sides
        parent_files = self._listed("")
        win_files = self._listed(win_folder)
        winners_of = _by_stem(win_files)
        losers_of = _by_stem(self._listed(lose_folder))
        for stem in sorted(winners_of.keys() | losers_of.keys()):
            winners = winners_of.get(stem, [])
            losers = losers_of.get(stem, [])
            yield (
                _cause(winners, losers),
                f"{win_folder}/{winners[0]}" if winners else "",
                f"{lose_folder}/{losers[0]}" if losers else "",
                _caption_file(f"{stem}{CAPTION_SUFFIX}", win_folder, win_files, parent_files),
            )

    def _listed(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files in a folder, without hidden ones."""
        infos = sources.entries(full_uri(self.uri, folder))
        visible = (info for info in infos if info.is_file and not info.base_name.startswith("."))
        return {info.base_name: info.size for info in visible}

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


def _cause(winners: list[str], losers: list[str]) -> str:
    """Why the images of a stem are not a pair; "" where they are."""
    if not winners or not losers:
        return "partner_missing"
    if len(winners) + len(losers) > 2:
        return "stem_twice"
    return ""


def _caption_file(name: str, win_folder: str, win_files: Container[str], parent_files: Container[str]) -> str:
    """Where the caption of a stem is; "" for none."""
    if name in win_files:
        return f"{win_folder}/{name}"
    return name if name in parent_files else ""


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Images by stem: every file that is not a caption."""
    images: dict[str, list[str]] = {}
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        if suffix != CAPTION_SUFFIX:
            images.setdefault(stem, []).append(name)
    return images
