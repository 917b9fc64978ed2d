"""Resumes a run from its newest usable checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch.optim import Optimizer

from dde_core import checkpoint
from dde_core.calibration import Calibration
from dde_core.checkpoint import Progress
from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.models.policy import Policy
from services.artifacts import checkpoints, ledgers
from services.artifacts.checkpoints import BrokenCheckpoint, CheckpointRecord
from services.stages.journal import Journal
from services.stages.specs import TrainSpec
from services.training.worker.collectives import broadcast_from_rank_zero

MAY_DIFFER = (
    "steps",
    "micro_batch_size",
    "gradient_checkpointing",
    "parallelism",
    "checkpoint_every",
    "keep_checkpoints",
)
"""Training settings that a resumed run may change."""
DEFAULTS: dict[str, Any] = {
    f"{section}.{field.name}": field.default
    for section, config in (("objective", ObjectiveConfig), ("training", TrainConfig))
    for field in fields(config)
}
"""Of every setting: what a run did before there was the setting."""
START = Progress(step=0, pairs_seen=0, images_seen=0)


def run_identity(spec: TrainSpec, pairs: dict[str, Any]) -> dict[str, Any]:
    """All that the weights after a step depend on, except the order of additions, as JSON values by field.

    ``pairs`` is the identity of the source of pairs.
    """
    training = {name: value for name, value in asdict(spec.training).items() if name not in MAY_DIFFER}
    fields = {
        **pairs,
        "model": ledgers.reference_digest(spec.model),
        **{f"objective.{name}": value for name, value in asdict(spec.objective).items()},
        **{f"training.{name}": value for name, value in training.items()},
    }
    identity: dict[str, Any] = json.loads(json.dumps(fields))
    return identity


@dataclass(frozen=True, eq=False)
class TrainState:
    """The newly made objects that a checkpoint is loaded into."""

    policy: Policy
    optimizer: Optimizer
    calibration: Calibration

    def load(self, run: str, record: CheckpointRecord, verify: bool) -> Progress:
        """Raises BrokenCheckpoint if ``verify`` and a file differs from what was written."""
        with checkpoints.opened(run, record, verify) as folder:
            return checkpoint.load(folder, self.policy, self.optimizer, self.calibration)


def resume(run: str, identity: dict[str, Any], state: TrainState, rank: int, journal: Journal) -> Progress:
    """Load the newest usable checkpoint into ``state``; START if there is none. Rank 0 chooses for all.

    A checkpoint with damaged files is invalidated, with a warning. Raises ConfigError for a checkpoint of
    another run, naming the first field that differs, and DataError for one that another version of this code
    wrote: that version can still resume from it, so it is kept.
    """
    progress = _load_newest(run, identity, state, journal) if rank == 0 else START
    step = broadcast_from_rank_zero(progress.step, state.policy.device)
    if rank > 0 and step > 0:
        progress = state.load(run, checkpoints.read(run, step), verify=False)
    return progress


def _load_newest(run: str, identity: dict[str, Any], state: TrainState, journal: Journal) -> Progress:
    for step in reversed(checkpoints.steps(run)):
        try:
            record = checkpoints.read(run, step)
            _check_identity(record, identity)
            return state.load(run, record, verify=True)
        except BrokenCheckpoint as error:
            journal.event(f"invalidated the checkpoint of step {step}: {error}", "warning")
            journal.flush()
            checkpoints.invalidate(run, step)
    return START


def _check_identity(record: CheckpointRecord, identity: dict[str, Any]) -> None:
    """Raises ConfigError for the first field that differs. One that an older record lacks had its default."""
    for name, value in identity.items():
        earlier = record.identity.get(name, DEFAULTS.get(name))
        if earlier != value:
            older = "" if name in record.identity else ", because it is older than the setting"
            reason = f"differs from the checkpoint of step {record.step}, which has {earlier!r}{older}"
            raise ConfigError(name, value, reason)
