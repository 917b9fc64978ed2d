"""Readers of text files that are one document: a JSON list of rows, and tables of comma-separated values.

A file is a unit: its rows are found only by reading it from the start. Memory holds one row. A compressed
file is decompressed while it is read.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from services.errors import BadRequest
from services.pairs.column_types import ColumnMap, FileColumns
from services.pairs.columnar import (
    Cells,
    Format,
    Unit,
    Unreadable,
    WholeFiles,
    full_uri,
    open_decompressed,
)
from services.pairs.path_based import MAX_LINE_BYTES, cells_of, keys_of, not_an_object

MAX_ROW_CHARS = MAX_LINE_BYTES
CHUNK_CHARS = 1 << 16
DELIMITERS = ",;\t|"
_NUMBERS = ("label_0", "label_1")
_LISTS = ("images", "ranks", "scores", "image_uids")
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}
_SPACE = re.compile(r"[ \t\n\r]*")
_SEPARATOR = re.compile(r"[ \t\n\r]*(,?)[ \t\n\r]*(\]?)")


@dataclass(frozen=True)
class JsonLists(WholeFiles):
    """JSON files that are one list of objects, as HPDv2 and ImageReward have them."""

    format: Format = "json"

    def columns(self) -> FileColumns:
        """The keys of the first rows. Raises BadRequest where none of them is an object."""
        rows = (row for file in self.files for row in self._objects(file))
        return keys_of(self.uri, rows, "holds no list of JSON objects", "not_json")

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        yield from cells_of(islice(self._objects(unit.file), start, stop), columns)

    def _objects(self, file: str) -> Iterator[dict[str, Any] | Unreadable]:
        """The rows in order. Raises BadRequest where the document is broken: its other rows would be lost."""
        with open_decompressed(self.uri, file) as reader:
            text = io.TextIOWrapper(reader, encoding="utf-8-sig", errors="surrogateescape")
            try:
                for number, value in enumerate(_elements(text)):
                    yield value if isinstance(value, dict) else not_an_object(value, f"row {number:,}")
            except _BrokenDocument as error:
                message = f"uri {full_uri(self.uri, file)!r} is not a complete JSON list: {error}"
                raise BadRequest(message, param="uri", code="not_json") from error


class _BrokenDocument(ValueError):
    """A JSON document that cannot be read to its end."""


def _elements(text: io.TextIOWrapper) -> Iterator[Any]:
    """The elements of a JSON list, while it is read. Raises _BrokenDocument."""
    decode = json.JSONDecoder().raw_decode
    pending = _Pending(text)
    pending.skip(_SPACE)
    if not pending.take("["):
        raise _BrokenDocument("it does not start with [")
    pending.skip(_SPACE)
    is_over = pending.take("]")
    number = 0
    while not is_over:
        yield pending.value(decode, number)
        match = pending.skip(_SEPARATOR)
        is_over = match[2] == "]"
        if is_over == (match[1] == ","):
            raise _BrokenDocument(f"after row {number:,} it needs a comma or the end of the list")
        number += 1
    pending.skip(_SPACE)
    if pending.rest():
        raise _BrokenDocument("more follows after the list")


class _Pending:
    """The text that is read and not yet decoded: at most MAX_ROW_CHARS and one chunk."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._buffer = ""
        self._position = 0

    def skip(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Move behind the pattern, which matches everywhere, if only as nothing."""
        while True:
            match = pattern.match(self._buffer, self._position)
            if match is None:
                raise _BrokenDocument("it cannot be read")
            if match.end() < len(self._buffer) or not self._read(CHUNK_CHARS):
                self._position = match.end()
                return match

    def take(self, character: str) -> bool:
        """Move behind the character if it is next."""
        is_next = self._buffer.startswith(character, self._position)
        self._position += is_next
        return is_next

    def rest(self) -> str:
        return self._buffer[self._position :]

    def value(self, decode: Any, number: int) -> Any:
        """The next JSON value; more text is read, doubling, until it is complete."""
        size = CHUNK_CHARS
        while True:
            try:
                value, end = decode(self._buffer, self._position)
            except RecursionError as error:
                raise _BrokenDocument(f"row {number:,} is nested too deeply") from error
            except ValueError as error:
                if self._read(size):
                    size *= 2
                    continue
                why = error.msg if isinstance(error, json.JSONDecodeError) else "a number too long to read"
                raise _BrokenDocument(f"row {number:,} is broken or cut off: {why}") from error
            if end < len(self._buffer) or not self._read(size):  # a number may go on in the next chunk
                self._position = end
                return value

    def _read(self, size: int) -> bool:
        """Append text. False at the end of the file. Raises _BrokenDocument for a row over MAX_ROW_CHARS."""
        if len(self._buffer) - self._position > MAX_ROW_CHARS:
            raise _BrokenDocument(f"a row is broken or longer than {MAX_ROW_CHARS:,} characters")
        text = self._text.read(size)
        self._buffer = self._buffer[self._position :] + text
        self._position = 0
        return bool(text)


@dataclass(frozen=True)
class CsvFiles(WholeFiles):
    """Tables of values separated by one of DELIMITERS, with a header, as `metadata.csv` of an image folder.

    Text becomes what the column needs: labels are numbers, lists are written as in JSON or Python, and an
    empty field is null.
    """

    format: Format = "csv"

    def columns(self) -> FileColumns:
        """The names in the first file's header. Raises BadRequest where it has none, or one twice."""
        header, _ = next(self._lines(self.files[0]), ([], 0))
        names = [name for name in header if name]
        if len(names) < 2 or len(set(names)) < len(names):
            message = f"uri {full_uri(self.uri, self.files[0])!r} has no header of distinct column names"
            raise BadRequest(message, param="uri", code="not_csv")
        return dict.fromkeys(names)

    def rows(
        self, unit: Unit, columns: ColumnMap, with_images: bool, start: int, stop: int | None
    ) -> Iterator[Cells | Unreadable]:
        lines = self._lines(unit.file)
        header, _ = next(lines, ([], 0))
        missing = [name for name in columns.values() if name not in header]
        if missing:
            message = f"uri {full_uri(self.uri, unit.file)!r} lacks the columns {', '.join(missing)}"
            raise BadRequest(message, param="uri", code="missing_columns")
        places = {column: header.index(name) for column, name in columns.items()}
        for fields, line in islice(lines, start, stop):
            if isinstance(fields, str):
                yield Unreadable("csv_broken", f"line {line:,}: {fields}")
            elif len(fields) != len(header):
                yield Unreadable(
                    "csv_broken", f"line {line:,} has {len(fields)} fields, the header {len(header)}"
                )
            else:
                yield {column: cell_of(column, fields[place]) for column, place in places.items()}

    def _lines(self, file: str) -> Iterator[tuple[list[str] | str, int]]:
        """The header, then the fields of each row or what is wrong with it, and the number of its last line.

        Raises BadRequest for broken rows of several lines: a quote that is not closed takes rows in.
        """
        with open_decompressed(self.uri, file) as reader:
            text = io.TextIOWrapper(reader, encoding="utf-8-sig", errors="surrogateescape", newline="")
            first = text.readline(MAX_ROW_CHARS)
            delimiter = max(DELIMITERS, key=first.count)
            header = next(csv.reader([first], delimiter=delimiter), [])
            yield header, 1
            lines = iter(lambda: text.readline(MAX_ROW_CHARS), "")
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            line = 1
            while (fields := _next(rows)) is not None:
                begin = line + 1
                line = rows.line_num + 1
                if line > begin and (isinstance(fields, str) or len(fields) != len(header)):
                    uri = full_uri(self.uri, file)
                    where = f"the row of lines {begin:,} to {line:,}"
                    message = f"uri {uri!r} has a quote that is not closed in {where}"
                    raise BadRequest(message, param="uri", code="not_csv")
                if fields:
                    yield fields, line


def _next(rows: Any) -> list[str] | str | None:
    """The next row's fields, or what is wrong with it; None at the end. csv's reader has no public type."""
    try:
        return next(rows, None)
    except csv.Error as error:
        return str(error)


def cell_of(column: str, text: str) -> Any:
    """Text as its column needs it. Text that does not fit stays text, and makes the row bad."""
    if not text.strip():
        return None
    if column in _NUMBERS:
        return _number(text)
    if column == "has_label":
        return _BOOLEANS.get(text.strip().lower(), text)
    return _list(text) if column in _LISTS else text


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _list(text: str) -> Any:
    """A list as JSON or as Python writes it."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text
