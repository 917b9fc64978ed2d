"""Things to hold in memory whose loads a test controls, and the memory that they take."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from services.serving.memory import Kind, Wanted


class Device:
    """Counts the bytes of the blocks that were loaded and not closed, and the most of them at once."""

    def __init__(self, load_s: float = 0.0) -> None:
        self.load_s = load_s
        self.attempts: Counter[str] = Counter()
        self.loads: Counter[str] = Counter()
        self.sizings: Counter[str] = Counter()
        self.closes: Counter[str] = Counter()
        self.num_bytes = 0
        self.most_bytes = 0
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self._lock = threading.Lock()

    def wanted(
        self, key: str, num_bytes: int, parent: Wanted[Any] | None = None, estimate: int | None = None
    ) -> Wanted[Block]:
        def size() -> int:
            with self._lock:
                self.sizings[key] += 1
            return num_bytes if estimate is None else estimate

        def load(owner: Block | None) -> Block:
            if gate := self.gates.get(key):
                assert gate.wait(30)
            time.sleep(self.load_s)
            with self._lock:
                self.attempts[key] += 1
            if error := self.errors.get(key):
                raise error
            assert owner is None or not owner.is_closed
            return Block(self, key, num_bytes, owner)

        kind: Kind = "adapter" if parent else "model"
        return Wanted(key, kind, size, load, parent)

    def change(self, key: str, num_bytes: int) -> None:
        with self._lock:
            (self.loads if num_bytes > 0 else self.closes)[key] += 1
            self.num_bytes += num_bytes
            self.most_bytes = max(self.most_bytes, self.num_bytes)


class Block:
    """Some bytes of a device."""

    def __init__(self, device: Device, key: str, num_bytes: int, owner: Block | None) -> None:
        self.key = key
        self.num_bytes = num_bytes
        self.owner = owner
        self.is_closed = False
        self._device = device
        device.change(key, num_bytes)

    def close(self) -> None:
        assert not self.is_closed
        assert self.owner is None or not self.owner.is_closed, "parts go before what they are in"
        self.is_closed = True
        self._device.change(self.key, -self.num_bytes)


class Recorder:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.loads = 0
        self.evictions = 0
        self.held: list[int] = []

    def loaded(self, seconds: float) -> None:
        assert seconds >= 0
        self.loads += 1

    def evicted(self) -> None:
        self.evictions += 1

    def holds(self, size_bytes: int) -> None:
        self.held.append(size_bytes)
