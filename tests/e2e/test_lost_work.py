"""Training loses no work on a cluster of two raylets whose workers, driver and second node are killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.requests import EvaluationConfig, ValidationConfig
from services.artifacts import checkpoints
from services.stages.specs import StageStopped, StopRequest, TrainSpec
from services.storage import files
from tests.support.encoded_pairs import write_encoded
from tests.support.ray_nodes import Nodes, two_nodes
from tests.support.stage_runs import Running, StageRuns, shapes_record
from tests.support.weights import base_weights, same_bits, update_distance, weights_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
OBJECTIVE = ObjectiveConfig(beta=500.0, calibration_bins=50)
TRAINING = TrainConfig(steps=300, batch_size=32, learning_rate=1e-4, checkpoint_every=3)
LONG_STEPS = TrainConfig(
    steps=30, batch_size=1024, micro_batch_size=64, learning_rate=1e-4, checkpoint_every=1000
)


class Trial(StageRuns):
    """Runs one after another, each with its own name. A killed driver is restarted as the next attempt."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        super().__init__(folder, {**nodes.env, "DDE_RESIZE_EVERY_S": "60"})
        self.nodes = nodes
        self.dataset = write_encoded(folder / "data", ModelFolder(MODEL_DIR), pairs=1024).as_uri()

    def spec(
        self, name: str, workers: int | tuple[int, int], training: TrainConfig, attempt: int = 1
    ) -> TrainSpec:
        folder = files.join(self.root, name)
        return TrainSpec(
            job=name,
            attempt=attempt,
            prefix=files.join(folder, f"a{attempt}"),
            dataset=self.dataset,
            model=shapes_record(),
            model_id=name,
            name=name,
            objective=OBJECTIVE,
            training=training,
            workers=workers,
            run=files.join(folder, "run"),
            output=files.join(folder, "model"),
        )

    def run(
        self, spec: TrainSpec, disturb: Callable[[Running, int], None] = lambda running, attempt: None
    ) -> list[str]:
        """Run to the end, whatever ``disturb`` does to the run; return all events."""
        events: list[str] = []
        for attempt in range(1, 40):
            again = spec.model_copy(
                update={"attempt": attempt, "prefix": spec.prefix.rsplit("/", 1)[0] + f"/a{attempt}"}
            )
            running = self.start("train", again)
            disturb(running, attempt)
            code = running.process.wait(1800)
            events += running.events()
            if code == 0:
                return events
            assert code == -signal.SIGKILL, running.failure() + "\n".join(events)
        raise AssertionError(f"{spec.name} has not ended after {attempt} attempts")

    def steps(self, spec: TrainSpec) -> list[int]:
        return checkpoints.steps(spec.run)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("lost")
    with two_nodes(folder / "cluster") as nodes:
        yield Trial(nodes, folder / "runs")


@pytest.fixture(scope="module")
def undisturbed(trial: Trial) -> dict[str, np.ndarray]:
    spec = trial.spec("undisturbed", 2, TRAINING)
    trial.run(spec)
    return weights_of(spec)


class Killer:
    """Kills a worker, the driver or the second node's raylet, ``times`` times, each after some progress.

    The node is started again, as an operator would do. ``kills`` lists what was killed.
    """

    def __init__(self, trial: Trial, spec: TrainSpec, times: int, seed: int, kinds: tuple[str, ...]) -> None:
        self._trial = trial
        self._spec = spec
        self._left = times
        self._random = random.Random(seed)
        self._kinds = kinds
        self.kills: list[str] = []

    def __call__(self, running: Running, attempt: int) -> None:
        while self._left and running.process.poll() is None:
            if not self._wait_for_progress(running):
                return
            kind = self._random.choice(self._kinds)
            workers, before = self._trial.nodes.workers(), max(self._trial.steps(self._spec), default=0)
            raylet = self._trial.nodes.raylet()
            if (kind == "worker" and not workers) or (kind == "raylet" and not raylet):
                continue
            self._left -= 1
            self.kills.append(kind)
            print(
                f"kill {len(self.kills)}: {kind}, newest checkpoint {before}, attempt {attempt}", flush=True
            )
            if kind == "worker":
                self._random.choice(workers).kill()
            elif kind == "driver":
                os.kill(running.process.pid, signal.SIGKILL)
                return
            else:
                raylet.kill()
                time.sleep(self._random.uniform(0, 3))
                self._trial.nodes.lose()
                self._trial.nodes.add()

    def _wait_for_progress(self, running: Running) -> bool:
        """Wait for a new checkpoint and a random moment more. False if the driver has ended before."""
        before = max(self._trial.steps(self._spec), default=0)
        while max(self._trial.steps(self._spec), default=0) <= before:
            if running.process.poll() is not None:
                return False
            time.sleep(0.05)
        time.sleep(self._random.uniform(0, 1.0))
        return running.process.poll() is None


def test_twenty_kills_of_worker_driver_or_raylet_change_no_bit(trial: Trial, undisturbed):
    spec = trial.spec("killed", 2, TRAINING)
    killer = Killer(trial, spec, 20, seed=1, kinds=("worker", "driver", "raylet"))
    events = trial.run(spec, killer)
    starts = [event for event in events if "workers" in event and "from step" in event]
    print("\n".join(starts))
    assert len(killer.kills) == 20
    assert set(killer.kills) == {"worker", "driver", "raylet"}
    assert all("on 2 workers" in event for event in starts)
    assert same_bits(undisturbed, weights_of(spec))


@pytest.mark.parametrize("how", ["pause", "signal"])
def test_a_stopped_run_releases_its_workers_and_resumes_to_the_same_bits(trial: Trial, undisturbed, how: str):
    """A pause is requested by a file, a preemption by SIGTERM to the driver."""
    spec = trial.spec(f"stopped-{how}", 2, replace(TRAINING, checkpoint_every=1000))
    running = trial.start("train", spec)
    wait_for(lambda: any("from step" in event for event in running.events()), running)
    time.sleep(2)
    if how == "pause":
        files.write_json(files.join(spec.prefix, "stop.json"), StopRequest(why="pause").model_dump())
    else:
        running.process.send_signal(signal.SIGTERM)
    requested = time.monotonic()
    assert running.process.wait(600) == 0, running.failure()
    while trial.nodes.workers():
        time.sleep(0.1)
    print(f"{how}: driver and workers gone after {time.monotonic() - requested:.1f} s")
    stopped = StageStopped.model_validate_json(files.read_bytes(files.join(spec.prefix, "stopped.json")))
    assert (stopped.why, 0 < stopped.step < TRAINING.steps) == (how, True)
    assert trial.steps(spec) == [stopped.step]
    again = trial.spec(f"stopped-{how}", 2, replace(TRAINING, checkpoint_every=1000), attempt=2)
    running = trial.start("train", again)
    running.finish()
    events = running.events()
    assert f"training on 2 workers (ddp) from step {stopped.step}" in events
    assert same_bits(undisturbed, weights_of(again))


def test_an_elastic_run_shrinks_when_a_node_is_lost_and_grows_when_it_returns(trial: Trial):
    """Few, long steps: rounding depends on the number of workers and grows over hundreds of steps.

    The only checkpoint is the one that is written because a node returns. The new workers resume from it.
    """
    spec, whole = trial.spec("elastic", (1, 2), LONG_STEPS), trial.spec("elastic-undisturbed", 2, LONG_STEPS)
    trial.run(whole)

    def lose_a_node(running: Running, attempt: int) -> None:
        wait_for(lambda: started(running, 2), running)
        trial.nodes.lose()
        wait_for(lambda: started(running, 1), running)
        trial.nodes.add()
        wait_for(lambda: sum("on 2 workers" in event for event in running.events()) == 2, running)

    events = trial.run(spec, lose_a_node)
    starts = [event for event in events if "workers" in event and "from step" in event]
    print("\n".join(starts))
    distance = update_distance(weights_of(spec), weights_of(whole), base_weights())
    print(f"relative L2 distance of the update, 2 -> 1 -> 2 workers against 2: {distance:.1e}")
    assert [event.split()[2] for event in starts] == ["2", "1", "2"]
    assert int(starts[-1].split()[-1]) > 0, "the checkpoint that was written because a node returned"
    assert distance < 1e-3


def test_a_node_that_is_drained_triggers_a_checkpoint(trial: Trial):
    """The node is drained as a pod's preStop hook does it."""
    spec = trial.spec("drained", 2, replace(TRAINING, checkpoint_every=1000))

    def drain(running: Running, attempt: int) -> None:
        wait_for(lambda: started(running, 2), running)
        trial.nodes.drain()
        wait_for(lambda: trial.steps(spec), running)
        print(f"drained: a checkpoint of step {trial.steps(spec)}")
        trial.nodes.lose()
        trial.nodes.add()

    events = trial.run(spec, drain)
    starts = [event for event in events if "workers" in event and "from step" in event]
    assert int(starts[1].split()[-1]) > 0


def test_validation_waits_for_the_end_of_training_if_the_cluster_has_no_room_for_it(trial: Trial):
    """The cluster has two CPUs, and two workers."""
    prompts = EvaluationConfig(prompts_uri=PROMPTS_FILE.as_uri(), num_prompts=2, sample=SampleConfig(steps=2))
    validation = ValidationConfig(every=3, num_prompts=2, best_metric="match")
    spec = trial.spec("no-room", 2, replace(TRAINING, steps=6))
    running = trial.start("train", spec.model_copy(update={"evaluation": prompts, "validation": validation}))
    running.finish()
    reported = [event for event in running.events() if "workers" in event or "the model after step" in event]
    print("\n".join(reported))
    assert [event.split(":")[0] for event in reported[1:]] == [
        "the cluster has no room for validation beside the workers",
        "training on 2 workers (ddp) from step 0",
        "the model after step 0",
        "the model after step 3",
        "the model after step 6",
    ]


def test_a_validation_that_fails_costs_a_warning_and_not_the_run(trial: Trial):
    evaluation = EvaluationConfig(prompts_uri=files.join(trial.root, "no-prompts.txt"), num_prompts=2)
    validation = ValidationConfig(every=3, num_prompts=2, best_metric="match")
    spec = trial.spec("not-validated", 1, replace(TRAINING, steps=6))
    running = trial.start(
        "train", spec.model_copy(update={"evaluation": evaluation, "validation": validation})
    )
    assert running.finish().step == 6, "the last step, because no validation succeeded"
    for step in (0, 3, 6):
        assert any(
            f"the model after step {step} could not be validated" in event for event in running.events()
        )


def started(running: Running, workers: int) -> bool:
    return any(f"training on {workers} workers" in event for event in running.events())


def wait_for(ready: Callable[[], object], running: Running, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert running.process.poll() is None, running.failure()
        assert time.monotonic() < deadline, running.events()
        time.sleep(0.1)
