"""Trackers with their real clients: TensorBoard's files are read back, MLflow is a server on loopback, W&B
writes offline."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dde_core.config import ObjectiveConfig, TrainConfig
from services.api.records import ModelRecord
from services.client.processes import Child, free_ports, wait_until
from services.errors import ServiceError, Unavailable
from services.settings import TrackerSettings
from services.stages.journal import Journal, read_journal
from services.stages.specs import TrainSpec
from services.storage import files
from services.training.tracking import clients, feed, outbox
from services.training.tracking.clients import CLOSES_WITHIN_S, Tracker
from services.training.tracking.feed import Tracking
from services.training.tracking.outbox import Outbox, Trackers, check_trackers, open_trackers
from tests.support.s3_server import Fault, Proxy, S3Server, first

STEPS = 8


def train_spec(run: str, job: str = "job-1", attempt: int = 1) -> TrainSpec:
    model = ModelRecord(id="m", name="base", uri="file:///m", family="sd15", digest="", created_at=0)
    return TrainSpec(
        job=job,
        attempt=attempt,
        prefix=f"{run}/a{attempt}",
        dataset="file:///d",
        model=model,
        model_id="aligned",
        name="my-aligned",
        objective=ObjectiveConfig(method="uniform", beta=2000.0),
        training=TrainConfig(steps=STEPS, learning_rate=1e-4),
        workers=1,
        run=run,
        output=f"{run}/model",
    )


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((16, 24, 3), shade, dtype=np.uint8)).save(data, "PNG")
    return data.getvalue()


def values(step: int) -> dict[str, float]:
    return {"loss": 1 / step, "margin_t0100": 0.5 * step}


def send(trackers, steps, validated=()) -> None:
    """Steps with their metrics, and validations with their images."""
    for step in steps:
        trackers.log_metrics(step, values(step))
    for step in validated:
        trackers.log_validation(step, {"taste": 0.1 * step}, png(step))


@pytest.fixture
def events() -> list[tuple[str, str]]:
    return []


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def flushed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FLUSH_EVERY_S", 0.0)


def opened(spec: TrainSpec, events: list) -> outbox.Trackers:
    return open_trackers(TrackerSettings(), spec, lambda message, level: events.append((level, message)))


def read_tensorboard(folder: Path, kind: str) -> EventAccumulator:
    found = EventAccumulator(str(folder / kind), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


# ---- TensorBoard


def test_tensorboard_shows_every_step_and_every_image(tmp_path, events):
    trackers = opened(train_spec(tmp_path.as_uri()), events)
    send(trackers, range(1, STEPS + 1), validated=[0, 4, 8])
    trackers.close(CLOSES_WITHIN_S)
    training = read_tensorboard(tmp_path / "tensorboard", "training")
    assert training.Tags()["scalars"] == ["loss", "margin_t0100"]
    assert [(each.step, each.value) for each in training.Scalars("margin_t0100")] == [
        (n, 0.5 * n) for n in range(1, STEPS + 1)
    ]
    validation = read_tensorboard(tmp_path / "tensorboard", "validation")
    assert [each.step for each in validation.Scalars("taste")] == [0, 4, 8]
    pictures = validation.Images("pictures")
    assert [each.step for each in pictures] == [0, 4, 8]
    assert np.asarray(Image.open(io.BytesIO(pictures[1].encoded_image_string)))[0, 0].tolist() == [4, 4, 4]
    assert events == []


def test_a_killed_run_that_resumes_shows_each_step_once_in_tensorboard(tmp_path, events):
    spec = train_spec(tmp_path.as_uri())
    killed = opened(spec, events)
    send(killed, range(1, 7), validated=[0, 4])
    killed.deliver()
    time.sleep(1.1)  # event files are ordered by the second in which they began
    resumed = opened(spec, events)
    send(resumed, range(1, STEPS + 1), validated=[0, 4, 8])
    resumed.close(CLOSES_WITHIN_S)
    assert len(files.list_files(files.join(spec.run, "tensorboard", "training"))) == 2
    training = read_tensorboard(tmp_path / "tensorboard", "training")
    assert [each.step for each in training.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [
        each.step for each in read_tensorboard(tmp_path / "tensorboard", "validation").Images("pictures")
    ] == [0, 4, 8]


def test_tensorboards_files_are_rotated_when_they_are_large_and_nothing_is_lost(
    tmp_path, events, monkeypatch
):
    monkeypatch.setattr(clients, "ROTATED_BYTES", 300)
    trackers = opened(train_spec(tmp_path.as_uri()), events)
    for step in range(1, STEPS + 1):
        send(trackers, [step])
        trackers.deliver()
    trackers.close(CLOSES_WITHIN_S)
    assert len(list((tmp_path / "tensorboard" / "training").iterdir())) > 2
    training = read_tensorboard(tmp_path / "tensorboard", "training")
    assert [each.step for each in training.Scalars("loss")] == list(range(1, STEPS + 1))
    assert events == []


@pytest.mark.slow
def test_tensorboards_files_reach_an_object_store_also_after_it_failed(
    bucket, s3_server: S3Server, tmp_path, events
):
    trackers = opened(train_spec(bucket), events)
    send(trackers, range(1, 5))
    trackers.deliver()
    s3_server.inject(Fault("slow_down"))
    send(trackers, range(5, STEPS + 1))
    trackers.deliver()
    assert [level for level, _ in events] == ["warning"]
    assert "TensorBoard failed" in events[0][1]
    s3_server.inject()
    trackers.close(CLOSES_WITHIN_S)
    files.copy_folder(files.join(bucket, "tensorboard"), tmp_path.as_uri())
    assert [each.step for each in read_tensorboard(tmp_path, "training").Scalars("loss")] == list(
        range(1, STEPS + 1)
    )
    assert events[1:] == [("info", "TensorBoard works again, 0 steps were lost")]


# ---- outboxes


class Broken:
    """A tracker that fails while ``broken`` is set."""

    def __init__(self) -> None:
        self.broken = True
        self.received: list[int] = []
        self.tried = 0
        self.closed = False

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.tried += 1
        if self.broken:
            raise Unavailable("no answer from http://user:secret@host/api\nand more")
        self.received.append(step)

    def log_validation(self, step: int, values: dict[str, float], image: bytes | None) -> None:
        self.received.append(step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def broken() -> Broken:
    return Broken()


@pytest.fixture
def box(broken: Broken, events: list) -> Outbox:
    return Outbox("B", lambda: broken, lambda message, level: events.append((level, message)))


def put(box: Outbox, *steps: int) -> None:
    for step in steps:
        box.put(lambda tracker, step=step: tracker.log_metrics(step, {}))


def test_a_tracker_that_fails_receives_everything_in_order_once_it_works(broken, box, events):
    put(box, 1, 2)
    box.deliver()
    put(box, 3)
    broken.broken = False
    box.close(CLOSES_WITHIN_S)
    assert broken.received == [1, 2, 3]
    assert broken.closed
    assert [level for level, _ in events] == ["warning", "info"]


def test_a_tracker_that_keeps_failing_pauses_and_is_reported_once_without_its_password(broken, box, events):
    put(box, 1)
    for _ in range(50):
        box.deliver()
    assert broken.tried == 1
    message = "B failed and is retried while training continues: Unavailable: no answer from http://host/api"
    assert events == [("warning", message)]


def test_updates_that_are_lost_when_training_ends_are_reported(broken, box, events):
    put(box, 1, 2, 3)
    box.close(within_s=0.2)
    assert events[-1] == ("warning", "B did not receive the last 3 updates")


def test_an_outbox_keeps_the_newest(broken, box, events, monkeypatch):
    put(box, *range(outbox.MAX_WAITING + 2))
    box.deliver()
    broken.broken = False
    box.close(CLOSES_WITHIN_S)
    assert broken.received == list(range(2, outbox.MAX_WAITING + 2))
    assert events[-1] == ("info", "B works again, 2 steps were lost")


class Stuck(Broken):
    """A tracker that blocks its caller until ``let_go`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.tried += 1
        self.let_go.wait()
        self.received.append(step)


def test_a_tracker_that_never_answers_is_left_behind_and_the_others_are_served_and_closed(broken, events):
    stuck, broken.broken = Stuck(), False
    trackers = Trackers(
        {"S": lambda: stuck, "B": lambda: broken}, lambda message, level: events.append((level, message))
    )
    send(trackers, [1, 2])
    trackers.close(within_s=1.0)
    assert (stuck.received, broken.received, broken.closed) == ([], [1, 2], True)
    assert events == [("warning", "S was not closed within 1.0 s, and may lack the last steps")]
    stuck.let_go.set()


# ---- from the journal


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "POLL_EVERY_S", 0.02)


def train(spec: TrainSpec, steps: range) -> None:
    """A worker's journal, one file a step."""
    journal = Journal(spec.prefix, flush_every_s=0)
    for step in steps:
        journal.metrics(step, values(step))


def given(monkeypatch: pytest.MonkeyPatch, tracker: Tracker) -> None:
    """Use this tracker instead of those that the environment configures."""
    monkeypatch.setattr(
        feed, "open_trackers", lambda settings, spec, log_event: Trackers({"B": lambda: tracker}, log_event)
    )


def warnings_of(spec: TrainSpec) -> list[str]:
    entries = [entry for _, some in read_journal(spec.prefix, 0) for entry in some]
    return [entry.message or "" for entry in entries if entry.level == "warning"]


def test_an_attempt_sends_what_earlier_attempts_did_not_deliver(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(feed, "FILES_AT_ONCE", 2)
    run = tmp_path.as_uri()
    train(train_spec(run, attempt=1), range(1, 5))
    send(before := opened(train_spec(run), []), [1, 2])
    before.deliver()  # and the driver is killed
    train(
        train_spec(run, attempt=3), range(4, STEPS + 1)
    )  # from the checkpoint of step 3; attempt 2 did not begin
    time.sleep(1.1)  # event files are ordered by the second in which they began
    spec = train_spec(run, attempt=3)
    Tracking(spec, Journal(spec.prefix)).close()
    shown = read_tensorboard(tmp_path / "tensorboard", "training").Scalars("margin_t0100")
    assert [(each.step, each.value) for each in shown] == [(n, 0.5 * n) for n in range(1, STEPS + 1)]
    assert warnings_of(spec) == []


def test_tracking_survives_a_broken_file_and_reports_it_once(tmp_path, broken, monkeypatch, quick):
    broken.broken = False
    given(monkeypatch, broken)
    spec = train_spec(tmp_path.as_uri())
    files.write_bytes(files.join(spec.run, "validation", "step-00000001.json"), b"no JSON")
    tracking = Tracking(spec, Journal(spec.prefix, flush_every_s=0))
    for step in range(1, STEPS + 1):
        train(spec, range(step, step + 1))
        wait_until(
            lambda step=step: broken.received == list(range(1, step + 1)),
            "a step was not passed on",
            [],
            10.0,
        )
    tracking.close()
    assert broken.closed
    (warning,) = warnings_of(spec)
    assert warning.startswith("trackers lack some of this run's data: ValidationError")


def test_an_event_about_a_tracker_during_a_storage_outage_reaches_the_journal_later(
    tmp_path, broken, monkeypatch, quick
):
    given(monkeypatch, broken)
    spec = train_spec(tmp_path.as_uri(), attempt=2)
    train(train_spec(spec.run, attempt=1), range(1, 3))
    blocked = tmp_path / "a2"
    blocked.write_bytes(b"a file where the folder must be")
    tracking = Tracking(spec, Journal(spec.prefix, flush_every_s=0))
    wait_until(lambda: broken.tried > 0, "the tracker gets nothing", [], 120.0)
    blocked.unlink()
    broken.broken = False
    tracking.close()
    assert broken.received == [1, 2]
    assert [message for message in warnings_of(spec) if message.startswith("B failed")]


def test_a_tracker_that_hangs_does_not_delay_the_close_of_tracking(tmp_path, monkeypatch, quick):
    given(monkeypatch, stuck := Stuck())
    spec = train_spec(tmp_path.as_uri())
    train(spec, range(1, 3))
    tracking = Tracking(spec, Journal(spec.prefix))
    wait_until(lambda: stuck.tried > 0, "the tracker gets nothing", [], 120.0)
    tracking.close(within_s=0.2)
    assert stuck.received == []
    stuck.let_go.set()
    wait_until(lambda: stuck.closed, "the thread that was left behind does not end", [], 120.0)
    assert stuck.received == [1, 2]


# ---- settings


@pytest.mark.parametrize(
    ("environment", "mlflow", "wandb"),
    [
        ({}, False, False),
        ({"MLFLOW_TRACKING_URI": ""}, False, False),
        ({"MLFLOW_TRACKING_URI": "http://mlflow:5000"}, True, False),
        ({"WANDB_API_KEY": "key"}, False, True),
        ({"WANDB_MODE": "offline"}, False, True),
        ({"WANDB_MODE": "online"}, False, False),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "disabled"}, False, False),
    ],
)
def test_the_environment_chooses_the_trackers(monkeypatch, environment, mlflow, wandb):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = TrackerSettings()
    assert (settings.mlflow, settings.wandb) == (mlflow, wandb)


def test_an_unknown_mode_of_weights_and_biases_is_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match=r"wandb_mode\n.*\n?.*ofline"):
        TrackerSettings()


def test_a_client_that_is_configured_and_not_installed_is_refused_with_its_extra(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ServiceError,
        match=r"MLFLOW_TRACKING_URI is set, but mlflow is not installed: .* 'dde-align\[mlflow\]'",
    ) as why:
        check_trackers(TrackerSettings())
    assert why.value.code == "tracker_not_installed"


# ---- MLflow


class MLflowServer:
    """A real one, with its database and images in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, (self._port,) = folder, free_ports(1)
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        where = [
            "--backend-store-uri",
            f"sqlite:///{self._folder}/db",
            "--artifacts-destination",
            f"{self._folder}/artifacts",
        ]
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--port",
            str(self._port),
            "--workers",
            "1",
            *where,
        ]
        env = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = Child("mlflow", command, self._folder / "mlflow.log", env)
        wait_until(self._answers, "MLflow does not answer", [self._process], 120.0)

    def stop(self) -> None:
        self._process.stop(5.0)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.uri}/health", timeout=2.0).is_success
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MLflowServer]:
    server = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.stop()


@pytest.fixture
def mlflow_client(mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "5")  # the tracker sets them: this gives back what was there
    return MlflowClient(tracking_uri=mlflow_server.uri)


def mlflow_run(client: Any, job: str) -> Any:
    experiment = client.get_experiment_by_name("dde")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`dde.job` = '{job}'")
    return run


@pytest.mark.slow
def test_mlflow_has_the_settings_metrics_and_images_of_a_killed_run_once(mlflow_client, tmp_path, events):
    spec = train_spec(tmp_path.as_uri(), job="job-killed")
    killed = opened(spec, events)
    send(killed, range(1, 7), validated=[0, 4])
    killed.deliver()
    assert mlflow_run(mlflow_client, spec.job).info.status == "RUNNING"
    resumed = opened(spec, events)
    send(resumed, range(1, STEPS + 1), validated=[0, 4, 8])
    resumed.close(CLOSES_WITHIN_S)
    run = mlflow_run(mlflow_client, spec.job)
    assert (run.info.run_name, run.info.status) == ("my-aligned", "FINISHED")
    assert run.data.params["objective.beta"] == "2000.0"
    assert run.data.params["training.learning_rate"] == "0.0001"
    history = mlflow_client.get_metric_history(run.info.run_id, "training/margin_t0100")
    assert [(each.step, each.value) for each in history] == [(n, 0.5 * n) for n in range(1, STEPS + 1)]
    validated = mlflow_client.get_metric_history(run.info.run_id, "validation/taste")
    assert [each.step for each in validated] == [0, 4, 8]
    pictures = [
        each.path
        for each in mlflow_client.list_artifacts(run.info.run_id, "images")
        if each.path.endswith(".png")
    ]
    assert sorted(int(re.search(r"step\W(\d+)", path)[1]) for path in pictures) == [0, 4, 8]
    assert events == []


@pytest.mark.slow
def test_an_mlflow_server_that_is_down_for_a_while_lacks_nothing_and_delays_nobody(
    mlflow_server, mlflow_client, tmp_path, events
):
    spec = train_spec(tmp_path.as_uri(), job="job-away")
    trackers = opened(spec, events)
    send(trackers, range(1, 4))
    trackers.deliver()
    mlflow_server.stop()
    send(trackers, range(4, 6), validated=[4])
    trackers.deliver()
    assert [level for level, _ in events] == ["warning"]
    mlflow_server.start()
    send(trackers, range(6, STEPS + 1))
    trackers.close(CLOSES_WITHIN_S)
    run = mlflow_run(mlflow_client, spec.job)
    history = mlflow_client.get_metric_history(run.info.run_id, "training/loss")
    assert [each.step for each in history] == list(range(1, STEPS + 1))
    assert [each.step for each in mlflow_client.get_metric_history(run.info.run_id, "validation/taste")] == [
        4
    ]
    assert events[1:] == [("info", "MLflow works again, 0 steps were lost")]


@pytest.mark.slow
def test_a_step_whose_response_was_lost_is_in_mlflow_once(
    mlflow_server, mlflow_client, tmp_path, events, monkeypatch
):
    proxy = Proxy(int(mlflow_server.uri.rpartition(":")[2]))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
    spec = train_spec(tmp_path.as_uri(), job="job-lost")
    trackers = opened(spec, events)
    send(trackers, [1])
    trackers.deliver()
    proxy.faults = [Fault("lose_response", first(1), target="log-batch")]
    send(trackers, range(2, STEPS + 1))
    trackers.close(CLOSES_WITHIN_S)
    proxy.shutdown()
    proxy.server_close()
    assert proxy.counts["lose_response"] == 1
    assert [level for level, _ in events] == ["warning", "info"]
    history = mlflow_client.get_metric_history(
        mlflow_run(mlflow_client, spec.job).info.run_id, "training/loss"
    )
    assert [each.step for each in history] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_that_ends_before_its_last_step_is_not_finished_in_mlflow(mlflow_client, tmp_path, events):
    spec = train_spec(tmp_path.as_uri(), job="job-paused")
    trackers = opened(spec, events)
    send(trackers, [1, 2])
    trackers.close(CLOSES_WITHIN_S)
    assert mlflow_run(mlflow_client, spec.job).info.status == "KILLED"


# ---- Weights & Biases


def wandb_records(folder: Path) -> Iterator[Any]:
    """The records of the uploaded file: LevelDB's log format after 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        length, kind = struct.unpack_from("<4xHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield Record.FromString(whole)
            whole = b""
        if -at % 32768 < 7:
            at += -at % 32768


@pytest.mark.slow
def test_weights_and_biases_writes_its_records_offline(tmp_path, events, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    spec = train_spec(tmp_path.as_uri())
    trackers = opened(spec, events)
    send(trackers, range(1, 4), validated=[0])
    trackers.deliver()
    send(trackers, range(4, STEPS + 1), validated=[4])
    trackers.close(CLOSES_WITHIN_S)
    assert events == []
    records = list(wandb_records(tmp_path / "wandb"))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.display_name, run.project) == ("job-1", "my-aligned", "dde")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["objective.beta"] == 2000.0
    assert config["training.steps"] == STEPS
    rows = [history_of(record) for record in records if record.WhichOneof("record_type") == "history"]
    assert [row["training_step"] for row in rows if "training_step" in row] == list(range(1, STEPS + 1))
    assert [row["training/margin_t0100"] for row in rows if "training/loss" in row] == [
        0.5 * n for n in range(1, STEPS + 1)
    ]
    validated = [row for row in rows if "validation_step" in row]
    assert [row["validation_step"] for row in validated] == [0, 4]
    for row in validated:
        (picture,) = tmp_path.glob(f"wandb/wandb/*/files/{row['validation/pictures.path']}")
        assert np.asarray(Image.open(picture))[0, 0, 0] == row["validation_step"]


def history_of(record: Any) -> dict[str, Any]:
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
    }
