"""Tools of every benchmark: alternating rounds, medians with their spread, memory of a process tree."""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil

from dde_core.planning import mfu

Result = dict[str, Any]
"""``ratio`` of two sides, ``value`` of ours in ``unit``, ``against``: the other side, ``machine``."""


def in_turn(
    rounds: int,
    sides: Mapping[str, Callable[[], float]],
    on_figure: Callable[[str, float], None] = lambda side, figure: None,
) -> dict[str, list[float]]:
    """Measure every side in every round, in alternating order; return each side's figures.

    A machine that slows down therefore slows all sides. ``on_figure(side, figure)`` follows each measurement.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            began = time.monotonic()
            found[name].append(sides[name]())
            seconds = time.monotonic() - began
            figure = found[name][-1]
            print(f"  round {number + 1} of {rounds}, {name}: {figure:.4g} ({seconds:.0f} s)", flush=True)
            on_figure(name, figure)
    return found


def ratio(found: Mapping[str, list[float]], side: str, against: str, unit: str, what: str) -> Result:
    """The median over rounds of ``side`` / ``against``: a slow round slows both."""
    ratios = sorted(a / b for a, b in zip(found[side], found[against], strict=True))
    ours = statistics.median(found[side])
    theirs = statistics.median(found[against])
    spread = f"{len(ratios)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    return result(statistics.median(ratios), ours, unit, f"{what}: {theirs:.4g} {unit}; {spread}")


def ceiling(name: str) -> str:
    """The end of a text: the ratio that FLOPs predict for the result of this name. "" if there is none."""
    quotient = mfu.flops_ratio(name)
    if quotient is None:
        return ""
    return f"; by FLOPs alone, the ratio is {quotient:.3f}"


def result(ratio: float | None, value: float, unit: str, against: str) -> Result:
    return {"ratio": ratio, "value": value, "unit": unit, "against": against, "machine": machine()}


def machine(accelerator: str = "no accelerator") -> str:
    """Processor, cores, memory and accelerator, as text."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    processor = models[0] if models else platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, {accelerator}"


@contextmanager
def peak_memory(every_s: float = 0.5) -> Iterator[dict[str, float]]:
    """Yield a dict whose ``bytes`` is, after the block, the peak of the summed PSS of this process tree.

    PSS splits shared pages among the processes that share them, so the sum counts Ray's object store once.
    """
    peak = {"bytes": 0.0}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(every_s):
            peak["bytes"] = max(peak["bytes"], float(summed_pss()))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()


def summed_pss() -> int:
    """Bytes of this process and all its descendants."""
    here = psutil.Process()
    return sum(_pss(process.pid) for process in [here, *here.children(recursive=True)])


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


class Stopwatch:
    """A call returns the seconds since the stopwatch was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began
