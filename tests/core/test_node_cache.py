"""Entries of a node's cache are made once, kept while in use, and evicted by their last use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dde_core.node_cache import NodeCache

ENTRY_BYTES = 1000


def file_of(content: bytes) -> tuple[int, Callable[[Path], None]]:
    return len(content), lambda path: path.write_bytes(content)


def folder_of(content: bytes) -> tuple[int, Callable[[Path], None]]:
    def write(path: Path) -> None:
        (path / "below").mkdir(parents=True)
        (path / "below" / "file").write_bytes(content)

    return len(content), write


KINDS = pytest.mark.parametrize("kind", [file_of, folder_of])


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    """Room for three entries."""
    return NodeCache(tmp_path / "cache", 3 * ENTRY_BYTES)


def entries(cache: NodeCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix != ".lock")


def use(cache: NodeCache, *names: str, kind: Callable = file_of) -> None:
    for number, name in enumerate(names):
        with cache.hold(name, partial(kind, bytes(ENTRY_BYTES))) as path:
            os.utime(path, (number, number))


@KINDS
def test_the_least_recently_used_entry_is_evicted(cache: NodeCache, kind: Callable) -> None:
    use(cache, "b1", "a2", "c3", kind=kind)
    use(cache, "d4", kind=kind)
    assert entries(cache) == ["a2", "c3", "d4"]


@KINDS
def test_an_entry_in_use_is_not_evicted_even_above_the_limit(cache: NodeCache, kind: Callable) -> None:
    use(cache, "b1", "a2", "c3", kind=kind)
    with cache.hold("b1", kind) as path:
        os.utime(path, (0, 0))
        use(cache, "d4", kind=kind)
        assert entries(cache) == ["b1", "c3", "d4"]
        with cache.hold("e5", partial(kind, bytes(5 * ENTRY_BYTES))):
            assert entries(cache) == ["b1", "e5"]
    cache.evict_unused()
    assert entries(cache) == []


def test_preferred_entries_are_evicted_last(cache: NodeCache) -> None:
    use(cache, "b1", "a2", "c3")
    cache.prefer(["b1"])
    use(cache, "d4", "e5", "f6")
    assert "b1" in entries(cache)


@KINDS
def test_an_entry_that_another_process_holds_until_its_exit_stays_until_then(
    cache: NodeCache, kind: Callable
) -> None:
    use(cache, "b1", kind=kind)
    code = """
import sys
from pathlib import Path
from dde_core.node_cache import NodeCache
NodeCache(Path(sys.argv[1]), 0).hold_until_exit("b1", None)
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(cache.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        cache.evict_unused()
        assert entries(cache) == ["b1"]
    cache.evict_unused()
    assert entries(cache) == []


def test_a_deleted_entry_is_made_again_even_if_it_was_held_until_exit(cache: NodeCache) -> None:
    path = cache.hold_until_exit("b1", partial(file_of, b"first"))
    path.unlink()
    assert cache.hold_until_exit("b1", partial(file_of, b"second")).read_bytes() == b"second"
    assert cache.hold_until_exit("b1", partial(file_of, b"third")).read_bytes() == b"second"


@KINDS
def test_an_error_leaves_no_entry(cache: NodeCache, kind: Callable) -> None:
    def fails(path: Path) -> None:
        kind(b"half")[1](path)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"), cache.hold("b1", lambda: (4, fails)):
        pass
    assert entries(cache) == []


@KINDS
def test_unfinished_entries_of_a_killed_process_are_deleted_and_never_read(
    cache: NodeCache, kind: Callable
) -> None:
    use(cache, "b1")
    for name in ("b2.part", "c3.part", "c3.reserved.part", "b1.deleted.part"):
        kind(b"half")[1](cache.folder / name)
    with cache.hold("b2", partial(file_of, b"whole")) as path:
        assert path.read_bytes() == b"whole"
    assert entries(cache) == ["b1", "b2"]


def test_entries_are_written_concurrently_and_their_bytes_count_from_the_reservation(
    cache: NodeCache,
) -> None:
    use(cache, "a1", "d4", "e5")
    other = NodeCache(cache.folder, 3 * ENTRY_BYTES)

    def write_while_another_is_written(path: Path) -> None:
        use(other, "c2")
        path.write_bytes(bytes(ENTRY_BYTES))

    with cache.hold("b1", lambda: (ENTRY_BYTES, write_while_another_is_written)):
        assert entries(cache) == ["b1", "c2", "e5"]
