"""Watching a job: plain lines for pipes, bars for terminals."""

from __future__ import annotations

import io
from collections import deque

import pytest
from rich.console import Console

from services.api.answers import JobView, MetricView, parse
from services.client.progress import JobProgress, describe
from services.client.watch import watch
from tests.services.client.conftest import EVALUATED, event, job, metric

PATH = "/v1/alignment/jobs/ajob_1"


def train_rows(first: int, last: int) -> list[dict]:
    numbers = {
        "loss": 0.5,
        "implicit_accuracy": 0.75,
        "winner_error_diff": -0.001,
        "loser_error_diff": 0.002,
        "margin": 9.0,
    }
    return [metric("train", n, 100.0 + 0.5 * n, numbers) for n in range(first, last + 1)]


def encode_rows(*done: int) -> list[dict]:
    return [metric("encode", n, float(n), {"images": n, "images_total": 80}) for n in done]


def read(rows: list[dict]) -> list[MetricView]:
    return [parse(MetricView, row) for row in rows]


def progress_of(status: str, stage: str, rows: list[dict], **other) -> JobProgress:
    progress, now = JobProgress(), parse(JobView, job(status, stage=stage, **other))
    progress.update(now, stage, read(rows))
    return progress


def test_training_counts_steps_with_rate_and_time_left() -> None:
    train = progress_of("running", "train", train_rows(1, 10)).stages["train"]
    assert (train.done, train.total, train.rate, train.eta_s) == (10, 40, 2.0, 15.0)
    pace = "train    10/40 steps (25%), 2/s, 15 s left"
    numbers = "loss 0.5000, implicit accuracy 0.7500, winner error -0.00100, loser error +0.00200"
    assert describe(train) == f"{pace}, {numbers}"


def test_encoding_counts_images() -> None:
    encode = progress_of("preparing", "encode", encode_rows(16, 32)).stages["encode"]
    assert (encode.done, encode.total, encode.rate, encode.eta_s) == (32, 80, 1.0, 48.0)


def test_evaluation_counts_images_although_its_metric_is_named_pictures() -> None:
    counts = {"pictures": 50, "pictures_total": 400, "pictures_per_s": 10.0}
    rows = [metric("evaluate", 25, 5.0, counts)]
    evaluate = progress_of("evaluating", "evaluate", rows).stages["evaluate"]
    assert describe(evaluate) == "evaluate 50/400 images (12%), 10/s, 35 s left"


def test_writing_a_ledger_counts_pairs() -> None:
    rows = [metric("ledger", n, float(n), {"pairs": n, "pairs_total": 900}) for n in (100, 300)]
    ledger = progress_of("preparing", "ledger", rows).stages["ledger"]
    assert describe(ledger) == "ledger   300/900 pairs (33%), 1/s, 600 s left"


def test_the_rate_is_the_stages_own_if_it_reports_one() -> None:
    rows = [{**row, "metrics": {**row["metrics"], "images_per_s": 8.0}} for row in encode_rows(16, 32)]
    encode = progress_of("preparing", "encode", rows).stages["encode"]
    assert (encode.rate, encode.eta_s) == (8.0, 6.0)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    slow = [{**row, "at": row["step"] * 10.0} for row in train_rows(1, 10)]
    fast = [{**row, "at": 100.0 + (row["step"] - 10)} for row in train_rows(11, 40)]
    assert progress_of("running", "train", slow + fast).stages["train"].rate == pytest.approx(1.0)


def test_the_rate_of_an_ended_stage_is_that_of_all_its_steps() -> None:
    slow = [{**row, "at": row["step"] * 10.0} for row in train_rows(1, 10)]
    fast = [{**row, "at": 100.0 + (row["step"] - 10)} for row in train_rows(11, 40)]
    progress = progress_of("succeeded", "train", slow + fast, stage_seconds={"train": 500.0})
    assert progress.stages["train"].rate == pytest.approx(39 / 120)


def test_rows_that_are_not_new_change_nothing() -> None:
    progress = progress_of("running", "train", train_rows(1, 10))
    progress.update(parse(JobView, job("running", stage="train")), "train", read(train_rows(4, 6)))
    assert progress.stages["train"].done == progress.cursor("train") == 10


ROUND = {"round": 2.0, "rollout_images": 128.0, "rollout_reward": 0.75, "rollout_gap": 0.05}
ROUND |= {"rollout_kept_share": 0.5, "rollout_bad": 2.0, "rollout_reward_t0952": 0.25}


def test_training_on_rollouts_shows_which_round_it_is_in_and_what_the_round_brought() -> None:
    rows = train_rows(1, 10)
    rows[8]["metrics"] |= ROUND
    rollouts = {"updates_per_round": 4}
    train = progress_of("running", "train", rows, rollouts=rollouts, dataset=None).stages["train"]
    assert (train.round, train.rounds) == (3, 10)
    line = describe(train)
    assert line.startswith("train    10/40 steps (25%), 2/s, 15 s left, round 3 of 10, loss 0.5000")
    assert line.endswith("reward 0.7500, gap 0.0500, pairs kept 0.5000, bad rewards 2")


def test_what_is_reported_of_the_last_step_later_is_shown_too() -> None:
    progress = progress_of("running", "train", train_rows(1, 10), rollouts={"updates_per_round": 4})
    train = progress.stages["train"]
    assert (train.round, progress.after("train")) == (0, 9)
    grown = train_rows(10, 10)
    grown[0]["metrics"] |= ROUND
    now = parse(JobView, job("running", stage="train", rollouts={"updates_per_round": 4}))
    for _ in range(3):
        progress.update(now, "train", read(grown))
    assert (train.round, train.done, train.rate) == (3, 10, 2.0)


def test_a_stage_is_read_once_more_after_it_has_ended_and_then_no_more() -> None:
    progress = progress_of("running", "train", train_rows(1, 10))
    now = parse(JobView, job("evaluating", stage="evaluate", stage_seconds={"encode": 1.0, "train": 20.0}))
    assert progress.unread(now) == ["encode", "train", "evaluate"]
    for stage in progress.unread(now):
        progress.update(now, stage, [])
    assert progress.unread(now) == ["evaluate"]
    assert "done in 20.0 s" in describe(progress.stages["train"])


def test_a_stage_without_metrics_has_no_rate() -> None:
    train = progress_of("running", "train", []).stages["train"]
    assert (train.rate, train.eta_s, describe(train)) == (None, None, "train    0/40 steps (0%)")


@pytest.fixture
def scripted(server):
    """A job that encodes, trains and succeeds within three polls."""
    seconds = {"encode": 4.0, "train": 20.0}
    done = job("succeeded", stage_seconds={**seconds, "evaluate": 9.5}, result={"evaluate": EVALUATED})
    states = [
        job("preparing", stage="encode"),
        job("running", stage="train", stage_seconds={"encode": 4.0}),
        done,
    ]
    server.single[PATH] = deque(states)
    events = [event(1, "encoding"), event(2, "one image is broken [1/80]", "warning")]
    server.items |= {f"{PATH}/events": events, f"{PATH}/metrics": [*encode_rows(40, 80), *train_rows(1, 40)]}
    return server


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_shows_events_and_every_stage_and_ends_with_the_job(scripted, client, terminal) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system=None)
    assert watch(client, "ajob_1", console, poll_s=0.01, line_every_s=0.0).status == "succeeded"
    text = out.getvalue()
    assert text.count("encoding") == 1
    assert "warning: one image is broken [1/80]" in text
    for part in (
        "80/80 images",
        "40/40 steps",
        "loss 0.5000",
        "implicit accuracy 0.7500",
        "winner error -0.00100",
    ):
        assert part in text
    assert ("\x1b[" in text) is terminal


def test_plain_lines_show_each_ended_stage_once_and_how_the_job_ended(scripted, client) -> None:
    out = io.StringIO()
    watch(client, "ajob_1", Console(file=out, width=60), poll_s=0.01, line_every_s=60.0)
    lines = out.getvalue().splitlines()
    assert sum("done in 4.0 s" in line for line in lines) == 1
    assert sum(line.startswith("train ") and "done in 20.0 s" in line for line in lines) == 1
    assert lines[-1] == "ajob_1 is succeeded"


def test_watching_continues_through_a_pause_until_the_job_ends(server, client) -> None:
    states = [("running", 5), ("paused", 5), ("queued", None), ("running", None), ("cancelled", None)]
    server.single[PATH] = deque(
        job(status, stage="train", pause_requested_at=requested_at) for status, requested_at in states
    )
    server.items |= {f"{PATH}/events": [], f"{PATH}/metrics": []}
    out = io.StringIO()
    assert (
        watch(client, "ajob_1", Console(file=out, width=60), poll_s=0.01, line_every_s=60.0).status
        == "cancelled"
    )
    statuses = [
        line.removeprefix("ajob_1 is ")
        for line in out.getvalue().splitlines()
        if line.startswith("ajob_1 is ")
    ]
    assert statuses == ["pausing", "paused", "queued", "running", "cancelled"]


def test_a_failed_job_ends_with_its_reason(server, client) -> None:
    reason = {"code": "DataError", "message": "no decided pairs", "param": "dataset"}
    server.single[PATH] = deque([job("failed", stage="encode", reason=reason)])
    out = io.StringIO()
    watch(client, "ajob_1", Console(file=out, width=60), poll_s=0.01)
    assert out.getvalue().splitlines()[-1] == "ajob_1 is failed: dataset: no decided pairs"


WAITING = {"position": 3, "reason": "slots", "since": 0, "message": "8 of 8 jobs are active"}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_job_that_waits_shows_its_place_and_reason_whenever_they_change(
    client, server, is_terminal
) -> None:
    nearer = {**WAITING, "position": 2}
    room = {"position": None, "reason": "cluster_room", "since": 0, "message": "2 GPU; 0 free of 8"}
    states = [job(waiting=WAITING), job(waiting=WAITING), job(waiting=nearer), job("running", waiting=room)]
    server.single[PATH] = deque([*states, job("running"), job("succeeded")])
    server.items |= {f"{PATH}/events": [], f"{PATH}/metrics": []}
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=200, color_system=None)
    watch(client, "ajob_1", console, poll_s=0.01)
    shown = out.getvalue()
    assert shown.count("(slots), place 3: 8 of 8 jobs are active") == 1
    assert shown.count("(slots), place 2: 8 of 8 jobs are active") == 1
    assert shown.count("(cluster_room), 2 GPU; 0 free of 8") == 1
