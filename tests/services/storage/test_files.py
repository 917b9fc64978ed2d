"""Files are written atomically on disk and in an object store. Journals take several writers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from dde_core.errors import ConfigError
from dde_core.shapes import FEW_PAIRS_FILE, FEW_PAIRS_URI, MODEL_DIR, MODEL_URI, PAIRS_FILE
from dde_core.shapes.pairs import FEW
from services.api.records import EncodeResult, ModelRecord
from services.api.requests import DatasetSource
from services.artifacts import models
from services.artifacts.prompts import read_prompts
from services.errors import BadRequest, Forbidden, NotFound
from services.stages import layout
from services.stages.journal import Journal, read_journal
from services.stages.runner import failure_of, root_cause, run_stage
from services.stages.specs import EncodeSpec, StageFailure
from services.storage import files

ODD_NAMES = ["a b", "100%", "50%25", "Größe", "a+b&c=d#e?f", "日本"]


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty folder."""
    return (tmp_path / "root").as_uri() if request.param == "file" else request.getfixturevalue("bucket")


def test_the_last_write_is_read_completely(root: str):
    uri = files.join(root, "deep", "file.json")
    files.write_json(uri, {"a": [1] * 1000})
    files.write_json(uri, {"a": 2})
    assert files.read_json(uri) == {"a": 2}
    files.write_bytes(uri, b"")
    assert files.read_bytes(uri) == b""


def test_missing_files_raise_on_reading_and_not_on_deletion(root: str):
    nothing = files.join(root, "nothing")
    for read in (
        files.read_bytes,
        files.read_json,
        lambda uri: files.copy_folder(uri, files.join(root, "copy")),
    ):
        with pytest.raises(FileNotFoundError, match="nothing"):
            read(nothing)
    files.delete_file(nothing)
    files.delete_folder(nothing)
    assert not files.exists(nothing)
    assert files.list_files(nothing, recursive=True) == []


def test_files_are_listed_by_their_names_below_the_folder_and_partial_ones_are_not(root: str):
    for name in ("b/c", "b/d/e", "a", "bc", "b/x.part"):
        files.write_bytes(files.join(root, *name.split("/")), name.encode())
    assert files.list_files(root) == ["a", "bc"]
    assert files.list_files(root, recursive=True) == ["a", "b/c", "b/d/e", "bc"]
    assert files.list_files(f"{root}/b/", recursive=True) == ["c", "d/e"]


def test_files_and_folders_exist_and_prefixes_of_names_do_not(root: str):
    files.write_bytes(files.join(root, "folder", "file"), b"x")
    assert files.exists(root)
    assert files.exists(files.join(root, "folder"))
    assert files.exists(files.join(root, "folder", "file"))
    assert not files.exists(files.join(root, "fold"))
    assert not files.exists(files.join(root, "folder", "file", "no"))


def test_a_folder_is_deleted_with_all_below_it_and_nothing_beside_it(root: str):
    for name in ("a/1", "a/b/2", "ab/3", "4"):
        files.write_bytes(files.join(root, *name.split("/")), b"x")
    files.delete_file(files.join(root, "4"))
    files.delete_folder(files.join(root, "a"))
    assert files.list_files(root, recursive=True) == ["ab/3"]
    assert not files.exists(files.join(root, "a"))


def test_names_may_hold_any_character(root: str):
    for name in ODD_NAMES:
        files.write_bytes(files.join(root, "dir " + name, name), name.encode())
    names = files.list_files(root, recursive=True)
    assert names == sorted(f"dir {name}/{name}" for name in ODD_NAMES)
    for name in names:
        uri = files.join(root, *name.split("/"))
        filesystem, path = files.resolve(uri)
        assert files.read_bytes(uri) == filesystem.open_input_file(path).read() == name.split("/")[1].encode()
        files.delete_file(uri)
    assert files.list_files(root, recursive=True) == []


@pytest.mark.parametrize("target", ["file", "s3"])
def test_a_folder_is_copied_between_all_places(root: str, target: str, bucket: str, tmp_path: Path):
    copied = f"{bucket}/copy" if target == "s3" else (tmp_path / "copy").as_uri()
    contents = {"ä b/100%": b"x" * 100, "c": b""}
    for name, data in contents.items():
        files.write_bytes(files.join(root, "from", *name.split("/")), data)
    files.copy_folder(files.join(root, "from"), copied)
    names = files.list_files(copied, recursive=True)
    assert {name: files.read_bytes(files.join(copied, *name.split("/"))) for name in names} == contents


def test_an_upload_copies_a_local_file_completely_and_leaves_it_unchanged(root: str, tmp_path: Path):
    path = tmp_path / "built.jsonl"
    path.write_bytes(b"0123456789" * 1_000_000)
    files.upload(path, files.join(root, "deep", "put.jsonl"))
    assert files.read_bytes(files.join(root, "deep", "put.jsonl")) == path.read_bytes()
    with pytest.raises(FileNotFoundError):
        files.upload(tmp_path / "nowhere", files.join(root, "never"))
    assert files.list_files(root, recursive=True) == ["deep/put.jsonl"]


def test_a_failed_local_write_leaves_the_previous_file_and_no_temporary_one(tmp_path: Path):
    uri = (tmp_path / "file").as_uri()
    files.write_bytes(uri, b"before")
    with pytest.raises(TypeError):
        files.write_bytes(uri, "text")  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"before"}


@pytest.mark.parametrize(
    "uri", ["gopher://x/y", "gs://x/y", "file://host/x", "s3://", "s3:///y", "s3://bucket/y?region=x"]
)
def test_the_error_of_an_unusable_uri_names_it(uri: str):
    with pytest.raises(BadRequest) as refused:
        files.read_bytes(uri)
    assert (refused.value.param, uri in str(refused.value)) == ("uri", True)


def test_models_are_found_by_name_until_they_are_retracted(root: str):
    record = ModelRecord(
        id="model_1", name="aligned", uri=f"{root}/x", family="sd15", digest="d", created_at=0, job="j"
    )
    files.write_bytes(files.join(layout.model_folder(root, record.id), "unet", "w"), b"w")
    models.publish(root, record)
    models.set_alias(root, "aligned", record.id)
    assert models.find(root, "aligned") == models.find(root, "model_1") == record
    models.retract(root, record)
    assert files.list_files(root, recursive=True) == []
    with pytest.raises(NotFound):
        models.find(root, "aligned")


def test_a_journal_is_read_from_any_number_and_two_writers_alternate(root: str):
    first = Journal(root, flush_every_s=0)
    first.event("begins")
    second = Journal(root, flush_every_s=0)
    second.metrics(1, {"loss": 0.5})
    first.event("ends", "warning")
    read = read_journal(root, 0)
    assert [number for number, _ in read] == [0, 1, 2]
    assert [entry.message for _, entries in read for entry in entries] == ["begins", None, "ends"]
    assert read_journal(root, 2)[0][1][0].level == "warning"
    assert read_journal(root, 3) == []


def test_a_writer_continues_after_the_files_of_later_writers_and_overwrites_none(root: str):
    driver, worker, other_worker = (Journal(root, flush_every_s=0) for _ in range(3))
    writers = [driver] * 2 + [worker] * 3 + [other_worker] * 4 + [driver] * 3
    messages = [str(number) for number in range(12)]
    for message, writer in zip(messages, writers, strict=True):
        writer.event(message)
    read = [(number, [entry.message for entry in entries]) for number, entries in read_journal(root, 0)]
    assert read == [(number, [message]) for number, message in enumerate(messages)]


def spec(folder: Path) -> EncodeSpec:
    uri = MODEL_DIR.as_uri()
    model = ModelRecord(id="m", name="m", uri=uri, family="sd15", digest="d", created_at=0)
    source = DatasetSource(uri="u")
    return EncodeSpec(
        job="j", attempt=1, prefix=folder.as_uri(), source=source, source_digest="d", model=model, output="o"
    )


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    uri = files.join(tmp_path.as_uri(), "spec.json")
    files.write_json(uri, spec(tmp_path).model_dump(mode="json"))
    monkeypatch.setattr(sys, "argv", ["stage", "--spec", uri])
    return tmp_path


def test_a_stage_that_succeeds_writes_its_result(prefix: Path):
    result = EncodeResult(dataset="d", digest="x", counts={"pairs": 1}, reused=False, seconds=1.0)

    def work(received: EncodeSpec, journal: Journal) -> EncodeResult:
        assert received == spec(prefix)
        return result

    run_stage(EncodeSpec, work)
    assert EncodeResult.model_validate_json((prefix / "done.json").read_bytes()) == result
    assert not (prefix / "failed.json").exists()


def test_a_stage_that_fails_writes_the_reason_with_the_field_and_raises(prefix: Path):
    def work(received, journal):
        raise ConfigError("beta", -1, "must be greater than 0")

    with pytest.raises(ConfigError):
        run_stage(EncodeSpec, work)
    failure = StageFailure.model_validate(json.loads((prefix / "failed.json").read_text()))
    assert failure == StageFailure(
        message="beta must be greater than 0, got -1", code="config_error", param="beta"
    )
    assert not (prefix / "done.json").exists()


def test_a_stage_opens_no_source_outside_of_the_rules_in_its_spec(tmp_path: Path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    given = spec(tmp_path)
    outside = given.model.model_copy(update={"uri": (tmp_path / "base").as_uri()})
    aligned = outside.model_copy(update={"job": "ajob_1"})
    uri = files.join(tmp_path.as_uri(), "spec.json")
    monkeypatch.setattr(sys, "argv", ["stage", "--spec", uri])

    def work(received: EncodeSpec, journal: Journal) -> EncodeResult:
        read_prompts(str(tmp_path / "prompts.txt"), 2)
        raise AssertionError("read")

    for model in (outside, aligned):
        for marker in tmp_path.glob("*.json"):
            marker.unlink()
        files.write_json(uri, given.model_copy(update={"model": model}).model_dump(mode="json"))
        with pytest.raises(Forbidden):
            run_stage(EncodeSpec, work)
        failure = json.loads((tmp_path / "failed.json").read_text())
        assert failure["code"] == "source_not_allowed"
        assert ("base" if model is outside else "prompts.txt") in failure["message"]


def test_our_error_is_found_inside_rays_wrappers():
    ours = ConfigError("beta", -1, "must be greater than 0")
    task = RayTaskError("decode", "a long traceback", ours).as_instanceof_cause()
    workers = WorkerGroupError("rank 1 failed", {1: task})
    assert root_cause(task) is ours
    assert root_cause(workers) is ours
    assert root_cause(ours) is ours
    other = ValueError("not ours")
    assert root_cause(other) is other


def test_a_failure_is_one_line_and_a_stop_is_not_an_error_of_the_work():
    assert failure_of(SystemExit(1)) == StageFailure(message="the stage was stopped", code="stopped")
    assert failure_of(OSError("disk full\nand more")) == StageFailure(
        message="OSError: disk full", code="oserror"
    )
    refused = BadRequest("uri 'x' does not exist", param="uri", code="not_found")
    assert failure_of(refused) == StageFailure(
        message="uri 'x' does not exist", code="not_found", param="uri"
    )


# ---- what the package ships


def test_a_shipped_file_is_found_by_a_uri_that_names_no_installation():
    assert files.local_path(MODEL_URI) == MODEL_DIR.resolve()
    assert files.read_bytes(FEW_PAIRS_URI) == FEW_PAIRS_FILE.read_bytes()
    assert files.as_uri(FEW_PAIRS_URI) == FEW_PAIRS_URI
    assert files.exists(files.join(MODEL_URI, "unet", "config.json"))


@pytest.mark.parametrize("uri", ["shapes://../config.py", "shapes://data/%2e%2e/%2e%2e/config.py"])
def test_a_shipped_uri_does_not_lead_out_of_what_is_shipped(uri: str):
    with pytest.raises(BadRequest, match="leads out of the files that are shipped") as caught:
        files.read_bytes(uri)
    assert caught.value.param == "uri"


def test_the_few_shipped_pairs_are_the_first_of_the_shipped_pairs():
    few = pq.read_table(FEW_PAIRS_FILE)
    assert few.num_rows == FEW
    assert few.equals(pq.read_table(PAIRS_FILE).slice(0, FEW))
