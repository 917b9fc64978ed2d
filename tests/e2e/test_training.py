"""Training on real Ray Train: the same update on one worker and two. In this process: the golden loss.

Killed runs are tested in test_lost_work.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR, PAIRS_FILE
from services.api.records import TrainResult
from services.client.local import LocalSystem
from services.stages.journal import read_journal
from services.stages.specs import TrainSpec
from services.storage import files
from tests.support.encode_here import EncodeHere
from tests.support.encoded_pairs import train_here
from tests.support.stage_runs import Running, StageRuns, cluster_environment, shapes_record
from tests.support.weights import WEIGHTS, base_weights, same_bits, update_distance

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_100.json"
OBJECTIVE = ObjectiveConfig(beta=500.0, calibration_bins=50)
TWENTY_STEPS = TrainConfig(steps=20, batch_size=64, learning_rate=1e-4, checkpoint_every=5)


class Runs(StageRuns):
    """Training runs on the session's cluster."""

    def __init__(self, system: LocalSystem, folder: Path) -> None:
        super().__init__(folder, cluster_environment(system))
        self.base = shapes_record()
        self.run = cache(self._run)
        self.encoded = cache(self._encoded)

    def _encoded(self) -> str:
        return (
            self.start("encode", self.encode_spec("encode", PAIRS_FILE.as_uri(), self.base)).finish().dataset
        )

    def train(self, name: str, workers: int, training: TrainConfig) -> Running:
        spec = TrainSpec(
            **self.frame(name),
            dataset=self.encoded(),
            model=self.base,
            model_id=name,
            name=name,
            objective=OBJECTIVE,
            training=training,
            workers=workers,
            run=files.join(self.prefix(name), "run"),
            output=files.join(self.prefix(name), "model"),
        )
        return self.start("train", spec)

    def _run(self, name: str, workers: int, training: TrainConfig) -> dict[str, np.ndarray]:
        self.train(name, workers, training).finish()
        return self.weights(name)

    def weights(self, name: str) -> dict[str, np.ndarray]:
        done = TrainResult.model_validate_json(files.read_bytes(files.join(self.prefix(name), "done.json")))
        return load_file(f"{files.resolve(done.model.uri)[1]}/unet/{WEIGHTS}")

    def events(self, name: str) -> list[str]:
        """The messages of the run's journal."""
        return [
            entry.message for _, some in read_journal(self.prefix(name), 0) for entry in some if entry.message
        ]

    def metrics(self, name: str, metric: str) -> dict[int, float]:
        """The last value of each step's metric."""
        entries = [entry for _, some in read_journal(self.prefix(name), 0) for entry in some]
        return {entry.step: entry.metrics[metric] for entry in entries if metric in (entry.metrics or {})}


def local(dataset: str) -> Path:
    return Path(files.resolve(dataset)[1])


@pytest.fixture(scope="module")
def runs(system: LocalSystem, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(system, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
def test_one_and_two_workers_make_the_same_update_up_to_rounding(runs: Runs, tmp_path: Path):
    train_here(tmp_path, ModelFolder(MODEL_DIR), local(runs.encoded()), OBJECTIVE, **asdict(TWENTY_STEPS))
    one = load_file(tmp_path / "run" / "checkpoints" / "step-00000020" / "weights" / WEIGHTS)
    distance = update_distance(runs.run("two", 2, TWENTY_STEPS), one, base_weights())
    print(f"relative L2 distance of the update, 1 against 2 workers, 20 steps: {distance:.2e}")
    assert distance < 1e-3


@pytest.mark.slow
def test_two_workers_under_fsdp_make_the_update_of_two_under_ddp(runs: Runs):
    """With micro-batches whose number does not divide the pairs of a step."""
    sharded = runs.run("sharded", 2, replace(TWENTY_STEPS, parallelism="fsdp", micro_batch_size=12))
    assert any("on 2 workers (fsdp) from step 0" in event for event in runs.events("sharded"))
    distance = update_distance(sharded, runs.run("two", 2, TWENTY_STEPS), base_weights())
    print(f"relative L2 distance of the update, FSDP2 against DDP, 2 workers, 20 steps: {distance:.2e}")
    assert distance < 1e-3


@pytest.mark.slow
def test_two_runs_on_the_same_number_of_workers_are_equal_to_the_bit(runs: Runs):
    assert same_bits(runs.run("two", 2, TWENTY_STEPS), runs.run("two-again", 2, TWENTY_STEPS))
    assert runs.metrics("two", "loss") == runs.metrics("two-again", "loss")


@pytest.mark.timeout(900)
def test_the_loss_curve_of_100_steps_is_the_golden_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``make golden`` rewrites the curve after an intended change. Without a cluster: in this process."""
    model = ModelFolder(MODEL_DIR)
    encoded = EncodeHere(monkeypatch, model, tmp_path / "encoded")(PAIRS_FILE).dataset
    training = TrainConfig(steps=100, batch_size=16, learning_rate=2e-5, checkpoint_every=100)
    metrics = train_here(tmp_path / "run", model, local(encoded), OBJECTIVE, **asdict(training))
    losses = [each["loss"] for each in metrics]
    assert len(losses) == 100
    if os.environ.get("DDE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses))
    golden = json.loads(GOLDEN.read_text())
    assert losses[:50] == pytest.approx(golden[:50], rel=5e-4)
    assert losses[50:] == pytest.approx(golden[50:], rel=1e-2), (
        "training amplifies the last digits of another CPU"
    )
