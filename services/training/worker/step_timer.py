"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SMOOTHING = 0.1
"""Weight of the last step in the mean from which the time that is left is told."""


class StepClock:
    """Seconds of the step in hand, of it what went into waiting for data and into checkpoints, and the pace of the run."""

    def __init__(self, batch_size: int, steps: int) -> None:
        self._batch_size, self._steps = batch_size, steps
        self._mean_s = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited_s, self._stalled_s = time.monotonic(), 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For data: rows, text and draws of a batch."""
        began = time.monotonic()
        yield
        self._waited_s += time.monotonic() - began

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """By a checkpoint."""
        began = time.monotonic()
        yield
        self._stalled_s += time.monotonic() - began

    def metrics(self, step: int, device: torch.device) -> dict[str, float]:
        """Of the step that ends now, the ``step``-th. Memory is the device's peak, on a CPU the process's."""
        seconds = time.monotonic() - self._began
        self._mean_s += (SMOOTHING if self._mean_s else 1.0) * (seconds - self._mean_s)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
        return {
            "pairs_per_s": self._batch_size / seconds,
            "data_wait": self._waited_s / seconds,
            "checkpoint_stall_s": self._stalled_s,
            "memory_gb": peak / 1e9,
            "eta_s": self._mean_s * (self._steps - step),
        }


def peak_resident_bytes() -> int:
    """The most memory that this program ever had. (What ``getrusage`` tells begins with the peak of whoever started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
