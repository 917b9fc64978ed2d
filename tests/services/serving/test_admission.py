"""Who may enter a replica: budgets, the queue's bound, deadlines; and that no room is ever lost."""

from __future__ import annotations

import asyncio
import pickle
import random
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from dde_core.engine.contract import Load
from dde_core.errors import ConfigError
from services.errors import BadRequest, DeadlineExceeded, ShuttingDown, TooManyRequests
from services.serving.admission import UNKNOWN_RATE_RETRY_S, Admission, Limits, Work
from services.serving.autoscaling import QUEUED_S, QueueTime


@dataclass
class Queue:
    """What the engine reports, and the time."""

    work: float = 0.0
    rate: float = 0.0
    now: float = 0.0

    def load(self) -> Load:
        return Load(requests=0, samples=0, work=self.work, work_per_s=self.rate)

    def now_s(self) -> float:
        return self.now


def admission(queue: Queue, refused: list[str] | None = None, **limits) -> Admission:
    codes = [] if refused is None else refused
    return Admission(Limits(**limits), queue.load, codes.append, queue.now_s)


def work(pixel_steps: int, images: int = 1) -> Work:
    """So many pixel-steps in all."""
    return Work(width=1, height=1, steps=pixel_steps // images, rows=1, images=images)


def test_work_is_pixels_times_steps_times_rows_times_images():
    assert Work(width=32, height=16, steps=10, rows=2, images=3).pixel_steps == 32 * 16 * 10 * 2 * 3


@pytest.mark.parametrize(
    ("images", "steps", "param", "got"),
    [
        (4, 100, "n", "got 4"),
        (1, 300, "num_inference_steps", "got 300"),
        (2, 300, "num_inference_steps", "300"),
    ],
)
def test_work_above_the_limit_can_never_enter_and_the_error_names_what_to_lower(images, steps, param, got):
    refused: list[str] = []
    gate = admission(Queue(), refused, max_work_per_request=200.0)
    with pytest.raises(BadRequest, match="at most 200 pixel-steps") as error:
        gate.enter("a", Work(width=1, height=1, steps=steps, rows=1, images=images))
    assert (error.value.param, error.value.code, error.value.status) == (param, "too_much_work", 400)
    assert str(error.value).endswith(got)
    assert refused == ["too_much_work"]
    assert gate.accepted == 0
    gate.enter("a", work(200))


def test_an_image_has_at_most_four_times_the_pixels_that_its_model_was_made_for():
    limits = Limits()
    limits.check_pixels(64, 64, 32, 32)
    limits.check_pixels(128, 32, 32, 32)
    with pytest.raises(BadRequest, match=r"made for 32x32 draws at most 4096 pixels, got 2048x2048") as error:
        limits.check_pixels(2048, 2048, 32, 32)
    assert (error.value.param, error.value.code) == ("size", "too_many_pixels")
    with pytest.raises(BadRequest):
        limits.check_pixels(72, 64, 32, 32)
    limits.check_pixels(2048, 2048, 1024, 1024)


def test_the_pixel_limit_can_be_set_as_a_ratio_and_as_a_number():
    Limits(max_native_ratio=16.0).check_pixels(128, 128, 32, 32)
    Limits(max_pixels=4096).check_pixels(64, 64, 512, 512)
    with pytest.raises(BadRequest, match="at most 4096 pixels here, got 65x64"):
        Limits(max_pixels=4096).check_pixels(65, 64, 512, 512)


def test_a_queue_longer_than_its_bound_refuses_with_the_time_until_there_is_room():
    queue = Queue(rate=10.0)
    refused: list[str] = []
    gate = admission(queue, refused, max_queued_s=60.0, key_share=1.0)
    gate.enter("a", work(10)).submitted()
    queue.work = 600.0
    gate.enter("a", work(10)).submitted()
    queue.work = 645.0
    with pytest.raises(TooManyRequests, match=r"the queue is 64\.5 s long") as error:
        gate.enter("a", work(10))
    assert (error.value.status, error.value.code) == (429, "queue_full")
    assert error.value.headers() == {"retry-after": "5"}
    assert refused == ["queue_full"]
    queue.work = 599.0
    gate.enter("a", work(1))


def test_requests_that_are_refused_together_return_one_after_the_other():
    queue = Queue(rate=10.0, work=650.0)
    gate = admission(queue, max_queued_s=60.0, key_share=1.0)
    gate.enter("a", work(10)).submitted()
    gate.enter("b", work(10)).submitted()
    waits = []
    for number in range(80):
        with pytest.raises(TooManyRequests) as error:
            gate.enter("ab"[number % 2], work(10))
        waits.append(error.value.retry_after_s)
    assert waits[:4] == pytest.approx([5.0, 6.0, 7.0, 8.0], abs=0.2), "one request takes a second"
    assert max(waits) <= 60.0, "no Retry-After is longer than the queue may be"


def test_retry_after_is_at_least_one_whole_second():
    queue = Queue(rate=10.0, work=601.0)
    gate = admission(queue, max_queued_s=60.0, key_share=1.0)
    gate.enter("a", work(1)).submitted()
    with pytest.raises(TooManyRequests) as error:
        gate.enter("a", work(1))
    assert error.value.headers() == {"retry-after": "1"}


def test_a_request_that_would_wait_longer_than_it_has_is_refused_at_once():
    queue = Queue(rate=10.0, work=100.0)
    gate = admission(queue)
    gate.enter("a", work(1)).submitted()
    gate.enter("a", work(1), timeout_s=11.0).submitted()
    with pytest.raises(TooManyRequests, match="can wait for 8 s") as error:
        gate.enter("a", work(1), timeout_s=8.0)
    assert error.value.headers() == {"retry-after": "2"}


def test_work_that_waits_for_its_model_counts_before_the_engine_has_it():
    queue = Queue(rate=1.0)
    gate = admission(queue, max_queued_s=10.0, key_share=1.0)
    waiting = gate.enter("a", work(8))
    assert gate.queued_s() == 8.0
    queue.work = 8.0
    waiting.submitted()
    assert gate.queued_s() == 8.0
    queue.work = 3.0
    assert gate.queued_s() == 3.0


def test_before_a_rate_is_known_the_number_of_requests_is_the_bound():
    queue = Queue()
    gate = admission(queue, max_requests=4, key_share=1.0)
    held = [gate.enter(key, work(1_000_000)) for key in "abcd"]
    assert gate.queued_s() == 0.0
    with pytest.raises(TooManyRequests, match="4 requests") as error:
        gate.enter("e", work(1))
    assert error.value.headers() == {"retry-after": f"{UNKNOWN_RATE_RETRY_S:g}"}
    held[0].release()
    gate.enter("e", work(1))


def test_one_key_takes_its_share_of_the_requests_and_others_find_room():
    refused: list[str] = []
    gate = admission(Queue(), refused, max_requests=8)
    for _ in range(4):
        gate.enter("greedy", work(1))
    for _ in range(100):
        with pytest.raises(TooManyRequests, match="the API key has 4 requests") as error:
            gate.enter("greedy", work(1))
        assert error.value.code == "key_limit"
    for _ in range(4):
        gate.enter("modest", work(1))
    assert refused == ["key_limit"] * 100


def test_one_key_takes_its_share_of_the_queued_seconds():
    queue = Queue(rate=10.0)
    gate = admission(queue, max_queued_s=60.0, key_share=0.5)
    for _ in range(3):
        gate.enter("greedy", work(100))
    with pytest.raises(TooManyRequests) as error:
        gate.enter("greedy", work(50))
    assert (error.value.code, error.value.headers()) == ("key_limit", {"retry-after": "10"})
    gate.enter("modest", work(300))
    with pytest.raises(TooManyRequests) as error:
        gate.enter("greedy", work(50))
    assert error.value.headers() == {"retry-after": "20"}, "half of the work that is done is its own now"


def test_the_budget_of_a_key_holds_without_a_rate():
    gate = admission(Queue(), max_work_per_request=60.0, max_work_per_key=100.0)
    first = gate.enter("a", work(60))
    with pytest.raises(TooManyRequests) as error:
        gate.enter("a", work(41))
    assert error.value.code == "key_limit"
    gate.enter("a", work(40))
    gate.enter("b", work(60))
    first.release()
    gate.enter("a", work(60))


def test_a_huge_request_of_one_key_shuts_no_other_out_and_can_itself_enter():
    queue = Queue(rate=10.0)
    gate = admission(queue, max_queued_s=60.0)
    gate.enter("giant", work(6_000)).submitted()
    queue.work = 6_000.0
    gate.enter("small", work(1)).submitted()
    with pytest.raises(TooManyRequests):
        gate.enter("giant", work(1))


def test_a_timeout_that_is_not_positive_or_too_long_names_the_header():
    gate = admission(Queue(), max_timeout_s=30.0)
    for wrong in (0.0, -1.0, 31.0, float("nan")):
        with pytest.raises(
            BadRequest, match="x-request-timeout-s: must be above 0 and at most 30, got"
        ) as error:
            gate.enter("a", work(1), timeout_s=wrong)
        assert error.value.param == "x-request-timeout-s"
    assert gate.enter("a", work(1)).timeout_s == 30.0
    assert gate.accepted == 1


def test_the_deadline_runs_from_the_arrival_and_cancels_what_is_awaited():
    async def main() -> None:
        queue = Queue()
        gate = admission(queue)
        cancelled = asyncio.Event()

        async def draw() -> None:
            try:
                await asyncio.sleep(60.0)
            finally:
                cancelled.set()

        with gate.enter("a", work(1), timeout_s=100.0) as ticket:
            assert await ticket.wait_for(asyncio.sleep(0.0, "done")) == "done"
            queue.now = 99.99
            assert ticket.remaining_s() == pytest.approx(0.01)
            with pytest.raises(
                DeadlineExceeded, match=r"not done within 100 s \(x-request-timeout-s\)"
            ) as error:
                await ticket.wait_for(draw())
            assert cancelled.is_set()
        assert (error.value.status, error.value.code) == (504, "deadline_exceeded")
        assert error.value.headers() == {"x-should-retry": "false"}
        assert gate.accepted == 0

    asyncio.run(main())


def test_a_timeout_of_the_work_itself_is_not_taken_for_the_deadline():
    async def main() -> None:
        with admission(Queue()).enter("a", work(1)) as ticket:

            async def fail() -> None:
                raise TimeoutError("storage")

            with pytest.raises(TimeoutError, match="storage"):
                await ticket.wait_for(fail())

    asyncio.run(main())


def test_room_comes_back_exactly_once_after_success_failure_cancel_and_deadline():
    """1,000 requests of 8 keys, each ended in one of five ways."""

    async def main() -> None:
        gate = admission(Queue(rate=1e6), max_requests=64)
        rng = random.Random(0)
        ended: dict[str, int] = {}

        async def one(i: int) -> str:
            how = rng.choice(["ok", "fails", "left", "late", "released twice"])
            try:
                ticket = gate.enter(
                    f"key-{i % 8}", work(rng.randint(1, 1000)), timeout_s=0.01 if how == "late" else 9
                )
            except TooManyRequests as error:
                return error.code
            with ticket:
                ticket.submitted()
                if how == "left":
                    task = asyncio.ensure_future(ticket.wait_for(asyncio.sleep(60.0)))
                    await asyncio.sleep(0.001)
                    task.cancel()
                    await task
                if how == "late":
                    await ticket.wait_for(asyncio.sleep(60.0))
                await ticket.wait_for(asyncio.sleep(0.002))
                if how == "fails":
                    raise ValueError("a model that fails")
                if how == "released twice":
                    ticket.release()
            return how

        async def counted(i: int) -> None:
            try:
                name = await one(i)
            except (ValueError, asyncio.CancelledError, DeadlineExceeded) as error:
                name = type(error).__name__
            ended[name] = ended.get(name, 0) + 1

        for start in range(0, 1000, 100):
            await asyncio.gather(*(counted(i) for i in range(start, start + 100)))
            assert gate.accepted == 0
        assert sum(ended.values()) == 1000
        assert {"ok", "ValueError", "CancelledError", "DeadlineExceeded", "released twice"} <= set(ended)
        assert {"queue_full", "key_limit"} & set(ended)
        assert gate.queued_s() == 0.0
        for _ in range(32):
            gate.enter("key-0", work(1))

    asyncio.run(main())


def test_a_closed_replica_hands_requests_back():
    gate = admission(Queue())
    kept = gate.enter("a", work(1))
    gate.close()
    with pytest.raises(ShuttingDown) as error:
        gate.enter("a", work(1))
    assert (error.value.status, error.value.code) == (503, "shutting_down")
    assert int(error.value.headers()["retry-after"]) >= 1
    assert gate.accepted == 1
    kept.release()
    assert gate.accepted == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_work_per_request", 0.0),
        ("max_work_per_key", 1.0),
        ("max_native_ratio", 0.5),
        ("max_pixels", -1),
        ("max_queued_s", 0.0),
        ("max_queued_s", float("inf")),
        ("max_requests", 0),
        ("key_share", 0.0),
        ("key_share", 1.1),
        ("max_timeout_s", float("nan")),
    ],
)
def test_limits_refuse_nonsense_and_name_the_field(field, value):
    with pytest.raises(ConfigError) as error:
        Limits(**{field: value})
    assert (error.value.field, error.value.value is value) == (field, True)


def test_errors_with_a_time_to_retry_survive_pickling():
    error = pickle.loads(pickle.dumps(TooManyRequests("full", code="key_limit", retry_after_s=2.1)))
    assert (error.code, error.headers(), str(error)) == ("key_limit", {"retry-after": "3"}, "full")


def test_admission_loads_no_torch_and_no_ray():
    source = (
        "import sys, services.serving.admission as a; print({'torch', 'ray', 'fastapi'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# ---- autoscaling


def context(current: int, target: int, queued_s: dict[str, float] | None):
    metrics = None if queued_s is None else {QUEUED_S: queued_s}
    return SimpleNamespace(
        current_num_replicas=current, target_num_replicas=target, aggregated_metrics=metrics
    )


@pytest.mark.parametrize(
    ("current", "queued_s", "wanted"),
    [
        (1, {"r1": 5.0}, 1),
        (1, {"r1": 35.0}, 4),
        (2, {"r1": 10.0, "r2": 20.0}, 3),
        (3, {"r1": 0.0, "r2": 0.0, "r3": 0.0}, 1),
        (2, {"r1": 30.0}, 6),
    ],
)
def test_the_number_of_replicas_brings_the_queue_to_its_target(current, queued_s, wanted):
    """The last: a replica that has not reported yet is taken for an average one."""
    assert QueueTime(10.0)(context(current, current, queued_s)) == (wanted, {})


def test_without_statistics_the_number_of_replicas_stays():
    assert QueueTime(10.0)(context(2, 3, None)) == (3, {})
    assert QueueTime(10.0)(context(2, 3, {})) == (3, {})
