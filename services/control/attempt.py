"""One attempt of a stage: what it has left in storage, and what Ray is told of its run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from services.artifacts import checkpoints
from services.control import stages
from services.control.launcher import Launcher, RunState
from services.control.tables import Job
from services.errors import Unavailable
from services.stages.journal import read_journal
from services.stages.layout import HEARD, STOP
from services.stages.specs import JournalEvent, StageFailure, StageStopped, StopRequest
from services.storage import files

RUNNING: tuple[RunState, ...] = ("pending", "running")
JOURNAL_FILES = 200
"""How many files of a journal one look reads: a look must be over before its lock expires."""


@dataclass(frozen=True)
class Attempt:
    """The present attempt of a job's stage."""

    job: Job
    root: str
    launcher: Launcher

    @cached_property
    def prefix(self) -> str:
        return stages.prefix(self.job, self.root)

    @cached_property
    def submission(self) -> str:
        return stages.submission_id(self.job)

    def marker(self, name: str) -> bytes | None:
        """A marker's content, or None where it is not there (yet)."""
        try:
            return files.read_bytes(files.join(self.prefix, name))
        except FileNotFoundError:
            return None

    def failure(self) -> StageFailure | None:
        """What failed.json says; a file that cannot be read is a failure too."""
        if (marker := self.marker("failed.json")) is None:
            return None
        try:
            return StageFailure.model_validate_json(marker)
        except ValidationError as error:
            return StageFailure(message=f"failed.json cannot be read: {error}", code="bad_result")

    def stopped(self) -> StageStopped | None:
        """What stopped.json says."""
        marker = self.marker("stopped.json")
        return None if marker is None else StageStopped.model_validate_json(marker)

    def journal(self, start: int) -> list[tuple[int, list[JournalEvent]]]:
        """The next files of the journal with their numbers, ``JOURNAL_FILES`` at most."""
        return read_journal(self.prefix, start, JOURNAL_FILES)

    def newest_step(self) -> int:
        """The step of the newest checkpoint of training, 0 before the first and for other stages."""
        if self.job.stage != "train":
            return 0
        return max(checkpoints.steps(stages.run_folder(self.job.id, self.root)), default=0)

    def ask_to_stop(self) -> None:
        """Tell training to store its state after the step it is at, and to end. Other stages do not read it: it says why they
        were ended."""
        request = files.join(self.prefix, STOP)
        if not files.exists(request):
            files.write_json(request, StopRequest(why="pause").model_dump())

    def has_heard(self) -> bool:
        """Whether training knows that it is asked to stop: it stores its state once the step in hand is done."""
        return self.job.stage == "train" and files.exists(files.join(self.prefix, HEARD))

    def was_asked_to_end(self) -> bool:
        """By a pause, or by a signal that training heard in time: such an end is nobody's fault."""
        request = self.marker(STOP)
        if request is not None and StopRequest.model_validate_json(request).why == "pause":
            return True
        return (stopped := self.stopped()) is not None and stopped.why == "signal"

    def state(self) -> RunState | None:
        """How Ray says that the run stands; None where it does not answer."""
        try:
            return self.launcher.state(self.submission)
        except Unavailable:
            return None

    def end(self) -> bool:
        """Tell Ray to end the run, whatever it says of it: it may call a driver failed that lives. Is it over?"""
        try:
            self.launcher.stop(self.submission)
        except Unavailable:
            return False
        return self.state() not in (*RUNNING, None)
