"""Shards on the local disk: bounded, shared, never half-written, prefetched; memory does not grow."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from dde_core.errors import ConfigError, DataError
from dde_core.latents.reader import LatentReader
from dde_core.latents.schema import MANIFEST
from tests.support.latent_shards import RecordingFiles, write_shards

SHAPE, SIZES, WINDOW = (4, 8, 8), (20,) * 12, 60
"""Shards of 20 pairs of 1 KB, read in windows of three."""
STEPS = sum(SIZES) // 20

OF_A_PROCESS = """
import sys, psutil
from pathlib import Path
from pyarrow import fs
from dde_core.latents.reader import LatentReader
from tests.support.latent_shards import RecordingFiles

watched = RecordingFiles(float(sys.argv[3]))
folder, cache, window_pairs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[4])
reader = LatentReader(fs.PyFileSystem(watched), folder, cache=cache, window_pairs=window_pairs)
"""
"""Arguments: dataset, cache, delay of a read in seconds, pairs of a window."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "dataset", SIZES, SHAPE)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def reader(folder: Path, cache: Path, watched: RecordingFiles | None = None, **options) -> LatentReader:
    return LatentReader(
        fs.PyFileSystem(watched or RecordingFiles()), str(folder), cache=cache, window_pairs=WINDOW, **options
    )


def process(
    code: str, folder: Path, cache: Path, delay_s: float = 0.0, window_pairs: int = WINDOW
) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        OF_A_PROCESS + code,
        str(folder),
        str(cache),
        str(delay_s),
        str(window_pairs),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def output_of(running: subprocess.Popen[str]) -> str:
    """What a process printed, which must have ended well."""
    output, _ = running.communicate(timeout=120)
    assert running.returncode == 0
    return output


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.arrow"))


def tear(path: Path) -> None:
    """Leave the beginning of a file. Whoever is reading it has the old one."""
    path.with_suffix(".torn").write_bytes(path.read_bytes()[:-100])
    path.with_suffix(".torn").rename(path)


def held_bytes(cache: Path) -> int:
    """Of all files together, at a moment when nobody changes them."""
    with (cache / "room.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in cache.iterdir())


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_cache_never_holds_more_than_its_bytes_and_every_row_is_right(folder: Path, cache: Path):
    reader(folder, cache).shard(0)
    one = kept(cache)[0].stat().st_size
    watched = RecordingFiles()
    with (
        reader(folder, cache, watched, cache_bytes=7 * one) as bounded,
        reader(folder, cache.with_name("unbounded")) as free,
    ):
        for step in range(2 * STEPS):
            rows = bounded.batch(0, step, 20)
            assert (rows.latents_w == free.batch(0, step, 20).latents_w).all()
            assert held_bytes(cache) <= 7 * one
    shards = [name for name in watched.read if name != MANIFEST]
    assert (
        len(SIZES) < len(shards) <= 3 * len(SIZES)
    )  # two epochs, two windows ahead: each was there while it was read


def test_the_least_recently_used_shards_of_others_go_first(folder: Path, cache: Path):
    big = reader(folder, cache)
    for number in (5, 6, 7, 8, 9):
        big.shard(number)
    first, *_, last = sorted(kept(cache), key=lambda path: path.stat().st_mtime_ns)
    big.shard(5)  # the oldest one is used again
    small = reader(folder, cache, cache_bytes=int(6.9 * first.stat().st_size))
    small.shard(10)
    small.shard(11)
    assert first in kept(cache)
    assert last in kept(cache)
    assert len(kept(cache)) == 6


def test_a_cache_that_cannot_hold_a_window_is_refused(folder: Path, cache: Path):
    with pytest.raises(
        ConfigError, match=r"cache_bytes must be at least \d+ for a window of 60 pairs, got 65536"
    ):
        reader(folder, cache, cache_bytes=65_536)


def test_processes_that_share_a_cache_fetch_each_shard_once_for_all(folder: Path, cache: Path):
    code = f"""
rows = [reader.batch(0, step, 20).pair_ids for step in range({STEPS})]
reader.close()
print(sum(name != "{MANIFEST}" for name in watched.read), len(set(sum(rows, ()))))
"""
    running = [process(code, folder, cache, delay_s=0.05) for _ in range(2)]
    reads, pairs = zip(*(map(int, output_of(one).split()) for one in running), strict=True)
    assert sum(reads) == len(SIZES)
    assert set(pairs) == {sum(SIZES)}


def test_a_shard_that_was_changed_is_refused_and_not_kept(folder: Path, cache: Path):
    shard = next(folder.glob("shard-00003-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"shard-00003.* has sha256 .*, the manifest says"):
        reader(folder, cache).shard(3)
    assert not kept(cache)


def test_an_error_of_a_prefetched_batch_is_raised_at_its_request_and_may_pass(folder: Path, cache: Path):
    with reader(folder, cache) as expected:
        steps = [expected.batch(0, step, 5).pair_ids for step in range(13)]
        late = int(expected.batch(0, 12, 5).shards[0])  # of the second window
    moved = next(folder.glob(f"shard-{late:05d}-*.parquet"))
    with reader(folder, cache.with_name("other")) as running:
        moved.rename(folder / "away")
        assert [running.batch(0, step, 5).pair_ids for step in range(12)] == steps[:12]
        with pytest.raises(DataError, match=rf"shard-{late:05d}.* is missing"):
            running.batch(0, 12, 5)
        (folder / "away").rename(moved)
        assert running.batch(0, 12, 5).pair_ids == steps[12]


@pytest.mark.parametrize("harm", [Path.unlink, tear])
def test_a_kept_file_that_somebody_deletes_or_tears_is_fetched_again(
    folder: Path, cache: Path, harm: Callable[[Path], object]
):
    with reader(folder, cache) as running, reader(folder, cache.with_name("other")) as expected:
        running.batch(0, 0, 20)
        wait_until(lambda: len(kept(cache)) == 6)
        for path in kept(cache):
            harm(path)
        for step in (5, 1, 2):
            assert (running.batch(0, step, 20).latents_l == expected.batch(0, step, 20).latents_l).all()


def test_a_file_is_on_the_disk_before_it_has_its_name(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    fsync, synced = os.fsync, []

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced.append((stat.st_ino, stat.st_size, kept(cache)))

    monkeypatch.setattr(os, "fsync", watched)
    with reader(folder, cache) as running:
        running.shard(0)
    stat = kept(cache)[0].stat()
    assert synced == [(stat.st_ino, stat.st_size, [])]


def test_a_process_that_is_killed_while_it_fetches_leaves_nothing_behind_that_harms(
    folder: Path, cache: Path
):
    killed = process("print('here', flush=True); reader.shard(0)", folder, cache, delay_s=30)
    assert killed.stdout
    assert killed.stdout.readline() == "here\n"
    wait_until(lambda: any(cache.glob("*.lock")))
    killed.kill()
    killed.communicate()
    (cache / "part").write_bytes(b"half")  # as if it had been killed later
    assert (reader(folder, cache).shard(0).latents_w[:, 0, 0, 0] == np.arange(20)).all()


def test_a_shard_that_the_disk_cannot_hold_is_an_error_that_names_the_cache_and_no_file(
    folder: Path, cache: Path
):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    reader.shard(0)
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(sorted(path.name for path in Path(sys.argv[2]).iterdir() if path.suffix != ".lock"))
print(len(reader.shard(0)))
"""
    message, files, rows = output_of(process(code, folder, cache)).splitlines()
    assert "the cache cannot store a latent shard" in message
    assert str(cache) in message
    assert (files, rows) == ("[]", "20")


def test_the_next_windows_shards_are_fetched_while_this_one_is_used(folder: Path, cache: Path):
    with reader(folder, cache) as running:
        running.batch(0, 0, 5)
        wait_until(lambda: len(kept(cache)) == 6)  # this window's three and the next one's
        time.sleep(0.3)
        assert len(kept(cache)) == 6


def test_shards_that_are_in_use_or_fetched_ahead_stay_whatever_else_is_read(folder: Path, cache: Path):
    reader(folder, cache).shard(0)
    one = kept(cache)[0].stat().st_size
    with reader(folder, cache, cache_bytes=9 * one) as running:
        used = set(running.batch(0, 0, 20).shards.tolist())
        wait_until(lambda: len(kept(cache)) in (6, 7))
        in_use = {cache / f"{running.manifest.shards[number].sha256}.arrow" for number in used}
        for number in range(len(SIZES)):
            running.shard(number)
            assert in_use <= set(kept(cache))


def test_no_more_is_fetched_ahead_than_there_is_room_for(folder: Path, cache: Path):
    watched = RecordingFiles()
    with reader(folder, cache, watched, cache_bytes=5 * 20 * 1320) as running:  # a window and two shards
        for step in range(8):
            running.batch(0, step, 20)
            time.sleep(0.05)
    shards = [name for name in watched.read if name != MANIFEST]
    assert len(shards) == len(set(shards)) >= 9  # of three windows, each once


def test_the_next_batch_is_in_memory_before_its_request(folder: Path, cache: Path):
    with reader(folder, cache.with_name("other")) as other:
        expected = other.batch(0, 1, 20).pair_ids
    with reader(folder, cache) as running:
        running.batch(0, 0, 20)
        wait_until(lambda: len(kept(cache)) == 6)
        time.sleep(2.0)
        for gone in (folder, cache):
            shutil.rmtree(gone)
        assert running.batch(0, 1, 20).pair_ids == expected


def test_the_next_steps_shards_are_read_between_batches(folder: Path, cache: Path):
    """A batch returns while no shard can be read: its three shards were read during the step before."""
    files = RecordingFiles()
    with reader(folder, cache, files) as running:
        running.batch(0, 0, 60)
        for step, cached in ((1, 9), (2, 12), (3, 12)):
            wait_until(lambda cached=cached: len(kept(cache)) == cached)
            files.gate.clear()
            running.batch(0, step, 60)
            files.gate.set()


def test_a_reader_that_nobody_closes_does_not_keep_its_process_alive(folder: Path, cache: Path):
    output_of(process("reader.batch(0, 0, 1)", folder, cache, delay_s=0.5, window_pairs=100_000))
    assert (
        1 <= len(kept(cache)) <= 4
    )  # that of the pair, of the next pair, and what was on its way: not all twelve


def test_a_closed_reader_hands_out_nothing(folder: Path, cache: Path):
    with reader(folder, cache) as closed:
        closed.batch(0, 0, 5)
    with pytest.raises(RuntimeError):
        closed.batch(0, 7, 5)
    with pytest.raises(RuntimeError, match="closed"):
        closed.shard(0)


def test_memory_grows_neither_with_the_shards_nor_with_the_batches(tmp_path: Path):
    code = """
for step in range(50):
    reader.batch(0, step, 64)
    if step in (9, 49):
        memory = psutil.Process().memory_full_info()
        print(memory.uss / 1e6, memory.rss / 1e6)
"""
    used = []
    for times in (1, 10):  # 25 MB and 252 MB of latents, batches of 4 MB
        folder = write_shards(tmp_path / f"x{times}", (64,) * 6 * times, (4, 64, 64))
        running = process(code, folder, tmp_path / f"cache{times}", window_pairs=256)
        used.append(np.array([line.split() for line in output_of(running).splitlines()], float))
    assert (used[1][1] - used[1][0] < 24).all()  # of the larger dataset, 168 MB more were read
    assert (used[1][1] - used[0][1] < 48).all()
