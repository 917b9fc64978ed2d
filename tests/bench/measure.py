"""What every benchmark needs: rounds whose sides take turns, medians with their spread, memory of a process tree."""

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
"""``ratio`` of the two sides, ``value`` in ``unit``, ``against`` what, on which ``machine``."""


def in_turn(
    rounds: int,
    sides: Mapping[str, Callable[[], float]],
    on_figure: Callable[[str, float], None] = lambda side, figure: None,
) -> dict[str, list[float]]:
    """Each side's figure in every round. Sides take turns and change places, so a machine that slows down harms all alike.

    ``on_figure(side, figure)`` is called as each comes.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in order:
            began = time.monotonic()
            found[name].append(sides[name]())
            seconds = time.monotonic() - began
            print(
                f"  round {number + 1} of {rounds}, {name}: {found[name][-1]:.4g} ({seconds:.0f} s)",
                flush=True,
            )
            on_figure(name, found[name][-1])
    return found


def ratio(found: Mapping[str, list[float]], side: str, against: str, unit: str, what: str) -> Result:
    """The median of the rounds' own ratios, ``side`` over ``against``: what slows the machine for a while is on both sides."""
    ratios = sorted(a / b for a, b in zip(found[side], found[against], strict=True))
    a, b = statistics.median(found[side]), statistics.median(found[against])
    spread = f"{len(ratios)} rounds, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    return result(statistics.median(ratios), a, unit, f"{what}: {b:.4g} {unit}; {spread}")


def ceiling(name: str) -> str:
    """What FLOPs alone make of the ratio of this name, as the end of a text. Nothing where the model is not counted."""
    quotient = mfu.flops_ratio(name)
    return (
        "" if quotient is None else f"; by arithmetic, at one speed of all of it, the ratio is {quotient:.3f}"
    )


def result(ratio: float | None, value: float, unit: str, against: str) -> Result:
    return {"ratio": ratio, "value": value, "unit": unit, "against": against, "machine": machine()}


def machine(accelerator: str = "no accelerator") -> str:
    """Processor, cores and memory in words."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {accelerator}"


@contextmanager
def peak_memory(every_s: float = 0.5) -> Iterator[dict[str, float]]:
    """The peak of the summed PSS of this process and all below it, in ``bytes`` when the block ends.

    PSS shares what processes have in common between them, so the sum counts it once: Ray's object store, too.
    """
    found, over = {"bytes": 0.0}, threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            found["bytes"] = max(found["bytes"], float(summed_pss()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def summed_pss() -> int:
    """Bytes of this process and all below it."""
    here = psutil.Process()
    return sum(_pss(process.pid) for process in [here, *here.children(recursive=True)])


def _pss(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began
