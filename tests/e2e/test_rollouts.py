"""On-policy runs on a real Ray cluster: the same weights on any number of actors, and whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.shapes import PROMPTS_FILE
from services.api.requests import Rollouts
from services.artifacts import checkpoints
from services.artifacts.scorers import BUILT_IN
from services.client.processes import environment, wait_until
from services.client.ray_head import RayHead
from services.control.review import TRANSIENT
from services.rollout import store
from services.rollout.maker import weights_digest
from services.stages import layout
from services.stages.specs import StageStopped, StopRequest, TrainSpec
from services.storage import files
from tests.support.ray_nodes import two_nodes
from tests.support.stage_runs import Running, StageRuns, shapes_record
from tests.support.weights import base_weights, same_bits, update_distance, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
OBJECTIVE = ObjectiveConfig(
    method="tailorpo",
    beta=100.0,
    guidance_scale=3.0,
    candidates=2,
    lookahead=1,
    t_min=802,
    t_max=902,
)
TRAINING = TrainConfig(steps=4, batch_size=16, learning_rate=1e-4, checkpoint_every=3)
ROLLOUTS = Rollouts(
    prompts_uri=PROMPTS_FILE.as_uri(),
    num_prompts=40,
    scorers={"taste": 1.0},
    prompts_per_round=12,
    prompts_per_call=3,
    updates_per_round=2,
)


class Trial(StageRuns):
    """Runs one after another, each with its own name. As in the control plane, the next attempt starts after
    a driver's death and after a failure that may pass."""

    def __init__(self, head: RayHead, folder: Path, mark: str) -> None:
        address = f"127.0.0.1:{head.ports.gcs}"
        env = environment(mark, {"RAY_ADDRESS": address, "RAY_TRAIN_V2_ENABLED": "1", **head.auth})
        super().__init__(folder, env)
        self.head = head

    def spec(self, name: str, attempt: int = 1, workers: int = 1, **more: Any) -> TrainSpec:
        folder = files.join(self.root, name)
        rollouts = more.pop("rollouts", ROLLOUTS)
        given: dict[str, Any] = {
            "objective": OBJECTIVE,
            "training": TRAINING,
            "rollouts": rollouts,
            "rewards": [BUILT_IN[each] for each in sorted(rollouts.scorers)],
            "workers": workers,
        }
        own = {"attempt": attempt, "prefix": files.join(folder, f"a{attempt}")}
        return TrainSpec(
            **{**self.frame(name), **given, **more, **own},
            model=shapes_record(),
            model_id=name,
            name=name,
            run=files.join(folder, "run"),
            output=files.join(folder, "model"),
        )

    def run(self, spec: TrainSpec, disturb: Callable[[Running], None] = lambda running: None) -> list[str]:
        """Run to the end, whatever ``disturb`` does to the run; return all events."""
        events: list[str] = []
        for attempt in range(1, 30):
            prefix = spec.prefix.rsplit("/", 1)[0] + f"/a{attempt}"
            running = self.start("train", spec.model_copy(update={"attempt": attempt, "prefix": prefix}))
            disturb(running)
            code = running.process.wait(1800)
            events += running.events()
            if code == 0:
                return events
            if code != -signal.SIGKILL:
                failure = json.loads(running.failure())
                assert failure["code"] in TRANSIENT, (failure, events)
        raise AssertionError(f"{spec.name} has not ended")

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes whose title has this name."""
        found = []
        for process in psutil.Process(self.head.child.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    folder = tmp_path_factory.mktemp("rollouts")
    cluster = folder / "cluster"
    cluster.mkdir()
    with RayHead(cluster, str(cluster), num_cpus=6) as head:
        wait_until(head.is_ready, "Ray's dashboard does not answer", [head.child], 120)
        yield Trial(head, folder / "runs", str(cluster))


@pytest.fixture(scope="module")
def undisturbed(trial: Trial) -> dict[str, np.ndarray]:
    spec = trial.spec("undisturbed")
    for event in trial.run(spec):
        print(event)
    weights = weights_of(spec)
    assert not same_bits(weights, base_weights())
    return weights


def with_actors(actors: int, reward_actors: int) -> Rollouts:
    return ROLLOUTS.model_copy(update={"actors": actors, "reward_actors": reward_actors})


@pytest.mark.parametrize(("actors", "reward_actors"), [(3, 0), (2, 2)])
def test_the_number_of_actors_changes_no_bit(
    trial: Trial, undisturbed: dict[str, np.ndarray], actors: int, reward_actors: int
):
    spec = trial.spec(f"actors-{actors}-{reward_actors}", rollouts=with_actors(actors, reward_actors))
    trial.run(spec)
    assert same_bits(weights_of(spec), undisturbed)


def test_only_the_rounds_of_the_kept_checkpoints_are_left(trial: Trial, undisturbed: dict[str, np.ndarray]):
    run = trial.spec("undisturbed").run
    assert checkpoints.steps(run) == [3, 4]
    assert [number for number in range(3) if store.read(run, number)] == [1]


class Killer:
    """Kills ``times`` processes, of all kinds in turn and in random order, each at a random moment."""

    KINDS = ("RolloutActor", "RewardActor", "RayTrainWorker", "driver")

    def __init__(self, trial: Trial, times: int, seed: int, kinds: tuple[str, ...] = KINDS) -> None:
        self._trial = trial
        self._random = random.Random(seed)
        repeated = list(kinds) * (times // len(kinds) + 1)
        self._todo = repeated[:times]
        self._random.shuffle(self._todo)
        self.kills: list[str] = []

    @property
    def left(self) -> list[str]:
        """Kills for which the run was too short."""
        return self._todo

    def __call__(self, running: Running) -> None:
        while self._todo and running.process.poll() is None:
            kind = self._todo[0]
            victims = [] if kind == "driver" else self._trial.processes(kind)
            if not victims and kind != "driver":
                time.sleep(0.5)
                continue
            time.sleep(self._random.uniform(0.5, 7.0))
            if running.process.poll() is not None:
                return
            if kind == "driver":
                os.kill(running.process.pid, signal.SIGKILL)
            else:
                with suppress(psutil.NoSuchProcess):
                    self._random.choice(victims).kill()
            self.kills.append(self._todo.pop(0))
            print(f"kill {len(self.kills)}: {kind}", flush=True)
            if kind == "driver":
                return


def test_a_killed_rollout_actor_changes_no_bit(trial: Trial, undisturbed: dict[str, np.ndarray]):
    spec = trial.spec("killed-actor", rollouts=with_actors(2, 0))
    killer = Killer(trial, 1, 0, ("RolloutActor",))
    trial.run(spec, killer)
    assert killer.kills == ["RolloutActor"]
    assert same_bits(weights_of(spec), undisturbed)


def test_ten_random_kills_of_drivers_workers_and_actors_change_no_bit(trial: Trial):
    training = replace(TRAINING, steps=40)
    straight = trial.spec("straight", training=training)
    trial.run(straight)
    spec = trial.spec("killed", training=training, rollouts=with_actors(2, 1))
    killer = Killer(trial, 10, 17)
    trial.run(spec, killer)
    print(killer.kills)
    assert not killer.left, "the run ended before all kills"
    assert same_bits(weights_of(spec), weights_of(straight))


def test_a_pause_within_a_round_stops_at_once_and_changes_no_bit(
    trial: Trial, undisturbed: dict[str, np.ndarray]
):
    spec = trial.spec("paused")
    running = trial.start("train", spec)
    wait_until(lambda: bool(trial.processes("RolloutActor")), "no actor draws", [], 240)
    wait_until(lambda: drawn_files(spec) > 0, "no chunk is drawn", [], 240)
    files.write_json(layout.stop_uri(spec.prefix), StopRequest(why="pause").model_dump())
    assert running.process.wait(120) == 0, running.failure()
    stopped = StageStopped.model_validate_json(files.read_bytes(layout.stopped_uri(spec.prefix)))
    assert stopped.step < TRAINING.steps
    again = trial.spec("paused", attempt=2)
    assert trial.start("train", again).process.wait(900) == 0
    assert same_bits(weights_of(again), undisturbed)


# ---- several training workers


def test_two_training_workers_share_the_rounds_of_one(trial: Trial, undisturbed: dict[str, np.ndarray]):
    spec = trial.spec("two-workers", workers=2)
    trial.run(spec)
    one, two = (store.read(trial.spec(name).run, 1) for name in ("undisturbed", "two-workers"))
    assert one
    assert two
    assert (one.slots, one.pairs) == (two.slots, two.pairs)
    distance = update_distance(weights_of(spec), undisturbed, base_weights())
    print(f"relative L2 distance of the update, two workers against one: {distance:.1e}")
    assert distance < 1e-3


def test_kills_change_no_bit_of_a_run_of_two_workers(trial: Trial):
    training = replace(TRAINING, steps=20)
    straight = trial.spec("two-straight", workers=2, training=training)
    trial.run(straight)
    spec = trial.spec("two-killed", workers=2, training=training, rollouts=with_actors(2, 1))
    killer = Killer(trial, 4, 5, ("RolloutActor", "RayTrainWorker", "driver"))
    trial.run(spec, killer)
    assert not killer.left, "the run ended before all kills"
    assert same_bits(weights_of(spec), weights_of(straight))


def test_a_drain_within_a_round_stores_a_checkpoint_while_the_round_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
):
    """Three workers and an actor fill two nodes of two CPUs; both have a worker."""
    folder = tmp_path_factory.mktemp("drained")
    long_rounds = {
        "workers": 3,
        "training": replace(TRAINING, checkpoint_every=1000),
        "rollouts": ROLLOUTS.model_copy(update={"prompts_per_round": 192}),
    }
    with two_nodes(folder / "cluster", num_cpus=2) as nodes:
        trial = Trial(nodes.head, folder / "runs", str(folder / "cluster"))
        straight = trial.spec("straight", **long_rounds)
        trial.run(straight)
        spec = trial.spec("drained", **long_rounds)

        def drain(running: Running) -> None:
            wait_until(lambda: drawn_files(spec, 1) > 0, "round 1 is not drawn", [], 600)
            nodes.drain()
            wait_until(lambda: bool(checkpoints.steps(spec.run)), "no checkpoint is stored", [], 60)
            assert checkpoints.steps(spec.run) == [2]
            assert store.read(spec.run, 1) is None, "the round was still being drawn"
            nodes.lose()
            nodes.add()

        trial.run(spec, drain)
        # Three workers add gradients in another order after a restart.
        assert update_distance(weights_of(spec), weights_of(straight), base_weights()) < 1e-4


# ---- rounds that are drawn early


EARLY: dict[str, Any] = {
    "rollouts": ROLLOUTS.model_copy(update={"lag": 1, "actors": 2}),
    "training": replace(TRAINING, steps=6),
}
"""Three rounds of two updates; the checkpoint of step 3 is within the second."""


@pytest.fixture(scope="module")
def early(trial: Trial) -> dict[str, np.ndarray]:
    spec = trial.spec("early", **EARLY)
    trial.run(spec)
    return weights_of(spec)


def test_the_next_round_is_drawn_with_the_weights_of_before_this_one(
    trial: Trial, early: dict[str, np.ndarray]
):
    run = trial.spec("early").run
    second, third = (store.read(run, number) for number in (1, 2))
    assert second
    assert third
    base = {name: torch.from_numpy(value) for name, value in base_weights().items()}
    assert second.weights == weights_digest(base)
    assert third.weights != second.weights


def test_kills_change_no_bit_of_a_run_whose_rounds_are_drawn_early(
    trial: Trial, early: dict[str, np.ndarray]
):
    spec = trial.spec("early-killed", **EARLY)
    killer = Killer(trial, 3, 3, ("RolloutActor", "RayTrainWorker", "driver"))
    trial.run(spec, killer)
    assert not killer.left, "the run ended before all kills"
    assert same_bits(weights_of(spec), early)


def test_a_pause_stores_the_round_that_is_drawn_early(trial: Trial, early: dict[str, np.ndarray]):
    spec = trial.spec("early-paused", **EARLY)
    running = trial.start("train", spec)
    wait_until(lambda: store.read(spec.run, 0) is not None, "no round is drawn", [], 240)
    files.write_json(layout.stop_uri(spec.prefix), StopRequest(why="pause").model_dump())
    assert running.process.wait(240) == 0, running.failure()
    stopped = StageStopped.model_validate_json(files.read_bytes(layout.stopped_uri(spec.prefix)))
    assert 0 < stopped.step < 6
    assert store.read(spec.run, stopped.step // 2 + stopped.step % 2), "what its resumption trains on next"
    again = trial.spec("early-paused", attempt=2, **EARLY)
    assert trial.start("train", again).process.wait(900) == 0
    assert same_bits(weights_of(again), early)


def drawn_files(spec: TrainSpec, round: int = 0) -> int:
    return len(files.list_files(layout.round_folder(spec.run, round)))
