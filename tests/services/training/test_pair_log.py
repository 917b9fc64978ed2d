"""The pair log of a run: files are written atomically, steps count once; and the credit record from it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dde_core.calibration import Calibration
from dde_core.config import ObjectiveConfig
from dde_core.credit import STABLE_DIFFUSION
from dde_core.errors import DataError
from dde_core.methods import METHODS
from dde_core.schedule import Schedule
from dde_core.train_step import PairErrors, step_losses
from services.api.records import CreditRecord
from services.training.pair_log import PairLog, credit_record, read

SCHEDULE = Schedule.from_config(STABLE_DIFFUSION)
PAIRS = 16


@pytest.fixture
def run(tmp_path: Path) -> str:
    return (tmp_path / "run").as_uri()


def add(log: PairLog, first: int, last: int, pairs: int = 3, margins: bool = True) -> None:
    """Steps whose values show which step they belong to."""
    for step in range(first, last + 1):
        values = step + torch.arange(pairs) / 10
        log.add(step, torch.arange(pairs) + step, -values if margins else None, values)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run" / "pairs").iterdir())


def steps_of(run: str) -> list[int]:
    return read(run).step.unique(return_counts=False).tolist()


def test_a_file_holds_the_steps_of_one_flush_in_small_types_and_is_named_by_them(run, tmp_path):
    log = PairLog(run)
    add(log, 1, 2)
    log.flush()
    log.flush()
    add(log, 3, 3)
    log.flush()
    assert files(tmp_path) == ["00000001-00000002.parquet", "00000003-00000003.parquet"]
    file = pq.ParquetFile(tmp_path / "run" / "pairs" / "00000001-00000002.parquet")
    schema = {"step": pa.int32(), "t": pa.int32()}
    schema |= dict.fromkeys(("margin", "gradient_weight", "share"), pa.float32())
    assert {field.name: field.type for field in file.schema_arrow} == schema
    assert {file.metadata.row_group(0).column(i).compression for i in range(5)} == {"ZSTD"}


def test_pairs_are_read_as_they_were_added_in_step_order(run):
    log = PairLog(run)
    for step in range(1, 13):
        add(log, step, step)
        log.flush()
    pairs = read(run)
    assert pairs.step.tolist() == [step for step in range(1, 13) for _ in range(3)]
    assert pairs.t.tolist() == [step + i for step in range(1, 13) for i in range(3)]
    torch.testing.assert_close(pairs.gradient_weight, pairs.step + torch.arange(3).repeat(12) / 10)
    assert torch.equal(pairs.margin, -pairs.gradient_weight)


def test_a_log_without_margins_has_none(run):
    log = PairLog(run)
    add(log, 1, 2, margins=False)
    log.flush()
    assert read(run).margin is None
    assert read(run).gradient_weight.tolist() == pytest.approx([1, 1.1, 1.2, 2, 2.1, 2.2])


def test_a_log_of_an_earlier_version_without_shares_is_read(run, tmp_path):
    log = PairLog(run)
    add(log, 1, 2)
    log.flush()
    path = tmp_path / "run" / "pairs" / "00000001-00000002.parquet"
    pq.write_table(pq.read_table(path).drop_columns("share"), path)
    assert read(run).share is None
    assert read(run).margin is not None


def test_a_resumed_run_writes_the_same_names_again(run, tmp_path):
    for _ in range(2):
        log = PairLog(run)
        add(log, 1, 4)
        log.flush()
    assert files(tmp_path) == ["00000001-00000004.parquet"]
    assert len(read(run).step) == 12


@pytest.mark.parametrize(
    "spans",
    [
        [(1, 4), (5, 6), (5, 8)],  # killed after 6, resumed from 4
        [(1, 3), (1, 4), (5, 8)],  # killed before the first checkpoint
        [(1, 8), (5, 6), (7, 8)],
        [(1, 5), (3, 8)],
        [(1, 4), (5, 8), (5, 8)],
    ],
)
def test_steps_that_several_files_contain_count_once(run, spans):
    for first, last in spans:
        log = PairLog(run)
        add(log, first, last)
        log.flush()
    pairs = read(run)
    assert pairs.step.tolist() == [step for step in range(1, 9) for _ in range(3)]
    assert pairs.t.tolist() == [step + i for step in range(1, 9) for i in range(3)]


def test_a_partly_written_file_is_not_read(run, tmp_path):
    log = PairLog(run)
    add(log, 1, 2)
    log.flush()
    (tmp_path / "run" / "pairs" / "00000003-00000004.parquet.abc.part").write_bytes(b"half")
    assert steps_of(run) == [1, 2]


def test_the_error_for_a_run_without_a_log_names_the_run(run):
    with pytest.raises(DataError, match=r"run 'file:.*/run' has no pair log"):
        read(run)


# ---- the record


def train(run: str, objective: ObjectiveConfig, steps: int = 12) -> Calibration:
    """A training loop on random errors."""
    generator, log, calibration = (
        torch.Generator().manual_seed(0),
        PairLog(run),
        Calibration(SCHEDULE, objective),
    )
    for step in range(1, steps + 1):
        t = torch.randint(1, 1001, (PAIRS,), generator=generator)
        theta, ref = (
            PairErrors(*(0.2 + 1e-4 * torch.randn(2, PAIRS, generator=generator))) for _ in range(2)
        )
        share = 0.5 + 0.5 * torch.rand(PAIRS, generator=generator)
        terms = step_losses(theta, ref, t, objective, SCHEDULE, calibration.correction(t), share)
        log.add(step, t, terms.margin, terms.gradient_weight, terms.share)
        if METHODS[objective.method].has_reference:
            calibration.update(t, theta, ref)
        if step % 5 == 0:
            log.flush()
    log.flush()
    return calibration


def recorded(run: str, objective: ObjectiveConfig) -> CreditRecord:
    """The record after a round trip through JSON."""
    calibration = train(run, objective)
    record = credit_record(read(run), objective, SCHEDULE, STABLE_DIFFUSION, calibration.state_dict(), PAIRS)
    return CreditRecord.model_validate_json(record.model_dump_json())


@pytest.mark.parametrize("method", ["dde", "dde_step", "uniform", "discounted"])
def test_logged_weights_are_those_that_the_margins_predict(run, method):
    record = recorded(run, ObjectiveConfig(method=method, calibration_bins=50))
    assert (record.steps, record.batch_size, sum(bucket.pairs for bucket in record.buckets)) == (
        12,
        PAIRS,
        12 * PAIRS,
    )
    assert [(bucket.t_first, bucket.t_last) for bucket in record.buckets] == [
        (100 * j + 1, 100 * j + 100) for j in range(10)
    ]
    for bucket in record.buckets:
        assert bucket.logged == pytest.approx(bucket.predicted, rel=1e-4)
        assert bucket.logged > 0
        assert 0 < abs(bucket.margin) < 1e-3


@pytest.mark.parametrize("method", ["dde", "dde_step", "uniform", "discounted"])
def test_logged_weights_of_soft_labels_are_those_that_margins_and_shares_predict(run, method):
    record = recorded(run, ObjectiveConfig(method=method, calibration_bins=50, label="soft"))
    assert sum(bucket.pairs for bucket in record.buckets) == 12 * PAIRS
    for bucket in record.buckets:
        assert bucket.logged == pytest.approx(bucket.predicted, rel=1e-4, abs=1e-5)
        assert bucket.logged != 0


def test_the_record_holds_the_settings_behind_its_numbers(run):
    record = recorded(run, ObjectiveConfig(t_min=2))
    assert (record.objective.noise, record.objective.t_min, record.objective.t_max) == (
        "independent",
        2,
        1000,
    )
    assert Schedule.from_config(record.scheduler).T == 1000
    assert {name: len(values) for name, values in record.calibration.items()} == dict.fromkeys(
        ("theta_w", "ref_w", "theta_l", "ref_l"), 1000
    )
    assert record.objective.method == "dde"


def test_sft_has_weights_and_no_margins(run):
    record = recorded(run, ObjectiveConfig(method="sft"))
    assert {(bucket.margin, bucket.logged, bucket.predicted) for bucket in record.buckets} == {
        (None, 1.0, 1.0)
    }


@pytest.mark.parametrize("lost", ["00000001-00000005.parquet", "00000006-00000010.parquet"])
def test_a_log_with_a_gap_makes_no_record(run, tmp_path, lost):
    objective = ObjectiveConfig()
    calibration = train(run, objective)
    (tmp_path / "run" / "pairs" / lost).unlink()
    with pytest.raises(DataError, match=r"the pair log lacks pairs: 112 in steps 1\.\.12 of 16"):
        credit_record(read(run), objective, SCHEDULE, STABLE_DIFFUSION, calibration.state_dict(), PAIRS)
