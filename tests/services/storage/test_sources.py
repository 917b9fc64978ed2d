"""Only what the rules allow is opened: regular files, folders and objects, within size, number and time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
from pyarrow import fs

from services.errors import BadRequest, Forbidden, NotFound, ServiceError
from services.stages import layout
from services.storage import files, s3, sources
from services.storage.sources import SourceRules


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """A folder that this process is held to, beside one that it may not open."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file.txt").write_text("secret")
    folder = tmp_path / "allowed"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file.txt").write_text("open")
    sources.hold_to(SourceRules((str(folder), "s3://bucket/pairs"), (str(folder / "key"),)))
    return folder


def refusal(uri: str | Path) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        sources.read_bytes(str(uri), 1000)
    assert "secret" not in caught.value.message.replace(str(uri), "")
    return caught.value


def test_a_process_that_is_held_to_nothing_opens_what_the_package_ships_and_nothing_else(tmp_path: Path):
    sources.hold_to(SourceRules())
    (tmp_path / "a.txt").write_text("x")
    assert isinstance(refusal(tmp_path / "a.txt"), Forbidden)
    assert sources.list_files(files.SHIPPED)
    assert sources.list_files("shapes://model")


def test_a_file_inside_is_read_by_path_and_by_uri(allowed: Path):
    file = allowed / "inner" / "file.txt"
    for uri in (str(file), file.as_uri(), f"{allowed}/inner/../inner/file.txt"):
        assert sources.read_bytes(uri, 1000) == b"open"


@pytest.mark.parametrize(
    "outside",
    [
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "relative.txt",
        "{folder}/../secret/file.txt",
        "file://{folder}/%2e%2e/secret/file.txt",
        "{folder}-other/file.txt",
        "{folder}/key",
        "{folder}/key/deeper",
        "s3://bucket",
        "s3://bucket/pairs-of-others/x",
        "s3://other/pairs/x",
    ],
)
def test_what_is_outside_is_forbidden_whether_it_exists_or_not(allowed: Path, outside: str):
    (allowed / "key").write_text("secret")
    error = refusal(outside.format(folder=allowed))
    assert (type(error), error.code) == (Forbidden, "source_not_allowed")
    assert "DDE_ALLOWED_SOURCES" in error.message


def test_a_link_is_followed_before_it_is_checked(allowed: Path, tmp_path: Path):
    (allowed / "file").symlink_to(tmp_path / "secret" / "file.txt")
    (allowed / "folder").symlink_to(tmp_path / "secret")
    (allowed / "own").symlink_to(allowed / "inner" / "file.txt")
    for name in ("file", "folder/file.txt"):
        assert refusal(allowed / name).code == "source_not_allowed"
    assert sources.read_bytes(str(allowed / "own"), 1000) == b"open"
    with pytest.raises(Forbidden, match=r"allowed/folder' is outside"):
        sources.list_files(str(allowed))


def test_a_listing_without_a_closed_part_is_no_listing_unless_the_part_is_hidden(allowed: Path):
    (allowed / "key").mkdir()
    with pytest.raises(Forbidden, match=r"allowed/key' is outside"):
        sources.list_files(str(allowed))
    (allowed / "key").rename(allowed / ".key")
    sources.hold_to(SourceRules((str(allowed),), (str(allowed / ".key"),)))
    assert sources.list_files(str(allowed)) == ["inner/file.txt"]


@pytest.mark.parametrize("uri", ["s3://bucket/pairs", "s3://bucket/pairs/", "s3://bucket/pairs/a%20b/c"])
def test_objects_below_an_allowed_prefix_are_allowed(allowed: Path, uri: str):
    sources.check_allowed(uri)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("file:///a%00b", "null byte"),
        ("file://host/x", "hostname"),
        ("gopher://x", "file:// or s3://"),
        ("s3://bucket/pairs/../other", "'..'"),
    ],
)
def test_an_unusable_uri_is_the_callers_mistake(allowed: Path, uri: str, why: str):
    error = refusal(uri)
    assert isinstance(error, BadRequest)
    assert why in error.message


def test_the_home_of_an_unknown_user_does_not_exist(allowed: Path):
    error = refusal("~nosuchuser/x")
    assert (type(error), error.message) == (
        NotFound,
        "uri '~nosuchuser/x' does not exist: no such user",
    )


def test_a_pipe_a_device_and_a_circle_of_links_are_refused_without_being_opened(allowed: Path):
    os.mkfifo(allowed / "pipe")
    (allowed / "link").symlink_to(allowed / "pipe")
    (allowed / "circle").symlink_to(allowed / "circle")
    for name in ("pipe", "link"):
        assert refusal(allowed / name).code == "not_a_file"
    assert isinstance(refusal(allowed / "circle"), BadRequest)
    sources.hold_to(SourceRules(("/dev",)))
    assert refusal("/dev/zero").code == "not_a_file"


def test_a_file_is_read_up_to_a_size_and_no_further(allowed: Path):
    (allowed / "long").write_bytes(b"x" * 1001)
    assert refusal(allowed / "long").code == "source_too_large"
    sources.hold_to(SourceRules(("/proc/self",)))  # files that report a size of 0
    with pytest.raises(BadRequest, match="longer than 10 bytes"):
        sources.read_bytes("/proc/self/maps", 10)


def test_a_folder_of_too_many_files_is_refused_after_that_many(allowed: Path):
    for number in range(20):
        (allowed / f"{number}.txt").touch()
    with pytest.raises(BadRequest, match="more than 10 entries"):
        sources.list_files(str(allowed), max_files=10)


def test_links_that_lead_back_up_are_not_followed_again(allowed: Path):
    for name in ("up", "again"):
        (allowed / "inner" / name).symlink_to(allowed)
    assert sources.list_files(str(allowed)) == ["inner/file.txt"]


def test_a_folder_elsewhere_is_entered_through_a_link_if_it_is_allowed(allowed: Path, tmp_path: Path):
    (allowed / "link").symlink_to(tmp_path / "secret")
    sources.hold_to(SourceRules((str(tmp_path),)))
    assert sources.list_files(str(allowed)) == ["inner/file.txt", "link/file.txt"]


def test_nothing_is_opened_once_the_time_is_over(allowed: Path):
    uri = str(allowed / "inner" / "file.txt")
    with sources.time_limit(0.01):
        time.sleep(0.02)
        for call in (sources.resolve, sources.open_file, sources.check_folder):
            with pytest.raises(BadRequest, match=r"within 0\.01 s") as caught:
                call(uri)
            assert caught.value.code == "read_timeout"
    assert sources.read_bytes(uri, 1000) == b"open"


def test_a_models_folder_with_one_link_to_the_outside_is_refused(allowed: Path, tmp_path: Path):
    sources.check_folder(str(allowed))
    (allowed / "config.json").symlink_to(tmp_path / "secret" / "file.txt")
    with pytest.raises(Forbidden, match=r"config\.json"):
        sources.check_folder(str(allowed))


def test_a_models_json_file_has_a_size_limit(allowed: Path):
    with (allowed / "config.json").open("wb") as file:
        file.truncate(sources.MAX_JSON_BYTES + 1)
    with pytest.raises(BadRequest, match=r"config\.json' is longer"):
        sources.check_folder(str(allowed))


def test_odd_names_are_allowed_as_any_other(bucket: str):
    sources.hold_to(SourceRules((bucket,)))
    uri = files.join(bucket, "a b", "50%25", "Größe")
    files.write_bytes(uri, b"x")
    assert sources.read_bytes(uri, 10) == b"x"
    assert sources.list_files(bucket) == ["a b/50%25/Größe"]
    sources.check_folder(bucket)
    with pytest.raises(Forbidden):
        sources.read_bytes(f"{bucket}-other/x", 10)


@pytest.mark.parametrize(
    ("project", "uri", "is_open"),
    [
        ("team-a", "s3://bucket/root/projects/team-a/models/model_1", True),
        ("team-a", "s3://bucket/root/projects/team-a", True),
        ("team-a", "s3://bucket/root//projects//team-a/pairs", True),
        ("team-a", "s3://bucket/root/projects/team-ab/models/model_1", False),
        ("team-a", "s3://bucket/root/models/model_1", False),
        ("team-a", "s3://bucket/r%6Fot/models/model_1", False),
        ("team-a", "s3://bucket/root//models", False),
        ("team-a", "s3://bucket//root/./models", False),
        ("team-a", "s3://bucket/root", False),
        ("team-a", "s3://bucket/root-of-others/pairs", True),
        ("default", "s3://bucket/root/models/model_1", True),
        ("default", "s3://bucket/root/projects/team-a/models/model_1", False),
        ("default", "s3://bucket/root//projects/team-a", False),
        ("default", "s3://bucket/root/projects", False),
        ("default", "s3://bucket/data", True),
    ],
)
def test_what_lies_in_the_storage_is_open_to_one_project(project: str, uri: str, is_open: bool):
    others, own = layout.others_root("s3://bucket/root", project)
    sources.hold_to(SourceRules((sources.ANY_BUCKET,), (), others, own))
    if is_open:
        sources.check_allowed(uri)
        return
    with pytest.raises(Forbidden, match="lies in the storage of another project") as caught:
        sources.check_allowed(uri)
    assert caught.value.code == sources.OTHER_PROJECT
    bucket, key = s3.parts(uri)
    assert not sources.is_allowed(fs.SubTreeFileSystem("/", fs.LocalFileSystem()), f"{bucket}/{key}")


def test_two_requests_at_once_are_held_to_the_rules_of_their_own_projects(allowed: Path):
    """Each in the threads that it starts, too; the rules of the process stay as they were."""
    both = threading.Barrier(2)
    for name in ("one", "two"):
        (allowed / name).mkdir()
        (allowed / name / "file.txt").write_text(name)

    def request(own: str, other: str) -> list[bytes | str]:
        sources.hold_request_to(SourceRules((str(allowed),), (), str(allowed), str(allowed / own)))
        both.wait(10)

        def read(name: str) -> bytes | str:
            try:
                return sources.read_bytes(str(allowed / name / "file.txt"), 100)
            except Forbidden as error:
                return error.code

        with sources.in_threads(read, [own, other], 2) as results:
            return list(results)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(copy_context().run, request, "one", "two")
        two = pool.submit(copy_context().run, request, "two", "one")
        assert one.result() == [b"one", "other_project"]
        assert two.result() == [b"two", "other_project"]
    assert sources.read_bytes(str(allowed / "two" / "file.txt"), 100) == b"two"


def test_threads_that_read_sources_have_the_callers_time_limit(allowed: Path):
    with (
        sources.time_limit(0),
        sources.in_threads(sources.entries, [str(allowed)], 2) as results,
        pytest.raises(BadRequest) as caught,
    ):
        next(results)
    assert caught.value.code == "read_timeout"


def test_nothing_more_is_read_after_the_block_of_threads():
    begun: list[int] = []
    threads: set[threading.Thread] = set()
    go_on = threading.Event()

    def read(number: int) -> int:
        threads.add(threading.current_thread())
        begun.append(number)
        if number:
            go_on.wait(10)
        return number

    with sources.in_threads(read, range(100), 1) as results:
        assert next(results) == 0
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(begun) <= 2


def test_a_block_of_threads_may_end_on_one_of_them():
    """A generator that nobody goes on with ends where it is collected: on any thread."""
    started = threading.Event()
    ended: Future[None] = Future()

    def read(number: int) -> int:
        if number == 1:
            started.wait(10)
            try:
                ended.set_result(unfinished.close())  # as the collector does
            except RuntimeError as error:
                ended.set_exception(error)
        return number

    def read_numbers() -> Generator[int, None, None]:
        with sources.in_threads(read, [0, 1], 1) as results:
            yield from results

    unfinished = read_numbers()
    assert next(unfinished) == 0
    started.set()
    ended.result(10)
