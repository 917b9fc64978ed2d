"""Which Arrow types each column may have in a file."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from services.api.requests import Column
from services.errors import BadRequest

ColumnMap = dict[Column, str]
"""Columns to read: canonical name -> name in the files."""
FileColumns = dict[str, pa.DataType | None]
"""Columns of a file: name -> type; None in JSON, where each value has a type of its own."""


def is_text(kind: pa.DataType) -> bool:
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(value_type)
        or pa.types.is_large_string(value_type)
        or pa.types.is_string_view(value_type)
    )


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_number_or_boolean(kind: pa.DataType) -> bool:
    return _is_number(kind) or bool(pa.types.is_boolean(kind))


def _is_boolean_or_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind))


def _is_id(kind: pa.DataType) -> bool:
    return is_text(kind) or bool(pa.types.is_integer(kind))


def _is_image(kind: pa.DataType) -> bool:
    """Bytes, a path or URI, or both in a struct as Hugging Face writes them."""
    if not pa.types.is_struct(kind):
        return is_binary(kind) or is_text(kind)
    fields = {field.name: field.type for field in kind}
    if "bytes" not in fields:
        return False
    return bool(pa.types.is_null(fields["bytes"])) or _is_image(fields["bytes"])


def _is_list_of(check: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    def is_list_of_checked(kind: pa.DataType) -> bool:
        return is_list(kind) and (bool(pa.types.is_null(kind.value_type)) or check(kind.value_type))

    return is_list_of_checked


_Allowed = tuple[Callable[[pa.DataType], bool], str]
"""The check of a type, and the allowed types in words."""

_IMAGE: _Allowed = (_is_image, "binary, struct<bytes, path> or string (a path or URI)")
_LABEL: _Allowed = (_is_number_or_boolean, "a number or bool")
_ID: _Allowed = (_is_id, "string or integer")
_ALLOWED: dict[str, _Allowed] = {
    "caption": (is_text, "string"),
    **dict.fromkeys(("jpg_0", "jpg_1", "chosen", "rejected"), _IMAGE),
    **dict.fromkeys(("label_0", "label_1"), _LABEL),
    **dict.fromkeys(("image_0_uid", "image_1_uid", "chosen_uid", "rejected_uid", "pair_id"), _ID),
    "has_label": (_is_boolean_or_integer, "bool or integer"),
    "images": (_is_list_of(_is_image), f"a list of {_IMAGE[1]}"),
    "ranks": (_is_list_of(_is_number), "a list of numbers"),
    "scores": (_is_list_of(_is_number_or_boolean), "a list of numbers or booleans"),
    "image_uids": (_is_list_of(_is_id), "a list of string or integer"),
}


def check_types(uri: str, file_columns: FileColumns, columns: ColumnMap) -> None:
    """Raises BadRequest for a mapped column that the file lacks or stores with a type that is not allowed."""
    missing = [name for name in columns.values() if name not in file_columns]
    if missing:
        message = f"uri {uri!r} lacks the columns {', '.join(missing)}; found: {', '.join(file_columns)}"
        raise BadRequest(message, param="uri", code="missing_columns")
    for column, name in columns.items():
        kind = file_columns[name]
        is_allowed, allowed_types = _ALLOWED[column]
        if kind is not None and not pa.types.is_null(kind) and not is_allowed(kind):
            message = f"column {name} of {uri!r} has the wrong type {kind}, it must be {allowed_types}"
            raise BadRequest(message, param="uri", code="wrong_column_type")
