"""The error tree of dde_core.

    DdeError
    ├── ConfigError (ValueError)      a setting that makes no sense; names the field and the value
    ├── DataError (ValueError)        pairs, shards or manifests that cannot be used
    ├── ModelError (ValueError)       a model folder that cannot be loaded or trained
    └── NonFiniteError                a loss or gradient that is not a number; the optimizer has not moved

All state goes through ``super().__init__`` so that the errors survive pickling between processes.
"""

from __future__ import annotations


class DdeError(Exception):
    """Base of everything that dde_core raises on purpose."""


class ConfigError(DdeError, ValueError):
    """A setting that makes no sense. ``field`` and ``value`` say which one and what it was."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(field, value, reason)
        self.field, self.value, self.reason = field, value, reason

    def __str__(self) -> str:
        return f"{self.field} {self.reason}, got {self.value!r}"


class DataError(DdeError, ValueError):
    """Pairs, shards or manifests that cannot be used."""


class ModelError(DdeError, ValueError):
    """A model folder that cannot be loaded or trained."""


class NonFiniteError(DdeError):
    """A loss or gradient that is not a finite number, raised before the optimizer moves."""
