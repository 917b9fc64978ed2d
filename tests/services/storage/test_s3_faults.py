"""An object store that is slow, answers 503 and breaks connections: objects are complete, writes are kept."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.api.records import ModelRecord
from services.artifacts import models
from services.errors import Unavailable
from services.storage import files, s3
from tests.support.s3_server import BUCKET, Fault, S3Server, every, first, random_fraction

ROOT = Path(__file__).parents[3]
MULTIPART_BYTES = 9_000_000
"""More than boto3 sends in one piece."""

SOMETIMES = {
    "503": [Fault("slow_down", every(3))],
    "slow": [Fault("delay", every(3), seconds=0.1)],
    "broken uploads": [Fault("refuse_upload", every(3), "PUT"), Fault("cut_upload", every(2), "PUT")],
    "lost responses": [Fault("lose_response", every(3))],
    "broken downloads": [Fault("cut_download", every(2), "GET")],
    "all of it": [
        Fault("cut_upload", random_fraction(0.3, 4), "PUT"),
        Fault("cut_download", random_fraction(0.3, 5), "GET"),
        Fault("slow_down", every(7)),
    ],
}


@pytest.fixture
def big(tmp_path: Path) -> Path:
    path = tmp_path / "big"
    path.write_bytes(os.urandom(MULTIPART_BYTES))
    return path


def keys(server: S3Server, uri: str) -> list[str]:
    """The keys below the URI, read past the injected faults."""
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    return [
        found["Key"]
        for found in server.direct().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    ]


# ---- faults that retries overcome


@pytest.mark.parametrize("fault", SOMETIMES)
def test_what_is_written_listed_copied_and_read_is_intact(
    fault: str, s3_server: S3Server, bucket: str, big: Path
):
    s3_server.inject(*SOMETIMES[fault])
    small = {"dir/empty": b"", "dir/small": os.urandom(1000)}
    for name, data in small.items():
        files.write_bytes(files.join(bucket, "from", *name.split("/")), data)
    files.upload(big, files.join(bucket, "from", "big"))
    expected = {**small, "big": big.read_bytes()}
    assert files.list_files(bucket, recursive=True) == sorted(f"from/{name}" for name in expected)
    files.copy_folder(files.join(bucket, "from"), (big.parent / "back").as_uri())
    for name, data in expected.items():
        assert files.read_bytes(files.join(bucket, "from", *name.split("/"))) == data
        assert (big.parent / "back" / name).read_bytes() == data
    assert sorted(path.name for path in (big.parent / "back").iterdir()) == ["big", "dir"]
    assert {each.kind for each in SOMETIMES[fault]} <= s3_server.counts.keys()


@pytest.mark.parametrize("fault", ["503", "broken downloads", "lost responses"])
def test_ranges_of_parquet_are_intact(fault: str, s3_server: S3Server, bucket: str, tmp_path: Path):
    table = pa.table({"n": range(20_000), "bytes": [os.urandom(50) for _ in range(20_000)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=4_000)
    files.upload(tmp_path / "t.parquet", f"{bucket}/t.parquet")
    filesystem, path = files.resolve(f"{bucket}/t.parquet")
    s3_server.inject(*SOMETIMES[fault])
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        assert file.read_row_group(3).equals(table.slice(12_000, 4_000))
        assert file.read(columns=["n"]).equals(table.select(["n"]))
    assert s3_server.counts[SOMETIMES[fault][0].kind] > 0


@pytest.mark.parametrize("kind", ["slow_down", "lose_response", "cut_download"])
def test_a_pickled_filesystem_reads_ranges_of_any_length(kind: Any, s3_server: S3Server, bucket: str):
    data = os.urandom(1_000_000)
    files.write_bytes(f"{bucket}/a", data)
    filesystem, path = pickle.loads(pickle.dumps(files.resolve(f"{bucket}/a")))
    for at, length in ((999_990, 100), (1000, 900_000)):
        s3_server.inject(Fault(kind, first(4), "GET"))
        with filesystem.open_input_file(path) as file:
            assert file.read_at(length, at) == data[at : at + length]
        assert s3_server.counts[kind] == 4


def test_a_stream_is_read_in_one_request(s3_server: S3Server, bucket: str):
    files.write_bytes(f"{bucket}/a.gz", b"x" * 3_000_000)
    filesystem, path = files.resolve(f"{bucket}/a.gz")
    s3_server.inject()
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"x" * 3_000_000
    assert s3_server.counts == {"HEAD": 1, "GET": 1}


def test_more_objects_are_listed_and_deleted_than_fit_in_one_response(s3_server: S3Server, bucket: str):
    client, prefix = s3_server.direct(), bucket.removeprefix(f"s3://{BUCKET}/")
    names = [f"{number:04d}" for number in range(1_200)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: client.put_object(Bucket=BUCKET, Key=f"{prefix}/many/{name}"), names))
    files.write_bytes(f"{bucket}/one", b"1")
    assert files.list_files(f"{bucket}/many") == names
    files.delete_folder(f"{bucket}/many")
    assert files.list_files(bucket, recursive=True) == ["one"]
    assert s3_server.counts["GET"] >= 4


# ---- faults that become errors


@pytest.mark.parametrize("kind", ["refuse_upload", "cut_upload"])
def test_an_object_stays_unchanged_when_every_upload_breaks(
    kind: Any, s3_server: S3Server, bucket: str, big: Path
):
    files.write_bytes(f"{bucket}/a", b"before")
    s3_server.inject(Fault(kind, method="PUT"))
    with pytest.raises(Unavailable, match=f"{bucket}/a"):
        files.write_bytes(f"{bucket}/a", b"x" * 100_000)
    with pytest.raises(Unavailable, match=f"{bucket}/new"):
        files.upload(big, f"{bucket}/new")
    s3_server.inject()
    assert files.read_bytes(f"{bucket}/a") == b"before"
    assert len(keys(s3_server, bucket)) == 1
    assert not files.exists(f"{bucket}/new")


def test_an_upload_whose_parts_all_fail_is_aborted(s3_server: S3Server, bucket: str, big: Path):
    s3_server.inject(Fault("lose_response", method="PUT", target="partNumber=2"))
    with pytest.raises(Unavailable, match=f"{bucket}/a"):
        files.upload(big, f"{bucket}/a")
    assert s3_server.counts["DELETE"] == 1
    assert keys(s3_server, bucket) == []


@pytest.mark.parametrize("call", ["write_bytes(uri, path.read_bytes())", "upload(path, uri)"])
def test_an_uploader_that_is_killed_leaves_no_object(
    call: str, s3_server: S3Server, bucket: str, tmp_path: Path
):
    (tmp_path / "a").write_bytes(bytes(40_000_000))
    code = (
        "from pathlib import Path; from services.storage import files;"
        f"path, uri = Path('a'), {bucket + '/a'!r}; files.{call}"
    )
    s3_server.inject(Fault("delay", method="PUT", seconds=1.0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as process:
        while not s3_server.counts["delay"] and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    time.sleep(1.5)
    assert s3_server.counts["delay"] > 0
    assert keys(s3_server, bucket) == []
    assert not files.exists(f"{bucket}/a")


@pytest.fixture
def record(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelRecord:
    """A registered model in the object store, which no process of this node has fetched."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    for name in ("unet/model.safetensors", "model_index.json"):
        files.write_bytes(files.join(bucket, *name.split("/")), os.urandom(200_000))
    digest = models.folder_digest(bucket)
    return ModelRecord(id="m", name="m", uri=bucket, family="sd15", digest=digest, created_at=0)


def test_a_model_whose_download_breaks_is_fetched_again(s3_server: S3Server, record: ModelRecord):
    s3_server.inject(Fault("cut_download", first(2), "GET", "safetensors"))
    folder, _ = models.fetch(record)
    assert s3_server.counts["cut_download"] == 2
    assert models.folder_digest(folder.as_uri()) == record.digest


def test_processes_of_a_node_fetch_a_model_once(s3_server: S3Server, record: ModelRecord, tmp_path: Path):
    s3_server.inject(Fault("delay", method="GET", target="model.safetensors", seconds=2))
    code = f"""
        from services.artifacts import models
        from services.api.records import ModelRecord
        print(models.fetch(ModelRecord.model_validate_json({record.model_dump_json()!r}))[0])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "TMPDIR": str(tmp_path / "node")}
    (tmp_path / "node").mkdir()
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(subprocess.run, command, capture_output=True, text=True, env=env, cwd=ROOT)
            for _ in range(3)
        ]
    assert {run.result().stdout.strip() for run in runs} == {
        str(tmp_path / "node" / "dde-models" / record.digest)
    }
    assert s3_server.counts["delay"] == 1


def test_a_model_whose_every_download_breaks_is_not_kept(
    s3_server: S3Server, record: ModelRecord, tmp_path: Path
):
    s3_server.inject(Fault("cut_download", method="GET", target="safetensors"))
    with pytest.raises(Unavailable, match="safetensors"):
        models.fetch(record)
    assert {path.suffix for path in (tmp_path / "node" / "dde-models").iterdir()} == {".lock"}
    with pytest.raises(Unavailable, match="safetensors"):
        files.read_bytes(files.join(record.uri, "unet", "model.safetensors"))


def refusals(uri: str, **environment: str) -> str:
    """The errors that a process with this environment prints when it opens, writes and lists ``uri``."""
    code = f"""
        from services.storage import files
        for call in (files.resolve, lambda uri: files.write_bytes(uri, b"x"), files.list_files):
            try:
                call({uri!r})
            except Exception as error:
                print(type(error).__name__, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT, timeout=240
    )
    return done.stdout + done.stderr


def test_the_endpoint_depends_on_the_buckets_region_for_aws_and_is_kept_for_other_stores():
    for url in (
        "https://s3.amazonaws.com",
        "https://s3.eu-central-1.amazonaws.com",
        "https://s3.cn-north-1.amazonaws.com.cn",
    ):
        assert s3.own_endpoint(url) == ""
    for url in (
        "http://minio:9000",
        "https://bucket.vpce-1.s3.us-east-1.vpce.amazonaws.com",
        "https://s3.example.com",
    ):
        assert s3.own_endpoint(url) == url


def test_expired_credentials_are_unavailable_and_not_the_callers_mistake(s3_server: S3Server, bucket: str):
    s3_server.inject(Fault("expired"))
    with pytest.raises(Unavailable, match="ExpiredToken"):
        files.write_bytes(f"{bucket}/a", b"1")
    s3_server.inject()
    files.write_bytes(f"{bucket}/a", b"1")


REFUSED = {
    "a missing bucket": (
        "s3://nowhere/a",
        {},
        "BadRequest uri 's3://nowhere/a': bucket 'nowhere' does not exist",
    ),
    "no credentials": (
        "s3://bucket/a",
        {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nowhere"},
        "BadRequest uri 's3://bucket/a' cannot be opened: no credentials",
    ),
    "no server at the endpoint": (
        "s3://bucket/a",
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
        "Unavailable uri 's3://bucket/a': the object store does not answer",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_unusable_store_is_named_in_every_error(why: str, s3_server: S3Server):
    uri, environment, message = REFUSED[why]
    printed = refusals(uri, **environment)
    lines = printed.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(message) for line in lines), printed
