"""docs/settings.md, made from the settings' classes: names, types, defaults, and the docstring of each.

python -m tests.support.settings_page       # rewrites the page; `make settings` does the same
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from services.serving.admission import Limits
from services.serving.args import ServeArgs
from services.settings import ClientSettings, Settings, TrackerSettings, TrainingSettings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"

SECTIONS: tuple[tuple[str, type, str], ...] = (
    ("Control plane", Settings, "DDE_"),
    ("Clients", ClientSettings, "DDE_"),
    ("Training", TrainingSettings, "DDE_"),
    ("Trackers", TrackerSettings, ""),
    ("Serve", ServeArgs, ""),
    ("Serve: limits", Limits, ""),
)
"""Heading, class, and the prefix of its environment variables."""

ENVIRONMENT = (Settings, ClientSettings, TrainingSettings, TrackerSettings)
"""The classes that are read from the environment; the others are arguments of the Serve application."""

INTRODUCTION = """# Settings

For whoever operates the system. Made from the code by `make settings`; a test holds both equal.

Environment variables configure the control plane, the clients and the machines of Ray. The `args` of the
application in `deploy/serve.yaml` configure Serve. A value that is not valid is refused at the start, with
its name. Times are in seconds. [deploy.md](deploy.md) says how to run the system, [runbook.md](runbook.md)
what to do when something is wrong."""

NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
SIGNS = {
    annotated_types.Ge: ("ge", "at least"),
    annotated_types.Gt: ("gt", "above"),
    annotated_types.Le: ("le", "at most"),
    annotated_types.Lt: ("lt", "below"),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A row of the page. ``default`` is None where there is none."""

    name: str
    kind: str
    default: str | None
    meaning: str


def settings_of(owner: type, prefix: str = "") -> list[Setting]:
    """Every field of a class, in order. Raises ValueError for one without a docstring."""
    meanings = docstrings(owner)
    rows = []
    for name, kind, default in _fields(owner):
        if name not in meanings:
            raise ValueError(f"{owner.__name__}.{name} has no docstring below it")
        shown = f"{prefix}{name}".upper() if owner in ENVIRONMENT else f"`{name}`"
        rows.append(Setting(shown, kind, default, meanings[name]))
    return rows


def docstrings(owner: type) -> dict[str, str]:
    """The string below each field of a class, as one line of Markdown."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:], strict=False):
        is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if is_field and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = _markdown(str(below.value.value))  # type: ignore[union-attr]
    return found


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for heading, owner, prefix in SECTIONS:
        parts.append(f"## {heading}\n\n{_markdown_of_class(owner)}\n\n{_table(settings_of(owner, prefix))}")
    return "\n\n".join(parts) + "\n"


def _fields(owner: type) -> Iterator[tuple[str, str, str | None]]:
    """Name, type in words, and default of every field."""
    if issubclass(owner, BaseModel):
        for name, field in owner.model_fields.items():
            default = field.get_default() if not field.is_required() else PydanticUndefined
            yield name, _kind(field), _shown(default)
        return
    types = get_type_hints(owner, include_extras=True)
    for each in dataclasses.fields(owner):
        yield each.name, _type(types[each.name], ()), _shown(each.default)


def _kind(field: FieldInfo) -> str:
    return _type(field.annotation, tuple(field.metadata))


def _type(annotation: Any, metadata: tuple[Any, ...]) -> str:
    """An annotation in words: ``whole number, at least 1``."""
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        return _type(inner, (*metadata, *own))
    if get_origin(annotation) in (Union, UnionType):
        (inner,) = (each for each in get_args(annotation) if each is not NoneType)
        return _type(inner, metadata)
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(annotation))
    if get_origin(annotation) is list:
        return "JSON list of texts"
    if annotation is SecretStr:
        return "secret"
    if annotation is Limits:
        return "object"
    return ", ".join([NAMES[annotation], *_bounds(metadata)])


def _bounds(metadata: tuple[Any, ...]) -> Iterator[str]:
    for each in metadata:
        for constraint in [each, *getattr(each, "metadata", ())]:
            if type(constraint) in SIGNS:
                attribute, words = SIGNS[type(constraint)]
                yield f"{words} {getattr(constraint, attribute)}"


def _shown(default: Any) -> str | None:
    """A default as it would be set; None where the setting must be given."""
    if default is PydanticUndefined or default is dataclasses.MISSING:
        return None
    if default is None or default == "" or default == []:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:.10g}"
    if isinstance(default, Limits):
        return "as below"
    return str(default) if isinstance(default, int) else f"`{json.loads(json.dumps(default, default=str))}`"


def _table(rows: list[Setting]) -> str:
    lines = ["| name | value | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        default = "**required**" if row.default is None else row.default
        cells = (row.name, row.kind, default, row.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _markdown_of_class(owner: type) -> str:
    """The class's docstring, filled to the width of a page."""
    text = _markdown(inspect.getdoc(owner) or "")
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


def _markdown(docstring: str) -> str:
    """Docstrings have two backticks where Markdown has one; a page's row is one line."""
    text = " ".join(docstring.split())
    return re.sub(r"`{1,2}([^`]+)`{1,2}", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(page())
