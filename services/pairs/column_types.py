"""Which Arrow types a column that is read may have in a file."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from services.api.requests import Column
from services.errors import BadRequest

Columns = dict[Column, str]
"""What is read, and what the files call it."""
Found = dict[str, pa.DataType | None]
"""Columns that a file has, with their types; None in JSON, where any value may be of any type."""


def is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _is_image(kind: pa.DataType) -> bool:
    """Bytes, a path or URI, or both in a struct as Hugging Face writes them."""
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "bytes" in fields and (pa.types.is_null(fields["bytes"]) or _is_image(fields["bytes"]))
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or is_text(kind)
    )


def _is_id(kind: pa.DataType) -> bool:
    return is_text(kind) or pa.types.is_integer(kind)


def _is_list_of(check: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    def is_list(kind: pa.DataType) -> bool:
        lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        return any(a_list(kind) for a_list in lists) and (
            pa.types.is_null(kind.value_type) or check(kind.value_type)
        )

    return is_list


_IMAGE = (_is_image, "binary, struct<bytes, path> or string (a path or URI)")
_LABEL, _ID = (_is_number, "a number"), (_is_id, "string or integer")
_ALLOWED: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "caption": (is_text, "string"),
    **dict.fromkeys(("jpg_0", "jpg_1", "chosen", "rejected"), _IMAGE),
    **dict.fromkeys(("label_0", "label_1"), _LABEL),
    **dict.fromkeys(("image_0_uid", "image_1_uid", "chosen_uid", "rejected_uid", "pair_id"), _ID),
    "has_label": (lambda kind: pa.types.is_boolean(kind) or pa.types.is_integer(kind), "bool or integer"),
    "images": (_is_list_of(_is_image), f"a list of {_IMAGE[1]}"),
    "ranks": (_is_list_of(_is_number), "a list of numbers"),
    "image_uids": (_is_list_of(_is_id), "a list of string or integer"),
}


def check_types(uri: str, found: Found, columns: Columns) -> None:
    """Raises BadRequest where a file lacks a column that is read, or has it with a type that it cannot have."""
    if missing := [own for own in columns.values() if own not in found]:
        message = f"uri {uri!r} lacks the columns {', '.join(missing)}; found: {', '.join(found)}"
        raise BadRequest(message, param="uri", code="missing_columns")
    for name, own in columns.items():
        kind, (allowed, wanted) = found[own], _ALLOWED[name]
        if kind is not None and not pa.types.is_null(kind) and not allowed(kind):
            message = f"column {own} of {uri!r} has the wrong type {kind}, it must be {wanted}"
            raise BadRequest(message, param="uri", code="wrong_column_type")
