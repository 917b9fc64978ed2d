"""What training keeps, and that it goes on from it: full disks, broken files, requests to stop, attempts
that are overtaken."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

from dde_core import checkpoint, train_step
from dde_core.checkpoint import Snapshot
from dde_core.config import LoraConfig, ObjectiveConfig
from dde_core.errors import ConfigError, DataError, NonFiniteError
from dde_core.models.folder import ModelFolder
from dde_core.models.policy import Policy
from services.api.records import Validated
from services.api.requests import EvaluationConfig, ValidationConfig
from services.artifacts import checkpoints
from services.artifacts.checkpoints import CheckpointRecord, ReaderPosition
from services.errors import Overtaken, Unavailable
from services.stages import layout
from services.stages.journal import Journal, read_journal
from services.stages.specs import StopRequest
from services.storage import files
from services.training import selection
from services.training.fence import Fence
from services.training.worker import errors, loop, preemption
from tests.support.encoded_pairs import train_here, train_spec, write_encoded
from tests.support.s3_server import Fault
from tests.support.tiny_folders import sd15_folder

OBJECTIVE = ObjectiveConfig(beta=500.0, calibration_bins=20)
TRAINING = {
    "batch_size": 6,
    "learning_rate": 1e-3,
    "ema_decay": 0.9,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(sd15_folder(tmp_path_factory.mktemp("models") / "sd15"))


@pytest.fixture(scope="module")
def encoded(model: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoded(tmp_path_factory.mktemp("encoded") / "pairs", model)


@pytest.fixture(scope="module")
def undisturbed(model, encoded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(folder, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    return state(folder, 8)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages that are given to a journal of this process, at once."""
    found: list[str] = []
    event = Journal.event

    def record(journal: Journal, message: str, *level: str) -> None:
        found.append(message)
        event(journal, message, *level)

    monkeypatch.setattr(Journal, "event", record)
    return found


def wait_until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited for {timeout_s:g} s"
        time.sleep(0.02)


def run_of(folder: Path | str) -> str:
    return files.join(files.as_uri(folder), "run")


def state(folder: Path | str, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    with checkpoints.opened(run_of(folder), checkpoints.read(run_of(folder), step)) as state:
        return {
            f"{path.relative_to(state)}/{n}": t
            for path in state.rglob("*.safetensors")
            for n, t in load_file(path).items()
        }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def events(folder: Path | str) -> list[str]:
    return [
        entry.message for _, some in read_journal(files.as_uri(folder), 0) for entry in some if entry.message
    ]


def test_a_checkpoint_names_its_run_and_the_last_ones_are_kept(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert checkpoints.steps(run_of(tmp_path)) == [6, 8]
    record = checkpoints.read(run_of(tmp_path), 8)
    assert (record.step, record.pairs_seen, record.images_seen, record.workers) == (8, 48, 96, 1)
    assert record.reader == ReaderPosition(epoch=3, pair=0), "48 pairs of 16"
    assert record.identity["training.batch_size"] == 6
    assert record.metrics["loss"] > 0
    expected = {"optimizer.safetensors", "calibration.safetensors", "state.json"}
    parts = {
        f"{part}/{name}"
        for part in ("weights", "ema")
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert set(record.files) == expected | parts
    assert (
        record.num_bytes
        == sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step-00000008").rglob("*.*"))
        - (tmp_path / "run/checkpoints/step-00000008/checkpoint.json").stat().st_size
    )
    assert same(state(tmp_path, 8), undisturbed)


def test_a_run_resumes_from_its_checkpoint_to_the_same_bits(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert [event for event in events(tmp_path) if "from step" in event] == [
        "training on 1 workers from step 0",
        "training on 1 workers from step 4",
    ]
    assert same(state(tmp_path, 8), undisturbed)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["whole", "lora"])
def test_a_run_with_adafactor_resumes_to_the_same_bits(model, encoded, tmp_path, lora):
    training = TRAINING | {"optimizer": "adafactor", "lora": lora}
    train_here(tmp_path / "whole", model, encoded, OBJECTIVE, steps=4, **training)
    for steps in (2, 4):
        train_here(tmp_path / "parts", model, encoded, OBJECTIVE, steps=steps, **training)
    assert "training on 1 workers from step 2" in events(tmp_path / "parts")
    found = state(tmp_path / "parts", 4)
    assert same(found, state(tmp_path / "whole", 4))
    assert any(name.endswith("/exp_avg_sq_row") for name in found)
    assert not any(name.endswith("/exp_avg") for name in found), "no first moment"


def test_a_checkpoint_whose_files_have_changed_is_put_aside(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    weights = tmp_path / "run/checkpoints/step-00000004/optimizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    changed = r"optimizer\.safetensors of the checkpoint at .*step-00000004' differs from its recorded digest"
    with pytest.raises(DataError, match=changed):
        state(tmp_path, 4)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert any("invalidated the checkpoint of step 4" in event for event in events(tmp_path))
    assert "training on 1 workers from step 2" in events(tmp_path)
    assert same(state(tmp_path, 8), undisturbed)


def test_while_a_checkpoint_is_stored_one_that_is_due_is_left_out_and_the_last_one_waits(
    model, encoded, tmp_path, monkeypatch, undisturbed, messages
):
    alive, most = weakref.WeakSet(), []

    class Slow(Snapshot):
        """Stored as slowly as a large model: until two later checkpoints were due."""

        def __init__(self, *values) -> None:
            super().__init__(*values)
            alive.add(self)
            most.append(len(alive))

        def write(self, folder: Path, policy: Policy) -> None:
            wait_until(lambda: sum("skipped" in message for message in messages) == 2)
            super().write(folder, policy)

    monkeypatch.setattr(checkpoint, "Snapshot", Slow)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    skipped = [event for event in events(tmp_path) if "skipped" in event]
    assert skipped == [
        f"checkpoint of step {step} skipped: the previous one is still being stored" for step in (4, 6)
    ]
    assert most == [1, 1], "the host has memory for one copy of the state"
    assert checkpoints.steps(run_of(tmp_path)) == [2, 8]
    assert same(state(tmp_path, 8), undisturbed)


def test_pruning_that_fails_costs_no_checkpoint(model, encoded, tmp_path, monkeypatch):
    newest, delete = [0], checkpoints.delete

    def failing(run: str, step: int) -> None:
        newest.append(max(checkpoints.steps(run), default=0))
        if len(newest) in (4, 7):
            raise OSError("busy")
        delete(run, step)

    monkeypatch.setattr(checkpoints, "delete", failing)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING | {"keep_checkpoints": 1})
    assert any("busy" in event for event in events(tmp_path))
    assert newest == sorted(newest)
    assert checkpoints.steps(run_of(tmp_path)) == [8]


def test_a_record_that_cannot_be_read_is_put_aside(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    (tmp_path / "run/checkpoints/step-00000004/checkpoint.json").write_text('{"step": ')
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert any("invalidated the checkpoint of step 4: the record of" in event for event in events(tmp_path))
    assert same(state(tmp_path, 8), undisturbed)


def test_a_checkpoint_of_another_version_ends_the_run_and_stays_as_it_is(model, encoded, tmp_path):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=2, **TRAINING)
    record = tmp_path / "run/checkpoints/step-00000002/checkpoint.json"
    newer = json.loads(record.read_text()) | {"mood": "good"}
    record.write_text(json.dumps(newer))
    with pytest.raises(
        DataError, match=r"step-00000002' was written by another version of this code: .*\n?.*mood"
    ):
        train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    assert json.loads(record.read_text()) == newer


def test_a_setting_that_a_checkpoint_does_not_know_yet_is_no_other_run(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    record = tmp_path / "run/checkpoints/step-00000004/checkpoint.json"
    older = json.loads(record.read_text())
    del older["identity"]["training.draw_seed"]
    record.write_text(json.dumps(older))
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert "training on 1 workers from step 4" in events(tmp_path)
    assert same(state(tmp_path, 8), undisturbed)


def test_a_setting_that_a_checkpoint_does_not_know_yet_had_its_default(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    record = tmp_path / "run/checkpoints/step-00000004/checkpoint.json"
    older = json.loads(record.read_text())
    later = ("objective.error", "objective.time_ids", "objective.dropped_caption", "objective.eta")
    for name in (*later, "training.optimizer", "ledger"):
        del older["identity"][name]
    record.write_text(json.dumps(older))
    changes = [
        ("objective.time_ids", {"time_ids": "fixed"}, {}, "per_side"),
        ("objective.dropped_caption", {"dropped_caption": "empty"}, {}, "model"),
        ("objective.eta", {"eta": 0.5}, {}, 1.0),
        ("training.optimizer", {}, {"optimizer": "adafactor"}, "adamw"),
    ]
    for field, objective, training, default in changes:
        changed = replace(OBJECTIVE, **objective)
        with pytest.raises(ConfigError) as refused:
            train_here(tmp_path, model, encoded, changed, steps=8, **TRAINING | training)
        assert refused.value.field == field
        assert f"which has {default!r}, because it is older than the setting" in str(refused.value)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert "training on 1 workers from step 4" in events(tmp_path)
    assert same(state(tmp_path, 8), undisturbed)


def test_workers_that_others_have_replaced_write_no_checkpoint_any_more(tmp_path):
    run = tmp_path.as_uri()
    driver, cut_off, new = Fence(run, 1), Fence(run, 1, "a"), Fence(run, 1, "b")
    for each in (driver, cut_off, new):
        each.take()
    driver.check()
    new.check()
    with pytest.raises(Overtaken, match="newer workers of attempt 1 have taken over this run"):
        cut_off.check()
    Fence(run, 2).take()
    for each in (driver, new):
        with pytest.raises(Overtaken, match="attempt 2 has taken over this run"):
            each.take()


def test_a_run_that_is_overtaken_makes_no_further_checkpoint_visible(model, encoded, tmp_path, monkeypatch):
    real = loop.learning_rate

    def overtaken(training, step: int) -> float:
        if step == 3:
            Fence(run_of(tmp_path), 2).take()
        return real(training, step)

    monkeypatch.setattr(loop, "learning_rate", overtaken)
    with pytest.raises(Overtaken, match="attempt 2 has taken over this run from attempt 1"):
        train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert not {4, 6, 8} & set(checkpoints.steps(run_of(tmp_path)))


def test_a_checkpoint_that_is_overtaken_while_it_is_written_stays_invisible(tmp_path):
    run, fence = tmp_path.as_uri(), Fence(tmp_path.as_uri(), 1, "a")
    fence.take()

    def write() -> None:
        with checkpoints.committed(run, record_of(5), fence.check) as state:
            (state / "state.json").write_text("{}")
            Fence(run, 1, "b").take()

    with pytest.raises(Overtaken):
        write()
    assert checkpoints.steps(run) == []


def test_files_without_a_record_are_no_checkpoint(model, encoded, tmp_path, undisturbed):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    (tmp_path / "run/checkpoints/step-00000004/checkpoint.json").unlink()
    assert checkpoints.steps(run_of(tmp_path)) == [2]
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert same(state(tmp_path, 8), undisturbed)


def test_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs(model, encoded, tmp_path):
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=2, **TRAINING)
    message = r"training\.learning_rate differs from the checkpoint of step 2, which has 0\.001, got 0\.002"
    with pytest.raises(ConfigError, match=message):
        train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING | {"learning_rate": 2e-3})
    failed = files.read_json(layout.worker_failed_uri(tmp_path.as_uri()))
    assert failed["param"] == "training.learning_rate", "the driver learns what would recur"


def test_weights_that_the_last_update_made_infinite_are_stored_nowhere_and_fail_the_run(
    model, encoded, tmp_path
):
    message = r"^the state to store: .* is not finite in \d+ of \d+ values"
    with pytest.raises(NonFiniteError, match=message):
        train_here(tmp_path, model, encoded, OBJECTIVE, steps=1, **TRAINING, weight_decay=1e50)
    assert checkpoints.steps(run_of(tmp_path)) == []
    failed = files.read_json(layout.worker_failed_uri(tmp_path.as_uri()))
    assert failed["code"] == "non_finite_error"


def test_an_error_that_nobody_foresaw_is_final_when_it_has_come_three_times_without_progress(
    model, encoded, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise KeyError("down_blocks")

    failed = tmp_path / "worker-failed.json"
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=2, **TRAINING)
    monkeypatch.setattr(train_step, "pair_errors", fail)
    for number in (1, 2, 3):
        assert not failed.exists(), number
        with pytest.raises(KeyError):
            train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    assert files.read_json(failed.as_uri())["message"] == "KeyError: 'down_blocks'"


@pytest.mark.parametrize(
    ("error", "workers", "world_size", "is_final"),
    [
        (torch.OutOfMemoryError("2 GiB"), 1, 1, True),
        (torch.OutOfMemoryError("2 GiB"), (1, 2), 1, False),
        (ValueError("Default process group has not been initialized"), 2, 2, False),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), 1, 1, False),
        (Unavailable("the object store does not answer"), 1, 1, False),
        (OSError(errno.ENOSPC, "no space"), 1, 1, False),
        (DataError("a shard is broken"), 1, 1, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_passes_or_is_of_other_workers_making_ends_no_run_however_often_it_comes(
    model, encoded, tmp_path, error, workers, world_size, is_final
):
    spec = train_spec(tmp_path, model, encoded, OBJECTIVE, steps=1).model_copy(update={"workers": workers})
    for _ in range(4):
        errors.report(spec, error, 0, world_size)
    assert (tmp_path / "worker-failed.json").exists() == is_final


def test_an_attempt_that_was_given_up_writes_no_checkpoint_any_more(model, encoded, tmp_path):
    Fence(run_of(tmp_path), 2).take()
    with pytest.raises(Overtaken, match="attempt 2 has taken over this run from attempt 1"):
        train_here(tmp_path, model, encoded, OBJECTIVE, steps=4, **TRAINING)
    assert checkpoints.steps(run_of(tmp_path)) == []


def test_a_run_that_is_requested_to_stop_ends_after_a_step_and_resumes_to_the_same_bits(
    model, encoded, tmp_path, undisturbed, monkeypatch
):
    monkeypatch.setattr(preemption, "LISTEN_EVERY_S", 0.01)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=2, **TRAINING | {"checkpoint_every": 100})
    stop = files.join(tmp_path.as_uri(), "stop.json")
    files.write_json(stop, StopRequest(why="pause").model_dump())
    again = TRAINING | {"checkpoint_every": 100}
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **again)
    stopped_after = checkpoints.steps(run_of(tmp_path))[-1]
    assert 2 < stopped_after < 8
    files.delete_file(stop)
    train_here(tmp_path, model, encoded, OBJECTIVE, steps=8, **again)
    assert same(state(tmp_path, 8), undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with room for less than one checkpoint."""
    if os.geteuid():
        pytest.skip("mounting a file system is root's")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_costs_no_step(model, encoded, small_disk, undisturbed, messages):
    def make_room() -> None:
        wait_until(lambda: any("storage failed" in message for message in messages))
        wait_until(lambda: any("skipped" in message for message in messages))
        subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)

    later = threading.Thread(target=make_room)
    later.start()
    metrics = train_here(small_disk, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    later.join()
    assert len(metrics) == 8, "none is lost"
    assert any("storage failed" in event and "No space left" in event for event in events(small_disk))
    assert any("skipped" in event for event in events(small_disk)), "training did not wait"
    assert same(state(small_disk, 8), undisturbed)


@pytest.mark.slow
def test_an_object_store_that_does_not_answer_for_a_while_costs_no_step(
    model, encoded, s3_server, bucket, undisturbed
):
    failed = Counter[str]()

    def fail_for_a_while() -> None:
        wait_until(lambda: files.exists(layout.fence_uri(run_of(bucket))))  # the run has started
        s3_server.inject(Fault("slow_down", method="PUT"))
        wait_until(lambda: s3_server.counts["slow_down"] > 0)
        time.sleep(12)
        failed.update(s3_server.counts)
        s3_server.inject()

    later = threading.Thread(target=fail_for_a_while)
    later.start()
    metrics = train_here(bucket, model, encoded, OBJECTIVE, steps=8, **TRAINING)
    later.join()
    assert failed["slow_down"] > 0
    assert len(metrics) == 8
    assert same(state(bucket, 8), undisturbed)


# ---- copies on a node, where storage is an object store


@pytest.fixture
def node(tmp_path, monkeypatch) -> Path:
    """The place for temporary files of a node of its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return tmp_path / "node" / f"dde-checkpoints-{os.getuid()}"


def folders(node: Path) -> list[str]:
    return [path.name for path in node.iterdir() if path.is_dir()]


def test_all_that_want_a_checkpoint_at_a_time_read_one_copy(bucket, node, monkeypatch):
    run, fetched, fetch = records(bucket, 5), [], files.copy_folder
    record, together = checkpoints.read(run, 5), threading.Barrier(4)
    monkeypatch.setattr(files, "copy_folder", lambda uri, target: fetched.append(uri) or fetch(uri, target))

    def reads(_: int) -> str:
        with checkpoints.opened(run, record) as state:
            together.wait(60)  # broken where one must wait for another to be done
            return (state / "state.json").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reads, range(4))) == ["{}"] * 4
    assert len(fetched) == 1
    assert folders(node) == []


def test_what_killed_processes_have_left_on_a_node_is_cleared_away_and_never_read(bucket, node):
    run = records(bucket, 5)
    record = checkpoints.read(run, 5)
    with checkpoints.opened(run, record) as state:
        name = state.name
    (node / name).mkdir()  # of a reader that was killed while it deleted
    (node / "upload").mkdir()
    (node / "upload.lock").touch()
    with checkpoints.opened(run, record) as state:
        assert (state / "state.json").read_text() == "{}"
        assert folders(node) == [name]
    assert folders(node) == []


# ---- which are kept


def record_of(step: int) -> CheckpointRecord:
    return CheckpointRecord(
        step=step,
        pairs_seen=step,
        images_seen=step,
        reader=ReaderPosition(epoch=0, pair=0),
        ledger=None,
        identity={},
        workers=1,
        attempt=1,
        created_at=0.0,
        metrics={},
        alarms={},
        files={},
    )


def records(folder: Path | str, *steps: int) -> str:
    run = files.as_uri(folder)
    for step in steps:
        with checkpoints.committed(run, record_of(step), before_record=lambda: None) as state:
            (state / "state.json").write_text("{}")
    return run


def validated(run: str, step: int, **metrics: float) -> None:
    files.write_json(
        layout.outcome_uri(run, step), Validated(step=step, metrics=metrics, seconds=1.0).model_dump()
    )


def test_the_last_the_best_and_what_validation_has_not_seen_are_kept(model, encoded, tmp_path):
    run = records(tmp_path, 10, 20, 30, 40, 50, 60)
    spec = train_spec(
        tmp_path,
        model,
        encoded,
        OBJECTIVE,
        steps=60,
        held_out_pairs=2,
        checkpoint_every=10,
        keep_checkpoints=1,
    )
    spec = spec.model_copy(update={"run": run})
    assert selection.prunable(spec) == [10, 20, 30, 40, 50]
    validation = ValidationConfig(every=20, best_metric="held_out_accuracy")
    spec = spec.model_copy(update={"validation": validation, "evaluation": EvaluationConfig(prompts_uri="x")})
    assert selection.prunable(spec) == [10, 30, 50], "20, 40 and 60 wait for validation"
    validated(run, 0, held_out_accuracy=0.9)
    validated(run, 20, held_out_accuracy=0.7)
    validated(run, 40, held_out_accuracy=0.7)
    assert selection.chosen(spec, selection.outcomes(run)) == 20, "the first of equals, and never the base"
    assert selection.prunable(spec) == [10, 30, 40, 50]
    validated(run, 60, held_out_accuracy=0.8)
    validated(run, 70, held_out_accuracy=0.9)  # of a checkpoint that was put aside since
    assert selection.chosen(spec, selection.outcomes(run)) == 60
    assert selection.prunable(spec) == [10, 20, 30, 40, 50]


def test_validation_is_due_every_so_often_and_at_the_end(model, encoded, tmp_path):
    spec = train_spec(tmp_path, model, encoded, OBJECTIVE, steps=50)
    due = lambda spec: [step for step in range(0, 51, 10) if selection.is_due(spec, step)]  # noqa: E731
    assert due(spec) == []
    assert due(train_spec(tmp_path, model, encoded, OBJECTIVE, steps=50, held_out_pairs=2)) == [50]
    assert due(spec.model_copy(update={"validation": ValidationConfig(every=20)})) == [0, 20, 40, 50]
