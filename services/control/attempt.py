"""One attempt at a stage: what it left in storage, and what Ray reports of its driver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError

from services.artifacts import checkpoints
from services.control import stages
from services.control.launchers.contract import Launcher, RunState, RunStatus
from services.control.tables import Job
from services.errors import Unavailable
from services.stages import layout
from services.stages.driver_log import without_color
from services.stages.journal import read_journal
from services.stages.specs import JournalEvent, StageFailure, StageStopped, StopRequest
from services.storage import files

RUNNING: tuple[RunState, ...] = ("pending", "running")
TAIL_LINES = 40
JOURNAL_FILES = 200
"""The most journal files that one review reads: it must end before its lock expires."""


@dataclass(frozen=True)
class Attempt:
    """The current attempt at a job's stage."""

    job: Job
    root: str
    launcher: Launcher

    @cached_property
    def prefix(self) -> str:
        """The attempt's folder in storage."""
        return stages.prefix(self.job, self.root)

    @cached_property
    def submission(self) -> str:
        """The attempt's id at Ray."""
        return stages.submission_id(self.job)

    # ---- storage

    def done(self) -> bytes | None:
        """The content of done.json, or None if it does not exist (yet)."""
        return _read(layout.done_uri(self.prefix))

    def failure(self) -> StageFailure | None:
        """The content of failed.json; an unreadable file is a failure, too."""
        marker = _read(layout.failed_uri(self.prefix))
        if marker is None:
            return None
        try:
            return StageFailure.model_validate_json(marker)
        except ValidationError as error:
            return StageFailure(message=f"failed.json cannot be read: {error}", code="bad_result")

    def stopped(self) -> StageStopped | None:
        """The content of stopped.json."""
        marker = _read(layout.stopped_uri(self.prefix))
        return None if marker is None else StageStopped.model_validate_json(marker)

    def journal(self, start: int) -> list[tuple[int, list[JournalEvent]]]:
        """At most ``JOURNAL_FILES`` files of the journal from number ``start`` on, with their numbers."""
        return read_journal(self.prefix, start, JOURNAL_FILES)

    def newest_step(self) -> int:
        """The step of training's newest checkpoint; 0 if there is none, or in another stage."""
        if self.job.stage != "train":
            return 0
        return max(checkpoints.steps(layout.run_folder(self.root, self.job.id)), default=0)

    def request_stop(self) -> None:
        """Ask training, through storage, to write a checkpoint after the current step and to exit.

        Other stages do not read the request, but it records why they were stopped.
        """
        request = layout.stop_uri(self.prefix)
        if not files.exists(request):
            files.write_json(request, StopRequest(why="pause").model_dump())

    def stop_acknowledged(self) -> bool:
        """Whether training has received the request and will write a checkpoint after the current step."""
        return self.job.stage == "train" and files.exists(layout.stop_ack_uri(self.prefix))

    def was_stopped_on_request(self) -> bool:
        """Whether a pause, or a signal that training received in time, ended the attempt: that counts as no
        failure.
        """
        request = _read(layout.stop_uri(self.prefix))
        if request is not None and StopRequest.model_validate_json(request).why == "pause":
            return True
        stopped = self.stopped()
        return stopped is not None and stopped.why == "signal"

    # ---- Ray

    def log_tail(self) -> str:
        """The last lines of the driver's output: from the cluster, else as far as the driver stored them.

        Raises Unavailable if neither has any and the cluster does not answer.
        """
        unavailable: Unavailable | None = None
        text = ""
        try:
            text = self.launcher.log_tail(self.submission)
        except Unavailable as error:
            unavailable = error
        stored = None if text else _read(layout.driver_log_uri(self.prefix))
        if stored:
            text = "\n".join(stored.decode(errors="replace").splitlines()[-TAIL_LINES:])
        elif unavailable is not None:
            raise unavailable
        return without_color(text)

    def status(self) -> RunStatus | None:
        """The run's status; None while Ray is unreachable."""
        try:
            return self.launcher.status(self.submission)
        except Unavailable:
            return None

    def stop(self) -> bool:
        """Make Ray stop the driver, even one that Ray reports as failed: it may be alive.

        True if it has ended.
        """
        try:
            self.launcher.stop(self.submission)
        except Unavailable:
            return False
        status = self.status()
        return status is not None and status.state not in RUNNING


def _read(uri: str) -> bytes | None:
    try:
        return files.read_bytes(uri)
    except FileNotFoundError:
        return None
