"""Recipes: the papers' runs as job bodies that lack model, dataset and prompts. One YAML file each, in ``recipes/``."""

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
    """``family`` is that of the base model, ``about`` one line for people, ``job`` a part of an AlignmentJobCreate."""

    name: str
    family: Family
    about: str
    job: dict[str, Any]

    @property
    def method(self) -> str:
        return self.job["objective"]["method"]


def names() -> list[str]:
    """Of all shipped recipes, in order."""
    return sorted(file.name.removesuffix(SUFFIX) for file in FOLDER.iterdir() if file.name.endswith(SUFFIX))


def load(name: str) -> Recipe:
    """The recipe of this name. Raises BadRequest, naming those that there are."""
    if name not in names():
        raise BadRequest(f"recipe must be one of {', '.join(names())}, got {name!r}", param="recipe")
    return Recipe(name=name, **yaml.safe_load((FOLDER / f"{name}{SUFFIX}").read_text()))


def all_recipes() -> Iterator[Recipe]:
    """Every shipped recipe, in the order of names."""
    return map(load, names())


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both bodies in one: ``above`` decides, section by section."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            both[key] = merged(below[key], above[key])
    return both
