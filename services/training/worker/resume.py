"""Where a run goes on: from its newest checkpoint that is whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch.optim import Optimizer

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.errors import ConfigError
from dde_core.latents.ledger import Ledger
from dde_core.latents.schema import Manifest
from dde_core.models.policy import Policy
from services.artifacts import checkpoints, ledgers
from services.artifacts.checkpoints import BrokenCheckpoint, CheckpointRecord
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.training.worker.collectives import from_rank_zero

FREE = (
    "steps",
    "micro_batch_size",
    "gradient_checkpointing",
    "parallelism",
    "checkpoint_every",
    "keep_checkpoints",
)
"""Settings of training that may differ between a checkpoint and the run that goes on from it."""
BEGINNING = Progress(step=0, pairs_seen=0, images_seen=0)


def identity(spec: TrainSpec, manifest: Manifest, ledger: Ledger | None) -> dict[str, Any]:
    """Everything that the weights after a step depend on, beside the order of additions. In JSON's types."""
    training = {name: value for name, value in asdict(spec.training).items() if name not in FREE}
    values = {
        "dataset": manifest.digest,
        "model": ledgers.reference_digest(spec.model),
        "ledger": ledger.record.key.name if ledger else None,
        **{f"objective.{name}": value for name, value in asdict(spec.objective).items()},
        **{f"training.{name}": value for name, value in training.items()},
    }
    return json.loads(json.dumps(values))


@dataclass(frozen=True, eq=False)
class State:
    """What a checkpoint is put back into: objects that were freshly made."""

    policy: Policy
    optimizer: Optimizer
    calibration: Calibration

    def load(self, run: str, record: CheckpointRecord, verify: bool) -> Progress:
        """Raises BrokenCheckpoint where the files are not those that were written."""
        with checkpoints.opened(run, record, verify) as folder:
            return checkpoint.load(folder, self.policy, self.optimizer, self.calibration)


def resume(run: str, same: dict[str, Any], state: State, rank: int, journal: Journal) -> Progress:
    """Go on from the newest checkpoint that is whole; without one the run begins. Rank 0 chooses, all follow.

    A checkpoint whose files are not those that were written is put aside, with a warning. Raises ConfigError where one
    belongs to another run, naming the first thing that differs, and DataError where it is whole and this code cannot read it:
    work that another version can go on with is not thrown away.
    """
    done = _newest(run, same, state, journal) if rank == 0 else BEGINNING
    step = from_rank_zero(done.step, state.policy.device)
    if rank > 0 and step:
        done = state.load(run, checkpoints.read(run, step), verify=False)
    return done


def _newest(run: str, same: dict[str, Any], state: State, journal: Journal) -> Progress:
    for step in reversed(checkpoints.steps(run)):
        try:
            record = checkpoints.read(run, step)
            _refuse_other(record, same)
            return state.load(run, record, verify=True)
        except BrokenCheckpoint as error:
            journal.event(f"the checkpoint of step {step} is put aside: {error}", "warning")
            journal.flush()
            checkpoints.discard(run, step)
    return BEGINNING


def _refuse_other(record: CheckpointRecord, same: dict[str, Any]) -> None:
    for name in [name for name in same if name in record.identity]:  # another version may know of more
        if record.identity[name] != same[name]:
            reason = f"differs from the checkpoint of step {record.step}, which has {record.identity[name]!r}"
            raise ConfigError(name, same[name], reason)
