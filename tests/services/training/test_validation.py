"""Checkpoints that cannot be validated, on Ray itself."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from dde_core import checkpoint
from dde_core.config import ObjectiveConfig
from dde_core.models.folder import ModelFolder
from services.api.records import Validated
from services.artifacts import checkpoints
from services.stages import layout
from services.stages.journal import Journal, read_journal
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.driver.supervision import POLL_EVERY_S, Validator
from tests.support.encoded_pairs import train_here, train_spec, write_encoded
from tests.support.tiny_folders import sd15_folder

TRAINING = {"steps": 2, "batch_size": 4, "checkpoint_every": 2, "held_out_pairs": 2}


@pytest.fixture
def cluster():
    yield ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.shutdown()


@pytest.mark.slow
def test_a_checkpoint_of_nan_weights_is_given_up_at_once_with_its_own_error(cluster, tmp_path: Path):
    model = ModelFolder(sd15_folder(tmp_path / "sd15"))
    encoded = write_encoded(tmp_path / "pairs", model)
    train_here(tmp_path / "job", model, encoded, ObjectiveConfig(), **TRAINING)
    spec = train_spec(tmp_path / "job", model, encoded, ObjectiveConfig(), **TRAINING)
    replace_weights_by_nan(spec, step=2)
    journal = Journal(spec.prefix)
    validator = Validator(spec, journal)
    validator.training_has_ended()
    deadline = time.monotonic() + 120
    while not validator.is_done:
        assert time.monotonic() < deadline
        validator.poll()
        time.sleep(POLL_EVERY_S / 10)
    journal.flush()
    outcome = Validated.model_validate_json(files.read_bytes(layout.outcome_uri(spec.run, 2)))
    why = "NonFiniteError: the margin of held-out pairs is not finite in 2 of 2 values"
    assert (outcome.error, outcome.metrics) == (why, {})
    events = [entry for _, some in read_journal(spec.prefix, 0) for entry in some if entry.message]
    last = events[-1]
    assert (last.level, last.message) == ("warning", f"the model after step 2 could not be validated: {why}")
    assert validator._tries == {2: 1}


def replace_weights_by_nan(spec: TrainSpec, step: int) -> None:
    """Commit the checkpoint again. Training stores none like this; those of other versions may be."""
    record = checkpoints.read(spec.run, step)
    folder = Path(files.resolve(layout.checkpoint_folder(spec.run, step))[1])
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint.json"))
    for file in checkpoint.model_weights(copy).rglob("*.safetensors"):
        save_file(
            {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file
        )
    with checkpoints.committed(spec.run, record, before_record=lambda: None) as new:
        shutil.copytree(copy, new, dirs_exist_ok=True)
    shutil.rmtree(copy)
