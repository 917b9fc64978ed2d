"""What the engine is asked for and what it reports. Imports no torch, so a fake needs none.

``Engine`` draws the images of many requests at once: every U-Net call holds samples of several requests, each
at its own step. Requests are submitted from any thread. One thread owns the models and sends the events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from dde_core.config import SampleConfig

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Images of one prompt: one for each seed.

    Prompt, negative prompt, seed and ``sample`` determine an image. ``negative_prompt`` is read where the
    guidance scale is above 1. ``partial_images`` is the number of previews of each image, spread evenly over
    its steps.
    """

    prompt: str
    seeds: tuple[int, ...]
    sample: SampleConfig
    negative_prompt: str = ""
    partial_images: int = 0

    @property
    def rows(self) -> int:
        """Rows of a U-Net call for each image: two where guidance needs an unconditional half."""
        return 2 if self.sample.guidance_scale > 1 else 1


@dataclass(frozen=True)
class Started:
    """The first U-Net call for the request is next. ``waited_s``: how long it waited for it."""

    waited_s: float


@dataclass(frozen=True)
class Preview:
    """An estimate of image ``index`` while it is denoised; ``number`` counts its previews from 0."""

    index: int
    number: int
    image: Pixels


@dataclass(frozen=True)
class Drawn:
    """Image ``index`` of the request is finished."""

    index: int
    image: Pixels


@dataclass(frozen=True)
class Finished:
    """The last event of a request that has all of its images."""


@dataclass(frozen=True)
class Failed:
    """The last event of a request that will not get its images: NonFiniteError, Cancelled, or what broke."""

    error: BaseException


Event = Started | Preview | Drawn | Finished | Failed


class Cancelled(Exception):
    """Nobody wants the images any more."""


@runtime_checkable
class Generation(Protocol):
    """One submitted request."""

    def cancel(self) -> None:
        """Free its samples before the next U-Net call; its last event is Failed(Cancelled). Idempotent."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One U-Net call, for metrics."""

    samples: int
    rows: int
    max_rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the engine has to do. Work is counted in pixel-steps: pixels x steps x U-Net rows.

    ``work_per_s`` is measured over the last turns; 0.0 before the first one.
    """

    requests: int
    samples: int
    work: float
    work_per_s: float


@runtime_checkable
class Engine(Protocol):
    """Draws images. The model of a request must stay loaded until its last event."""

    def submit(self, model: Any, request: GenerationRequest, on_event: Callable[[Event], None]) -> Generation:
        """Queue a request; never blocks. ``on_event`` is called in the engine's thread and must not block.

        Raises ConfigError, before anything is queued, for settings that the model cannot draw with: a size
        that its VAE's factor does not divide, a sampler that its schedule does not allow.
        """

    def load(self) -> Load:
        """The present load."""

    def close(self) -> None:
        """End the thread; requests that are not finished fail with Cancelled."""
