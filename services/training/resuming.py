"""Where a run goes on: from its newest checkpoint that is whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.errors import ConfigError, DataError
from dde_core.latents.ledger import LedgerRecord
from dde_core.latents.schema import Manifest
from dde_core.models.policy import Policy
from services import checkpoints, ledgers
from services.checkpoints import CheckpointRecord
from services.contracts import TrainSpec
from services.observability import Journal

FREE = ("steps", "micro_batch_size", "gradient_checkpointing", "parallelism", "checkpoint_every", "keep_checkpoints")
"""Settings of training that may differ between a checkpoint and the run that goes on from it."""


def identity(spec: TrainSpec, manifest: Manifest) -> dict[str, Any]:
    """Everything that the weights after a step depend on, beside the order of additions. In JSON's types."""
    ledger: LedgerRecord | None = ledgers.read(spec.ledger) if spec.ledger else None
    training = {name: value for name, value in asdict(spec.training).items() if name not in FREE}
    values = {
        "dataset": manifest.digest,
        "model": ledgers.reference_digest(spec.model),
        "ledger": ledger.key.name if ledger else None,
        **{f"objective.{name}": value for name, value in asdict(spec.objective).items()},
        **{f"training.{name}": value for name, value in training.items()},
    }
    return json.loads(json.dumps(values))


def resume(
    run: str, same: dict[str, Any], policy: Policy, optimizer: Optimizer, calibration: Calibration, journal: Journal | None
) -> Progress:
    """Put the newest whole checkpoint's state into freshly made objects; without one the run begins.

    A checkpoint whose files are not those that were written is passed over, with a warning. Raises ConfigError where one
    belongs to another run, naming the first thing that differs.
    """
    for step in reversed(checkpoints.steps(run)):
        record = checkpoints.read(run, step)
        _refuse_other(record, same)
        try:
            with checkpoints.opened(run, record) as folder:
                return checkpoint.load(folder, policy, optimizer, calibration)
        except DataError as error:
            if journal:
                journal.event(f"the checkpoint of step {step} is passed over: {error}", "warning")
    return Progress(step=0, pairs_seen=0, images_seen=0)


def _refuse_other(record: CheckpointRecord, same: dict[str, Any]) -> None:
    for name, value in same.items():
        if record.identity.get(name) != value:
            reason = f"differs from the checkpoint of step {record.step}, which has {record.identity.get(name)!r}"
            raise ConfigError(name, value, reason)
