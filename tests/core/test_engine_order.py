"""The order of requests: who takes the next turn, and that nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dde_core.engine.order import PATIENCE, choose, due_of


@dataclass
class Job:
    """A request of one image: one row, ``work`` turns."""

    name: int
    work: int
    arrives: int
    group: str = "a"
    rows: int = 1
    due: float = 0.0
    came: int = 0
    left: int = 0
    ended: int = -1


def simulate(jobs: list[Job], max_rows: int = 1) -> list[list[int]]:
    """The names of each turn. A turn advances each chosen job by one, and the clock by as much."""
    waiting: list[Job] = []
    turns: list[list[int]] = []
    clock = 0
    coming = sorted(jobs, key=lambda job: job.arrives)
    while coming or waiting:
        while coming and (coming[0].arrives <= clock or not waiting):
            job = coming.pop(0)
            job.came, job.due, job.left = clock, due_of(clock, job.work), job.work
            waiting.append(job)
        chosen = choose(waiting, lambda job: max_rows)
        turns.append([job.name for job in chosen])
        for job in chosen:
            job.left -= 1
            clock += 1
            if not job.left:
                job.ended = clock
        waiting = [job for job in waiting if job.left]
    return turns


def test_nothing_waits_and_nothing_is_chosen():
    assert choose([], lambda job: 8) == []


def test_equal_requests_go_in_the_order_of_arrival_without_taking_turns():
    jobs = [Job(name, work=3, arrives=0) for name in range(3)]
    assert simulate(jobs) == [[0], [0], [0], [1], [1], [1], [2], [2], [2]]


def test_a_short_request_passes_a_long_one():
    jobs = [Job(0, work=100, arrives=0), Job(1, work=2, arrives=10)]
    simulate(jobs)
    assert jobs[1].ended == 12
    assert jobs[0].ended == 102


def test_a_long_request_is_passed_for_a_bounded_time_under_endless_short_ones():
    long = Job(0, work=50, arrives=0)
    short = [Job(name, work=1, arrives=name) for name in range(1, 1000)]
    simulate([long, *short])
    assert long.ended <= PATIENCE * long.work + long.work
    assert long.ended < 999


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 60)), min_size=1, max_size=25))
def test_only_requests_that_arrive_before_its_due_pass_a_request(shapes: list[tuple[int, int]]):
    jobs = [Job(name, work, arrives) for name, (work, arrives) in enumerate(shapes)]
    simulate(jobs)
    for job in jobs:
        others = [other for other in jobs if other is not job]
        assert all(other.ended > job.ended for other in others if other.came > job.due)
        allowed = sum(other.work for other in others if other.came <= job.due)
        assert job.ended <= job.came + job.work + allowed


@pytest.mark.parametrize("max_rows", [1, 2, 5, 8])
def test_a_call_has_one_group_and_at_most_its_rows(max_rows: int):
    jobs = [Job(i, 1, 0, group="ab"[i % 2], rows=1 + i % 3 % 2, due=float(i % 5)) for i in range(12)]
    chosen = choose(jobs, lambda job: max_rows)
    first = min(jobs, key=lambda job: job.due)
    assert chosen[0] is first
    assert {job.group for job in chosen} == {first.group}
    assert sum(job.rows for job in chosen) <= max(max_rows, first.rows)
    assert [job.due for job in chosen] == sorted(job.due for job in chosen)


def test_a_wide_sample_goes_even_where_it_alone_is_more_than_a_call_takes():
    assert len(choose([Job(0, 1, 0, rows=2)], lambda job: 1)) == 1


def test_what_does_not_fit_leaves_room_for_narrower_samples_behind_it():
    jobs = [Job(0, 1, 0, rows=2, due=0), Job(1, 1, 0, rows=2, due=1), Job(2, 1, 0, rows=1, due=2)]
    assert [job.name for job in choose(jobs, lambda job: 3)] == [0, 2]
