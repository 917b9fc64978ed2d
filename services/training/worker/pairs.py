"""Where a run's pairs come from: the latent shards of a dataset, or rounds that the policy draws itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch

from dde_core.batches import BatchMaker
from dde_core.checkpoint import weights_on_host
from dde_core.errors import DataError
from dde_core.latents.ledger import Ledger
from dde_core.latents.reader import LatentReader
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from dde_core.rounds import RoundBatches, RoundRows
from dde_core.schedule import Schedule
from dde_core.train_step import PairErrors
from services.rollout import store
from services.rollout.maker import RoundMaker, inputs_digest, read_round_prompts
from services.rollout.store import RoundRecord
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.driver import capacity
from services.training.fence import Fence
from services.training.worker.collectives import any_worker
from services.training.worker.preemption import Preemption
from services.training.worker.recorder import Recorder

POLL_S = 1.0
"""How long workers wait for an actor before they look whether somebody wants the run to stop."""
ROOM_AFTER_S = 30.0
"""Actors start within seconds where the cluster has room for them."""


class PairSource(Protocol):
    """A context manager. ``num_pairs`` are those of an epoch, or of a round."""

    num_pairs: int

    def identity(self) -> dict[str, Any]:
        """What the pairs depend on, as JSON values, for the run's identity."""
        ...

    def ready(self, step: int) -> bool:
        """Wait for the pairs of global batch ``step``. A collective.

        False if a checkpoint is needed first: call it again after that, unless the run is to stop.
        """
        ...

    def rows(self, step: int) -> Any:
        """This worker's rows of global batch ``step``."""
        ...

    def make(self, part: Any) -> Any:
        """The batch of a worker's rows, or of a micro-batch of them."""
        ...

    def stored_errors(self, part: Any) -> PairErrors | None:
        """The reference's errors, if they are stored."""
        ...

    def settle(self) -> bool:
        """Wait until what a run needs to resume from a checkpoint of now is stored. A collective.

        False if it cannot be, and the run is to stop: it resumes from the checkpoint before.
        """
        ...

    def report_to(self, recorder: Recorder) -> None:
        """On rank 0: where events go from now on."""
        ...

    def metrics(self, step: int) -> dict[str, float]:
        """What is to be logged with the step: of a round at its first one."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ShardPairs:
    """Pairs of an encoded dataset."""

    def __init__(
        self,
        spec: TrainSpec,
        folder: ModelFolder,
        schedule: Schedule,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        assert spec.dataset
        self._spec = spec
        self._place = (rank, world_size)
        self._reader = LatentReader(*files.resolve(spec.dataset), spec.training.held_out_pairs)
        self._batches = BatchMaker(self._reader, folder, schedule, spec.objective, spec.training, device)
        self._ledger = Ledger(*files.resolve(spec.ledger), device) if spec.ledger else None
        self.num_pairs = len(self._reader)

    def identity(self) -> dict[str, Any]:
        return {
            "dataset": self._reader.manifest.digest,
            "ledger": self._ledger.record.key.name if self._ledger else None,
        }

    def ready(self, step: int) -> bool:
        return True

    def rows(self, step: int) -> Any:
        return self._batches.rows(step, *self._place)

    def make(self, part: Any) -> Any:
        return self._batches.make(part)

    def stored_errors(self, part: Any) -> PairErrors | None:
        return self._ledger.errors(part) if self._ledger else None

    def settle(self) -> bool:
        return True

    def report_to(self, recorder: Recorder) -> None:
        pass

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


class RoundPairs:
    """Pairs of rounds: before the first step of a round, the policy's weights go to the actors that draw it.

    Rank 0 has a ``RoundMaker``; the others read what it commits. A run that resumes within a round reads the
    round again; one that resumes at its beginning has the same weights, so the same round. With
    ``rollouts.lag`` the weights of before round r draw round r + 1, which no later weights could draw again:
    it is committed before a checkpoint is stored.
    """

    def __init__(
        self,
        spec: TrainSpec,
        folder: ModelFolder,
        policy: Policy,
        device: torch.device,
        rank: int,
        world_size: int,
        preemption: Preemption,
        fence: Fence,
    ) -> None:
        assert spec.rollouts
        self._spec = spec
        self._updates = spec.rollouts.updates_per_round
        self._policy = policy
        self._device = device
        self._rank = rank
        self._world_size = world_size
        self._preemption = preemption
        self._recorder: Recorder | None = None
        self._batches = RoundBatches(folder, spec.objective, spec.training, device)
        self._maker: RoundMaker | None = None
        if rank == 0:
            self._maker = RoundMaker(spec, capacity.needed(spec), fence.check)
        self._record: RoundRecord | None = None
        self._is_first = False
        self._shortage: str | None = None
        self._lag = spec.rollouts.lag
        self._is_drawing = False
        self._began = 0.0
        self.num_pairs = self._updates * spec.training.batch_size

    def identity(self) -> dict[str, Any]:
        return {
            "dataset": None,
            "ledger": None,
            "rollouts": inputs_digest(self._spec, read_round_prompts(self._spec)),
        }

    def ready(self, step: int) -> bool:
        round, update = divmod(step, self._updates)
        self._is_first = update == 0
        if self._record and self._record.round == round:
            if self._maker and self._is_drawing:
                self._maker.poll(0.0)  # hands out more work
            return True
        if update == 0 and not self._drawn(round):
            return False
        if update == 0 and self._lag and step + self._updates < self._spec.training.steps:
            self._begin(round + 1)
        record = store.read(self._spec.run, round)
        if record is None:
            raise DataError(f"round {round} of {self._spec.run!r} is gone, and step {step} needs it")
        parts = [
            RoundRows.from_parquet(store.read_pairs(self._spec.run, round, each)) for each in record.files
        ]
        self._batches.enter(round, RoundRows.joined(parts))
        self._record = record
        return True

    def settle(self) -> bool:
        return not self._lag or self._waited(
            lambda lacks_room: lacks_room and self._preemption.stop_requested
        )

    def _begin(self, round: int) -> None:
        weights = weights_on_host(self._policy, self._rank)
        if self._maker:
            self._maker.begin(round, weights)
        self._is_drawing = True
        self._began = time.monotonic()

    def _drawn(self, round: int) -> bool:
        """Draw a round. False if a checkpoint is needed first.

        A round that was to be drawn early has a record by now, but in a run that has got more steps.
        """
        if not self._is_drawing and not (self._lag and store.read(self._spec.run, round)):
            self._begin(round)
        needs = self._preemption
        return self._waited(lambda lacks_room: needs.stop_requested if self._lag else needs.checkpoint_needed)

    def _waited(self, gives_up: Callable[[bool], bool]) -> bool:
        """Whether the round that was begun is committed. Every worker waits for rank 0, unless ``gives_up``
        says to stop, given whether actors lack room."""
        while self._is_drawing:
            is_done = self._maker is not None and self._maker.poll(POLL_S) is not None
            shortage = ""
            if self._maker and not is_done and time.monotonic() - self._began > ROOM_AFTER_S:
                shortage = self._maker.missing_room() or ""
            self._report_room(shortage)
            is_done, lacks_room = any_worker([is_done, bool(shortage)], self._device)
            self._preemption.poll()
            self._is_drawing = not is_done
            if self._is_drawing and gives_up(lacks_room):
                return False
        return True

    def _report_room(self, shortage: str) -> None:
        """Say what the actors wait for, once, and when they have it."""
        if self._recorder and shortage != self._shortage:
            self._recorder.waiting(shortage)
            self._shortage = shortage

    def report_to(self, recorder: Recorder) -> None:
        self._recorder = recorder
        if self._maker:
            self._maker.report_to(recorder.event)

    def rows(self, step: int) -> Any:
        return self._batches.rows(step % self._updates, self._rank, self._world_size)

    def make(self, part: Any) -> Any:
        return self._batches.make(part)

    def stored_errors(self, part: Any) -> PairErrors | None:
        return self._batches.anchors(part)

    def metrics(self, step: int) -> dict[str, float]:
        if not (self._is_first and self._record):
            return {}
        record = self._record
        counts = {"round": record.round, "rollout_images": record.images, "rollout_s": record.seconds}
        return record.metrics | {name: float(value) for name, value in counts.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._maker:
            self._maker.close()
