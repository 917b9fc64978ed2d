"""Concurrent writers of one journal, in a folder and in an object store: no entry is lost or repeated."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.stages.journal import Journal, read_journal
from services.storage import files
from tests.support.s3_server import Fault, S3Server, every

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["file", "s3"])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The prefix of an attempt without a journal."""
    return (tmp_path / "a1").as_uri() if request.param == "file" else request.getfixturevalue("bucket")


def messages_in(prefix: str) -> list[str]:
    """All messages, in the journal's order; the numbers of its files have no gaps."""
    journal_files = read_journal(prefix, 0)
    assert [number for number, _ in journal_files] == list(
        range(len(files.list_files(files.join(prefix, "journal"))))
    )
    return [entry.message or "" for _, entries in journal_files for entry in entries]


def names(writer: str, num: int) -> list[str]:
    return [f"{writer} {number}" for number in range(num)]


def of(writer: str, messages: list[str]) -> list[str]:
    return [message for message in messages if message.startswith(f"{writer} ")]


def write(journal: Journal, messages: list[str]) -> None:
    for message in messages:
        journal.event(message)


def test_threads_that_share_a_journal_lose_nothing(prefix: str):
    journal = Journal(prefix, flush_every_s=0.005)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda writer: write(journal, names(writer, 50)), "abcd"))
    journal.flush()
    assert [of(writer, messages_in(prefix)) for writer in "abcd"] == [names(writer, 50) for writer in "abcd"]


def test_several_writers_at_once_lose_and_overwrite_nothing(prefix: str):
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda writer: write(Journal(prefix, flush_every_s=0), names(writer, 12)), "abc"))
    assert len(read_journal(prefix, 0)) == 36
    assert [of(writer, messages_in(prefix)) for writer in "abc"] == [names(writer, 12) for writer in "abc"]


def test_processes_that_write_at_once_lose_and_overwrite_nothing(tmp_path: Path):
    code = """
        import sys
        from services.stages.journal import Journal
        journal = Journal(sys.argv[1], flush_every_s=0)
        for number in range(20):
            journal.event(f"{sys.argv[2]} {number}")
    """
    prefix = tmp_path.as_uri()
    command = [sys.executable, "-c", textwrap.dedent(code), prefix]
    processes = [subprocess.Popen([*command, writer], cwd=ROOT) for writer in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert [of(writer, messages_in(prefix)) for writer in "ab"] == [names(writer, 20) for writer in "ab"]


def test_lost_responses_and_broken_uploads_lose_and_repeat_no_entry(s3_server: S3Server, bucket: str):
    s3_server.inject(Fault("lose_response", every(3), "PUT"), Fault("cut_upload", every(4), "PUT"))
    first, second = Journal(bucket, flush_every_s=0), Journal(bucket, flush_every_s=0)
    for number in range(6):
        write(first, [f"a {number}"])
        write(second, [f"b {number}"])
    assert s3_server.counts["lose_response"] > 0 < s3_server.counts["cut_upload"]
    s3_server.inject()
    assert messages_in(bucket) == [f"{writer} {number}" for number in range(6) for writer in "ab"]


def test_a_single_writer_lists_no_folder(s3_server: S3Server, bucket: str):
    s3_server.inject()
    write(Journal(bucket, flush_every_s=0), names("a", 5))
    assert s3_server.counts == {"PUT": 5}


def test_entries_of_a_failed_write_are_kept_and_written_later(tmp_path: Path):
    journal = Journal(tmp_path.as_uri(), flush_every_s=0)
    (tmp_path / "journal").write_bytes(b"a file where the folder must be")
    for message in ("a 0", "a 1"):
        with pytest.raises(NotADirectoryError):
            journal.event(message)
    (tmp_path / "journal").unlink()
    journal.flush()
    assert messages_in(tmp_path.as_uri()) == ["a 0", "a 1"]


def test_a_write_that_succeeded_with_an_error_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    link = os.link

    def link_and_fail(*paths: Path) -> None:
        link(*paths)
        raise OSError(errno.EIO, "the answer was lost")

    journal = Journal(tmp_path.as_uri(), flush_every_s=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link_and_fail)
        with pytest.raises(OSError, match="the answer was lost"):
            journal.event("a 0")
    journal.event("a 1")
    assert messages_in(tmp_path.as_uri()) == ["a 0", "a 1"]


@pytest.mark.parametrize("number", files.NO_HARD_LINKS)
def test_writers_overwrite_nothing_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    def refuse(*paths: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    first, second = Journal(tmp_path.as_uri(), flush_every_s=0), Journal(tmp_path.as_uri(), flush_every_s=0)
    write(first, names("a", 2))
    write(second, names("b", 2))
    write(first, ["a 2"])
    assert messages_in(tmp_path.as_uri()) == ["a 0", "a 1", "b 0", "b 1", "a 2"]
    assert not files.create_bytes(files.join(tmp_path.as_uri(), "journal", "00000001.json"), b"other")


def test_a_full_disk_leaves_no_partial_file_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "no links")

    def fill(*_: int) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(os, "link", refuse)
    sync = files._sync
    monkeypatch.setattr(files, "_sync", lambda path: (sync(path), monkeypatch.setattr(os, "fsync", fill)))
    with pytest.raises(OSError, match="the disk is full"):
        files.create_bytes((tmp_path / "x").as_uri(), b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_stops_before_a_partial_file_and_refuses_other_contents(prefix: str):
    write(Journal(prefix, flush_every_s=0), names("a", 3))
    uri = files.join(prefix, "journal", "00000001.json")
    whole = files.read_bytes(uri)
    for part in (b"", whole[:1], whole[:-1]):
        files.write_bytes(uri, part)
        assert [number for number, _ in read_journal(prefix, 0)] == [0]
    files.write_bytes(uri, whole)
    assert messages_in(prefix) == names("a", 3)
    files.write_bytes(uri, b'[{"at": "noon"}]')
    with pytest.raises(ValueError, match="at"):
        read_journal(prefix, 0)


def test_fields_of_a_later_version_are_ignored(prefix: str):
    later = [{"at": 1.0, "message": "known", "mood": "good"}]
    files.write_json(f"{prefix}/journal/00000000.json", later)
    assert messages_in(prefix) == ["known"]
