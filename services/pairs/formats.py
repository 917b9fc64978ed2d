"""What kind of file a URI holds: what it says of itself, by its first bytes and its name.

A file that cannot be read is refused with what was found, what can be read, and the nearest conversion.
"""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any

from services.errors import BadRequest
from services.pairs.columnar import Format, full_uri, open_decompressed, unreadable
from services.pairs.path_based import MAX_LINE_BYTES

HEAD_BYTES = 1 << 14
READABLE = (
    "Parquet, Arrow streams of `save_to_disk`, JSON lines, a JSON list of objects, CSV (these three also "
    "compressed), webdataset tars, and folders named win and lose"
)
SUFFIXES: dict[Format, tuple[str, ...]] = {
    "parquet": (".parquet", ".parq"),
    "jsonl": (".jsonl", ".ndjson"),
    "arrow": (".arrow",),
    "csv": (".csv", ".tsv"),
    "tar": (".tar", ".tgz"),
    "json": (".json",),
}
"""Suffixes of each format's files, in the order in which a folder is searched for them: many tools describe
images and datasets in .json files.
"""
COMPRESSED = (".gz", ".zst", ".bz2")
_UNPACK = "unpack it and name the folder"
_ONE_IMAGE = "one image; name the folder that holds win and lose, or a file of rows that names the images"
_TO_PARQUET = "write its rows as Parquet with pandas: `frame.to_parquet('pairs.parquet')`"
_JSON_LINES = "write one JSON object a line"
_KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file",
        "run `git lfs pull` in its folder",
    ),
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", "unpack it with `xz -d`"),
    (0, b"ARROW1", "an Arrow file (Feather)", _TO_PARQUET),
    (
        0,
        b"SQLite format 3",
        "an SQLite database",
        "export the table: `sqlite3 -json FILE 'select ...' > pairs.json`",
    ),
    (0, b"\x89HDF\r\n", "an HDF5 file", _TO_PARQUET),
    (0, b"\x93NUMPY", "a NumPy array", _TO_PARQUET),
    (0, b"Obj\x01", "an Avro file", _TO_PARQUET),
    (0, b"ORC", "an ORC file", _TO_PARQUET),
    (0, b"\xd0\xcf\x11\xe0", "an Excel or Office file", "save the sheet as CSV"),
    (0, b"\x80\x02", "a Python pickle", _TO_PARQUET),
    (0, b"\x80\x03", "a Python pickle", _TO_PARQUET),
    (0, b"\x80\x04", "a Python pickle", _TO_PARQUET),
    (0, b"\x80\x05", "a Python pickle", _TO_PARQUET),
    (16, b"\xde\xc0\xef\xbe", "an LMDB database", _TO_PARQUET),
    (0, b"%PDF", "a PDF document", _JSON_LINES),
    (0, b"\x89PNG", "a PNG image", _ONE_IMAGE),
    (0, b"\xff\xd8\xff", "a JPEG image", _ONE_IMAGE),
    (0, b"GIF8", "a GIF image", _ONE_IMAGE),
    (4, b"ftyp", "a HEIC or AVIF image, or a video", "convert images to PNG or JPEG; " + _ONE_IMAGE),
    (0, b"RIFF", "a WebP image or other media", _ONE_IMAGE),
    (0, b"\xff\xfe", "text in UTF-16", "save it as UTF-8: `iconv -f UTF-16 -t UTF-8`"),
    (0, b"\xfe\xff", "text in UTF-16", "save it as UTF-8: `iconv -f UTF-16 -t UTF-8`"),
)
"""(offset, bytes there, what the file is, what to do)."""
_BY_SUFFIX = {
    ".xlsx": ("an Excel workbook", "save the sheet as CSV"),
    ".npz": ("a NumPy archive", _TO_PARQUET),
    ".pt": ("a PyTorch file", _TO_PARQUET),
    ".pth": ("a PyTorch file", _TO_PARQUET),
    ".ckpt": ("a PyTorch file", _TO_PARQUET),
    ".safetensors": (
        "a file of weights",
        "name the dataset's file; a model is registered with `dde models create`",
    ),
    ".tfrecord": ("a TFRecord file", "write its rows as Parquet or as webdataset tars"),
    ".yaml": ("a YAML file", _JSON_LINES),
    ".yml": ("a YAML file", _JSON_LINES),
}
"""Files that their first bytes do not tell."""
_BLANK = b"\xef\xbb\xbf \t\r\n"
_ROWS_FIELD = re.compile(r'"([^"\\]{1,60})"\s*:\s*\[\s*\{')


def format_of(uri: str, file: str = "") -> Format:
    """The format of a dataset's file, by its content. Raises BadRequest for a file that cannot be read."""
    full = full_uri(uri, file)
    name = posixpath.basename(full).lower()
    by_name = format_of_name(name)
    head = _head(uri, file)
    found = _by_content(head, by_name)
    if found is not None:
        return found
    what, remedy = _description(head, name)
    code = f"not_{by_name}" if by_name else "unknown_format"
    raise BadRequest(f"uri {full!r} is {what}; {remedy}; can be read: {READABLE}", param="uri", code=code)


def format_of_name(name: str) -> Format | None:
    """The format that a file's suffix names, compressed or not; None for other suffixes."""
    plain = name.lower()
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    return next((each for each, suffixes in SUFFIXES.items() if plain.endswith(suffixes)), None)


def suffix_of(name: str) -> str:
    """A file's suffix in small letters; its name where it has none."""
    base = posixpath.basename(name)
    return posixpath.splitext(base)[1].lower() or base


def describe(uri: str, file: str) -> str:
    """``a zip archive; unpack it and name the folder``: what a file is, and what to do."""
    return "; ".join(_description(_head(uri, file), file.lower()))


def _head(uri: str, file: str) -> bytes:
    """The first bytes, decompressed; of text that is one JSON object a line, the whole first line."""
    try:
        with open_decompressed(uri, file) as reader:
            head = reader.read(HEAD_BYTES)
            if head.lstrip(_BLANK).startswith(b"{") and b"\n" not in head:
                head += reader.readline(MAX_LINE_BYTES)
            return head
    except OSError as error:
        raise unreadable(error, full_uri(uri, file), "cannot be read") from error


def _by_content(head: bytes, by_name: Format | None) -> Format | None:
    """The format of a file that starts so; None where it cannot be read."""
    text = head.lstrip(_BLANK)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "arrow"
    if head[257:262] == b"ustar" or (by_name == "tar" and head and not any(head)):  # zeros: an empty tar
        return "tar"
    if b"\0" in head or any(head.startswith(magic, offset) for offset, magic, *_ in _KINDS):
        return None
    if re.match(rb"\[\s*[{\]]", text):
        return "json"
    if by_name == "csv" or (by_name == "jsonl" and text):
        return by_name
    is_row = _object(text.partition(b"\n")[0]) and not _field_of_rows(head) and not _is_columns(text)
    return "jsonl" if is_row else None


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_columns(text: bytes) -> bool:
    """Whether a document is one object of columns, as pandas writes a table."""
    values = _object(text).values()
    return bool(values) and all(isinstance(value, dict | list) for value in values)


def _field_of_rows(head: bytes) -> str:
    """The field that holds a list of objects, where a document is one object; else ""."""
    match = _ROWS_FIELD.search(head.decode(errors="replace"))
    return match[1] if match and b"}\n{" not in head.replace(b"\r", b"") else ""


def _description(head: bytes, name: str) -> tuple[str, str]:
    """What a file is that cannot be read, and what to do."""
    if not head:
        return "an empty file", "its download or copy may have failed"
    text = head.lstrip(_BLANK)
    if not text:
        return "a file of blank lines", "its rows may be in another file"
    suffix = suffix_of(name)
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    for offset, magic, what, remedy in _KINDS:
        if head.startswith(magic, offset):
            return what, remedy
    if text.startswith((b"<!", b"<html", b"<HTML")):
        return "a web page", "download the file itself"
    if b"\0" in head:
        return "a file of an unknown kind", _TO_PARQUET
    if text.startswith(b"<"):
        return "an XML file", _JSON_LINES
    field = _field_of_rows(head)
    if text.startswith(b"{") and field:
        remedy = f"write its rows one a line: `jq -c '.[\"{field}\"][]' FILE > rows.jsonl`"
        return "one JSON object, not a list of rows", remedy
    if _is_columns(text):
        remedy = "write its rows with pandas: `frame.to_json(path, orient='records', lines=True)`"
        return "one JSON object of columns, not of rows", remedy
    if text.startswith(b"{"):
        return "one JSON object, not a list of rows", _JSON_LINES
    if text.startswith(b"["):
        return "a JSON list of values that are no objects", _JSON_LINES
    return "a text file", f"{_JSON_LINES}, or a table with a header as .csv"
