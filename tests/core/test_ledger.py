"""The ledger's files: errors are read back at their places; damaged or mismatched files are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import fs

from dde_core.config import ObjectiveConfig, TrainConfig
from dde_core.errors import DataError
from dde_core.latents import ledger as ledger_module
from dde_core.latents.ledger import (
    Ledger,
    LedgerKey,
    LedgerRecord,
    committed,
    complete_draws,
    is_record_name,
    ledger_file,
)
from dde_core.latents.rows import LatentRows
from dde_core.latents.schema import Manifest, Shard
from dde_core.models.folder import ModelFolder
from dde_core.shapes import MODEL_DIR
from dde_core.step_metrics import logit_deviation
from dde_core.train_step import PairErrors

ROWS, DRAWS = (7, 4, 5), 3
MANIFEST = Manifest(
    digest="d",
    encoder_digest="e",
    settings={"resolution": 32, "crop": "centre", "flip": "none"},
    latent_shape=(4, 8, 8),
    num_tokenizers=1,
    num_tokens=16,
    counts={"pairs": sum(ROWS)},
    shards=tuple(Shard(name=f"{i}.parquet", rows=rows, sha256=str(i)) for i, rows in enumerate(ROWS)),
)


def key_of(
    objective: ObjectiveConfig | None = None, reference: str = "r", manifest: Manifest = MANIFEST, **training
) -> LedgerKey:
    objective, folder = objective or ObjectiveConfig(), ModelFolder(MODEL_DIR)
    return LedgerKey.of_run(reference, manifest, folder, objective, TrainConfig(**training))


def value_of(shard: int, draw: int, row: int, column: int) -> float:
    """Different for every number of a ledger, and exact in float32."""
    return shard + draw / 8 + row / 64 + column / 512


def errors_of(shard: int, draw: int, rows: int, points: bool = False) -> PairErrors:
    columns = [
        [value_of(shard, draw, row, column) for row in range(rows)] for column in range(4 if points else 2)
    ]
    return PairErrors(*(torch.tensor(column) for column in columns))


def write(folder: Path, key: LedgerKey) -> Path:
    for shard, rows in enumerate(ROWS):
        for draw in range(DRAWS):
            name, data = ledger_file(shard, draw, errors_of(shard, draw, rows, key.evaluation_points))
            (folder / name).write_bytes(data)
    return write_record(folder, key)


def write_record(folder: Path, key: LedgerKey) -> Path:
    files = complete_draws(committed(path.name for path in folder.iterdir()), len(ROWS))
    record = LedgerRecord(key=key, rows=ROWS, files=files, noise={"step0_logit_std_half": 0.5}, seconds=1.0)
    (folder / record.name).write_bytes(record.to_json())
    return folder / record.name


def rows_at(*where: tuple[int, int, int]) -> LatentRows:
    """Rows of (shard, draw, place); a ledger reads nothing else of them."""
    shards, draws, places = (np.array(column) for column in zip(*where, strict=True))
    rows = len(where)
    none = {"token_ids": np.empty((rows, 0, 0), int), "labels": np.ones(rows, np.float32)}
    for side in "wl":
        none[f"latents_{side}"] = np.empty((rows, 0, 0, 0), np.float32)
        none[f"sizes_{side}"] = np.empty((rows, 2), int)
        none[f"crops_{side}"] = np.empty((rows, 2), int)
    ids = tuple(map(str, where))
    return LatentRows(np.arange(rows), draws, shards, places, ids, **none)


def opened(path: Path) -> Ledger:
    return Ledger(fs.LocalFileSystem(), str(path))


# ---- files


@pytest.mark.parametrize("point", ["expected", "sampled"])
def test_every_row_gets_the_errors_of_its_shard_draw_and_place_in_whatever_order(tmp_path, point):
    ledger = opened(write(tmp_path, key_of(ObjectiveConfig(calibration_point=point))))
    where = [
        (shard, draw, row) for shard, rows in enumerate(ROWS) for draw in range(DRAWS) for row in range(rows)
    ]
    where = [where[i] for i in np.random.default_rng(0).permutation(len(where))] + where[:3]
    errors = ledger.errors(rows_at(*where))
    columns = [errors.w, errors.l, errors.z_w, errors.z_l]
    assert [column is None for column in columns] == [False, False, point == "expected", point == "expected"]
    for number, column in enumerate(columns[: 4 if point == "sampled" else 2]):
        assert column.dtype == torch.float32
        assert column.tolist() == [value_of(shard, draw, row, number) for shard, draw, row in where]


def test_a_file_is_read_when_a_row_asks_for_it_and_forgotten_when_others_need_the_room(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "KEPT_BYTES", 2 * 8 * max(ROWS))  # two files
    ledger = opened(write(tmp_path, key_of()))
    ledger.errors(rows_at((0, 0, 0), (1, 0, 0)))
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    assert ledger.errors(rows_at((1, 0, 3), (0, 0, 6))).w.tolist() == [
        value_of(1, 0, 3, 0),
        value_of(0, 0, 6, 0),
    ]
    with pytest.raises(DataError, match="is missing"):
        ledger.errors(rows_at((2, 0, 0)))


def test_a_draw_of_a_pair_takes_8_bytes_and_a_file_less_than_700_beside(tmp_path):
    for rows in (1, 1000, 20_000):
        _, data = ledger_file(0, 0, errors_of(0, 0, rows))
        assert 8 * rows < len(data) < 8 * rows + 700
        _, with_points = ledger_file(0, 0, errors_of(0, 0, rows, points=True))
        assert 16 * rows < len(with_points) < 16 * rows + 1300


def test_a_file_is_named_by_shard_draw_and_content():
    name, data = ledger_file(12, 3, errors_of(0, 0, 5))
    assert (name, data) == ledger_file(12, 3, errors_of(0, 0, 5))
    assert name.startswith("00012-0003-")
    other, _ = ledger_file(12, 3, errors_of(0, 1, 5))
    assert other != name
    assert committed([name, other, "ledger-0003.json", "x.parquet"]) == {(12, 3): min(name, other)}
    assert is_record_name("ledger-0003.json")
    assert not is_record_name(name)


def test_only_draws_that_every_shard_has_are_there():
    there = {(shard, draw): f"{shard}/{draw}" for shard in range(3) for draw in range(4)}
    assert len(complete_draws(there, 3)) == 4
    del there[1, 2]
    assert complete_draws(there, 3) == (("0/0", "1/0", "2/0"), ("0/1", "1/1", "2/1"))
    assert complete_draws({}, 3) == ()


def test_a_record_round_trips(tmp_path):
    path = write(tmp_path, key_of())
    record = LedgerRecord.from_json(path.read_bytes())
    assert path.name == record.name == "ledger-0003.json"
    assert (record.key, record.rows, record.draws, record.noise) == (
        key_of(),
        ROWS,
        DRAWS,
        {"step0_logit_std_half": 0.5},
    )
    assert record.to_json() == path.read_bytes()


# ---- refusals


def test_a_changed_file_is_refused_by_name(tmp_path):
    ledger = opened(write(tmp_path, key_of()))
    (path,) = tmp_path.glob("00001-0002-*")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"ledger file .*{path.name} has sha256"):
        ledger.errors(rows_at((1, 2, 0)))
    assert ledger.errors(rows_at((1, 1, 0))).w.tolist() == [value_of(1, 1, 0, 0)]


@pytest.mark.parametrize(
    ("bad", "rows"), [(float("nan"), ROWS[1]), (float("inf"), ROWS[1]), (1.0, ROWS[1] - 1)]
)
def test_values_that_are_no_numbers_and_missing_rows_are_refused(tmp_path, bad, rows):
    write(tmp_path, key_of())
    (path,) = tmp_path.glob("00001-0002-*")
    path.unlink()
    errors = errors_of(1, 2, rows)
    errors.l[2] = bad
    name, data = ledger_file(1, 2, errors)
    (tmp_path / name).write_bytes(data)
    ledger = opened(write_record(tmp_path, key_of()))
    with pytest.raises(DataError, match=f"{name} must hold 4 rows of finite numbers"):
        ledger.errors(rows_at((1, 2, 0)))


def test_a_missing_draw_and_a_record_of_another_format_are_refused(tmp_path):
    path = write(tmp_path, key_of())
    with pytest.raises(DataError, match=r"has draws 0\.\.2, requested draw 3"):
        opened(path).errors(rows_at((0, 3, 0)))
    path.write_bytes(path.read_bytes().replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(DataError, match=r"^ledger has format_version 2, this code reads 1"):
        opened(path)
    with pytest.raises(DataError, match=r"ledger-0007\.json' is missing"):
        opened(tmp_path / "ledger-0007.json")


NO_RECORDS = [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"key": []}', b'{"key": {"format_version": 1}}']


@pytest.mark.parametrize("data", NO_RECORDS, ids=repr)
def test_what_is_no_record_is_refused_as_data(data):
    with pytest.raises(DataError, match="ledger's record cannot be read: "):
        LedgerRecord.from_json(data)


# ---- the key

OTHERS = {
    "reference": key_of(reference="other"),
    "dataset": key_of(manifest=dataclasses.replace(MANIFEST, digest="other")),
    "shards": key_of(manifest=dataclasses.replace(MANIFEST, shards=MANIFEST.shards[::-1])),
    "schedule": dataclasses.replace(key_of(), schedule="other"),
    "prediction_type": dataclasses.replace(key_of(), prediction_type="v_prediction"),
    "resolution": key_of(manifest=dataclasses.replace(MANIFEST, settings={"resolution": 64})),
    "precision": key_of(precision="bf16"),
    "no_caption": dataclasses.replace(key_of(), no_caption="zeros"),
    "caption_dropout": key_of(caption_dropout=0.1),
    "noise": key_of(ObjectiveConfig(noise="shared")),
    "t_min": key_of(ObjectiveConfig(t_min=2)),
    "t_max": key_of(ObjectiveConfig(t_max=999)),
    "draw_seed": key_of(draw_seed=1),
    "evaluation_points": key_of(ObjectiveConfig(calibration_point="sampled")),
    "error": dataclasses.replace(key_of(), error="velocity"),
    "time_ids": dataclasses.replace(key_of(), time_ids="fixed"),
    "format_version": dataclasses.replace(key_of(), format_version=0),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LedgerKey)])
def test_each_field_of_a_key_that_differs_is_named_with_both_values(field):
    needed, here = OTHERS[field], key_of()
    assert here.mismatches(needed) == {field: (getattr(here, field), getattr(needed, field))}
    assert here.name != needed.name


def test_evaluation_points_that_nobody_reads_do_no_harm():
    assert OTHERS["evaluation_points"].mismatches(key_of()) == {}
    assert OTHERS["evaluation_points"].columns == ["e_w", "e_l", "z_w", "z_l"]


def test_what_does_not_change_the_errors_is_not_in_the_key():
    own = {
        "batch_size": 7,
        "learning_rate": 1e-3,
        "steps": 9,
        "seed": 3,
        "draws": 8,
        "micro_batch_size": 2,
        "ema_decay": 0.9,
    }
    assert key_of(ObjectiveConfig(beta=1.0, t_max=1000), **own) == key_of()
    for method in ("dde_single", "dde_step"):
        assert key_of(ObjectiveConfig(method=method)) == key_of()
    for method in ("uniform", "discounted"):
        assert key_of(ObjectiveConfig(method=method)) == OTHERS["noise"]
        assert key_of(ObjectiveConfig(method=method, noise="independent")) == key_of()


# ---- noise


def test_the_deviation_of_the_logit_is_taken_about_zero_for_each_weight():
    t, margin = np.array([1, 100, 101, 1000]), np.array([1e-4, -1e-4, 2e-4, 0.0])
    snr = np.array([2.0, 1.0, 0.5, 0.1])
    found = logit_deviation(t, margin, snr, 5000.0, 1000)
    assert found.pop("step0_logit_std_half") == pytest.approx(5000 / 2 * np.sqrt(np.mean(margin**2)))
    wanted = {"t0100": 5000e-4 * np.sqrt((0.25 + 1) / 2), "t0200": 5000 * 4e-4, "t1000": 0.0}
    assert found == pytest.approx({f"step0_logit_std_snr_{tenth}": value for tenth, value in wanted.items()})
