"""Who may write into a run's folder: the newest attempt, and within it the newest group of workers.

A process that was given up for dead but still runs finds out before its checkpoint becomes visible.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass

from services.errors import Overtaken
from services.stages import layout
from services.storage import files


@dataclass(frozen=True)
class Fence:
    """One writer of a run. ``group`` names the workers that were started together; the driver has none."""

    run: str
    attempt: int
    group: str = ""

    @classmethod
    def of_workers(cls, run: str, attempt: int) -> Fence:
        """The fence of a newly started group of workers."""
        return cls(run, attempt, uuid.uuid4().hex)

    def take(self) -> None:
        """Become the writer of the run. Raises Overtaken if a newer attempt is."""
        self._refuse_newer_attempt()
        files.write_json(layout.fence_uri(self.run), {"attempt": self.attempt, "group": self.group})

    def check(self) -> None:
        """Raises Overtaken if another has become the writer. The driver accepts all workers of its own."""
        self._refuse_newer_attempt()
        if self.group and self._writer()[1] != self.group:
            raise Overtaken(f"newer workers of attempt {self.attempt} have taken over this run")

    def has_workers(self) -> bool:
        """Whether workers of this attempt have started."""
        attempt, group = self._writer()
        return attempt == self.attempt and group != ""

    def _refuse_newer_attempt(self) -> None:
        newest, _ = self._writer()
        if newest > self.attempt:
            raise Overtaken(f"attempt {newest} has taken over this run from attempt {self.attempt}")

    def _writer(self) -> tuple[int, str]:
        """(attempt, group) of the run's current writer."""
        with suppress(FileNotFoundError):
            writer = files.read_json(layout.fence_uri(self.run))
            return writer["attempt"], writer["group"]
        return 0, ""
