"""Watch a job until it ends: progress bars in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from services.api.answers import EventView, JobView, WaitingView
from services.client.api import Client
from services.client.progress import JobProgress, describe, numbers, pace, rounds


class Screen(Protocol):
    """Where ``watch`` shows events and progress."""

    def event(self, event: EventView) -> None:
        """Show a new event."""

    def show(self, job: JobView, progress: JobProgress) -> None:
        """Show the present state."""

    def __enter__(self) -> Screen: ...

    def __exit__(self, *exc: object) -> None: ...


def watch(
    client: Client, job_id: str, console: Console, *, poll_s: float = 1.0, line_every_s: float = 5.0
) -> JobView:
    """Show a job's events and progress until it has ended; returns the job."""
    progress = JobProgress()
    last_event = None
    with Bars(console) if console.is_terminal else Lines(console, line_every_s) as screen:
        while True:
            job = client.job(job_id)
            for event in client.events(job_id, last_event):
                screen.event(event)
                last_event = event.id
            for stage in progress.unread(job):
                progress.update(job, stage, client.metrics(job_id, stage, progress.after(stage)))
            screen.show(job, progress)
            if job.finished:
                return job
            time.sleep(poll_s)


class Lines:
    """Plain lines: events at once, the running stage every few seconds, each stage once when it has ended."""

    def __init__(self, console: Console, every_s: float) -> None:
        self._console = console
        self._every_s = every_s
        self._last_lines: dict[str, str] = {}
        self._ended: set[str] = set()
        self._next_at = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def event(self, event: EventView) -> None:
        self._print(event_line(event))

    def show(self, job: JobView, progress: JobProgress) -> None:
        is_due = time.monotonic() >= self._next_at
        for name, stage in progress.stages.items():
            has_ended = stage.seconds is not None
            if name not in self._ended and (has_ended or is_due or job.finished):
                self._print_if_changed(name, describe(stage))
            if has_ended:
                self._ended.add(name)
        reason = f": {job.reason}" if job.reason else ""
        self._print_if_changed("status", f"{job.id} is {job.state}{reason}")
        if job.waiting:
            self._print_if_changed("waiting", waiting_line(job, job.waiting))
        if is_due:
            self._next_at = time.monotonic() + self._every_s

    def _print_if_changed(self, topic: str, line: str) -> None:
        if self._last_lines.get(topic) != line:
            self._last_lines[topic] = line
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """One bar per stage; events scroll above the bars."""

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
        self._last_wait = ""

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def event(self, event: EventView) -> None:
        style = {"warning": "yellow", "error": "red"}.get(event.level, "dim")
        self._progress.console.print(event_line(event), style=style, markup=False, highlight=False)

    def show(self, job: JobView, progress: JobProgress) -> None:
        wait = waiting_line(job, job.waiting) if job.waiting else ""
        if wait and wait != self._last_wait:
            self._progress.console.print(wait, style="yellow", markup=False, highlight=False)
        self._last_wait = wait
        for name, stage in progress.stages.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(
                    name, total=None, stage=name, count="", pace="", numbers=""
                )
            has_ended = stage.seconds is not None
            total = stage.total or (max(stage.done, 1) if has_ended else None)
            self._progress.update(
                self._tasks[name],
                total=total,
                completed=total if has_ended else stage.done,
                count=f"{stage.done}/{stage.total or '?'} {stage.unit}",
                pace=", ".join(pace(stage)),
                numbers="  ".join([*rounds(stage), *numbers(stage)]),
            )


def waiting_line(job: JobView, waiting: WaitingView) -> str:
    """``ajob_1 waits for room since 12:30:05 (slots), place 3: 8 of 8 jobs are active``."""
    since = time.strftime("%H:%M:%S", time.localtime(waiting.since))
    return f"{job.id} waits for room since {since} ({waiting.reason}), {waiting}"


def event_line(event: EventView) -> str:
    """``12:30:05 warning: ...``; the level "info" is omitted."""
    at = time.strftime("%H:%M:%S", time.localtime(event.created_at))
    return f"{at} {event.message}" if event.level == "info" else f"{at} {event.level}: {event.message}"
