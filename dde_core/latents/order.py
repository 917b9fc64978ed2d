"""The order in which pairs are visited: a function of the seed and the shards' sizes, computed a window at a
time.

An epoch permutes the shards and groups them, in that order, into windows of at least WINDOW_PAIRS pairs (the
last may have fewer). Each window permutes its pairs. So a reader needs the shards of one window at a time,
and a dataset that fits into one window is permuted as a whole. Held-out pairs are in no window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int

from dde_core.noise import permutation, shard_permutation

WINDOW_PAIRS = 65_536


@dataclass(frozen=True, eq=False)
class Window:
    """One window of an epoch: its shards, ascending, and its visits ``start`` .. ``stop`` - 1 of the
    epoch."""

    seed: int
    epoch: int
    number: int
    shards: Int[np.ndarray, " m"]
    start: int
    stop: int


class VisitOrder:
    """Maps visits to pairs. ``rows`` are the shards' lengths; ``held_out`` marks pairs that are never
    visited."""

    def __init__(
        self, rows: Sequence[int], held_out: Bool[np.ndarray, " pairs"], window_pairs: int = WINDOW_PAIRS
    ) -> None:
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._is_held_out = held_out
        self._window_pairs = window_pairs
        pairs = np.flatnonzero(held_out)
        shards = np.searchsorted(self._starts, pairs, side="right") - 1
        self.held_out: Int[np.ndarray, "2 n"] = np.stack([shards, pairs - self._starts[shards]])
        """Shards and places of the held-out pairs."""
        self._visited = np.array([len(self._places(shard)) for shard in range(len(rows))], dtype=np.int64)
        self._length = int(self._visited.sum())
        self.windows = lru_cache(maxsize=2)(self._windows)
        self._order = lru_cache(maxsize=2)(self._window_order)

    def __len__(self) -> int:
        """The number of visits in an epoch."""
        return self._length

    def visits(
        self, seed: int, numbers: Int[np.ndarray, " b"]
    ) -> Iterator[tuple[Window, Int[np.ndarray, " m"], Int[np.ndarray, " m"], Int[np.ndarray, " m"]]]:
        """Locate visits, window by window. ``numbers`` are ascending and count from the first epoch's first
        visit.

        For each window with visits: the window, their indices in ``numbers``, and the shards and places of
        their pairs.
        """
        epochs, offsets = np.divmod(numbers, len(self))
        for epoch in np.unique(epochs).tolist():
            in_epoch = np.flatnonzero(epochs == epoch)
            windows = self.windows(seed, epoch)
            window_of = np.searchsorted([window.stop for window in windows], offsets[in_epoch], side="right")
            for number in np.unique(window_of).tolist():
                window = windows[number]
                in_window = in_epoch[window_of == number]
                shards, places = self._order(window)[:, offsets[in_window] - window.start]
                yield window, in_window, shards, places

    def after(self, window: Window) -> Window:
        """The next window, in this epoch or the next one."""
        windows = self.windows(window.seed, window.epoch)
        if window.number + 1 < len(windows):
            return windows[window.number + 1]
        return self.windows(window.seed, window.epoch + 1)[0]

    def _places(self, shard: int) -> Int[np.ndarray, " n"]:
        """The places of a shard's pairs that are visited."""
        return np.flatnonzero(~self._is_held_out[self._starts[shard] : self._starts[shard + 1]])

    def _windows(self, seed: int, epoch: int) -> list[Window]:
        order = shard_permutation(seed, epoch, len(self._visited))
        order = order[self._visited[order] > 0]
        before = np.concatenate([[0], np.cumsum(self._visited[order])])
        windows: list[Window] = []
        first = 0
        while before[first] < len(self):
            last = min(int(np.searchsorted(before, before[first] + self._window_pairs)), len(order))
            shards = np.sort(order[first:last])
            windows.append(Window(seed, epoch, len(windows), shards, int(before[first]), int(before[last])))
            first = last
        return windows

    def _window_order(self, window: Window) -> Int[np.ndarray, "2 n"]:
        places = [self._places(shard) for shard in window.shards.tolist()]
        shards = np.repeat(window.shards, [len(each) for each in places])
        order = permutation(window.seed, window.epoch, window.stop - window.start, window.number)
        return np.stack([shards, np.concatenate(places)])[:, order]
