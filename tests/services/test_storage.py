"""Files appear whole, journals hand over between writers, and a stage always leaves a marker."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from dde_core.errors import ConfigError
from services import storage
from services.contracts import EncodeResult, EncodeSpec, ModelRecord, StageFailure
from services.errors import BadRequest
from services.observability import Journal, read_journal
from services.stage import failure_of, root_cause, run_stage


def test_a_file_replaces_the_one_before_and_no_part_of_it_is_listed(tmp_path: Path):
    uri = storage.join(tmp_path.as_uri(), "deep", "file.json")
    storage.write_json(uri, {"a": 1})
    storage.write_json(uri, {"a": 2})
    (tmp_path / "deep" / "other.abc.part").write_bytes(b"half")
    assert storage.read_json(uri) == {"a": 2}
    assert storage.list_files(tmp_path.as_uri(), recursive=True) == ["deep/file.json"]
    assert storage.list_files(storage.join(tmp_path.as_uri(), "nowhere")) == []


def test_a_scheme_that_nobody_knows_is_refused_by_name():
    with pytest.raises(BadRequest, match=r"gopher://x"):
        storage.read_bytes("gopher://x/y")


def test_a_journal_is_read_once_from_where_the_reader_was_and_writers_take_turns(tmp_path: Path):
    prefix = tmp_path.as_uri()
    first = Journal(prefix, flush_every_s=0)
    first.event("begins")
    second = Journal(prefix, flush_every_s=0)
    second.metrics(1, {"loss": 0.5})
    first.event("ends", "warning")
    read = read_journal(prefix, 0)
    assert [number for number, _ in read] == [0, 1, 2]
    assert [entry.message for _, entries in read for entry in entries] == ["begins", None, "ends"]
    assert read_journal(prefix, 2)[0][1][0].level == "warning"
    assert read_journal(prefix, 3) == []


def spec(folder: Path) -> EncodeSpec:
    model = ModelRecord(id="m", name="m", uri="x", family="sd15", digest="d", created_at=0)
    return EncodeSpec(job="j", attempt=1, prefix=folder.as_uri(), dataset_uri="u", dataset_digest="d", model=model, output="o")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    uri = storage.join(tmp_path.as_uri(), "spec.json")
    storage.write_json(uri, spec(tmp_path).model_dump(mode="json"))
    monkeypatch.setattr(sys, "argv", ["stage", "--spec", uri])
    return tmp_path


def test_a_stage_that_succeeds_leaves_its_result(told: Path):
    result = EncodeResult(dataset="d", digest="x", counts={"pairs": 1}, reused=False, seconds=1.0)
    run_stage(EncodeSpec, lambda asked, journal: result if asked == spec(told) else pytest.fail("another spec"))
    assert EncodeResult.model_validate_json((told / "done.json").read_bytes()) == result
    assert not (told / "failed.json").exists()


def test_a_stage_that_fails_leaves_why_with_the_field_and_fails(told: Path):
    def work(asked, journal):
        raise ConfigError("beta", -1, "must be greater than 0")

    with pytest.raises(ConfigError):
        run_stage(EncodeSpec, work)
    failure = StageFailure.model_validate(json.loads((told / "failed.json").read_text()))
    assert failure == StageFailure(message="beta must be greater than 0, got -1", code="config_error", param="beta")
    assert not (told / "done.json").exists()


def test_the_error_of_ours_is_found_inside_what_ray_wraps_around_it():
    ours = ConfigError("beta", -1, "must be greater than 0")
    task = RayTaskError("decode", "a long traceback", ours).as_instanceof_cause()
    workers = WorkerGroupError("rank 1 failed", {1: task})
    assert root_cause(task) is ours
    assert root_cause(workers) is ours
    assert root_cause(ours) is ours
    other = ValueError("not ours")
    assert root_cause(other) is other


def test_what_failed_is_one_line_and_a_stop_is_no_error_of_the_work():
    assert failure_of(SystemExit(1)) == StageFailure(message="the stage was stopped", code="stopped")
    assert failure_of(OSError("disk full\nand more")) == StageFailure(message="OSError: disk full", code="oserror")
    refused = BadRequest("uri 'x' does not exist", param="uri", code="not_found")
    assert failure_of(refused) == StageFailure(message="uri 'x' does not exist", code="not_found", param="uri")
