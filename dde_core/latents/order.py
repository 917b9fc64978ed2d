"""The order in which pairs are visited: a function of the seed and of the shards' sizes, worked out a window at a time.

An epoch is a sequence of windows. The shards are put in an order of the epoch's own and grouped, in that order, until a window
holds WINDOW_PAIRS pairs; inside a window all of its pairs are put in an order. So a reader needs the shards of one window
at a time, and a data set that fits into one window is put in order as a whole. What is held out is in no window.
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
    """One window of one epoch: its shards, ascending, and the visits of the epoch (from, to) that are made in it."""

    seed: int
    epoch: int
    number: int
    shards: Int[np.ndarray, " m"]
    start: int
    stop: int


class VisitOrder:
    """Where the pair of each visit lies. ``held_out`` says of every pair, shard by shard, whether it is never visited."""

    def __init__(
        self, rows: Sequence[int], held_out: Bool[np.ndarray, " pairs"], window_pairs: int = WINDOW_PAIRS
    ) -> None:
        self._starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._is_held_out, self._window_pairs = held_out, window_pairs
        pairs = np.flatnonzero(held_out)
        shards = np.searchsorted(self._starts, pairs, side="right") - 1
        self.held_out: Int[np.ndarray, "2 n"] = np.stack([shards, pairs - self._starts[shards]])
        """Shards and places of the pairs that are never visited."""
        self._visited = np.array([len(self._places(shard)) for shard in range(len(rows))], dtype=np.int64)
        self._length = int(self._visited.sum())
        self.windows = lru_cache(maxsize=2)(self._windows)
        self._order = lru_cache(maxsize=2)(self._window_order)

    def __len__(self) -> int:
        """The number of visits in an epoch."""
        return self._length

    def visits(
        self, seed: int, numbers: Int[np.ndarray, " b"]
    ) -> Iterator[tuple[Window, np.ndarray, np.ndarray, np.ndarray]]:
        """For every window that the visits (ascending, counted from the first epoch on) fall into: the window, which of them
        are made in it, and the shards and places of their pairs."""
        epochs, offsets = np.divmod(numbers, len(self))
        for epoch in np.unique(epochs).tolist():
            in_epoch, windows = np.flatnonzero(epochs == epoch), self.windows(seed, epoch)
            window_of = np.searchsorted([window.stop for window in windows], offsets[in_epoch], side="right")
            for number in np.unique(window_of).tolist():
                here, window = in_epoch[window_of == number], windows[number]
                shards, places = self._order(window)[:, offsets[here] - window.start]
                yield window, here, shards, places

    def after(self, window: Window) -> Window:
        """The window that follows, in this epoch or the next."""
        here = self.windows(window.seed, window.epoch)
        return (
            here[window.number + 1]
            if window.number + 1 < len(here)
            else self.windows(window.seed, window.epoch + 1)[0]
        )

    def _places(self, shard: int) -> np.ndarray:
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
        shards = np.repeat(window.shards, [len(some) for some in places])
        order = permutation(window.seed, window.epoch, window.stop - window.start, window.number)
        return np.stack([shards, np.concatenate(places)])[:, order]
