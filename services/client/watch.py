"""Watch a job until it ends: bars in a terminal, a plain line every few seconds anywhere else."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from services.client.api import Client
from services.client.progress import JobProgress, describe, numbers, pace
from services.client.types import Event, Job


class Screen(Protocol):
    """Where a watcher shows what it sees."""

    def event(self, event: Event) -> None:
        """A new event."""

    def show(self, job: Job, progress: JobProgress) -> None:
        """The state as it is now."""

    def __enter__(self) -> Screen: ...

    def __exit__(self, *exc: object) -> None: ...


def watch(
    client: Client, job_id: str, console: Console, *, poll_s: float = 1.0, line_every_s: float = 5.0
) -> Job:
    """Show a job's events and progress until it has ended; the job as it is then."""
    progress, last_event = JobProgress(), None
    with Bars(console) if console.is_terminal else Lines(console, line_every_s) as screen:
        while True:
            job = client.job(job_id)
            for event in client.events(job_id, last_event):
                screen.event(event)
                last_event = event.id
            for stage in progress.unread(job):
                progress.update(job, stage, client.metrics(job_id, stage, progress.cursor(stage)))
            screen.show(job, progress)
            if job.finished:
                return job
            time.sleep(poll_s)


class Lines:
    """Plain lines: every event at once, the running stage every few seconds, every stage once when it is over."""

    def __init__(self, console: Console, every_s: float) -> None:
        self._console, self._every_s = console, every_s
        self._said: dict[str, str] = {}
        self._over: set[str] = set()
        self._next = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def event(self, event: Event) -> None:
        self._say(event_line(event))

    def show(self, job: Job, progress: JobProgress) -> None:
        due = time.monotonic() >= self._next
        for stage in progress.stages.values():
            over = stage.seconds is not None
            if stage.stage not in self._over and (over or due or job.finished):
                self._over |= {stage.stage} if over else set()
                self._changed(stage.stage, describe(stage))
        self._changed("status", f"{job.id} is {job.state}" + (f": {job.reason}" if job.reason else ""))
        if due:
            self._next = time.monotonic() + self._every_s

    def _changed(self, topic: str, line: str) -> None:
        if self._said.get(topic) != line:
            self._said[topic] = line
            self._say(line)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """One bar a stage, events scrolling above."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[stage]:<8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[pace]}", style="cyan"),
            TextColumn("{task.fields[numbers]}", style="magenta"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def event(self, event: Event) -> None:
        style = {"warning": "yellow", "error": "red"}.get(event.level, "dim")
        self._progress.console.print(event_line(event), style=style, markup=False, highlight=False)

    def show(self, job: Job, progress: JobProgress) -> None:
        for name, stage in progress.stages.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(
                    name, total=None, stage=name, count="", pace="", numbers=""
                )
            over = stage.seconds is not None
            total = stage.total or (max(stage.done, 1) if over else None)
            self._progress.update(
                self._tasks[name],
                total=total,
                completed=total if over else stage.done,
                count=f"{stage.done}/{stage.total or '?'} {stage.unit}",
                pace=", ".join(pace(stage)),
                numbers="  ".join(numbers(stage)),
            )


def event_line(event: Event) -> str:
    """``12:30:05 warning ...``; the level is left out where it is the usual one."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    return f"{clock} {event.message}" if event.level == "info" else f"{clock} {event.level}: {event.message}"
