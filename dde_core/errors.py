"""The error tree of dde_core.

    DdeError
    ├── ConfigError (ValueError)      an invalid setting; carries field, value and reason
    ├── DataError (ValueError)        unusable pairs, shards, ledgers or manifests
    ├── ModelError (ValueError)       a model folder that cannot be loaded or trained
    │   └── IncompleteModelError      a file or a tensor of the folder is missing
    └── NonFiniteError                an infinite or NaN loss, gradient, latent or image

All fields pass through ``super().__init__``, so that the errors survive pickling between processes.
"""

from __future__ import annotations


class DdeError(Exception):
    """Base of the errors that dde_core raises on purpose."""


class ConfigError(DdeError, ValueError):
    """An invalid setting. ``field`` is its name, ``value`` what it was, ``reason`` what it must be.

    A note names the field where an error's text alone is left.
    """

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(field, value, reason)
        self.field = field
        self.value = value
        self.reason = reason
        self.add_note(f"param: {field}")

    def __str__(self) -> str:
        return f"{self.field} {self.reason}, got {self.value!r}"


class DataError(DdeError, ValueError):
    """Unusable pairs, shards, ledgers or manifests."""


class ModelError(DdeError, ValueError):
    """A model folder that cannot be loaded or trained."""


class IncompleteModelError(ModelError):
    """A file or a tensor of a model folder is missing."""


class NonFiniteError(DdeError):
    """An infinite or NaN loss or gradient, raised before the optimizer steps, or such a latent or image."""
