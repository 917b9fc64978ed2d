"""Trackers with their real clients: TensorBoard's files are read back, MLflow is a server on loopback, W&B writes offline."""

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
from tests.support.s3_server import Harm, Proxy, S3Server, first

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


def tell(told, steps, looks=()) -> None:
    """Steps with their values, and validations with their pictures."""
    for step in steps:
        told.metrics(step, values(step))
    for step in looks:
        told.validation(step, {"taste": 0.1 * step}, png(step))


@pytest.fixture
def events() -> list[tuple[str, str]]:
    return []


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FLUSH_EVERY_S", 0.0)


def opened(spec: TrainSpec, events: list) -> outbox.Trackers:
    return open_trackers(TrackerSettings(), spec, lambda message, level: events.append((level, message)))


def read_tensorboard(folder: Path, kind: str) -> EventAccumulator:
    found = EventAccumulator(str(folder / kind), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


# ---- TensorBoard


def test_tensorboard_shows_every_step_and_every_picture(tmp_path, events):
    told = opened(train_spec(tmp_path.as_uri()), events)
    tell(told, range(1, STEPS + 1), looks=[0, 4, 8])
    told.close(CLOSES_WITHIN_S)
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


def test_a_run_that_was_killed_and_goes_on_shows_each_step_once_in_tensorboard(tmp_path, events):
    spec = train_spec(tmp_path.as_uri())
    killed = opened(spec, events)
    tell(killed, range(1, 7), looks=[0, 4])
    killed.deliver()
    time.sleep(1.1)  # event files are ordered by the second in which they began
    goes_on = opened(spec, events)
    tell(goes_on, range(1, STEPS + 1), looks=[0, 4, 8])
    goes_on.close(CLOSES_WITHIN_S)
    assert len(files.list_files(files.join(spec.run, "tensorboard", "training"))) == 2
    training = read_tensorboard(tmp_path / "tensorboard", "training")
    assert [each.step for each in training.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [
        each.step for each in read_tensorboard(tmp_path / "tensorboard", "validation").Images("pictures")
    ] == [0, 4, 8]


def test_tensorboards_files_are_begun_anew_when_they_are_long_and_nothing_is_lost(
    tmp_path, events, monkeypatch
):
    monkeypatch.setattr(clients, "ROTATED_BYTES", 300)
    told = opened(train_spec(tmp_path.as_uri()), events)
    for step in range(1, STEPS + 1):
        tell(told, [step])
        told.deliver()
    told.close(CLOSES_WITHIN_S)
    assert len(list((tmp_path / "tensorboard" / "training").iterdir())) > 2
    training = read_tensorboard(tmp_path / "tensorboard", "training")
    assert [each.step for each in training.Scalars("loss")] == list(range(1, STEPS + 1))
    assert events == []


@pytest.mark.slow
def test_tensorboards_files_reach_an_object_store_also_after_it_failed(
    bucket, s3_server: S3Server, tmp_path, events
):
    told = opened(train_spec(bucket), events)
    tell(told, range(1, 5))
    told.deliver()
    s3_server.harm(Harm("slow_down"))
    tell(told, range(5, STEPS + 1))
    told.deliver()
    assert [level for level, _ in events] == ["warning"]
    assert "TensorBoard is not told" in events[0][1]
    s3_server.harm()
    told.close(CLOSES_WITHIN_S)
    files.copy_folder(files.join(bucket, "tensorboard"), tmp_path.as_uri())
    assert [each.step for each in read_tensorboard(tmp_path, "training").Scalars("loss")] == list(
        range(1, STEPS + 1)
    )
    assert events[1:] == [("info", "TensorBoard is told again, 0 steps are lost")]


# ---- outboxes


class Broken:
    """A tracker that fails as long as it is told to."""

    def __init__(self) -> None:
        self.broken, self.told, self.tried, self.closed = True, list[int](), 0, False

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tried += 1
        if self.broken:
            raise Unavailable("no answer from http://user:secret@host/api\nand more")
        self.told.append(step)

    def validation(self, step: int, values: dict[str, float], picture: bytes | None) -> None:
        self.told.append(step)

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
        box.put(lambda tracker, step=step: tracker.metrics(step, {}))


def test_a_tracker_that_fails_is_told_everything_in_order_once_it_works(broken, box, events):
    put(box, 1, 2)
    box.deliver()
    put(box, 3)
    broken.broken = False
    box.close(CLOSES_WITHIN_S)
    assert broken.told == [1, 2, 3]
    assert broken.closed
    assert [level for level, _ in events] == ["warning", "info"]


def test_a_tracker_that_goes_on_failing_is_left_alone_and_spoken_of_once_without_its_password(
    broken, box, events
):
    put(box, 1)
    for _ in range(50):
        box.deliver()
    assert broken.tried == 1
    said = (
        "B is not told, and tried again while training goes on: Unavailable: no answer from http://host/api"
    )
    assert events == [("warning", said)]


def test_what_could_not_be_told_when_training_ends_is_said(broken, box, events):
    put(box, 1, 2, 3)
    box.close(within_s=0.2)
    assert events[-1] == ("warning", "B lacks the last 3 things that it was to be told")


def test_an_outbox_keeps_the_newest(broken, box, events, monkeypatch):
    put(box, *range(outbox.MAX_WAITING + 2))
    box.deliver()
    broken.broken = False
    box.close(CLOSES_WITHIN_S)
    assert broken.told == list(range(2, outbox.MAX_WAITING + 2))
    assert events[-1] == ("info", "B is told again, 2 steps are lost")


class Stuck(Broken):
    """A tracker that holds whoever calls it until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.tried += 1
        self.let_go.wait()
        self.told.append(step)


def test_a_tracker_that_never_answers_is_left_behind_and_the_others_are_told_and_closed(broken, events):
    stuck, broken.broken = Stuck(), False
    told = Trackers(
        {"S": lambda: stuck, "B": lambda: broken}, lambda message, level: events.append((level, message))
    )
    tell(told, [1, 2])
    told.close(within_s=1.0)
    assert (stuck.told, broken.told, broken.closed) == ([], [1, 2], True)
    assert events == [("warning", "S was not closed within 1.0 s, and may lack the last steps")]
    stuck.let_go.set()


# ---- from the journal


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "LOOK_EVERY_S", 0.02)


def train(spec: TrainSpec, steps: range) -> None:
    """What a worker's journal tells, one file a step."""
    journal = Journal(spec.prefix, flush_every_s=0)
    for step in steps:
        journal.metrics(step, values(step))


def given(monkeypatch: pytest.MonkeyPatch, tracker: Tracker) -> None:
    """This tracker instead of those that the environment names."""
    monkeypatch.setattr(
        feed, "open_trackers", lambda settings, spec, tell: Trackers({"B": lambda: tracker}, tell)
    )


def warnings_of(spec: TrainSpec) -> list[str]:
    entries = [entry for _, some in read_journal(spec.prefix, 0) for entry in some]
    return [entry.message or "" for entry in entries if entry.level == "warning"]


def test_an_attempt_tells_what_the_attempts_before_it_did_not_deliver(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(feed, "FILES_AT_ONCE", 2)
    run = tmp_path.as_uri()
    train(train_spec(run, attempt=1), range(1, 5))
    tell(before := opened(train_spec(run), []), [1, 2])
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


def test_tracking_goes_on_though_something_that_it_reads_is_broken_and_says_so_once(
    tmp_path, broken, monkeypatch, quick
):
    broken.broken = False
    given(monkeypatch, broken)
    spec = train_spec(tmp_path.as_uri())
    files.write_bytes(files.join(spec.run, "validation", "step-00000001.json"), b"no JSON")
    passed_on = Tracking(spec, Journal(spec.prefix, flush_every_s=0))
    for step in range(1, STEPS + 1):
        train(spec, range(step, step + 1))
        wait_until(
            lambda step=step: broken.told == list(range(1, step + 1)), "a step was not passed on", [], 10.0
        )
    passed_on.close()
    assert broken.closed
    (warning,) = warnings_of(spec)
    assert warning.startswith("trackers lack something of this run: ValidationError")


def test_what_is_said_of_a_tracker_while_storage_is_away_ends_nothing_and_is_in_the_journal_later(
    tmp_path, broken, monkeypatch, quick
):
    given(monkeypatch, broken)
    spec = train_spec(tmp_path.as_uri(), attempt=2)
    train(train_spec(spec.run, attempt=1), range(1, 3))
    blocked = tmp_path / "a2"
    blocked.write_bytes(b"a file where the folder must be")
    passed_on = Tracking(spec, Journal(spec.prefix, flush_every_s=0))
    wait_until(lambda: broken.tried > 0, "the tracker is not told", [], 10.0)
    blocked.unlink()
    broken.broken = False
    passed_on.close()
    assert broken.told == [1, 2]
    assert [message for message in warnings_of(spec) if message.startswith("B is not told")]


def test_who_closes_tracking_is_not_held_by_a_tracker(tmp_path, monkeypatch, quick):
    given(monkeypatch, stuck := Stuck())
    spec = train_spec(tmp_path.as_uri())
    train(spec, range(1, 3))
    passed_on = Tracking(spec, Journal(spec.prefix))
    wait_until(lambda: stuck.tried > 0, "the tracker is not told", [], 10.0)
    passed_on.close(within_s=0.2)
    assert stuck.told == []
    stuck.let_go.set()
    wait_until(lambda: stuck.closed, "the thread that was left behind does not end", [], 10.0)
    assert stuck.told == [1, 2]


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
def test_what_the_environment_names_is_told(monkeypatch, environment, mlflow, wandb):
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
        ServiceError, match=r"MLFLOW_TRACKING_URI is set, but mlflow is not installed: .* dde-align\[mlflow\]"
    ) as why:
        check_trackers(TrackerSettings())
    assert why.value.code == "tracker_not_installed"


# ---- MLflow


class MLflowServer:
    """A real one, with its database and pictures in ``folder``."""

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
def test_mlflow_has_a_runs_settings_metrics_and_pictures_once_though_it_was_killed(
    mlflow_client, tmp_path, events
):
    spec = train_spec(tmp_path.as_uri(), job="job-killed")
    killed = opened(spec, events)
    tell(killed, range(1, 7), looks=[0, 4])
    killed.deliver()
    assert mlflow_run(mlflow_client, spec.job).info.status == "RUNNING"
    goes_on = opened(spec, events)
    tell(goes_on, range(1, STEPS + 1), looks=[0, 4, 8])
    goes_on.close(CLOSES_WITHIN_S)
    run = mlflow_run(mlflow_client, spec.job)
    assert (run.info.run_name, run.info.status) == ("my-aligned", "FINISHED")
    assert run.data.params["objective.beta"] == "2000.0"
    assert run.data.params["training.learning_rate"] == "0.0001"
    history = mlflow_client.get_metric_history(run.info.run_id, "training/margin_t0100")
    assert [(each.step, each.value) for each in history] == [(n, 0.5 * n) for n in range(1, STEPS + 1)]
    looks = mlflow_client.get_metric_history(run.info.run_id, "validation/taste")
    assert [each.step for each in looks] == [0, 4, 8]
    pictures = [
        each.path
        for each in mlflow_client.list_artifacts(run.info.run_id, "images")
        if each.path.endswith(".png")
    ]
    assert sorted(int(re.search(r"step\W(\d+)", path)[1]) for path in pictures) == [0, 4, 8]
    assert events == []


@pytest.mark.slow
def test_an_mlflow_server_that_is_away_for_a_while_lacks_nothing_and_holds_nobody_up(
    mlflow_server, mlflow_client, tmp_path, events
):
    spec = train_spec(tmp_path.as_uri(), job="job-away")
    told = opened(spec, events)
    tell(told, range(1, 4))
    told.deliver()
    mlflow_server.stop()
    began = time.monotonic()
    tell(told, range(4, 6), looks=[4])
    told.deliver()
    assert time.monotonic() - began < 2 * clients.GIVES_UP_AFTER_S
    assert [level for level, _ in events] == ["warning"]
    mlflow_server.start()
    tell(told, range(6, STEPS + 1))
    told.close(CLOSES_WITHIN_S)
    run = mlflow_run(mlflow_client, spec.job)
    history = mlflow_client.get_metric_history(run.info.run_id, "training/loss")
    assert [each.step for each in history] == list(range(1, STEPS + 1))
    assert [each.step for each in mlflow_client.get_metric_history(run.info.run_id, "validation/taste")] == [
        4
    ]
    assert events[1:] == [("info", "MLflow is told again, 0 steps are lost")]


@pytest.mark.slow
def test_a_step_whose_answer_was_lost_is_in_mlflow_once(
    mlflow_server, mlflow_client, tmp_path, events, monkeypatch
):
    proxy = Proxy(int(mlflow_server.uri.rpartition(":")[2]))
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.server_port}")
    spec = train_spec(tmp_path.as_uri(), job="job-lost")
    told = opened(spec, events)
    tell(told, [1])
    told.deliver()
    proxy.harms = [Harm("lose_answer", first(1), target="log-batch")]
    tell(told, range(2, STEPS + 1))
    told.close(CLOSES_WITHIN_S)
    proxy.shutdown()
    proxy.server_close()
    assert proxy.done["lose_answer"] == 1
    assert [level for level, _ in events] == ["warning", "info"]
    history = mlflow_client.get_metric_history(
        mlflow_run(mlflow_client, spec.job).info.run_id, "training/loss"
    )
    assert [each.step for each in history] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_that_ends_before_its_last_step_is_not_finished_in_mlflow(mlflow_client, tmp_path, events):
    spec = train_spec(tmp_path.as_uri(), job="job-paused")
    told = opened(spec, events)
    tell(told, [1, 2])
    told.close(CLOSES_WITHIN_S)
    assert mlflow_run(mlflow_client, spec.job).info.status == "KILLED"


# ---- Weights & Biases


def wandb_records(folder: Path) -> Iterator[Any]:
    """What stands in the file that was brought to storage: LevelDB's log format after 7 bytes, records in blocks of 32 KiB."""
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
def test_weights_and_biases_writes_offline_what_it_would_show(tmp_path, events, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    spec = train_spec(tmp_path.as_uri())
    told = opened(spec, events)
    tell(told, range(1, 4), looks=[0])
    told.deliver()
    tell(told, range(4, STEPS + 1), looks=[4])
    told.close(CLOSES_WITHIN_S)
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
    looks = [row for row in rows if "validation_step" in row]
    assert [row["validation_step"] for row in looks] == [0, 4]
    for row in looks:
        (picture,) = tmp_path.glob(f"wandb/wandb/*/files/{row['validation/pictures.path']}")
        assert np.asarray(Image.open(picture))[0, 0, 0] == row["validation_step"]


def history_of(record: Any) -> dict[str, Any]:
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
    }
