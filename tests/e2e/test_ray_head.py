"""Ray of a local system: who has the token submits jobs, and a job finds the cluster and its settings."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import httpx

from services.client.local import LocalSystem


def test_nobody_without_the_token_submits_a_job(system: LocalSystem):
    job = {"entrypoint": "echo hello", "submission_id": "intruder"}
    assert httpx.post(f"{system.ray.url}/api/jobs/", json=job, timeout=120).status_code == 401
    wrong = {"Authorization": f"Bearer {'0' * 64}"}
    assert httpx.post(f"{system.ray.url}/api/jobs/", json=job, headers=wrong, timeout=120).status_code == 403
    assert stat.S_IMODE(Path(system.ray.auth["RAY_AUTH_TOKEN_PATH"]).stat().st_mode) == 0o600


def test_a_job_sees_the_token_file_and_the_threads_and_reaches_the_cluster(system: LocalSystem):
    numbers = "ray.cluster_resources()['CPU'], os.environ['OMP_NUM_THREADS']"
    code = f"import os, ray; ray.init(); print('cpus', {numbers})"
    headers = {"Authorization": f"Bearer {system.ray.token}"}
    with httpx.Client(base_url=system.ray.url, headers=headers, timeout=120) as http:
        job = {"entrypoint": f'python -c "{code}"', "submission_id": "friend"}
        assert http.post("/api/jobs/", json=job).status_code == 200
        deadline = time.monotonic() + 240
        while (status := http.get("/api/jobs/friend").json()["status"]) in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        assert status == "SUCCEEDED"
        assert "cpus 8.0 1" in http.get("/api/jobs/friend/logs").json()["logs"]
