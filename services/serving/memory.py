"""What a replica keeps in memory, counted in bytes: what is in use is never evicted, one load serves all.

A ``Memory`` belongs to one event loop. Its threads read, load and close.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from services.errors import Unavailable
from services.serving.metrics import Unmeasured

log = logging.getLogger("ray.serve")

Kind = Literal["model", "adapter", "scorer"]

RETRY_S = 10.0
"""A load that failed is not tried again for this long."""

PATIENCE_S = 5.0
"""Who waits for room is passed, for this long, by those who want what is in memory already."""

READERS = 4
"""Models whose files are read, or copied to this node, at once."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Held(Protocol):
    """Something in memory."""

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""

    def close(self) -> None:
        """Free the memory. Called once, when nobody uses it."""


Value = TypeVar("Value", bound=Held)


@dataclass(frozen=True)
class Wanted(Generic[Value]):
    """Something to hold. ``size`` estimates its bytes from its files, and ``load`` loads it.

    Both are called in a thread, ``load`` and ``close`` always in the same one: diffusers and transformers
    change the process's state while they load, so two loads at once would spoil one another.
    What has a ``parent`` lives inside it: the parent is held as long, and ``load`` receives its value.
    """

    key: str
    kind: Kind
    size: Callable[[], int]
    load: Callable[[Any], Value]
    parent: Wanted[Any] | None = None

    def chain(self) -> list[Wanted[Any]]:
        """All that must be in memory, parents first."""
        return [*(self.parent.chain() if self.parent else []), self]


class Observer(Protocol):
    """Counts loads, evictions and bytes (``services.serving.metrics.Metrics``). Must not block."""

    def loaded(self, seconds: float) -> None:
        """Something was loaded from files on this node."""

    def evicted(self) -> None:
        """Something made room."""

    def holds(self, size_bytes: int) -> None:
        """The bytes in memory now, those of running loads included."""


class LoadFailed(Exception):
    """``error`` is what reading the files or loading them raised. Its frames are gone: they hold memory."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _LargerThanEstimated(Exception):
    """What was loaded takes more room than there is; it is closed again, and its size is known now."""


@dataclass(eq=False)
class _Entry:
    """Something in memory, or being loaded. ``uses`` counts leases, its own load and the loads of its parts.

    ``value`` is there once ``loading`` has ended.
    """

    wanted: Wanted[Any]
    num_bytes: int
    parent: _Entry | None
    uses: int = 0
    loading: asyncio.Task[None] = field(init=False)
    value: Any = None


@dataclass(eq=False)
class _Waiter:
    """A lease that waits for room. ``sizes`` are the bytes of all that it needs, by key."""

    chain: list[Wanted[Any]]
    sizes: dict[str, int]
    since: float
    granted: asyncio.Future[list[_Entry]]


class Memory:
    """Holds what its users lease, and keeps it for the next ones while there is room.

    - At most ``max_bytes`` are held: room is reserved by an estimate before a load begins, and what makes
      room is closed before it. The least recently used goes first; what is leased never goes.
    - Where all is leased, a lease waits. The order is that of arrival, but for ``patience_s`` those who want
      what is in memory pass; then they wait too, so the one in front gets its turn.
    - All that a lease needs is reserved at once, so leases never wait for one another in a circle. A task
      that holds a lease must not ask for another one.
    - A load that failed fails all who wait for it. For ``retry_s`` others get the same error without a
      load, unless storage did not answer (Unavailable).
    - A load goes on if all who wait for it leave.
    """

    def __init__(
        self,
        max_bytes: int,
        observer: Observer | None = None,
        retry_s: float = RETRY_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._max_bytes = max_bytes
        self._observer = observer or Unmeasured()
        self._retry_s = retry_s
        self._patience_s = patience_s
        self._entries: dict[str, _Entry] = {}  # the least recently used first
        self._waiting: list[_Waiter] = []
        self._sizing: dict[str, asyncio.Task[int]] = {}
        self._failed: dict[str, tuple[Exception, float]] = {}
        self._measured: dict[str, int] = {}  # of what was larger than estimated
        self._readers = ThreadPoolExecutor(READERS, "read")
        self._loader = ThreadPoolExecutor(1, "load")  # what makes room is closed before the load begins

    @property
    def num_bytes(self) -> int:
        """The bytes in memory, those reserved by running loads included."""
        return sum(entry.num_bytes for entry in self._entries.values())

    @property
    def keys(self) -> list[str]:
        """Keys of what is in memory or being loaded, the least recently used first."""
        return list(self._entries)

    @asynccontextmanager
    async def hold(self, wanted: Wanted[Value]) -> AsyncIterator[Value]:
        """What is wanted, in memory for as long as the block runs.

        Raises LoadFailed, and Unavailable for what can never fit.
        """
        entries = await self._acquire(wanted.chain())
        try:
            yield entries[-1].value
        finally:
            self._release(entries)

    async def close(self) -> None:
        """Wait for running loads, then close all that nobody uses."""
        await asyncio.gather(*self._sizing.values(), return_exceptions=True)
        await asyncio.gather(*(each.loading for each in self._entries.values()), return_exceptions=True)
        for entry in reversed(list(self._entries.values())):
            if not entry.uses and entry.wanted.key in self._entries:
                self._drop(entry)
        self._readers.shutdown(wait=False)
        await asyncio.to_thread(self._loader.shutdown)

    async def _acquire(self, chain: list[Wanted[Any]]) -> list[_Entry]:
        """Leased entries of all that is wanted, loaded."""
        while True:
            entries = await self._reserve(chain)
            try:
                await asyncio.shield(entries[-1].loading)
            except _LargerThanEstimated:
                self._release(entries)
            except BaseException:
                self._release(entries)
                raise
            else:
                return entries

    # ---- room

    async def _reserve(self, chain: list[Wanted[Any]]) -> list[_Entry]:
        """Leased entries, as soon as there is room for all of them; the loads of missing ones have begun."""
        sizes = {each.key: await self._size(each) for each in chain}
        if sum(sizes.values()) > self._max_bytes:
            needed = " + ".join(f"{sizes[each.key]} bytes of the {each.kind}" for each in chain)
            message = f"there is no room: {needed} are more than the {self._max_bytes} of max_bytes"
            raise Unavailable(message, code="out_of_memory")
        loop = asyncio.get_running_loop()
        waiter = _Waiter(chain, sizes, loop.time(), loop.create_future())
        self._waiting.append(waiter)
        self._grant()
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._waiting.remove(waiter)
                self._grant()
            else:
                self._release(waiter.granted.result())
            raise

    def _grant(self) -> None:
        """Let those in who may go, in order."""
        first: _Waiter | None = None
        for waiter in list(self._waiting):
            if waiter.granted.done():  # cancelled; it leaves by itself
                continue
            if self._may_pass(waiter, first) and self._has_room(waiter):
                self._waiting.remove(waiter)
                waiter.granted.set_result(self._take(waiter))
            else:
                first = first or waiter

    def _may_pass(self, waiter: _Waiter, first: _Waiter | None) -> bool:
        """Whether a lease may go while ``first`` waits for room."""
        if first is None:
            return True
        is_patient = asyncio.get_running_loop().time() < first.since + self._patience_s
        return is_patient and all(each.key in self._entries for each in waiter.chain)

    def _has_room(self, waiter: _Waiter) -> bool:
        """Whether what others use leaves enough."""
        used = sum(e.num_bytes for key, e in self._entries.items() if e.uses and key not in waiter.sizes)
        return used + sum(self._bytes_of(key, size) for key, size in waiter.sizes.items()) <= self._max_bytes

    def _bytes_of(self, key: str, size: int) -> int:
        return self._entries[key].num_bytes if key in self._entries else size

    def _take(self, waiter: _Waiter) -> list[_Entry]:
        """Lease all that the waiter needs, and begin to load what is missing."""
        missing = sum(size for key, size in waiter.sizes.items() if key not in self._entries)
        self._evict(missing, keep=set(waiter.sizes))
        taken: list[_Entry] = []
        for each in waiter.chain:
            parent = taken[-1] if taken else None
            entry = self._entries.get(each.key) or self._begin(each, waiter.sizes[each.key], parent)
            entry.uses += 1
            taken.append(entry)
        return taken

    def _evict(self, num_bytes: int, keep: set[str]) -> None:
        """Make room for so many bytes: close what is not in use, the least recently used first."""
        for key, entry in list(self._entries.items()):
            if self.num_bytes + num_bytes <= self._max_bytes:
                return
            if not entry.uses and key not in keep and key in self._entries:
                self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        """Close an entry in a thread, its parts first."""
        for part in [each for each in self._entries.values() if each.parent is entry]:
            self._drop(part)
        del self._entries[entry.wanted.key]
        self._close(entry.value, entry.wanted.key)
        self._observer.evicted()
        self._observer.holds(self.num_bytes)

    def _close(self, value: Held, key: str) -> None:
        self._loader.submit(_close, value, key)

    def _release(self, entries: list[_Entry]) -> None:
        """End leases. A parent counts as used after its parts."""
        for entry in reversed(entries):
            entry.uses -= 1
            key = entry.wanted.key
            if self._entries.get(key) is entry:
                self._entries[key] = self._entries.pop(key)
        self._grant()

    # ---- loads

    async def _size(self, wanted: Wanted[Any]) -> int:
        """The bytes that it takes, or will take by an estimate."""
        key = wanted.key
        if key in self._entries:
            return self._entries[key].num_bytes
        self._refuse_failed(key)
        if key not in self._sizing:
            self._sizing[key] = _task(self._estimate(wanted))
        return await asyncio.shield(self._sizing[key])

    async def _estimate(self, wanted: Wanted[Any]) -> int:
        try:
            estimate: int = await self._in_thread(self._readers, wanted, wanted.size)
        finally:
            del self._sizing[wanted.key]
        return max(estimate, self._measured.get(wanted.key, 0))

    def _begin(self, wanted: Wanted[Any], num_bytes: int, parent: _Entry | None) -> _Entry:
        """A new entry, which uses itself and its parent until it is loaded."""
        entry = _Entry(wanted, num_bytes, parent)
        used = [parent, entry] if parent else [entry]
        for each in used:
            each.uses += 1
        self._entries[wanted.key] = entry
        self._observer.holds(self.num_bytes)
        entry.loading = _task(self._load(entry, used))
        return entry

    async def _load(self, entry: _Entry, used: list[_Entry]) -> None:
        """Load after the parent."""
        try:
            if entry.parent:
                await entry.parent.loading
            value, num_bytes, seconds = await self._in_thread(self._loader, entry.wanted, _load, entry)
            self._observer.loaded(seconds)
            self._settle(entry, value, num_bytes)
        except BaseException:
            del self._entries[entry.wanted.key]
            self._observer.holds(self.num_bytes)
            raise
        finally:
            self._release(used)

    def _settle(self, entry: _Entry, value: Held, num_bytes: int) -> None:
        """Count the bytes that were measured in place of the estimate.

        Raises _LargerThanEstimated if there is no room for more; the next attempt reserves enough.
        """
        more = num_bytes - entry.num_bytes
        if more > 0:
            self._measured[entry.wanted.key] = num_bytes
            self._evict(more, keep={each.key for each in entry.wanted.chain()})
            if self.num_bytes + more > self._max_bytes:
                self._close(value, entry.wanted.key)
                raise _LargerThanEstimated
        entry.num_bytes = num_bytes
        entry.value = value
        self._observer.holds(self.num_bytes)

    # ---- failures

    async def _in_thread(
        self, threads: ThreadPoolExecutor, wanted: Wanted[Any], work: Callable[..., Any], *args: Any
    ) -> Any:
        """What ``work`` returns. Raises LoadFailed and remembers the error."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(threads, work, *args)
        except Exception as error:
            log.warning("%s %s cannot be loaded", wanted.kind, wanted.key, exc_info=error)
            _forget_frames(error)
            self._failed = {key: found for key, found in self._failed.items() if loop.time() < found[1]}
            if not isinstance(error, Unavailable):
                self._failed[wanted.key] = (error, loop.time() + self._retry_s)
            raise LoadFailed(error) from None

    def _refuse_failed(self, key: str) -> None:
        """Raise LoadFailed for what failed a short time ago."""
        error, until = self._failed.get(key, (None, 0.0))
        if error and asyncio.get_running_loop().time() < until:
            raise LoadFailed(error)


def _load(entry: _Entry) -> tuple[Held, int, float]:
    """The value, its bytes, and the seconds that it took."""
    started = time.monotonic()
    value: Held = entry.wanted.load(entry.parent.value if entry.parent else None)
    return value, value.num_bytes, time.monotonic() - started


def _task(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """A task that goes on if nobody waits for it; an error that nobody fetches is no warning."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _close(value: Held, key: str) -> None:
    try:
        value.close()
    except Exception:
        log.exception("%s cannot be closed", key)


def _forget_frames(error: BaseException | None) -> None:
    """Drop the frames of an error and of its causes: they hold what was loaded so far."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def memory_of(device: str) -> int:
    """Bytes of memory of the device that this process may use: a GPU's, or the host's within its cgroup."""
    if device.startswith("cuda"):
        import torch  # only here: the rest of the module needs none

        return int(torch.cuda.mem_get_info(device)[1])
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # "max" is no limit
        found = min(found, int(CGROUP_LIMIT.read_text()))
    return found
