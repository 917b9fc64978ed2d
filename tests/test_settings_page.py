"""docs/settings.md is what the code says."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from services.settings import ClientSettings, Settings, TrackerSettings, TrainingSettings
from tests.support.settings_page import ENVIRONMENT, PAGE, SECTIONS, Setting, page, settings_of


class Documented(BaseModel):
    """A class with each kind of field."""

    needed: str
    """What must be given."""
    wait_s: Annotated[float, Field(gt=0, le=60)] = 2.5
    """How long
    to wait, see ``needed``."""
    mode: Literal["a", "b"] | None = None
    """A or b."""


@dataclasses.dataclass
class Plain:
    """A dataclass."""

    width: int = 3
    """In pixels."""


def test_the_page_is_the_one_that_the_code_makes():
    assert PAGE.read_text() == page(), "run `make settings`"


def test_the_page_has_every_setting():
    lines = PAGE.read_text().splitlines()
    owners = {owner for _, owner, _ in SECTIONS}
    assert {Settings, ClientSettings, TrainingSettings, TrackerSettings} <= owners
    for owner in ENVIRONMENT:
        prefix = str(owner.model_config.get("env_prefix", ""))
        for name in owner.model_fields:
            assert any(line.startswith(f"| {(prefix + name).upper()} |") for line in lines), name


def test_a_row_has_name_type_default_and_the_docstring_below_the_field():
    assert settings_of(Documented) == [
        Setting("`needed`", "text", None, "What must be given."),
        Setting("`wait_s`", "number, above 0, at most 60", "2.5", "How long to wait, see `needed`."),
        Setting("`mode`", "`a` or `b`", "none", "A or b."),
    ]
    assert settings_of(Plain) == [Setting("`width`", "whole number", "3", "In pixels.")]


def test_a_setting_without_a_docstring_is_refused():
    class Undocumented(BaseModel):
        one: int = 1
        """The first."""
        two: int = 2

    with pytest.raises(ValueError, match=r"Undocumented\.two has no docstring below it"):
        settings_of(Undocumented)
