"""The process itself: what it imports, what it prints, that it starts and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

BARE = {"PATH": os.environ["PATH"]}


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=BARE, timeout=240, **kwargs
    )


def test_the_control_plane_imports_neither_torch_nor_ray():
    imports = "import sys, services.control.app, services.control.__main__"
    code = f"{imports}; print([m for m in ('torch', 'ray') if m in sys.modules])"
    assert run("-c", code).stdout.strip() == "[]"


def test_the_openapi_document_is_printed_without_any_settings_and_every_reference_in_it_holds(tmp_path):
    document = json.loads(run("-m", "services.control", "openapi", check=True).stdout)
    text, schemas = json.dumps(document), document["components"]["schemas"]
    assert {"AlignmentJobCreate", "ObjectiveConfig", "JobView", "ErrorView"} <= set(schemas)
    assert all(f'"#/components/schemas/{name}"' not in text or name in schemas for name in _references(text))
    assert _references(text) <= set(schemas)
    body = document["paths"]["/v1/alignment/jobs"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert body == {"$ref": "#/components/schemas/AlignmentJobCreate"}
    assert schemas["ObjectiveConfig"]["properties"]["beta"]["exclusiveMinimum"] == 0
    assert "422" not in document["paths"]["/v1/alignment/jobs"]["get"]["responses"]
    assert list(tmp_path.iterdir()) == []


def test_the_openapi_document_has_every_error_and_the_type_of_every_body():
    document = json.loads(run("-m", "services.control", "openapi", check=True).stdout)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            for status in ("4XX", "5XX"):
                schema = responses[status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorView"}, (method, path)
            assert "null" not in json.dumps(operation.get("parameters", [])), (method, path)
    ready = document["paths"]["/readyz"]["get"]["responses"]
    for status in ("200", "503"):
        reference = ready[status]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/ReadyView"
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    events = document["paths"]["/v1/alignment/jobs/{job_id}/events"]["get"]["responses"]
    assert list(events["200"]["content"]) == ["application/json", "text/event-stream"]


def _references(text: str) -> set[str]:
    return {part.split('"', 1)[0] for part in text.split("#/components/schemas/")[1:]}


@pytest.mark.parametrize("missing", ["DDE_API_KEY", "DDE_STORAGE_URI"])
def test_a_missing_setting_is_named(missing):
    env = {**BARE, "DDE_API_KEY": "k", "DDE_STORAGE_URI": "file:///tmp/x"}
    del env[missing]
    ended = subprocess.run(
        [sys.executable, "-m", "services.control"], capture_output=True, text=True, env=env, timeout=240
    )
    assert ended.returncode != 0
    assert missing.removeprefix("DDE_").lower() in ended.stderr


def test_the_process_serves_and_ends_on_sigterm(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **BARE,
        "DDE_API_KEY": "k",
        "DDE_STORAGE_URI": str(tmp_path / "store"),
        "DDE_DATABASE_URL": f"sqlite:///{tmp_path}/dde.db",
        "DDE_RAY_URL": "http://127.0.0.1:1",
        "DDE_PORT": str(port),
        "DDE_DRAIN_NOTICE_S": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "services.control"], env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            deadline = time.monotonic() + 240
            while True:
                try:
                    assert http.get("/healthz").json() == {"status": "ok"}
                    report = http.get("/readyz", timeout=5).json()
                    if all(check["age_s"] is not None for check in report["checks"].values()):
                        break
                except httpx.TransportError:
                    pass
                assert time.monotonic() < deadline
                time.sleep(0.1)
            ready = http.get("/readyz", timeout=5)
            assert (ready.status_code, ready.json()["checks"]["ray"]["ok"]) == (200, False)
            assert ready.json()["checks"]["storage"]["ok"]
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "Traceback" not in log
