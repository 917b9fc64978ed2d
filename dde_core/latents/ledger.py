"""The reference ledger: errors of the frozen model, computed once for draws of every pair and read by every run that fits.

The reference enters a loss through e_ref alone (and, for `sampled` calibration, mean(z (eps_ref - eps))), which depends on the
pair, the draw and the frozen model. A ledger is a folder beside the shards that it belongs to:

    00007-0002-{sha256}.parquet    draw 2 of shard 7: float32 e_w, e_l (and z_w, z_l), rows in the shard's order
    ledger-0003.json               written last: the key, and the files of draws 0..2

Files are named by their content and never replaced: a pass that was killed goes on with what is missing, further draws are
added beside the others, and passes that write one ledger at the same time do each other no harm.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pyarrow import fs

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import DataError
from dde_core.latents.rows import LatentRows
from dde_core.latents.schema import Manifest
from dde_core.methods import METHODS
from dde_core.models.folder import ModelFolder
from dde_core.train_step import PairErrors

FORMAT_VERSION = 1
COLUMNS = {"e_w": "w", "e_l": "l", "z_w": "z_w", "z_l": "z_l"}
"""Columns of a file, and the fields of PairErrors that they hold."""
KEPT_BYTES = 64_000_000
"""A reader keeps so much of a ledger in memory: 8 million draws without evaluation points."""
_FILE = re.compile(r"(\d{5,})-(\d{4})-([0-9a-f]{64})\.parquet")
_RECORD = re.compile(r"ledger-(\d{4})\.json")


@dataclass(frozen=True, kw_only=True)
class LedgerKey:
    """Everything that the errors depend on. ``reference``, ``dataset``, ``shards`` (which row lies where) and ``schedule`` (the
    float64 table of alpha_bar) are digests; ``precision`` names the arithmetic (compiled kernels round otherwise);
    ``no_caption`` says what a dropped caption is."""

    reference: str
    dataset: str
    shards: str
    schedule: str
    prediction_type: str
    resolution: int
    precision: str
    no_caption: str
    caption_dropout: float
    noise: str
    t_min: int
    t_max: int
    draw_seed: int
    evaluation_points: bool
    format_version: int = FORMAT_VERSION

    @classmethod
    def of_run(
        cls,
        reference: str,
        manifest: Manifest,
        folder: ModelFolder,
        objective: ObjectiveConfig,
        training: TrainConfig,
    ) -> LedgerKey:
        """What a run needs. ``reference`` is the frozen model's digest."""
        schedule = folder.schedule()
        return cls(
            reference=reference,
            dataset=manifest.digest,
            shards=hashlib.sha256(
                json.dumps([[shard.rows, shard.sha256] for shard in manifest.shards]).encode()
            ).hexdigest(),
            schedule=hashlib.sha256(schedule.alpha_bar.numpy().tobytes()).hexdigest(),
            prediction_type=schedule.prediction_type,
            resolution=manifest.settings["resolution"],
            precision=training.precision + (", compiled" if training.compile else ""),
            no_caption="zeros" if folder.no_caption_is_zeros else "empty",
            caption_dropout=training.caption_dropout,
            noise=objective.noise_mode,
            t_min=objective.t_min,
            t_max=objective.t_max or schedule.T,
            draw_seed=training.draw_seed,
            evaluation_points=METHODS[objective.method].corrected
            and objective.calibration_point == "sampled",
        )

    @property
    def name(self) -> str:
        """The ledger's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def columns(self) -> list[str]:
        """The columns of its files."""
        return list(COLUMNS)[: 4 if self.evaluation_points else 2]

    def mismatches(self, needed: LedgerKey) -> dict[str, tuple[Any, Any]]:
        """Where this is not what a run needs: {field: (here, needed)}. Evaluation points that nobody reads do no harm."""
        here, there = asdict(self), asdict(needed)
        differing = {field: (here[field], there[field]) for field in there if here[field] != there[field]}
        if not needed.evaluation_points:
            differing.pop("evaluation_points", None)
        return differing


@dataclass(frozen=True, kw_only=True)
class LedgerRecord:
    """A ledger's JSON. ``rows`` of each shard; ``files`` [draw][shard]; ``noise`` is what ``logit_deviation`` says of pairs
    whose errors were computed twice, in batches of two sizes; ``seconds`` is the time of the pass that wrote it."""

    key: LedgerKey
    rows: tuple[int, ...]
    files: tuple[tuple[str, ...], ...]
    noise: dict[str, float]
    seconds: float

    @property
    def draws(self) -> int:
        """How many draws of every pair there are."""
        return len(self.files)

    @property
    def name(self) -> str:
        """The record's file."""
        return f"ledger-{self.draws:04d}.json"

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "draws": self.draws}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> LedgerRecord:
        """Raises DataError for a ledger of another format, and for what is no ledger's record."""
        try:
            values = json.loads(data)
            if (version := values["key"].get("format_version")) == FORMAT_VERSION:
                return cls(
                    key=LedgerKey(**values["key"]),
                    rows=tuple(values["rows"]),
                    files=tuple(tuple(names) for names in values["files"]),
                    noise=values["noise"],
                    seconds=values["seconds"],
                )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"ledger's record cannot be read: {error!r}") from error
        raise DataError(f"ledger has format_version {version!r}, this code reads {FORMAT_VERSION}")


def is_record_name(name: str) -> bool:
    """Whether this is the name of a ledger's record."""
    return _RECORD.fullmatch(name) is not None


def committed(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """{(shard, draw): file} of what lies in a ledger's folder. Of several the first: passes on unlike machines may differ."""
    found = {(int(m[1]), int(m[2])): m[0] for m in map(_FILE.fullmatch, sorted(names, reverse=True)) if m}
    return dict(sorted(found.items()))


def complete_draws(there: Mapping[tuple[int, int], str], num_shards: int) -> tuple[tuple[str, ...], ...]:
    """Files [draw][shard] of the draws 0, 1, ... that are complete."""
    draws, shards = 0, range(num_shards)
    while all((shard, draws) in there for shard in shards):
        draws += 1
    return tuple(tuple(there[shard, draw] for shard in shards) for draw in range(draws))


def ledger_file(shard: int, draw: int, errors: PairErrors) -> tuple[str, bytes]:
    """The name and the content of one shard's errors at one draw, rows in the shard's order."""
    values = {
        column: getattr(errors, field)
        for column, field in COLUMNS.items()
        if getattr(errors, field) is not None
    }
    table = pa.table(
        {column: pa.array(value.cpu().numpy(), pa.float32()) for column, value in values.items()}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="none", use_dictionary=False, write_statistics=False, store_schema=False
    )
    data = sink.getvalue().to_pybytes()
    return f"{shard:05d}-{draw:04d}-{hashlib.sha256(data).hexdigest()}.parquet", data


class Ledger:
    """Reads a ledger, a file at a time when a row asks for it. ``path`` is that of its record; errors come on ``device``."""

    def __init__(self, filesystem: fs.FileSystem, path: str, device: torch.device | str = "cpu") -> None:
        self._filesystem, self._device = filesystem, device
        self._folder, _, _ = path.rpartition("/")
        self.record = LedgerRecord.from_json(self._read(path))
        bytes_of_a_file = 4 * len(self.record.key.columns) * max(self.record.rows)
        self._file = lru_cache(maxsize=max(1, KEPT_BYTES // bytes_of_a_file))(self._load)

    def errors(self, rows: LatentRows) -> PairErrors:
        """The reference's errors for each row's place and draw. Raises DataError for a file that is not what was written."""
        values = np.empty((len(rows), len(self.record.key.columns)), np.float32)
        files = np.stack([rows.shards, rows.draws], axis=1)
        for shard, draw in np.unique(files, axis=0).tolist():
            here = (files == (shard, draw)).all(axis=1)
            values[here] = self._file(shard, draw)[rows.places[here]]
        columns = torch.from_numpy(values.T.copy()).to(self._device)
        return PairErrors(
            **{COLUMNS[name]: column for name, column in zip(self.record.key.columns, columns, strict=True)}
        )

    def _load(self, shard: int, draw: int) -> Float[np.ndarray, "rows columns"]:
        if draw >= self.record.draws:
            raise DataError(
                f"ledger {self._folder!r} holds {self.record.draws} draws, draw {draw} is asked for"
            )
        name = self.record.files[draw][shard]
        data = self._read(f"{self._folder}/{name}")
        if (found := hashlib.sha256(data).hexdigest()) not in name:
            raise DataError(f"ledger file {self._folder}/{name} has sha256 {found}")
        table = pq.read_table(pa.BufferReader(data), columns=self.record.key.columns)
        values = np.stack([column.to_numpy() for column in table.columns], axis=1)
        if len(values) != self.record.rows[shard] or not np.isfinite(values).all():
            raise DataError(
                f"ledger file {self._folder}/{name} must hold {self.record.rows[shard]} rows of finite numbers"
            )
        return values

    def _read(self, path: str) -> bytes:
        try:
            with self._filesystem.open_input_stream(path) as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise DataError(f"ledger lacks {path!r}") from error
