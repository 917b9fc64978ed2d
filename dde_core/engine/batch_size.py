"""How many rows a U-Net call may have: measured on the device, for each base model and size."""

from __future__ import annotations

import logging
import time
from weakref import WeakKeyDictionary

import torch

from dde_core.engine.model import BaseModel

ENOUGH = 0.95
"""The smallest call with this share of the best measured throughput is chosen: more rows only add latency."""

MAX_TURN_S = 2.0
"""No call may take longer: new requests join between calls."""

LAUNCH_BOUND = 1.5
"""Calls that take less than this many times the fastest one wait for launches, not for work."""

CANDIDATES = (2, 4, 8, 16, 32, 64)
"""Rows of the measured calls."""

log = logging.getLogger("dde.engine")


class BatchSizes:
    """Rows of a call by base model and size, measured when first asked for; ``fixed`` measures nothing."""

    def __init__(self, fixed: int = 0, max_rows: int = CANDIDATES[-1]) -> None:
        self._fixed = fixed
        self._candidates = [rows for rows in CANDIDATES if rows <= max_rows]
        self._rows: WeakKeyDictionary[BaseModel, dict[tuple[int, int], int]] = WeakKeyDictionary()

    def max_rows(self, base: BaseModel, size_px: tuple[int, int]) -> int:
        """Rows of a call for images of ``size_px`` (height, width)."""
        if self._fixed:
            return self._fixed
        rows = self._rows.setdefault(base, {})
        if size_px not in rows:
            seconds = measure(base, size_px, self._candidates)
            rows[size_px] = best(seconds) if seconds else 1  # one row may fit where two do not
            base.capture_up_to(size_px, launch_bound(seconds))
            log.info("%dx%d px: %d rows a call; seconds: %s", *reversed(size_px), rows[size_px], seconds)
        return rows[size_px]

    def lower(self, base: BaseModel, size_px: tuple[int, int], rows: int) -> None:
        """Take at most so many rows from now on."""
        self._rows.setdefault(base, {})[size_px] = rows
        if self._fixed:
            self._fixed = min(self._fixed, rows)


def best(seconds: dict[int, float]) -> int:
    """The smallest number of rows with ``ENOUGH`` of the best throughput.

    ``seconds`` is the time of a call by its rows, not empty. Calls longer than ``MAX_TURN_S`` do not count.
    """
    short = {rows: taken for rows, taken in seconds.items() if taken <= MAX_TURN_S}
    short = short or {min(seconds): seconds[min(seconds)]}
    top = max(rows / taken for rows, taken in short.items())
    return min(rows for rows, taken in short.items() if rows / taken >= ENOUGH * top)


def launch_bound(seconds: dict[int, float]) -> int:
    """The most rows of a call that takes at most ``LAUNCH_BOUND`` times the fastest one; 0 if more rows cost
    more time from the start, or nothing was measured.
    """
    if not seconds:
        return 0
    fastest = min(seconds.values())
    rows = max(rows for rows, taken in seconds.items() if taken <= LAUNCH_BOUND * fastest)
    return rows if rows > min(seconds) else 0


@torch.no_grad()
def measure(base: BaseModel, size_px: tuple[int, int], candidates: list[int]) -> dict[int, float]:
    """Seconds of a U-Net call by its rows; ends where a call takes too long or does not fit the memory."""
    height, width = (side // base.pixels_per_latent for side in size_px)
    row = base.encode([None], *size_px)
    found: dict[int, float] = {}
    for rows in candidates:
        latents = torch.zeros(rows, base.latent_channels, height, width, device=base.device)
        conditioning = {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in row.items()}
        t = torch.full((rows,), 1.0, device=base.device)
        try:
            timed = [_seconds(base, latents, t, conditioning) for _ in range(3)]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        found[rows] = min(timed[1:])
        if found[rows] > MAX_TURN_S / 2:
            break
    return found


def _seconds(
    base: BaseModel, latents: torch.Tensor, t: torch.Tensor, conditioning: dict[str, torch.Tensor]
) -> float:
    """On a CPU those of this thread: what other programs do at the time does not count."""
    clock = time.thread_time if base.device.type == "cpu" else time.perf_counter
    began = clock()
    base.predict(latents, t, conditioning)
    base.wait()
    return clock() - began
