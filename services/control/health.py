"""Which parts of the system this replica reaches, from checks in the background.

A probe only looks at what the last checks found, so a part that hangs delays no probe. The database alone
decides whether the replica is ready: without storage, Ray or Serve it still answers, and says what is away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from services.api.answers import CheckView, ReadyView
from services.control import schema
from services.control.database import Database
from services.control.draining import Drain
from services.control.launchers.contract import Launcher
from services.errors import Unavailable
from services.settings import Settings
from services.storage import files

EVERY_S = {"database": 2.0, "storage": 15.0, "ray": 10.0, "serve": 10.0}
"""How often a part is checked that answered the last time. A check of storage writes: some cost money."""
AWAY_EVERY_S = 1.0
"""How often, while it is away."""
PATIENCE_S = 10.0
"""A part whose check takes longer is away, whatever the check finds in the end."""
SERVE_S = 5.0
STOP_S = 2.0
"""How long the end waits for a check of the database."""
MAX_DETAIL = 300

Check = Callable[[], str | None]
"""Raises if the part is away. Returns what is unusual about it, or None."""


@dataclass(frozen=True)
class Outcome:
    """What a check found, and when it ended (time.monotonic())."""

    ok: bool
    detail: str | None
    at_s: float


class Part:
    """One part, checked by a thread of its own."""

    def __init__(self, name: str, check: Check) -> None:
        self.name = name
        self._check = check
        self._outcome: Outcome | None = None
        self._began_at_s: float | None = None

    def view(self) -> CheckView:
        """What the last check found. A check that hangs counts as one that failed."""
        now = time.monotonic()
        outcome = self._outcome
        began_at_s = self._began_at_s
        age_s = None if outcome is None else round(now - outcome.at_s, 3)
        if began_at_s is not None and now - began_at_s > PATIENCE_S:
            return CheckView(ok=False, detail=f"no answer for {now - began_at_s:.0f} s", age_s=age_s)
        if outcome is None:
            return CheckView(ok=False, detail="not checked yet", age_s=None)
        return CheckView(ok=outcome.ok, detail=outcome.detail, age_s=age_s)

    def run(self) -> float:
        """Check once. Returns the seconds until the next check."""
        self._began_at_s = time.monotonic()
        ok = True
        try:
            detail = self._check()
        except Exception as error:  # whatever it is, the part is away and the thread goes on
            ok = False
            detail = f"{type(error).__name__}: {error}".splitlines()[0][:MAX_DETAIL]
        self._outcome = Outcome(ok, detail, time.monotonic())
        self._began_at_s = None
        return EVERY_S[self.name] if ok else AWAY_EVERY_S


class Parts:
    """Database, storage, Ray and Serve. ``start`` and ``stop`` their checks in the background."""

    def __init__(self, database: Database, settings: Settings, launcher: Launcher) -> None:
        root = settings.storage_uri
        serve = f"{settings.serve_url.rstrip('/')}/healthz"

        def write_storage() -> None:
            files.write_bytes(files.join(root, ".writable"), b"the control plane can write here\n")

        def reach_ray() -> None:
            launcher.status("readyz")

        def reach_serve() -> None:
            httpx.get(serve, timeout=SERVE_S, trust_env=False).raise_for_status()

        checks: dict[str, Check] = {
            "database": lambda: schema.remark(schema.state(database)),
            "storage": write_storage,
            "ray": reach_ray,
            "serve": reach_serve,
        }
        self.parts: Mapping[str, Part] = {name: Part(name, check) for name, check in checks.items()}
        self._stopping = threading.Event()
        self._threads: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Check each part now and from then on."""
        self._stopping.clear()
        self._threads = {
            name: threading.Thread(target=self._run, args=(part,), name=f"check-{name}", daemon=True)
            for name, part in self.parts.items()
        }
        for thread in self._threads.values():
            thread.start()

    def stop(self) -> None:
        """End the threads after the checks in progress, without waiting for them, but for the one of the
        database: its connection goes back before the database is closed.
        """
        self._stopping.set()
        if "database" in self._threads:
            self._threads["database"].join(STOP_S)

    def views(self) -> dict[str, CheckView]:
        """Each part by its name."""
        return {name: part.view() for name, part in self.parts.items()}

    def require(self, name: str) -> None:
        """Raises Unavailable if the part is away: a request that needs it need not wait to find out."""
        view = self.parts[name].view()
        if not view.ok and view.age_s is not None:
            raise Unavailable(f"{name} is away, so this cannot be done now: {view.detail}")

    def _run(self, part: Part) -> None:
        while not self._stopping.is_set():
            self._stopping.wait(part.run())


def readiness(parts: Parts, drain: Drain) -> ReadyView:
    """Whether this replica should get requests, and a report on each part."""
    checks = parts.views()
    is_ready = checks["database"].ok and not drain.is_draining
    return ReadyView(status="ready" if is_ready else "not ready", draining=drain.is_draining, checks=checks)
