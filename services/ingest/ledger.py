"""The ledger stage: the reference errors of every draw of every pair, computed by the frozen model.

The pass is forward only, on Ray Data actors. Each file holds one shard at one draw and is written whole, so a
killed pass resumes with the files that are missing. All draws of a shard are consecutive, so the shard is
fetched once. The arithmetic and the micro-batch size are those of training.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from numpy.typing import NDArray

from dde_core.batches import BatchMaker, slices
from dde_core.config import MAX_DRAWS, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.latents.ledger import LedgerKey, LedgerRecord, committed, complete_draws, ledger_file
from dde_core.latents.reader import LatentReader
from dde_core.latents.rows import LatentRows
from dde_core.latents.schema import Manifest
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, use_deterministic_kernels
from dde_core.step_metrics import format_metrics, logit_deviation
from dde_core.train_step import PairErrors, check_finite, pair_errors, preference_margin
from services.api.records import LedgerResult
from services.artifacts import ledgers, models
from services.stages import layout
from services.stages.journal import Journal
from services.stages.pace import Pace
from services.stages.specs import LedgerSpec
from services.storage import files

DEFAULT_BATCH_PAIRS = 32
"""The batch of the pass where the run sets no micro-batch size."""
REPEATED_PAIRS = 5
"""So many pairs of each file are computed again, in a batch of their own: the difference is rounding."""
MAX_BLOCKS = 1000

ShardDraw = dict[str, int]
"""What one file holds: ``shard`` and ``draw``."""


def ledger(spec: LedgerSpec, journal: Journal) -> LedgerResult:
    """Find a ledger that serves the run, or write the missing files of one under the run's own key.

    Raises ConfigError for more than MAX_DRAWS draws, such as for a run over very many epochs that sets none.
    """
    started = time.monotonic()
    models.check_digests(spec.model)
    required = ledgers.requirements_of(spec)
    if required.draws > MAX_DRAWS:
        raise ConfigError(
            "training.draws",
            required.draws,
            f"(one for each epoch where it is 0) must be at most {MAX_DRAWS}",
        )
    found = ledgers.find(required)
    reused = found is not None
    if found is None:
        key, objective = required.choices[0]
        _write(spec, journal, key, objective, required.draws)
        found = ledgers.find(required)
    assert found is not None, "it has just been written"
    journal.event(f"{found.record.draws} draws of {sum(found.record.rows)} pairs in ledger {found.uri}")
    return LedgerResult(
        ledger=found.uri,
        draws=found.record.draws,
        pairs=sum(found.record.rows),
        noise=found.record.noise,
        reused=reused,
        seconds=time.monotonic() - started,
    )


def _write(
    spec: LedgerSpec, journal: Journal, key: LedgerKey, objective: ObjectiveConfig, draws: int
) -> None:
    """Compute the missing files, then write the record of all files."""
    started = time.monotonic()
    folder = layout.ledger_folder(spec.dataset, key.name)
    manifest = Manifest.from_json(files.read_bytes(layout.manifest_uri(spec.dataset)))
    rows = tuple(shard.rows for shard in manifest.shards)
    present = committed(files.list_files(folder))
    missing = [
        {"shard": shard, "draw": draw}
        for shard in range(len(rows))
        for draw in range(draws)
        if (shard, draw) not in present
    ]
    journal.event(
        f"reference ledger {key.name}: {draws} draws of {sum(rows)} pairs, {len(missing)} files to write"
    )
    progress = Progress(journal, sum(rows[shard_draw["shard"]] for shard_draw in missing))
    samples: list[NDArray[Any]] = []
    for written in compute(missing, spec, objective, folder):
        progress.add(written["pairs"])
        samples.append(np.array([written["t"], written["margin"]]))
    noise = _noise(samples, ModelFolder(*models.fetch(spec.model)))
    ledger_files = complete_draws(committed(files.list_files(folder)), len(rows))
    record = LedgerRecord(
        key=key, rows=rows, files=ledger_files, noise=noise, seconds=time.monotonic() - started
    )
    files.write_bytes(files.join(folder, record.name), record.to_json())
    if noise:
        journal.event(f"rounding moves the logit of the reference against itself: {format_metrics(noise)}")


def _noise(samples: list[NDArray[Any]], folder: ModelFolder) -> dict[str, float]:
    """The logit's rounding noise at DDE's beta, from the repeated pairs; empty where nothing was computed."""
    if not samples:
        return {}
    t, margin = np.concatenate(samples, axis=1)
    schedule = folder.schedule()
    snr = schedule.snr[torch.from_numpy(t).long()]
    return logit_deviation(t, margin, snr, ObjectiveConfig().beta, schedule.T)


def compute(
    shard_draws: list[ShardDraw], spec: LedgerSpec, objective: ObjectiveConfig, folder: str
) -> Iterator[dict[str, Any]]:
    """Write the files. Yields {pairs, t, margin} of each, in any order: see ``ReferencePass``."""
    if not shard_draws:
        return
    work = ray.data.from_items(shard_draws, override_num_blocks=min(len(shard_draws), MAX_BLOCKS))
    written = work.map_batches(
        ReferencePass,
        fn_constructor_args=(spec, objective, folder),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=spec.actors),
        num_cpus=1,
        num_gpus=1 if spec.use_gpu else 0,
    )
    yield from written.iter_rows()


class ReferencePass:
    """The frozen model of one actor."""

    def __init__(self, spec: LedgerSpec, objective: ObjectiveConfig, folder: str) -> None:
        use_deterministic_kernels()
        device = torch.device("cuda" if spec.use_gpu else "cpu")
        model = ModelFolder(*models.fetch(spec.model))
        arithmetic = TrainConfig(precision=spec.training.precision, compile=spec.training.compile)
        self._frozen = Policy(model, arithmetic, device)
        self._schedule = model.schedule()
        self._error = objective.error
        self._reader = LatentReader(*files.resolve(spec.dataset))
        self._batches = BatchMaker(self._reader, model, self._schedule, objective, spec.training, device)
        self._batch_pairs = spec.training.micro_batch_size or DEFAULT_BATCH_PAIRS
        self._folder = folder

    def __call__(self, shard_draw: dict[str, NDArray[Any]]) -> pa.Table:
        """Write the file of one shard at one draw.

        Returns the number of ``pairs``, and of the repeated pairs the timesteps ``t`` and the ``margin``
        between their two computations. Raises NonFiniteError, before anything is written, for non-finite
        errors.
        """
        shard = int(shard_draw["shard"][0])
        draw = int(shard_draw["draw"][0])
        rows = self._reader.shard(shard).visit(draw)
        _, errors = self._errors(rows, self._batch_pairs)
        for field in fields(errors):
            values = getattr(errors, field.name)
            if values is not None:
                check_finite(f"reference error {field.name} of shard {shard} at draw {draw}", values)
        name, data = ledger_file(shard, draw, errors)
        files.write_bytes(files.join(self._folder, name), data)
        # A batch of the same size would be computed to the same bits.
        batch_pairs = REPEATED_PAIRS if self._batch_pairs != REPEATED_PAIRS else REPEATED_PAIRS - 1
        repeated = min(len(rows), batch_pairs)
        t, again = self._errors(rows.rows(slice(repeated)), repeated)
        margin = preference_margin(again, errors.rows(slice(repeated))).cpu()
        return pa.table({"pairs": [len(rows)], "t": [t.tolist()], "margin": [margin.tolist()]})

    @torch.no_grad()
    def _errors(self, rows: LatentRows, batch_pairs: int) -> tuple[torch.Tensor, PairErrors]:
        """The timesteps and the errors of these rows, ``batch_pairs`` at a time."""
        timesteps: list[torch.Tensor] = []
        errors: list[PairErrors] = []
        for part in slices(rows, batch_pairs):
            batch = self._batches.make(part)
            with self._frozen.autocast():
                errors.append(pair_errors(self._frozen.unet, self._schedule, batch, self._error))
            timesteps.append(batch.t)
        return torch.cat(timesteps), PairErrors.joined(errors)


class Progress:
    """Reports pairs a second and the time left, as metrics and events. A pair counts once for each draw."""

    def __init__(self, journal: Journal, total: int) -> None:
        self._journal = journal
        self._total = total
        self._done = 0
        self._pace = Pace()

    def add(self, pairs: int) -> None:
        """Count pairs whose file is written."""
        self._done += pairs
        rate, eta_s = self._pace.measure(self._done, self._total)
        is_last = self._done == self._total
        if is_last or self._pace.metrics.has_elapsed():
            values = {"pairs": self._done, "pairs_total": self._total, "pairs_per_s": rate, "eta_s": eta_s}
            self._journal.metrics(self._done, {name: float(value) for name, value in values.items()})
            self._pace.metrics.restart()
        if is_last or self._pace.event.has_elapsed():
            speed = f"{rate:.1f} pairs/s, {eta_s:.0f} s left"
            self._journal.event(f"reference errors of {self._done} of {self._total} pairs, {speed}")
            self._pace.event.restart()
