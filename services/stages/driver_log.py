"""The end of a driver's output in storage: the cluster that has all of it may be gone before one reads it."""

from __future__ import annotations

import fcntl
import os
import re
import selectors
import sys
import termios
import threading
import time
from array import array
from contextlib import suppress
from types import TracebackType

from services.errors import ServiceError
from services.storage import files

KEPT_BYTES = 64 * 1024
STORED_EVERY_S = 15.0
"""At most this much of the output is missing after a driver was killed."""
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def without_color(text: str) -> str:
    """The text without the escape sequences by which Ray colors its output."""
    return _COLOR.sub("", text)


class DriverLog:
    """While it is entered, what the process and its children write to stdout and stderr goes to ``uri``, too:
    the last ``KEPT_BYTES``, at most ``every_s`` late. Outages of storage are waited for, not reported.
    """

    def __init__(self, uri: str, every_s: float = STORED_EVERY_S) -> None:
        self._uri = uri
        self._every_s = every_s
        self._tail = bytearray()
        self._lock = threading.Lock()
        self._is_new = False
        self._ending = threading.Event()
        self._outputs: dict[int, int] = {}
        self._readable: list[int] = []

    def __enter__(self) -> DriverLog:
        selector = selectors.DefaultSelector()
        _flush()
        for output in (1, 2):
            original = os.dup(output)
            reading, writing = os.pipe()
            os.dup2(writing, output)
            os.close(writing)
            self._outputs[output] = original
            self._readable.append(reading)
            selector.register(reading, selectors.EVENT_READ, original)
        self._reader = threading.Thread(target=self._read, args=(selector,), daemon=True, name="driver-log")
        self._reader.start()
        threading.Thread(target=self._store_forever, daemon=True, name="driver-log-store").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _flush()
        for output, original in self._outputs.items():
            os.dup2(original, output)
        self._ending.set()
        # Children that live on keep the pipes open, so their end may never come.
        self._reader.join(timeout=1)
        if not self._reader.is_alive():
            for original in self._outputs.values():
                os.close(original)

    def add(self, text: str) -> None:
        """Text that the process will print only after this ends, such as its traceback."""
        with self._lock:
            self._append(text.encode(errors="replace"))

    def store(self) -> None:
        """Store what there is now."""
        _flush()
        self._wait_for_reader()
        with self._lock:
            data = bytes(self._tail)
            self._is_new = False
        try:
            files.write_bytes(self._uri, data)
        except (ServiceError, OSError):
            self._is_new = True

    def _read(self, selector: selectors.BaseSelector) -> None:
        """Copy until all writers have closed their ends."""
        while selector.get_map():
            for key, _ in selector.select():
                with self._lock:
                    data = os.read(key.fd, 1 << 16)
                    self._append(data)
                    if not data:
                        selector.unregister(key.fileobj)
                        self._readable.remove(key.fd)
                        os.close(key.fd)
                        continue
                with suppress(OSError):  # nobody may read the original output any more
                    _write(key.data, data)

    def _append(self, data: bytes) -> None:
        """Requires the lock."""
        self._tail += data
        del self._tail[:-KEPT_BYTES]
        self._is_new = True

    def _wait_for_reader(self) -> None:
        """Until it has read what was written so far: some milliseconds, at most a second."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            with self._lock:
                if not any(_has_bytes(reading) for reading in self._readable):
                    return
            time.sleep(0.005)

    def _store_forever(self) -> None:
        while not self._ending.wait(self._every_s):
            if self._is_new:
                self.store()


def _has_bytes(pipe: int) -> bool:
    waiting = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, waiting)
    return waiting[0] > 0


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):  # a closed stream
            stream.flush()


def _write(output: int, data: bytes) -> None:
    while data:
        data = data[os.write(output, data) :]
