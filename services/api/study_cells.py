"""The cells of a study: the bodies of its jobs, from its grid and its list of overrides."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.api.requests import MAX_CELLS, NAME_PATTERN, AlignmentJobCreate, StudyCreate
from services.errors import BadRequest

SEEDS = ("training.seed", "training.draw_seed")
"""Cells that differ in these fields alone are repetitions of one setting."""
OWN_FIELDS = {"name", "metadata.study", "metadata.cell"}
"""Fields of its cells that the study sets. Lists of jobs find the cells by the metadata."""
MAX_COMBINATIONS = 2000
"""Of a grid, before its exclusions."""
_WORD = re.compile(r"[A-Za-z0-9._-]{1,24}")


@dataclass(frozen=True)
class Cell:
    """One job of a study.

    ``setting`` names what the cell has in common with those that differ from it by their seeds alone.
    """

    label: str
    setting: str
    overrides: dict[str, Any]
    request: AlignmentJobCreate


Parse = Callable[[str, dict[str, Any]], AlignmentJobCreate]
"""Parses the body of the cell of a label, or raises."""


def expand(request: StudyCreate, parse: Parse) -> list[Cell]:
    """Every cell, the grid's first, in the order of its lists: the last field changes fastest.

    Raises BadRequest for a study without cells or with too many, for an exclusion that excludes nothing, for
    two cells of one label or with equal bodies, and for a name that is too long; and what ``parse`` raises.
    """
    _refuse_own_fields(request)
    labeled = [*_grid_cells(request), *_listed_cells(request)]
    if not labeled:
        raise BadRequest("grid: no cell is left, and cells has none", param="grid")
    if len(labeled) > MAX_CELLS:
        raise BadRequest(f"grid: a study has at most {MAX_CELLS} cells, got {len(labeled)}", param="grid")
    parsed = [parse(label, _body(request, label, overrides)) for label, overrides in labeled]
    _refuse_repeated(labeled, parsed)
    settings = _settings(labeled, parsed)
    return [
        Cell(label, settings[_without_seed(body)], overrides, body)
        for (label, overrides), body in zip(labeled, parsed, strict=True)
    ]


def fields_of(fields: str) -> list[str]:
    """``"training.seed, training.draw_seed"`` as two fields."""
    return [field.strip() for field in fields.split(",")]


def is_seed(fields: str) -> bool:
    """Whether these are seeds alone."""
    return set(fields_of(fields)) <= set(SEEDS)


def seeds_of(body: Mapping[str, Any]) -> tuple[int, ...]:
    """The seeds of a checked body. Cells of two settings with the same ones are compared as a pair."""
    return tuple(body["training"][field.rpartition(".")[2]] for field in SEEDS)


def _refuse_own_fields(request: StudyCreate) -> None:
    """A study sets name and two keys of the metadata of every cell."""
    paths = {
        "base": [*request.base, *_metadata_fields(request)],
        "grid": list(request.grid),
    }
    paths |= {f"cells.{i}.overrides": list(cell.overrides) for i, cell in enumerate(request.cells)}
    for where, fields in paths.items():
        for field in sorted(OWN_FIELDS.intersection(itertools.chain(*map(fields_of, fields)))):
            raise BadRequest(f"{where}.{field}: is set by the study", param=f"{where}.{field}")


def _metadata_fields(request: StudyCreate) -> list[str]:
    metadata = request.base.get("metadata")
    return [f"metadata.{key}" for key in metadata] if isinstance(metadata, dict) else []


def _grid_cells(request: StudyCreate) -> list[tuple[str, dict[str, Any]]]:
    """Label and overrides of each combination that is not excluded."""
    grid = request.grid
    lists = list(grid.values()) or [[]]
    num_combinations = math.prod(map(len, lists))
    if num_combinations > MAX_COMBINATIONS:
        message = f"grid: has at most {MAX_COMBINATIONS} combinations, got {num_combinations}"
        raise BadRequest(message, param="grid")
    excluded = [0] * len(request.exclude)
    cells = []
    for values in itertools.product(*map(enumerate, lists)):
        overrides = {field: value for field, (_, value) in zip(grid, values, strict=True)}
        matches = [i for i, pattern in enumerate(request.exclude) if _matches(pattern, overrides)]
        for i in matches:
            excluded[i] += 1
        if not matches:
            words = [_word(field, value, i) for field, (i, value) in zip(grid, values, strict=True)]
            cells.append(("-".join(words), overrides))
    for i, (pattern, count) in enumerate(zip(request.exclude, excluded, strict=True)):
        if not count:
            message = f"exclude.{i}: matches no cell of the grid, got {json.dumps(pattern)}"
            raise BadRequest(message, param=f"exclude.{i}")
    return cells


def _matches(pattern: Mapping[str, Any], overrides: Mapping[str, Any]) -> bool:
    """Whether all fields of the pattern have its values; 1 and True are different."""
    return all(
        field in overrides and json.dumps(overrides[field]) == json.dumps(value)
        for field, value in pattern.items()
    )


def _listed_cells(request: StudyCreate) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, cell in enumerate(request.cells):
        words = [_word(field, value, i) for field, value in cell.overrides.items()]
        yield cell.label or "-".join(words), cell.overrides


def _word(field: str, value: Any, index: int) -> str:
    """What a value adds to a label: a short text itself, a number after its first field's name, else a
    count.
    """
    leaf = fields_of(field)[0].rpartition(".")[2]
    if isinstance(value, str) and _WORD.fullmatch(value):
        return value
    if isinstance(value, bool) or value is None:
        return f"{leaf}-{json.dumps(value)}"
    if isinstance(value, int | float):
        return leaf + repr(value).removesuffix(".0").replace("+", "")
    return f"{leaf}{index + 1}"


def _body(request: StudyCreate, label: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The base with the overrides, a name, and metadata in which the study's id is still empty."""
    body = copy.deepcopy(request.base)
    done: set[str] = set()
    for fields, value in overrides.items():
        for field in fields_of(fields):
            if field in done:
                message = f"cell {label}: {field} is set twice"
                raise BadRequest(message, param=f"cells.{label}.{field}")
            done.add(field)
            _set(body, label, field, copy.deepcopy(value))
    name = f"{request.name}-{label}"
    if not re.fullmatch(NAME_PATTERN, name):
        message = f"cell {label}: its model's name must match {NAME_PATTERN}, got {name!r}"
        raise BadRequest(f"{message}; give the study a shorter name or the cell a label", param="name")
    body["name"] = name
    metadata = body.get("metadata") or {}
    if isinstance(metadata, dict):
        body["metadata"] = metadata | {"study": "", "cell": label}
    return body


def _set(body: dict[str, Any], label: str, field: str, value: Any) -> None:
    *sections, leaf = field.split(".")
    for i, section in enumerate(sections):
        inner = body.get(section)
        if inner is None:
            inner = body[section] = {}
        if not isinstance(inner, dict):
            path = ".".join(sections[: i + 1])
            message = f"cell {label}: {field}: {path} is no section, got {inner!r}"
            raise BadRequest(message, param=f"cells.{label}.{field}")
        body = inner
    body[leaf] = value


def _refuse_repeated(labeled: Sequence[tuple[str, Any]], parsed: Sequence[AlignmentJobCreate]) -> None:
    labels: set[str] = set()
    seen: dict[str, str] = {}
    for (label, _), body in zip(labeled, parsed, strict=True):
        if label in labels:
            message = f"cells: two have the label {label!r}; give one of them another label"
            raise BadRequest(message, param="cells", code="repeated_cell")
        labels.add(label)
        twin = seen.setdefault(_identity(body), label)
        if twin != label:
            message = f"cells: {twin!r} and {label!r} are the same job"
            raise BadRequest(message, param="cells", code="repeated_cell")


def _settings(
    labeled: Sequence[tuple[str, Mapping[str, Any]]], parsed: Sequence[AlignmentJobCreate]
) -> dict[str, str]:
    """The name of each setting, by the body without its seeds: the label of its first cell, without the words
    of seeds. No two have one name.
    """
    names: dict[str, str] = {}
    for (label, overrides), body in zip(labeled, parsed, strict=True):
        key = _without_seed(body)
        if key in names:
            continue
        seeds = {_word(fields, value, 0) for fields, value in overrides.items() if is_seed(fields)}
        name = "-".join(part for part in label.split("-") if part not in seeds) or body.objective.method
        numbered = (f"{label}-{number}" for number in itertools.count(2))
        choices = itertools.chain([name, label], numbered)
        names[key] = next(choice for choice in choices if choice not in names.values())
    return names


def _identity(body: AlignmentJobCreate) -> str:
    """Everything that determines the cell's model."""
    return body.model_copy(update={"name": None, "metadata": {}}).model_dump_json()


def _without_seed(body: AlignmentJobCreate) -> str:
    training = dataclasses.replace(body.training, seed=0, draw_seed=0)
    return _identity(body.model_copy(update={"training": training}))
