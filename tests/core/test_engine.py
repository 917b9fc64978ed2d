"""The engine on the shipped model: pictures in random company, and requests that fail, leave or wait."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dde_core.config import SampleConfig, SamplerName
from dde_core.engine.batch_size import BatchSizes, best, launch_bound, measure
from dde_core.engine.batching import StepEngine
from dde_core.engine.contract import (
    Cancelled,
    Drawn,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Preview,
    Started,
    Turn,
)
from dde_core.engine.model import BaseModel, Model
from dde_core.engine.sample import start, take_step
from dde_core.engine.turn import stepping_together
from dde_core.errors import ConfigError, NonFiniteError
from dde_core.generation import TextToImage
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from tests.support.tiny_folders import sd15_folder

POISON = "a poisoned prompt"
PROMPTS = ["a small red circle at the left", "a big blue square", "a green triangle on a white background"]


class Client:
    """One request and its events, in order."""

    def __init__(self, engine: StepEngine, model: Model, request: GenerationRequest) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.events: list[Event] = []
        self.request = request
        self.generation = engine.submit(model, request, self._events.put)

    def wait(self, timeout_s: float = 60.0) -> Event:
        """The last event."""
        while not self.events or not isinstance(self.events[-1], Finished | Failed):
            self.events.append(self._events.get(timeout=timeout_s))
        return self.events[-1]

    def wait_for_start(self, timeout_s: float = 60.0) -> None:
        while not self.events:
            self.events.append(self._events.get(timeout=timeout_s))

    def images(self) -> list[np.ndarray]:
        assert self.wait() == Finished()
        drawn = {event.index: event.image for event in self.events if isinstance(event, Drawn)}
        return [drawn[i] for i in range(len(self.request.seeds))]


class Gate(nn.Module):
    """A U-Net that waits for permission before each call, and counts the rows of its calls."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self.rows: list[int] = []
        self.free = threading.Event()
        self.free.set()
        self.steps = threading.Semaphore(0)
        self.most_rows = 0
        self.error: Exception | None = None
        self.poison: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, t: torch.Tensor, **conditioning: Any) -> Any:
        if not self.free.is_set():
            assert self.steps.acquire(timeout=60)
        if self.most_rows and len(x) > self.most_rows:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        if self.error is not None:
            raise self.error
        self.rows.append(len(x))
        output = self.unet(x, t, **conditioning)
        if self.poison is not None:
            is_poisoned = (conditioning["encoder_hidden_states"] == self.poison).flatten(1).all(1)
            output.sample[is_poisoned] = float("nan")
        return output


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate(ModelFolder(MODEL_DIR).unet())


@pytest.fixture(scope="module")
def base(gate: Gate) -> BaseModel:
    return BaseModel(ModelFolder(MODEL_DIR), unet=gate)


@pytest.fixture
def turns() -> list[Turn]:
    return []


@pytest.fixture
def engine(gate: Gate, turns: list[Turn]) -> Iterator[StepEngine]:
    engine = StepEngine(BatchSizes(fixed=16), on_turn=turns.append)
    gate.rows.clear()
    yield engine
    gate.free.set()
    gate.most_rows, gate.error, gate.poison = 0, None, None
    engine.close()


def request_of(
    steps: int = 3, guidance: float = 3.0, seeds: Sequence[int] = (1,), prompt: str = PROMPTS[0], **more: Any
) -> GenerationRequest:
    sampler: SamplerName = more.pop("sampler", "ddim")
    size = more.pop("size", 0)
    sample = SampleConfig(steps=steps, guidance_scale=guidance, sampler=sampler, height=size, width=size)
    return GenerationRequest(prompt=prompt, seeds=tuple(seeds), sample=sample, **more)


def solo(request: GenerationRequest) -> list[np.ndarray]:
    """The request's images, drawn by the model alone, one by one."""
    model = TextToImage(ModelFolder(MODEL_DIR))
    return [model([request.prompt], [seed], request.sample)[0] for seed in request.seeds]


def differs(images: list[np.ndarray], others: list[np.ndarray]) -> int:
    """The largest difference of a value of 0..255."""
    return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(images, others, strict=True))


def test_an_image_is_the_same_in_random_company(engine: StepEngine, base: BaseModel, turns: list[Turn]):
    draw = random.Random(5)
    requests = [
        request_of(
            steps=draw.randint(1, 9),
            guidance=draw.choice([0.0, 1.0, 2.5, 7.0]),
            seeds=[draw.randrange(2**40) for _ in range(draw.randint(1, 3))],
            prompt=draw.choice(PROMPTS),
            sampler=draw.choice(["ddim"]),
            size=draw.choice([0, 0, 0, 40]),
        )
        for _ in range(14)
    ]
    clients = []
    for request in requests:
        clients.append(Client(engine, Model(base), request))
        time.sleep(draw.random() * 0.03)
    for client in clients:
        alone = solo(client.request)
        assert differs(client.images(), alone) <= 1
        assert max(image.std() for image in alone) > 3
    assert max(turn.samples for turn in turns) > 3
    assert all(turn.rows <= turn.max_rows == 16 for turn in turns)


def test_images_at_the_same_step_of_ddim_take_it_in_one_call_with_the_bits_of_steps_alone(base: BaseModel):
    cond = {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    sample = SampleConfig(steps=4, guidance_scale=1.0)
    longer = SampleConfig(steps=5, guidance_scale=1.0)
    configs = [sample, longer, sample, sample]
    together, alone = (
        [start(base, seed, config, cond, None) for seed, config in enumerate(configs)] for _ in "ab"
    )
    take_step(together[3:], together[3].latents)
    take_step(alone[3:], alone[3].latents)
    assert stepping_together(together) == [[0, 2], [1], [3]]
    for group in ([0, 2], [1], [3], [0, 2]):
        members = [together[i] for i in group]
        take_step(members, torch.cat([member.latents.sin() for member in members]))
        for i in group:
            take_step([alone[i]], alone[i].latents.sin())
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.estimate is not None
        assert other.estimate is not None
        assert torch.equal(one.estimate, other.estimate)
        assert one.steps_done == one.scheduler.steps_done == other.steps_done
    assert [one.steps_done for one in together] == [2, 1, 2, 2]


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "lcm"])
def test_images_of_other_samplers_step_alone(base: BaseModel, sampler: SamplerName):
    cond = {"encoder_hidden_states": torch.zeros(1, 1, 1)}
    config = SampleConfig(steps=4, guidance_scale=1.0, sampler=sampler)
    assert stepping_together([start(base, seed, config, cond, None) for seed in (1, 2)]) == [[0], [1]]


def test_a_negative_prompt_counts_where_there_is_guidance(engine: StepEngine, base: BaseModel):
    plain = Client(engine, Model(base), request_of()).images()
    negative = Client(engine, Model(base), request_of(negative_prompt="red")).images()
    unguided = request_of(guidance=1.0)
    ignored = Client(engine, Model(base), request_of(guidance=1.0, negative_prompt="red")).images()
    assert differs(plain, negative) > 10
    assert differs(Client(engine, Model(base), unguided).images(), ignored) == 0


def test_calls_hold_unconditional_halves_only_where_guidance_needs_them(
    engine: StepEngine, base: BaseModel, gate: Gate
):
    gate.free.clear()
    clients = [Client(engine, Model(base), request_of(guidance=g, steps=2)) for g in (0.5, 1.0, 3.0)]
    gate.free.set()
    gate.steps.release()
    for client in clients:
        client.images()
    assert max(gate.rows) == 4


def test_new_requests_join_at_the_next_step_and_finished_ones_leave(
    engine: StepEngine, base: BaseModel, gate: Gate
):
    gate.free.clear()
    first = Client(engine, Model(base), request_of(steps=4, guidance=1.0))
    gate.steps.release()
    first.wait_for_start()
    second = Client(engine, Model(base), request_of(steps=2, guidance=1.0, seeds=(5, 6)))
    gate.steps.release(8)
    for client in (first, second):
        client.images()
    assert sorted(gate.rows) == [1, 1, 3, 3]


def test_a_cancelled_request_frees_its_samples_before_the_next_call(
    engine: StepEngine, base: BaseModel, gate: Gate
):
    gate.free.clear()
    long = Client(engine, Model(base), request_of(steps=50, guidance=1.0, seeds=range(4)))
    gate.steps.release()
    long.wait_for_start()
    other = Client(engine, Model(base), request_of(steps=3, guidance=1.0))
    long.generation.cancel()
    long.generation.cancel()
    gate.free.set()
    gate.steps.release()
    last = long.wait()
    assert isinstance(last, Failed)
    assert isinstance(last.error, Cancelled)
    other.images()
    assert sum(gate.rows) <= 4 * 2 + 3  # the call that ran, and at most one that had begun
    assert not any(isinstance(event, Drawn) for event in long.events)
    assert engine.load().requests == 0


def test_a_sample_that_is_not_finite_fails_its_request_alone(engine: StepEngine, base: BaseModel, gate: Gate):
    gate.poison = base.encode([POISON], 32, 32)["encoder_hidden_states"]
    good = [Client(engine, Model(base), request_of(prompt=prompt)) for prompt in PROMPTS]
    bad = Client(engine, Model(base), request_of(prompt=POISON))
    last = bad.wait()
    assert isinstance(last, Failed)
    assert isinstance(last.error, NonFiniteError)
    for client in good:
        assert differs(client.images(), solo(client.request)) <= 1


def test_a_call_that_does_not_fit_the_memory_is_made_smaller(engine: StepEngine, base: BaseModel, gate: Gate):
    gate.most_rows = 4
    clients = [Client(engine, Model(base), request_of(seeds=(i,), steps=2)) for i in range(6)]
    for client in clients:
        assert differs(client.images(), solo(client.request)) <= 1
    assert max(gate.rows) <= 4


def test_an_image_that_does_not_fit_alone_fails_and_the_engine_goes_on(
    engine: StepEngine, base: BaseModel, gate: Gate
):
    gate.most_rows = 1
    last = Client(engine, Model(base), request_of(guidance=3.0)).wait()
    assert isinstance(last, Failed)
    assert isinstance(last.error, torch.OutOfMemoryError)
    Client(engine, Model(base), request_of(guidance=1.0)).images()


def test_an_error_of_a_call_fails_its_requests_and_no_later_one(
    engine: StepEngine, base: BaseModel, gate: Gate
):
    gate.error = ValueError("the device is on fire")
    last = Client(engine, Model(base), request_of()).wait()
    assert isinstance(last, Failed)
    assert str(last.error) == "the device is on fire"
    gate.error = None
    Client(engine, Model(base), request_of()).images()


def test_previews_are_estimates_that_come_nearer(engine: StepEngine, base: BaseModel):
    request = request_of(steps=8, partial_images=3)
    client = Client(engine, Model(base), request)
    image = client.images()[0]
    previews = [event for event in client.events if isinstance(event, Preview)]
    assert [preview.number for preview in previews] == [0, 1, 2]
    far = [np.abs(preview.image.astype(float) - image).mean() for preview in previews]
    assert far[0] > far[2] > 0
    assert differs([image], solo(request)) <= 1


def test_events_come_in_order_and_the_last_is_one(engine: StepEngine, base: BaseModel):
    client = Client(engine, Model(base), request_of(seeds=(1, 2, 3)))
    client.images()
    kinds = [type(event) for event in client.events]
    assert kinds == [Started, Drawn, Drawn, Drawn, Finished]
    started = client.events[0]
    assert isinstance(started, Started)
    assert started.waited_s >= 0


def test_a_request_starts_once_though_its_images_go_one_after_the_other(base: BaseModel):
    engine = StepEngine(BatchSizes(fixed=1))
    try:
        client = Client(engine, Model(base), request_of(guidance=1.0, steps=2, seeds=(1, 2, 3)))
        client.images()
    finally:
        engine.close()
    assert [type(event) for event in client.events] == [Started, Drawn, Drawn, Drawn, Finished]


def test_settings_that_the_model_cannot_draw_with_are_refused_before_anything_is_queued(
    engine: StepEngine, base: BaseModel, gate: Gate
):
    for request in (request_of(steps=1000), request_of(steps=999, sampler="lcm")):
        with pytest.raises(ConfigError):
            engine.submit(Model(base), request, lambda event: None)
    assert engine.load().samples == 0
    assert gate.rows == []


def test_models_and_sizes_have_calls_of_their_own(engine: StepEngine, base: BaseModel, tmp_path: Any):
    other = BaseModel(ModelFolder(sd15_folder(tmp_path / "other")))
    clients = [
        Client(engine, Model(model), request_of(steps=2, size=size))
        for model in (base, other)
        for size in (32, 64)
    ]
    for client in clients:
        assert client.images()[0].shape[0] in (32, 64)


def test_load_counts_pixel_steps_until_nothing_is_left(engine: StepEngine, base: BaseModel, gate: Gate):
    gate.free.clear()
    client = Client(engine, Model(base), request_of(steps=4, guidance=2.0, seeds=(1, 2)))
    before = engine.load()
    assert (before.requests, before.samples) == (1, 2)
    assert before.work == 2 * 2 * 4 * 32 * 32
    gate.free.set()
    gate.steps.release()
    client.images()
    after = engine.load()
    assert (after.requests, after.samples, after.work) == (0, 0, 0)
    assert after.work_per_s > 0


def test_a_closed_engine_ends_what_it_holds_and_takes_nothing_more(base: BaseModel, gate: Gate):
    engine = StepEngine(BatchSizes(fixed=16))
    gate.free.clear()
    client = Client(engine, Model(base), request_of(steps=1000 // 2))
    client.wait_for_start()
    gate.free.set()
    gate.steps.release()
    engine.close()
    last = client.wait()
    assert isinstance(last, Failed)
    assert isinstance(last.error, Cancelled)
    with pytest.raises(Cancelled):
        engine.submit(Model(base), request_of(), lambda event: None)


def test_a_model_is_measured_before_its_first_request_and_between_the_turns_of_others(
    base: BaseModel, gate: Gate
):
    other = BaseModel(ModelFolder(MODEL_DIR))
    engine = StepEngine(BatchSizes(max_rows=4))
    try:
        gate.free.clear()
        client = Client(engine, Model(other), request_of(steps=2))
        gate.free.set()
        gate.rows.clear()
        engine.prepare(base)
        measured = list(gate.rows)
        assert measured == [2, 2, 2, 4, 4, 4]
        assert len(client.images()) == 1
        drawn = Client(engine, Model(base), request_of(steps=2)).images()
        assert gate.rows[len(measured) :] == [2, 2], "its first request measures nothing"
        assert np.array_equal(drawn[0], client.images()[0])
    finally:
        gate.free.set()
        engine.close()
    with pytest.raises(Cancelled):
        engine.prepare(base)


def test_a_model_that_cannot_be_measured_fails_its_load_and_not_the_engine(base: BaseModel, gate: Gate):
    engine = StepEngine(BatchSizes(max_rows=4))
    gate.error = RuntimeError("a damaged kernel")
    try:
        with pytest.raises(RuntimeError, match="a damaged kernel"):
            engine.prepare(base)
        gate.error = None
        gate.most_rows = 1
        engine.prepare(base)
        assert len(Client(engine, Model(base), request_of(guidance=1.0)).images()) == 1
    finally:
        gate.error, gate.most_rows = None, 0
        engine.close()


def test_the_smallest_call_of_nearly_the_best_throughput_is_chosen():
    assert best({2: 1.0, 4: 1.1, 8: 1.2, 16: 2.3}) == 8
    assert best({2: 1.0, 4: 2.0, 8: 4.0}) == 2
    assert best({2: 5.0, 4: 6.0}) == 2


def test_launch_bound_calls_are_those_that_rows_do_not_slow():
    assert launch_bound({2: 28.3, 4: 28.5, 8: 33.8, 16: 57.6}) == 8
    assert launch_bound({2: 10.0, 4: 20.0, 8: 40.0}) == 0


def test_measuring_times_each_call_and_ends_where_memory_does(base: BaseModel, gate: Gate):
    gate.most_rows = 4
    try:
        seconds = measure(base, (32, 32), [2, 4, 8, 16])
    finally:
        gate.most_rows = 0
    assert list(seconds) == [2, 4]
    assert all(taken > 0 for taken in seconds.values())
