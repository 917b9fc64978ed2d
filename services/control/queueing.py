"""The order in which queued jobs get slots, over all projects.

A free slot goes to a project with fewer than ``max_active_jobs_per_project`` active jobs; of these to the one
with the fewest; of these to the one that has started no job for the longest time; there to the oldest job.

Every read is of a few rows, or of an index alone, however many jobs wait.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session, aliased

from services.api.records import WaitReason
from services.control.tables import Job
from services.control.transitions import ACTIVE
from services.settings import Settings

NEVER = 0.0


@dataclass(frozen=True)
class ProjectShare:
    """What a project has of the cluster: active jobs, queued ones, and when it last started one."""

    name: str
    active: int
    queued: int
    last_start: float

    @property
    def turn(self) -> tuple[int, float, str]:
        """The order of projects whose next jobs are on one level (``level``)."""
        return -self.active, self.last_start, self.name

    def level(self, rank: int) -> int:
        """How many active jobs the project has when its queued job ``rank`` (from 1) is next.

        Slots go to the lowest level first. Of several projects that reach a level, those that start there
        come before those that started a job on the way, and these keep their order.
        """
        return self.active + rank - 1


@dataclass(frozen=True)
class Queue:
    """All queued jobs, by project, at one time."""

    shares: Mapping[str, ProjectShare]
    active: int
    max_active: int
    max_per_project: int

    def position(self, project: str, rank: int) -> int:
        """The place, from 1, of the queued job that is number ``rank`` of its project."""
        own = self.shares[project]
        level = own.level(rank)
        place = rank
        for other in self.shares.values():
            if other is not own:
                before = level - other.active
                place += min(max(before, 0), other.queued)
                place += 0 <= before < other.queued and other.turn < own.turn
        return place

    def reason(self, project: str) -> tuple[WaitReason, str]:
        """Why the queued jobs of a project wait, as a code and for people."""
        active = self.shares[project].active
        if active >= self.max_per_project:
            return "project_limit", f"project {project!r} has {active} active jobs, its limit"
        return "slots", f"{self.active} of {self.max_active} jobs are active"


def read(session: Session, settings: Settings) -> Queue:
    """The queue of all projects: the session must not be of one."""
    active = _active(session)
    count = select(Job.project, func.count()).where(Job.status == "queued").group_by(Job.project)
    queued = dict(session.execute(count).all())
    started = _last_starts(session, queued)
    shares = {
        project: ProjectShare(project, active.get(project, 0), number, started[project])
        for project, number in queued.items()
    }
    return Queue(shares, sum(active.values()), settings.max_active_jobs, _project_limit(settings))


def ranks(session: Session, project: str, seqs: Iterable[int]) -> dict[int, int]:
    """The place, from 1, of each of these jobs (``Job.seq``; at least one) among the queued ones of its
    project. One that has started meanwhile is left out.
    """
    wanted = set(seqs)
    own = (Job.status == "queued", Job.project == project)
    older = session.scalar(select(func.count()).where(*own, Job.seq < min(wanted))) or 0
    rest = select(Job.seq).where(*own, Job.seq.between(min(wanted), max(wanted))).order_by(Job.seq)
    return {seq: rank for rank, seq in enumerate(session.scalars(rest), older + 1) if seq in wanted}


def starting(session: Session, settings: Settings) -> list[str]:
    """The ids of the queued jobs that get the free slots now, in order.

    Two replicas asking at once may exceed a limit by one.
    """
    active = _active(session)
    free = settings.max_active_jobs - sum(active.values())
    limit = _project_limit(settings)
    if free <= 0:
        return []
    projects = [name for name in _queued_projects(session) if active.get(name, 0) < limit]
    started = _last_starts(session, projects)
    shares = [ProjectShare(name, active.get(name, 0), 0, started[name]) for name in projects]
    # A project gets a slot only after all that are before it here have got one.
    first = sorted(shares, key=lambda share: (share.active, share.last_start, share.name))[:free]
    turns = [
        (share.level(rank), share.turn, job_id)
        for share in first
        for rank, job_id in enumerate(_oldest(session, share.name, min(free, limit - share.active)), 1)
    ]
    return [job_id for _, _, job_id in sorted(turns)[:free]]


def reason(session: Session, settings: Settings, project: str) -> tuple[WaitReason, str]:
    """Why the queued jobs of a project wait, without counting them."""
    active = _active(session)
    share = ProjectShare(project, active.get(project, 0), 0, NEVER)
    limits = (settings.max_active_jobs, _project_limit(settings))
    return Queue({project: share}, sum(active.values()), *limits).reason(project)


def _project_limit(settings: Settings) -> int:
    return settings.max_active_jobs_per_project or sys.maxsize


def _active(session: Session) -> dict[str, int]:
    """The number of jobs of each project that may have a run on the cluster."""
    has_runs = Job.status.in_(ACTIVE) & (Job.kind != "study")
    count = select(Job.project, func.count()).where(has_runs).group_by(Job.project)
    return dict(session.execute(count).all())


def _queued_projects(session: Session) -> list[str]:
    """The projects that have queued jobs: the index is read once for each of them, not for each job."""
    queued = Job.status == "queued"
    least = select(func.min(Job.project).label("name")).where(queued).cte("projects", recursive=True)
    following = aliased(Job)
    following_name = (
        select(func.min(following.project))
        .where(following.status == "queued", following.project > least.c.name)
        .scalar_subquery()
    )
    projects = least.union_all(select(following_name).where(least.c.name.is_not(None)))
    return list(session.scalars(select(projects.c.name).where(projects.c.name.is_not(None))))


def _last_starts(session: Session, projects: Iterable[str]) -> dict[str, float]:
    """When each project last started a job."""
    last = func.max(Job.started_at)
    return {name: session.scalar(select(last).where(Job.project == name)) or NEVER for name in projects}


def _oldest(session: Session, project: str, limit: int) -> list[str]:
    """The ids of a project's oldest queued jobs, without those that a request stops."""
    is_stopping = Job.cancel_requested_at.is_not(None) | Job.pause_requested_at.is_not(None)
    queued = select(Job.id).where(Job.status == "queued", Job.project == project, ~is_stopping)
    return list(session.scalars(queued.order_by(Job.seq).limit(limit)))
