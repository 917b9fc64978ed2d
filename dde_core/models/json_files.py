"""JSON files of a model folder, read into checked values. Imports no torch: the control plane uses it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from dde_core.errors import ConfigError, ModelError

GIT_LFS = b"version https://git-lfs"
"""How the text begins that Git stores in place of a large file."""
MAX_SHOWN = 200
MOST = 1_000_000
"""Above any width, number of tokens or of timesteps."""
MAX_LAYERS = 64
"""Above the number of layers of any block, and of transformers beside one of them."""
MAX_LEVELS = 16
GREATEST = 1e30
"""Above any number of a config."""


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError, naming the file, for anything else."""
    refuse_pointer(data, name)
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ModelError(f"{name} is nested too deeply to be read") from error
    except ValueError as error:
        raise ModelError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} must hold a JSON object, got a {type(value).__name__}")
    return value


def refuse_pointer(data: bytes, name: str) -> None:
    """Raises ModelError for a Git LFS pointer: the file itself was never downloaded."""
    if data.startswith(GIT_LFS):
        raise ModelError(f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull`")


def shown(value: object) -> str:
    """A value as text, shortened, for an error message."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class Fields:
    """The fields of a part's ``config.json``, read by type.

    Every method raises ConfigError with the field as ``part.field``, its value and what it must be. A field
    that is absent has the library's default.
    """

    def __init__(self, part: str, values: Mapping[str, Any]) -> None:
        self._prefix = f"{part}." if part else ""
        self._values = values

    def refusal(self, name: str, reason: str) -> ConfigError:
        """The error for a field."""
        value = self._values.get(name)
        is_short = len(repr(value)) <= MAX_SHOWN
        return ConfigError(f"{self._prefix}{name}", value if is_short else shown(value), reason)

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self._values.get(name, default)

    def must_be(self, name: str, allowed: object, reason: str = "") -> None:
        """Refuse any other value. An absent field is allowed, and null in place of false."""
        value = self._values.get(name, allowed)
        is_false = allowed is False and value is None
        if not is_false and not _same(value, allowed):
            raise self.refusal(name, f"must be {allowed!r}{reason}")

    def one_of(self, name: str, default: Any, allowed: Collection[Any]) -> Any:
        """One of several values."""
        value = self._values.get(name, default)
        if not any(_same(value, each) for each in allowed):
            raise self.refusal(name, f"must be one of {', '.join(map(str, allowed))}")
        return value

    def whole(self, name: str, default: int | None, least: int = 1, most: int = MOST) -> int:
        """A whole number. Without a default the field must be there."""
        value = self._values.get(name, default)
        if not _is_whole(value, least, most):
            raise self.refusal(name, f"must be a whole number from {least} to {most}")
        return int(value)

    def number(self, name: str, default: float | None, above: float, below: float = GREATEST) -> float:
        """A finite number between two bounds. Without a default the field must be there."""
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
            bound = f" and less than {below:g}" if below < GREATEST else ""
            raise self.refusal(name, f"must be a number greater than {above:g}{bound}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; null has the default, as converted checkpoints write it."""
        value = self._values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false")
        return value

    def wholes(self, name: str, default: tuple[int, ...]) -> list[int]:
        """A list of positive whole numbers."""
        value = self._values.get(name, default)
        is_list = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_LEVELS
        if not is_list or not all(_is_whole(each) for each in value):
            raise self.refusal(name, f"must be a list of 1 to {MAX_LEVELS} positive whole numbers")
        return list(value)

    def names(self, name: str, default: tuple[str, ...], allowed: Collection[str], levels: int) -> list[str]:
        """A list of ``levels`` names."""
        value = self._values.get(name, default)
        if not isinstance(value, list | tuple) or len(value) != levels:
            raise self.refusal(name, f"must be a list of {levels} names, one for each of block_out_channels")
        if unknown := [each for each in value if each not in tuple(allowed)]:
            raise self.refusal(name, f"must hold {' or '.join(allowed)} only, not {shown(unknown[0])}")
        return list(value)

    def each_level(self, name: str, default: Any, levels: int, most: int = MOST) -> list[int]:
        """A whole number for each of ``levels`` levels, written as one number or as a list."""
        value = self._values.get(name, default)
        values = [value] * levels if not isinstance(value, list | tuple) else list(value)
        if len(values) != levels or not all(_is_whole(each, most=most) for each in values):
            reason = f"must be a whole number from 1 to {most}, or a list of {levels} of them"
            raise self.refusal(name, reason)
        return values


def _is_whole(value: object, least: int = 1, most: int = MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _same(value: object, allowed: object) -> bool:
    """Equal, and both or neither true or false: 1 is not true."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed
