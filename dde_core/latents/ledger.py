"""The reference ledger: errors of the frozen model, computed once for each pair's draws and read by every
matching run.

A loss reads only e_ref of the reference (and, for `sampled` calibration, mean(z (eps_ref - eps))). Both
depend on the pair, the draw and the frozen model alone. A ledger is a folder beside the shards that it
belongs to:

    00007-0002-{sha256}.parquet    draw 2 of shard 7: float32 e_w, e_l (and z_w, z_l), rows in the shard's
                                   order
    ledger-0003.json               the record, written last: the key, and the files of draws 0..2

Files are named by their content and never replaced. So a killed pass resumes with the missing files, more
draws can be added later, and several passes can write one ledger at the same time.
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
from jaxtyping import Float32
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
LATER = {"error": "noise", "time_ids": "per_side"}
"""Fields of a key that earlier versions did not have, with what they did: such ledgers are still found."""
KEPT_BYTES = 64_000_000
"""How much of a ledger a reader keeps in memory: 8 million draws without evaluation points."""
_FILE = re.compile(r"(\d{5,})-(\d{4})-([0-9a-f]{64})\.parquet")
_RECORD = re.compile(r"ledger-(\d{4})\.json")


@dataclass(frozen=True, kw_only=True)
class LedgerKey:
    """Everything that the errors depend on.

    ``reference``, ``dataset``, ``shards`` (the places of rows) and ``schedule`` (the float64 table of
    alpha_bar) are digests. ``precision`` names the arithmetic; compiled kernels round differently.
    ``no_caption`` is "zeros" or "empty": how a dropped caption is encoded.
    """

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
    error: str = "noise"
    time_ids: str = "per_side"
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
        """The key that a run needs. ``reference`` is the frozen model's digest."""
        schedule = folder.schedule()
        shards = json.dumps([[shard.rows, shard.sha256] for shard in manifest.shards])
        is_sampled = objective.calibration_point == "sampled"
        return cls(
            reference=reference,
            dataset=manifest.digest,
            shards=hashlib.sha256(shards.encode()).hexdigest(),
            schedule=hashlib.sha256(schedule.alpha_bar.numpy().tobytes()).hexdigest(),
            prediction_type=schedule.prediction_type,
            resolution=manifest.settings["resolution"],
            precision=training.precision + (", compiled" if training.compile else ""),
            no_caption="zeros" if drops_to_zeros(objective, folder) else "empty",
            caption_dropout=training.caption_dropout,
            noise=objective.noise_mode,
            t_min=objective.t_min,
            t_max=objective.t_max or schedule.T,
            draw_seed=training.draw_seed,
            evaluation_points=METHODS[objective.method].corrected and is_sampled,
            error=objective.error,
            time_ids=objective.time_ids if folder.family == "sdxl" else "per_side",
        )

    @property
    def name(self) -> str:
        """The name of the ledger's folder."""
        values = {field: value for field, value in asdict(self).items() if value != LATER.get(field)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def columns(self) -> list[str]:
        """The columns of the ledger's files."""
        return list(COLUMNS)[: 4 if self.evaluation_points else 2]

    def mismatches(self, needed: LedgerKey) -> dict[str, tuple[Any, Any]]:
        """Fields that differ from those that a run needs: {field: (own, needed)}. Extra evaluation points are
        fine."""
        own = asdict(self)
        differing = {
            field: (own[field], value) for field, value in asdict(needed).items() if own[field] != value
        }
        if not needed.evaluation_points:
            differing.pop("evaluation_points", None)
        return differing


def drops_to_zeros(objective: ObjectiveConfig, folder: ModelFolder) -> bool:
    """Whether no caption is encoded as zeros. Rounds drop none, and always draw as the model does."""
    as_model = METHODS[objective.method].on_policy or objective.dropped_caption == "model"
    return as_model and folder.no_caption_is_zeros


@dataclass(frozen=True, kw_only=True)
class LedgerRecord:
    """A ledger's JSON record.

    ``rows`` are the shards' lengths, ``files`` the names [draw][shard]. ``noise`` is the ``logit_deviation``
    of pairs whose errors were computed twice, in batches of two sizes. ``seconds`` is the duration of the
    pass that wrote it.
    """

    key: LedgerKey
    rows: tuple[int, ...]
    files: tuple[tuple[str, ...], ...]
    noise: dict[str, float]
    seconds: float

    @property
    def draws(self) -> int:
        """The number of draws of every pair."""
        return len(self.files)

    @property
    def name(self) -> str:
        """The name of the record's file."""
        return f"ledger-{self.draws:04d}.json"

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "draws": self.draws}, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> LedgerRecord:
        """Raises DataError for a record that is invalid or of another format version."""
        try:
            values = json.loads(data)
            version = values["key"].get("format_version")
            if version == FORMAT_VERSION:
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
    """Whether a file of this name is a ledger's record."""
    return _RECORD.fullmatch(name) is not None


def committed(names: Iterable[str]) -> dict[tuple[int, int], str]:
    """{(shard, draw): file} from the names in a ledger's folder.

    Passes on different machines may write different content; the first name in sorted order then counts.
    """
    files: dict[tuple[int, int], str] = {}
    for match in map(_FILE.fullmatch, sorted(names)):
        if match:
            files.setdefault((int(match[1]), int(match[2])), match[0])
    return files


def complete_draws(files: Mapping[tuple[int, int], str], num_shards: int) -> tuple[tuple[str, ...], ...]:
    """Files [draw][shard] of the draws 0, 1, ... that have a file for every shard."""
    draws = 0
    while all((shard, draws) in files for shard in range(num_shards)):
        draws += 1
    return tuple(tuple(files[shard, draw] for shard in range(num_shards)) for draw in range(draws))


def ledger_file(shard: int, draw: int, errors: PairErrors) -> tuple[str, bytes]:
    """The name and the content of one shard's errors at one draw, rows in the shard's order."""
    arrays = {}
    for column, field in COLUMNS.items():
        values = getattr(errors, field)
        if values is not None:
            arrays[column] = pa.array(values.cpu().numpy(), pa.float32())
    table = pa.table(arrays)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="none", use_dictionary=False, write_statistics=False, store_schema=False
    )
    data = sink.getvalue().to_pybytes()
    return f"{shard:05d}-{draw:04d}-{hashlib.sha256(data).hexdigest()}.parquet", data


class Ledger:
    """Reads a ledger's files when rows need them. ``path`` is that of its record; errors are returned on
    ``device``."""

    def __init__(self, filesystem: fs.FileSystem, path: str, device: torch.device | str = "cpu") -> None:
        self._filesystem = filesystem
        self._device = device
        self._folder, _, _ = path.rpartition("/")
        self.record = LedgerRecord.from_json(self._read(path))
        bytes_of_a_file = 4 * len(self.record.key.columns) * max(self.record.rows)
        self._file = lru_cache(maxsize=max(1, KEPT_BYTES // bytes_of_a_file))(self._load)

    def errors(self, rows: LatentRows) -> PairErrors:
        """The reference's errors for each row's place and draw. Raises DataError for missing or damaged
        files."""
        values = np.empty((len(rows), len(self.record.key.columns)), np.float32)
        files = np.stack([rows.shards, rows.draws], axis=1)
        for shard, draw in np.unique(files, axis=0).tolist():
            in_file = (files == (shard, draw)).all(axis=1)
            values[in_file] = self._file(shard, draw)[rows.places[in_file]]
        columns = torch.from_numpy(values.T.copy()).to(self._device)
        fields = [COLUMNS[name] for name in self.record.key.columns]
        return PairErrors(**dict(zip(fields, columns, strict=True)))

    def _load(self, shard: int, draw: int) -> Float32[np.ndarray, "rows columns"]:
        if draw >= self.record.draws:
            raise DataError(
                f"ledger {self._folder!r} has draws 0..{self.record.draws - 1}, requested draw {draw}"
            )
        name = self.record.files[draw][shard]
        data = self._read(f"{self._folder}/{name}")
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 not in name:
            raise DataError(f"ledger file {self._folder}/{name} has sha256 {sha256}")
        table = pq.read_table(pa.BufferReader(data), columns=self.record.key.columns)
        values = np.stack([column.to_numpy() for column in table.columns], axis=1)
        if len(values) != self.record.rows[shard] or not np.isfinite(values).all():
            expected = f"{self.record.rows[shard]} rows of finite numbers"
            raise DataError(f"ledger file {self._folder}/{name} must hold {expected}")
        return values

    def _read(self, path: str) -> bytes:
        try:
            with self._filesystem.open_input_stream(path) as stream:
                data: bytes = stream.read()
        except FileNotFoundError as error:
            raise DataError(f"ledger file {path!r} is missing") from error
        return data
