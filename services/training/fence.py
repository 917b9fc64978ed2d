"""Who may write into a run's folder: the newest attempt, and of it the newest group of workers.

Whoever was given up for dead, and is not, finds out before a checkpoint becomes visible.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass

from services.errors import Overtaken
from services.storage import files

FILE = "fence.json"


@dataclass(frozen=True)
class Fence:
    """``group`` names the workers of one start; the driver has none."""

    run: str
    attempt: int
    group: str = ""

    @classmethod
    def of_workers(cls, run: str, attempt: int) -> Fence:
        """For workers that start now."""
        return cls(run, attempt, uuid.uuid4().hex)

    def take(self) -> None:
        """From now on this one writes. Raises Overtaken where a newer attempt does."""
        self._refuse_newer_attempt()
        files.write_json(self._uri, {"attempt": self.attempt, "group": self.group})

    def check(self) -> None:
        """Raises Overtaken where somebody else has taken it since; a driver's own workers may."""
        self._refuse_newer_attempt()
        if self.group and self._now()[1] != self.group:
            raise Overtaken(f"other workers of attempt {self.attempt} go on with this run")

    def has_workers(self) -> bool:
        """Whether workers of this attempt have started."""
        attempt, group = self._now()
        return attempt == self.attempt and group != ""

    def _refuse_newer_attempt(self) -> None:
        if (newest := self._now()[0]) > self.attempt:
            raise Overtaken(f"attempt {self.attempt} was given up: attempt {newest} goes on with this run")

    def _now(self) -> tuple[int, str]:
        with suppress(FileNotFoundError):
            found = files.read_json(self._uri)
            return found["attempt"], found["group"]
        return 0, ""

    @property
    def _uri(self) -> str:
        return files.join(self.run, FILE)
