"""Why a row is bad, for people: the columns and values that its cause is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_VALUE_CHARS = 60
MAX_DETAIL_CHARS = 200
_LABELS = ("label_0", "label_1")
_CAUSES: dict[str, tuple[tuple[str, ...], str]] = {
    "caption_missing": (("caption",), ""),
    "caption_too_long": (("caption",), ""),
    "caption_null_byte": (("caption",), ""),
    "label_nan": (_LABELS, ""),
    "label_sum": (_LABELS, "they must be shares that add up to 1, or votes"),
    "image_missing": (("images",), ""),
    "too_few_images": (("images",), ""),
    "too_many_images": (("images",), ""),
    "uids_length": (("image_uids", "images"), ""),
    "ranks_length": (("ranks", "images"), ""),
    "ranks_nan": (("ranks",), ""),
    "ranks_below_one": (
        ("ranks",),
        "ranks count from 1, the best; map a column where more is better to scores",
    ),
    "scores_length": (("scores", "images"), ""),
    "scores_nan": (("scores",), ""),
    "scores_against_ranks": (("ranks", "scores"), "they order the images differently"),
}
"""Cause -> the columns to show, and what to do."""
_UIDS = ("image_0_uid", "image_1_uid", "chosen_uid", "rejected_uid", "image_uids", "pair_id")
_IMAGES = ("jpg_0", "jpg_1", "chosen", "rejected", "images")
_EXPECTED: dict[str, tuple[tuple[type, ...], str]] = {
    "caption": ((str,), "a string"),
    "has_label": ((bool, int), "a boolean"),
    **dict.fromkeys(_LABELS, ((bool, int, float), "a number or a boolean")),
    **dict.fromkeys(("ranks", "scores"), ((list,), "a list of numbers")),
    **dict.fromkeys(_UIDS, ((str, int), "a string or an integer")),
    **dict.fromkeys(_IMAGES, ((str, bytes, dict), "bytes, a path or a URI")),
    "images": ((list,), "a list of images"),
    "image_uids": ((list,), "a list of strings or integers"),
}

_ENTRIES: dict[str, tuple[type, ...]] = {
    "ranks": (int, float),
    "scores": (bool, int, float),
    "images": (str, bytes, dict),
    "image_uids": (str, int),
}
"""The types of a list's entries."""


def detail_of(cause: str, cells: Mapping[str, Any]) -> str:
    """``label_0 = 0.7, label_1 = 0.5``: the cells that a cause is about, at most MAX_DETAIL_CHARS."""
    columns, remedy = _CAUSES.get(cause, ((), ""))
    if cause == "wrong_type":
        text = ", ".join(_misfits(cells))
    else:
        names = columns or _of_cause(cause, cells)
        text = ", ".join(f"{name} = {show(cells[name])}" for name in names if name in cells)
    return f"{text}: {remedy}"[:MAX_DETAIL_CHARS] if remedy else text[:MAX_DETAIL_CHARS]


def show(value: Any) -> str:
    """A cell's value, cut to MAX_VALUE_CHARS; bytes by their number alone."""
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes" if value else "text that is not UTF-8"
    if isinstance(value, str):
        excerpt = ascii(value[:MAX_VALUE_CHARS]) if _is_odd(value) else repr(value[:MAX_VALUE_CHARS])
        return excerpt if len(value) <= MAX_VALUE_CHARS else f"{excerpt}... ({len(value):,} characters)"
    if isinstance(value, list):
        shown = "[" + ", ".join(map(show, value[:4]))
        return f"{shown}]" if len(value) <= 4 else f"{shown}, ...] ({len(value)} values)"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{show(name)}: {show(field)}" for name, field in list(value.items())[:4]) + "}"
        )
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)


def _is_odd(text: str) -> bool:
    """Whether the text has characters that UTF-8 or a terminal cannot show."""
    return not text[:MAX_VALUE_CHARS].isprintable()


def _of_cause(cause: str, cells: Mapping[str, Any]) -> list[str]:
    """The columns of a cause that names none: of a uid, also the paths that stand in for one; else all."""
    names = [name for name in cells if name not in _IMAGES or isinstance(cells[name], str | list | dict)]
    return [name for name in names if name in _UIDS + _IMAGES] if cause.startswith("uid") else names


def _misfits(cells: Mapping[str, Any]) -> list[str]:
    """The cells whose type, or whose entries' type, cannot be used."""
    found: list[str] = []
    for name, value in cells.items():
        types, expected = _EXPECTED.get(name, ((object,), ""))
        entry_types = _ENTRIES.get(name, (object,))
        is_wrong = value is not None and not _is_one_of(value, types)
        if is_wrong or not all(_is_one_of(entry, entry_types) for entry in _entries(value)):
            found.append(f"{name} = {show(value)}, must be {expected}")
    return found or [f"{name} = {show(value)}" for name, value in cells.items()]


def _entries(value: Any) -> list[Any]:
    """The entries of a list that are not null."""
    return [entry for entry in value if entry is not None] if isinstance(value, list) else []


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    """Whether a value is of these types; a boolean is a number where booleans are listed only."""
    return isinstance(value, types) and not (isinstance(value, bool) and int in types and bool not in types)
