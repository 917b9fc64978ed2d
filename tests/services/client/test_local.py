"""The local system's parts: its state folder, its Serve config, and a real Ray that leaves nothing behind."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from services.client import cli, up
from services.client.bodies import job_body
from services.client.local import (
    PRIVATE,
    SERVE_CONFIG,
    LocalSystem,
    fill_serve_config,
    locked,
    read_serve_config,
    source_settings,
    write_private,
)
from services.client.processes import MARK, StartFailed, free_ports, kill_marked, wait_until
from services.client.ray_head import START_TIMED_OUT, RayHead
from services.control.stages import source_rules
from services.errors import Forbidden
from services.settings import ClientSettings, Settings
from services.storage import sources

ROOT = Path(__file__).parents[3]
APPS = Path(__file__).parent / "apps"


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch) -> None:
    """Ray looks for tokens in the home folder, and for its mode in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def alive(processes: list[psutil.Process]) -> list[str]:
    left = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()[:4]))
    return left


def wait_ready(ray: RayHead) -> None:
    wait_until(ray.is_ready, "Ray does not answer", [ray.child], 240)


def marked(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process.pid)
    return found


# ---- state folder and configs


def test_a_private_file_can_be_read_by_its_owner_alone(tmp_path) -> None:
    write_private(tmp_path / "key", "secret")
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert (tmp_path / "key").read_text() == "secret\n"


def test_a_state_folder_has_one_owner(tmp_path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(StartFailed, match=f"another system is running in {tmp_path}"),
    ):
        locked(tmp_path / "lock").__enter__()
    with locked(tmp_path / "lock"):
        pass


def test_a_second_system_in_a_state_folder_is_refused_before_anything_starts(tmp_path) -> None:
    (tmp_path / "key").write_text("kept")
    with locked(tmp_path / "lock"), pytest.raises(StartFailed, match="another system is running"):
        LocalSystem(tmp_path).__enter__()
    assert (tmp_path / "key").read_text() == "kept"
    assert not (tmp_path / "logs" / "ray.log").exists()


def test_a_port_that_is_taken_is_named(tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartFailed, match=f"port {port} is in use"):
            LocalSystem(tmp_path, ports=[port]).__enter__()
    with locked(tmp_path / "lock"):
        pass


def test_requests_read_in_the_state_folder_where_the_system_started_and_in_what_is_allowed(
    tmp_path, monkeypatch
) -> None:
    for name in ("state/storage", "work", "more", "other"):
        (tmp_path / name).mkdir(parents=True)
    for name in (*PRIVATE[:2], "logs"):
        (tmp_path / "state" / name).write_text("private")
    monkeypatch.chdir(tmp_path / "work")
    for name, value in source_settings(tmp_path / "state", [(tmp_path / "more").as_uri()]).items():
        monkeypatch.setenv(name, value)
    settings = Settings(api_key="k", storage_uri="file:///s")
    sources.hold_to(source_rules(settings, "default"))
    for name in ("state/storage/a", "work/a", "more/a"):
        sources.check_allowed(str(tmp_path / name))
    for name in ("other/a", "state/key", "state/dde.db", "state/logs/control.log"):
        with pytest.raises(Forbidden):
            sources.check_allowed(str(tmp_path / name))


def test_up_passes_on_what_it_is_told_to_allow(tmp_path, monkeypatch) -> None:
    started = {}
    monkeypatch.setattr(up, "run_up", lambda console, state, **options: started.update(options))
    monkeypatch.chdir(tmp_path)
    arguments = ["up", "--allow", "data", "--allow", "s3://pairs/v1"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert started["allow"] == [(tmp_path / "data").as_uri(), "s3://pairs/v1"]


def test_a_setting_of_sources_that_is_no_list_is_named(monkeypatch) -> None:
    monkeypatch.setenv("DDE_ALLOWED_SOURCES", "/data")
    with pytest.raises(ValueError, match=r"(?s)allowed_sources.*must be a JSON list, such as"):
        Settings(api_key="k", storage_uri="file:///s")


def test_the_serve_config_gets_port_and_storage_and_serve_takes_it() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = fill_serve_config(read_serve_config(SERVE_CONFIG), 1234, "file:///state/storage")
    schema = ServeDeploySchema.model_validate(config)
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 1234)
    (application,) = schema.applications
    assert application.import_path == "services.serving.app:build_app"
    assert application.args["storage_uri"] == "file:///state/storage"
    assert "file:///state" not in SERVE_CONFIG.read_text()


@pytest.mark.parametrize("text", ["applications: []", "a: [", "[]", "http_options: {}"])
def test_a_serve_config_that_cannot_be_used_is_named(tmp_path, text) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(StartFailed, match=str(path)):
        LocalSystem(tmp_path / "state", serve_config=path)
    assert not (tmp_path / "state").exists()


def test_the_demos_job_needs_only_dataset_and_prompts() -> None:
    request = job_body(ROOT / "deploy" / "demo.json", {"dataset": "ds_1", "prompts": "/p.txt"})
    file = json.loads((ROOT / "deploy" / "demo.json").read_text())
    assert request.training.steps == file["training"]["steps"]
    assert request.evaluation.prompts_uri == "file:///p.txt"


def test_the_client_reads_address_and_key_from_the_state_folder(tmp_path, monkeypatch) -> None:
    for name in ("DDE_URL", "DDE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DDE_HOME", str(tmp_path))
    assert ClientSettings().base_url == "http://127.0.0.1:8080"
    write_private(tmp_path / "url", "http://127.0.0.1:5")
    write_private(tmp_path / "key", "from-file")
    assert (ClientSettings().base_url, ClientSettings().key) == ("http://127.0.0.1:5", "from-file")
    monkeypatch.setenv("DDE_URL", "http://other")
    monkeypatch.setenv("DDE_API_KEY", "from-env")
    assert (ClientSettings().base_url, ClientSettings().key) == ("http://other", "from-env")


def test_a_ray_that_took_too_long_to_start_is_started_again_and_one_that_fails_is_not(tmp_path, monkeypatch):
    """The commands stand for ``ray start``: what is tested is what follows their end."""
    starts = tmp_path / "starts"
    slow = f"echo x >> {starts}; echo 'Exception: {START_TIMED_OUT}. This could happen'; exit 1"
    broken = f"echo x >> {starts}; echo 'the port is in use'; exit 1"
    for script, expected in ((slow, 3), (broken, 1)):
        starts.unlink(missing_ok=True)
        monkeypatch.setattr(
            "services.client.ray_head.start_command", lambda *_, script=script: ["sh", "-c", script]
        )
        with RayHead(tmp_path, mark=str(tmp_path)) as ray, pytest.raises(StartFailed, match="exit code 1"):
            wait_ready(ray)
        assert len(starts.read_text().split()) == expected


# ---- a real Ray


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory) -> Iterator[RayHead]:
    logs = tmp_path_factory.mktemp("logs")
    with RayHead(logs, mark=str(logs)) as ray:
        wait_ready(ray)
        yield ray
        processes = family(ray.child.pid)
    assert len(processes) > 5
    assert alive(processes) == []
    assert marked(str(logs)) == []
    assert list((logs / "ray").glob("gcs_server*")), "the session's logs are kept"
    assert not Path(ray.auth["RAY_AUTH_TOKEN_PATH"]).parent.exists()


def serve_config(tmp_path: Path, import_path: str) -> tuple[dict, int]:
    port = free_ports(1)[0]
    environment = {"env_vars": {"PYTHONPATH": str(APPS)}}
    application = {
        "name": "small",
        "route_prefix": "/",
        "import_path": import_path,
        "runtime_env": environment,
    }
    return fill_serve_config(
        {"proxy_location": "HeadOnly", "applications": [application]}, port, "file:///s"
    ), port


def wait_serving(ray: RayHead, name: str) -> None:
    deadline = time.monotonic() + 240
    while not ray.is_running(name):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_an_application_is_deployed_and_a_failed_deployment_reports_its_cause(ray_head, tmp_path) -> None:
    config, port = serve_config(tmp_path, "small_app:build_app")
    ray_head.deploy(config)
    wait_serving(ray_head, "small")
    assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=120).json() == {
        "storage_uri": "file:///s",
        "use_gpu": False,
    }

    broken, _ = serve_config(tmp_path, "small_app:broken_app")
    broken["applications"][0] |= {"name": "broken", "route_prefix": "/broken"}
    ray_head.deploy(broken)
    with pytest.raises(StartFailed, match=r"'broken' could not be deployed[\s\S]*storage is not there"):
        wait_serving(ray_head, "broken")
    with pytest.raises(StartFailed, match="refused its config"):
        ray_head.deploy({"applications": [{"name": "", "import_path": "nothing"}]})


SCRIPT = """
import sys, time
from pathlib import Path
from services.client.processes import wait_until
from services.client.ray_head import RayHead
from services.client.up import signals_interrupt
with signals_interrupt(), RayHead(Path(sys.argv[1]), sys.argv[1]) as ray:
    wait_until(ray.is_ready, "Ray does not answer", [ray.child], 240)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def script(tmp_path) -> Iterator[subprocess.Popen]:
    """A process that has started Ray."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout.readline() == "ready\n"
        yield started
        started.kill()
    kill_marked(str(tmp_path))


def test_sigterm_leaves_no_process(script, tmp_path) -> None:
    processes = family(script.pid)
    assert len(processes) > 5
    script.send_signal(signal.SIGTERM)
    _, errors = script.communicate(timeout=240)
    assert script.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert alive(processes) == []
    assert marked(str(tmp_path)) == []


@pytest.mark.slow
def test_the_next_system_in_a_folder_kills_what_a_killed_one_left_running(script, tmp_path) -> None:
    _, *processes = family(script.pid)
    script.kill()
    script.communicate(timeout=240)
    assert len(alive(processes)) > 5
    folder = next(
        Path(word.split("=")[1]).parent for word in processes[0].cmdline() if word.startswith("--temp-dir=")
    )
    assert folder.is_dir()
    (tmp_path / "dde.db").write_text("this is no database " * 100)
    with pytest.raises(StartFailed, match="control ended"):
        LocalSystem(tmp_path).__enter__()
    assert alive(processes) == []
    assert not folder.exists()


@pytest.mark.slow
def test_a_ray_that_cannot_start_is_reported_and_leaves_no_process(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("services.client.ray_head.OBJECT_STORE_BYTES", -5)
    with (
        pytest.raises(StartFailed, match=r"ray ended with exit code [1-9][\s\S]*ray\.log"),
        RayHead(tmp_path, str(tmp_path)) as ray,
    ):
        wait_ready(ray)
    assert marked(str(tmp_path)) == []


def test_a_control_plane_that_cannot_start_is_reported_and_everything_is_ended(tmp_path) -> None:
    (tmp_path / "dde.db").write_text("this is no database " * 100)
    with pytest.raises(
        StartFailed, match=r"control ended with exit code [1-9][\s\S]*control\.log[\s\S]*database"
    ):
        LocalSystem(tmp_path).__enter__()
    assert marked(str(tmp_path)) == []
    assert not (tmp_path / "url").exists()
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with locked(tmp_path / "lock"):
        pass
