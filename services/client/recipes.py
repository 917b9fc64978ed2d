"""Recipes: the papers' runs as job bodies without model, dataset and prompts; YAML files in ``recipes/``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import yaml

from dde_core.family import Family
from services.api.requests import Strict
from services.errors import BadRequest

SUFFIX = ".yaml"
FOLDER = files("services.client") / "recipes"


class Recipe(Strict):
    """``family`` is the base model's, ``about`` describes it, ``job`` is a partial AlignmentJobCreate."""

    name: str
    family: Family
    about: str
    job: dict[str, Any]

    @property
    def method(self) -> str:
        return str(self.job["objective"]["method"])


def names() -> list[str]:
    """The names of all shipped recipes, sorted."""
    return sorted(file.name.removesuffix(SUFFIX) for file in FOLDER.iterdir() if file.name.endswith(SUFFIX))


def load(name: str) -> Recipe:
    """The recipe of this name. Raises BadRequest, listing the known names."""
    if name not in names():
        raise BadRequest(f"recipe must be one of {', '.join(names())}, got {name!r}", param="recipe")
    return Recipe(name=name, **yaml.safe_load((FOLDER / f"{name}{SUFFIX}").read_text()))


def all_recipes() -> Iterator[Recipe]:
    """Every shipped recipe, sorted by name."""
    return map(load, names())


def merged(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Both bodies in one: the values of ``override`` win, section by section."""
    result = {**base, **override}
    for key in base.keys() & override.keys():
        if isinstance(base[key], Mapping) and isinstance(override[key], Mapping):
            result[key] = merged(base[key], override[key])
    return result
