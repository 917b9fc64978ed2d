"""What one look at a job finds, for the reconciler to write down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from services.api.records import ModelRecord
from services.stages.specs import JournalEvent


@dataclass
class Change:
    """What one look at a job found: new column values, entries of its journal, a model that is there now.

    ``publish``: a model to be made known. ``point``: the job's name means its model from now on. ``again``: there is
    more to do at once. ``pause_s``: when there is, where that is not at the next poll.
    """

    values: dict[str, Any] = field(default_factory=dict)
    entries: list[JournalEvent] = field(default_factory=list)
    publish: ModelRecord | None = None
    point: bool = False
    again: bool = False
    pause_s: float | None = None

    def say(self, at: float, message: str, level: str = "info") -> None:
        """Add an event of the control plane's own."""
        self.entries.append(JournalEvent.model_validate({"at": at, "level": level, "message": message}))


def fresh(number: int) -> dict[str, Any]:
    """The columns of an attempt that has not begun, of a stage that was not started again."""
    plain = {
        "submitted_at": None,
        "journal_cursor": 0,
        "stop_asked_at": None,
        "ended_at": None,
        "unreachable_at": None,
    }
    return {"attempt": number, "restarts": 0, "restart_step": 0, **plain}
