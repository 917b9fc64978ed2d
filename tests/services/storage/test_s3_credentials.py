"""Keys that are rotated while a process runs: the old one is refused, the new one is found in its file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.errors import Unavailable
from services.storage import files, s3
from tests.support.s3_server import BUCKET, S3Server


def write_key(file: Path, key: str) -> None:
    """As Kubernetes updates a mounted Secret: by renaming."""
    new = file.with_suffix(".new")
    new.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")
    new.replace(file)


@pytest.fixture
def key_file(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The credentials are those of a file, of the key "old"."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write_key(tmp_path / "credentials", "old")
    s3.forget_clients()
    yield tmp_path / "credentials"
    s3_server.proxy.refused_keys = set()
    s3.forget_clients()


def test_a_rotated_key_is_read_again_for_every_kind_of_request(
    key_file: Path, s3_server: S3Server, bucket: str, tmp_path: Path
):
    big = tmp_path / "big"
    big.write_bytes(bytes(9_000_000))
    calls = {
        "write": lambda: files.write_bytes(f"{bucket}/a", b"1"),
        "read": lambda: files.read_bytes(f"{bucket}/a"),
        "exists, a HEAD": lambda: files.exists(f"{bucket}/a"),
        "list": lambda: files.list_files(bucket),
        "an upload in parts": lambda: files.upload(big, f"{bucket}/big"),
        "create": lambda: files.create_bytes(f"{bucket}/new", b"1"),
        "delete": lambda: files.delete_file(f"{bucket}/new"),
    }
    files.write_bytes(f"{bucket}/a", b"0")
    for number, (name, call) in enumerate(calls.items()):
        s3_server.proxy.refused_keys = {"old", *(f"key{n}" for n in range(number))}
        write_key(key_file, f"key{number}")
        s3_server.inject()
        call()
        assert sum(s3_server.counts.values()) >= 2, f"{name}: refused once, then repeated"
    assert files.read_bytes(f"{bucket}/a") == b"1"
    assert len(files.read_bytes(f"{bucket}/big")) == 9_000_000


def test_threads_whose_requests_are_refused_at_once_all_go_on(
    key_file: Path, s3_server: S3Server, bucket: str
):
    files.write_bytes(f"{bucket}/a", b"1")
    write_key(key_file, "new")
    s3_server.proxy.refused_keys = {"old"}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: files.read_bytes(f"{bucket}/a"), range(32))) == [b"1"] * 32


def test_a_key_that_is_refused_and_not_replaced_is_unavailable_after_two_tries(
    key_file: Path, s3_server: S3Server, bucket: str
):
    files.write_bytes(f"{bucket}/a", b"1")
    s3_server.proxy.refused_keys = {"old"}
    s3_server.inject()
    with pytest.raises(Unavailable, match="ExpiredToken"):
        files.read_bytes(f"{bucket}/a")
    assert s3_server.counts["GET"] == 2
    write_key(key_file, "new")
    assert files.read_bytes(f"{bucket}/a") == b"1"


def test_credentials_that_come_after_the_first_request_are_found(
    key_file: Path, s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    key_file.unlink()
    monkeypatch.setenv("HOME", str(key_file.parent))
    with pytest.raises(ValueError, match="no credentials"):
        files.write_bytes(f"{bucket}/a", b"1")
    write_key(key_file, "late")
    files.write_bytes(f"{bucket}/a", b"1")
    assert f"{BUCKET}/" in bucket
    assert files.read_bytes(f"{bucket}/a") == b"1"
