"""Prompt files: text, tables and JSON, as the field's prompt sets are published.

    text          one prompt a line
    TSV           a header with ``Prompt``, perhaps ``Category`` (PartiPrompts); quotes are part of the text
    CSV           a header with ``Prompts`` or ``Prompt`` and perhaps ``Category`` (DrawBench), as in RFC 4180
    JSON list     strings (HPDv2), or objects with ``prompt`` and perhaps ``category``
    JSON lines    objects with ``prompt`` and perhaps ``category`` (GenEval 2), or strings

A suffix (.tsv, .csv, .json, .jsonl, .ndjson) says what a file has to be. Any other file is what its first
line says: a header, a JSON object or a JSON list; else text. Other columns and fields are not read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

from dde_core.score_table import Prompt
from services.errors import BadRequest
from services.storage import sources

MAX_BYTES = 1 << 26
Format = Literal["text", "tsv", "csv", "json", "jsonl"]

_SUFFIXES: dict[str, Format] = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_PROMPT = ("prompt", "prompts")
_CATEGORY = ("category",)
_HEADER = frozenset((*_PROMPT, *_CATEGORY, "challenge", "note"))
_LINE_END = re.compile(r"\r\n|\r|\n")
"""What ends a line of a text file. Unicode's other separators, and form feeds, may be part of a prompt."""


def all_prompts(uri: str) -> list[Prompt]:
    """The prompts of a file in its order, without the spaces around them.

    Raises BadRequest for a file that is not text in UTF-8, or not what its name or first line says; the error
    names the file, the line (or the item of a JSON list) and the field.
    """
    text = _text(uri)
    found = _format_of(uri, text)
    if found == "text":
        return [Prompt(line.strip()) for line in _LINE_END.split(text) if line.strip()]
    if found == "tsv" or found == "csv":
        return list(_table(uri, text, found))
    return list(_json_items(uri, text, found))


def read_prompts(uri: str, num_prompts: int, skip: int = 0, param: str = "num_prompts") -> list[Prompt]:
    """``num_prompts`` prompts of a file, after the first ``skip``.

    Raises BadRequest if it has too few, and like ``all_prompts``.
    """
    prompts = all_prompts(uri)
    if len(prompts) < skip + num_prompts:
        after = f" after the first {skip}" if skip else ""
        raise BadRequest(f"{param} is {num_prompts}{after}, {uri!r} holds {len(prompts)}", param=param)
    return prompts[skip : skip + num_prompts]


def _text(uri: str) -> str:
    try:
        text = sources.read_bytes(uri, MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{uri!r} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        raise BadRequest(message, code="not_utf8") from error
    place = text.find("\0")
    if place >= 0:
        number = len(_LINE_END.findall(text, 0, place)) + 1
        raise BadRequest(f"{uri!r} holds a null byte in line {number}: save it as UTF-8", code="not_utf8")
    return text


def digest_of(prompts: Sequence[Prompt]) -> str:
    """sha256 of the prompts' texts in their order."""
    return hashlib.sha256(json.dumps([prompt.text for prompt in prompts]).encode()).hexdigest()


def _format_of(uri: str, text: str) -> Format:
    name = uri.rpartition("/")[2].lower()
    by_name = next((each for suffix, each in _SUFFIXES.items() if name.endswith(suffix)), None)
    start = text.lstrip(" \t\r\n")
    if by_name == "json" and start.startswith("{"):
        return "jsonl"
    if by_name is not None:
        return by_name
    if start.startswith("[") and isinstance(_json_or_none(start), list):
        return "json"
    line = _LINE_END.split(start, maxsplit=1)[0]
    if isinstance(_json_or_none(line), dict):
        return "jsonl"
    if _is_header(line.split("\t")):
        return "tsv"
    if _is_header(line.split(",")):
        return "csv"
    return "text"


def _is_header(fields: list[str]) -> bool:
    names = {_name(field) for field in fields}
    return len(fields) > 1 and names <= _HEADER and not names.isdisjoint(_PROMPT)


def _name(field: str) -> str:
    return field.strip().strip('"').lower()


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- tables


def _table(uri: str, text: str, found: Literal["tsv", "csv"]) -> Iterator[Prompt]:
    rows = _tab_rows(text) if found == "tsv" else _comma_rows(uri, text)
    first = next(rows, None)
    if first is None:
        _refuse(
            uri, "line 1", "holds no header: its first line names the columns, one of them 'Prompt'", "header"
        )
    number, header = first
    names = [_name(field) for field in header]
    prompt = _column(uri, number, header, names, _PROMPT, found)
    category = _column(uri, number, header, names, _CATEGORY, found)
    if prompt is None:
        _refuse(uri, f"line {number}", _no_prompt_column(header, found), "header")
    for number, row in rows:
        if len(row) != len(header):
            why = f"has {len(row)} fields, the header has {len(header)}: {', '.join(map(repr, header))}"
            _refuse(uri, f"line {number}", why, "fields")
        yield _prompt(
            uri,
            f"line {number}",
            (header[prompt], row[prompt]),
            None if category is None else (header[category], row[category] or None),
        )


def _tab_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The number and the fields of each line that is not blank."""
    for number, line in enumerate(_LINE_END.split(text), 1):
        if line.strip():
            yield number, line.split("\t")


def _comma_rows(uri: str, text: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line, and the fields, of each row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    number = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            why = (
                f"cannot be read as CSV ({error}): a field with a comma, a quote or a line end is quoted, and"
            )
            _refuse(uri, f"line {number}", f"{why} a quote in it doubled", "csv")
        if row is None:
            return
        if any(field.strip() for field in row):
            yield number, row
        number = reader.line_num + 1


def _column(
    uri: str, number: int, header: list[str], names: list[str], wanted: tuple[str, ...], found: str
) -> int | None:
    """The position of the one column with a wanted name; None without one."""
    places = [place for place, name in enumerate(names) if name in wanted]
    if len(places) > 1:
        several = " and ".join(repr(header[place]) for place in places)
        _refuse(uri, f"line {number}", f"names the column {several} twice", "header")
    return places[0] if places else None


def _no_prompt_column(header: list[str], found: Literal["tsv", "csv"]) -> str:
    why = f"has no column 'Prompt' or 'Prompts', only {', '.join(map(repr, header))}"
    other, separator, suffix = ("\t", "tabs", ".tsv") if found == "csv" else (",", "commas", ".csv")
    if len(header) == 1 and other in header[0]:
        why += f"; its columns are separated by {separator}: name the file {suffix}"
    return why


# ---- JSON


def _json_items(uri: str, text: str, found: Literal["json", "jsonl"]) -> Iterator[Prompt]:
    for place, item in _json_list(uri, text) if found == "json" else _json_lines(uri, text):
        if isinstance(item, str):
            yield _prompt(uri, place, ("prompt", item), None)
        elif not isinstance(item, dict):
            _refuse(
                uri, place, f"must be a string or an object with a field 'prompt', got {_kind(item)}", "item"
            )
        elif "prompt" not in item:
            names = ", ".join(map(repr, item)) or "none"
            _refuse(uri, place, f"has no field 'prompt', only {names}"[:300], "prompt")
        else:
            yield _prompt(uri, place, ("prompt", item["prompt"]), ("category", item.get("category")))


def _json_list(uri: str, text: str) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        _refuse(uri, f"line {error.lineno}", f"is no JSON: {error.msg}", "json")
    except (ValueError, RecursionError) as error:
        _refuse(uri, "line 1", f"is no JSON: {error}", "json")
    if not isinstance(items, list):
        _refuse(uri, "line 1", f"must be a JSON list of prompts, got {_kind(items)}", "json")
    for number, item in enumerate(items, 1):
        yield f"item {number}", item


def _json_lines(uri: str, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_LINE_END.split(text), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            _refuse(uri, f"line {number}", f"is no JSON: {reason}; each line is one prompt", "json")


# ---- one prompt


def _prompt(uri: str, place: str, prompt: tuple[str, Any], category: tuple[str, Any] | None) -> Prompt:
    """A prompt from the names and values of its fields."""
    text = _string(uri, place, *prompt)
    if not text:
        _refuse(uri, place, f"field {prompt[0]!r} is empty", "empty_prompt")
    if category is None or category[1] is None:
        return Prompt(text)
    return Prompt(text, _string(uri, place, *category) or None)


def _string(uri: str, place: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(uri, place, f"field {name!r} must be a string, got {_kind(value)}", "type")
    if "\0" in value:
        _refuse(uri, place, f"field {name!r} holds a null character", "null")
    try:
        value.encode()
    except UnicodeEncodeError:
        _refuse(
            uri, place, f"field {name!r} holds half of a surrogate pair, which is no character", "surrogate"
        )
    return value.strip()


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _refuse(uri: str, place: str, why: str, code: str) -> NoReturn:
    raise BadRequest(f"{uri!r} {place} {why}", code=f"prompts_{code}")
