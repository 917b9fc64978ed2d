"""The reference ledger's pass: the frozen model once over every draw of every pair, forward only, on Ray Data actors.

A unit of work is a shard at a draw, and becomes one file, written whole: a pass that was killed goes on with the units that
lack theirs. All draws of a shard follow one another, so that it is fetched once. The arithmetic is that of training; batches
are of training's micro-batch size.
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

from dde_core.batches import BatchMaker, slices
from dde_core.config import MAX_DRAWS, ObjectiveConfig, TrainConfig
from dde_core.errors import ConfigError
from dde_core.latents.ledger import LedgerKey, LedgerRecord, committed, complete_draws, ledger_file
from dde_core.latents.reader import LatentReader
from dde_core.latents.rows import LatentRows
from dde_core.latents.schema import Manifest
from dde_core.metrics import format_metrics, logit_deviation
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy, use_deterministic_kernels
from dde_core.train_step import PairErrors, check_finite, pair_errors, preference_margin
from services.api.records import LedgerResult
from services.artifacts import ledgers, models
from services.ingest.pace import Pace
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import LedgerSpec
from services.storage import files

PAIRS_AT_ONCE = 32
"""Where training runs its whole share at once."""
PAIRS_TWICE = 5
"""So many pairs of a unit are computed once more, as a batch of their own: what differs is rounding."""
MAX_BLOCKS = 1000

Unit = dict[str, int]
"""``shard`` and ``draw``."""


def ledger(spec: LedgerSpec, journal: Journal) -> LedgerResult:
    """Find a ledger that serves the run, or write what is missing of one under the run's own key.

    Raises ConfigError for more draws than a ledger holds, as a run over very many epochs asks for that sets none.
    """
    began = time.monotonic()
    models.check_digests(spec.model)
    request = ledgers.requirements_of(spec)
    if request.draws > MAX_DRAWS:
        raise ConfigError(
            "training.draws", request.draws, f"(one for each epoch where it is 0) must be at most {MAX_DRAWS}"
        )
    found, reused = ledgers.find(request), True
    if found is None:
        key, objective = request.choices[0]
        _write(spec, journal, key, objective, request.draws)
        found, reused = ledgers.find(request), False
    assert found is not None, "it has just been written"
    journal.event(f"{found.record.draws} draws of {sum(found.record.rows)} pairs in ledger {found.uri}")
    return LedgerResult(
        ledger=found.uri,
        draws=found.record.draws,
        pairs=sum(found.record.rows),
        noise=found.record.noise,
        reused=reused,
        seconds=time.monotonic() - began,
    )


def _write(
    spec: LedgerSpec, journal: Journal, key: LedgerKey, objective: ObjectiveConfig, draws: int
) -> None:
    """Compute what is not there, then write the record of all that is."""
    began, folder = time.monotonic(), layout.ledger_folder(spec.dataset, key.name)
    manifest = Manifest.from_json(files.read_bytes(layout.manifest_uri(spec.dataset)))
    rows = tuple(shard.rows for shard in manifest.shards)
    there = committed(files.list_files(folder))
    missing = [{"shard": s, "draw": n} for s in range(len(rows)) for n in range(draws) if (s, n) not in there]
    journal.event(
        f"reference ledger {key.name}: {draws} draws of {sum(rows)} pairs, {len(missing)} files to write"
    )
    progress, samples = Progress(journal, sum(rows[unit["shard"]] for unit in missing)), []
    for done in compute(missing, spec, objective, folder):
        progress.add(done["pairs"])
        samples.append(np.array([done["t"], done["margin"]]))
    noise = _noise(samples, ModelFolder(*models.fetch(spec.model)))
    ledger_files = complete_draws(committed(files.list_files(folder)), len(rows))
    record = LedgerRecord(
        key=key, rows=rows, files=ledger_files, noise=noise, seconds=time.monotonic() - began
    )
    files.write_bytes(files.join(folder, record.name), record.to_json())
    if noise:
        journal.event(f"rounding moves the logit of the reference against itself: {format_metrics(noise)}")


def _noise(samples: list[np.ndarray], folder: ModelFolder) -> dict[str, float]:
    """What the pairs that were computed twice say at DDE's beta; nothing where this pass had nothing to compute."""
    if not samples:
        return {}
    (t, margin), schedule = np.concatenate(samples, axis=1), folder.schedule()
    return logit_deviation(
        t, margin, schedule.snr[torch.from_numpy(t).long()], ObjectiveConfig().beta, schedule.T
    )


def compute(
    units: list[Unit], spec: LedgerSpec, objective: ObjectiveConfig, folder: str
) -> Iterator[dict[str, Any]]:
    """Write the units' files. Yields {pairs, t, margin} as they come, in any order: see ``ReferencePass``."""
    if not units:
        return
    work = ray.data.from_items(units, override_num_blocks=min(len(units), MAX_BLOCKS))
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
    """The frozen model, one in each actor."""

    def __init__(self, spec: LedgerSpec, objective: ObjectiveConfig, folder: str) -> None:
        use_deterministic_kernels()
        device, model = (
            torch.device("cuda" if spec.use_gpu else "cpu"),
            ModelFolder(*models.fetch(spec.model)),
        )
        arithmetic = TrainConfig(precision=spec.training.precision, compile=spec.training.compile)
        self._frozen = Policy(model, arithmetic, device)
        self._schedule, self._reader = model.schedule(), LatentReader(*files.resolve(spec.dataset))
        self._batches = BatchMaker(self._reader, model, self._schedule, objective, spec.training, device)
        self._size, self._folder = spec.training.micro_batch_size or PAIRS_AT_ONCE, folder

    def __call__(self, unit: dict[str, np.ndarray]) -> pa.Table:
        """Write one unit's file. Its number of ``pairs``; ``t`` and the ``margin`` between two computations of some of them.

        Raises NonFiniteError, before anything is written, for errors that are no numbers.
        """
        shard, draw = int(unit["shard"][0]), int(unit["draw"][0])
        rows = self._reader.shard(shard).visit(draw)
        _, errors = self._errors(rows, self._size)
        for field in fields(errors):
            if (values := getattr(errors, field.name)) is not None:
                check_finite(f"reference error {field.name} of shard {shard} at draw {draw}", values)
        name, data = ledger_file(shard, draw, errors)
        files.write_bytes(files.join(self._folder, name), data)
        twice = min(len(rows), PAIRS_TWICE if self._size != PAIRS_TWICE else PAIRS_TWICE - 1)
        t, again = self._errors(rows.rows(slice(twice)), twice)
        margin = preference_margin(again, errors.rows(slice(twice))).cpu()
        return pa.table({"pairs": [len(rows)], "t": [t.tolist()], "margin": [margin.tolist()]})

    @torch.no_grad()
    def _errors(self, rows: LatentRows, size: int) -> tuple[torch.Tensor, PairErrors]:
        """The timesteps and the errors of these rows, ``size`` pairs at a time."""
        times, parts = [], []
        for part in slices(rows, size):
            batch = self._batches.make(part)
            with self._frozen.autocast():
                parts.append(pair_errors(self._frozen.unet, self._schedule, batch))
            times.append(batch.t)
        return torch.cat(times), PairErrors.joined(parts)


class Progress:
    """Pairs a second and what is left, as metrics and now and then as an event. A pair counts once for each draw."""

    def __init__(self, journal: Journal, total: int) -> None:
        self._journal, self._total, self._done, self._pace = journal, total, 0, Pace()

    def add(self, pairs: int) -> None:
        """So many more are committed."""
        self._done += pairs
        rate, eta_s = self._pace.measure(self._done, self._total)
        last = self._done == self._total
        if self._pace.metrics_due() or last:
            values = {"pairs": self._done, "pairs_total": self._total, "pairs_per_s": rate, "eta_s": eta_s}
            self._journal.metrics(self._done, {name: float(value) for name, value in values.items()})
        if self._pace.event_due() or last:
            pace = f"{rate:.1f} pairs/s, {eta_s:.0f} s left"
            self._journal.event(f"reference errors of {self._done} of {self._total} pairs, {pace}")
