"""k8s/: every overlay passes the validator, the validator notices mistakes, the scripts refuse what is wrong.

``KUBERAY_CRDS`` names a folder with KubeRay's CRDs (ray.io_*.yaml); without it, Ray documents are checked by
rules alone and the tests of mutations are skipped.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.validate_k8s import check, facts, kuberay, mutate, schemas
from tests.validate_k8s.overlay import K8S, OVERLAYS, Overlay, at, build, cluster_of

needs_crds = pytest.mark.skipif(
    schemas.crds() is None, reason="KUBERAY_CRDS names no folder of KubeRay's CRDs"
)


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return build(request.param)


@pytest.fixture(scope="module")
def production() -> Overlay:
    return build("production")


# ---- the overlays --------------------------------------------------------------------------------


def test_an_overlay_has_nothing_wrong(overlay: Overlay) -> None:
    assert list(check.findings(overlay)) == []


@needs_crds
def test_a_sample_of_single_mistakes_is_noticed_and_every_reference_of_it(overlay: Overlay) -> None:
    result = mutate.run(overlay, lambda index: index % 17 == 0)
    made, caught = sum(result.made.values()), sum(result.caught.values())
    assert made > 150
    assert caught >= 0.95 * made, result.uncaught
    assert result.caught["reference"] == result.made["reference"] > 0, result.uncaught
    assert result.caught["misspelt"] == result.made["misspelt"] > 0, result.uncaught


@needs_crds
@pytest.mark.slow
def test_every_single_mistake_is_noticed_but_for_some_amounts(overlay: Overlay) -> None:
    result = mutate.run(overlay)
    assert sum(result.caught.values()) >= 0.95 * sum(result.made.values()), result.uncaught
    assert result.caught["reference"] == result.made["reference"], result.uncaught
    assert result.caught["misspelt"] == result.made["misspelt"], result.uncaught


def test_a_mutation_is_undone(production: Overlay) -> None:
    before = copy.deepcopy(production.documents)
    mutate.run(production, lambda index: index % 499 == 0)
    assert production.documents == before


def rename(mapping: dict, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def serve(overlay: Overlay) -> dict:
    (found,) = overlay.of("ServeConfig")
    return found["applications"][0]["args"]


def group(overlay: Overlay, kind: str, name: str) -> dict:
    (document,) = overlay.of(kind)
    (found,) = [g for g in cluster_of(document)["workerGroupSpecs"] if g["groupName"] == name]
    return found


def only(overlay: Overlay, kind: str, name: str) -> dict:
    found = overlay.named(kind, name)
    assert found
    return found


MISTAKES: dict[str, tuple[Callable[[Overlay], Any], str]] = {
    "a Ray document opens itself to anyone": (
        lambda o: only(o, "RayCluster", "dde-train")["spec"].pop("authOptions"),
        "authOptions is not the token",
    ),
    "a head that dies with its node": (
        lambda o: only(o, "RayCluster", "dde-train")["spec"].pop("gcsFaultToleranceOptions"),
        "a lost head ends the cluster",
    ),
    "an image that nobody rolls out": (
        lambda o: only(o, "RayCluster", "dde-train")["spec"].pop("upgradeStrategy"),
        "a new image would change no pod",
    ),
    "an autoscaler without a token": (
        lambda o: only(o, "RayCluster", "dde-train")["spec"]["autoscalerOptions"].pop("volumeMounts"),
        "does not mount the account's token",
    ),
    "an autoscaler that PodSecurity refuses": (
        lambda o: only(o, "RayCluster", "dde-train")["spec"]["autoscalerOptions"].pop("securityContext"),
        "autoscaler: allowPrivilegeEscalation is not false",
    ),
    "a preStop that is cut off": (
        lambda o: group(o, "RayCluster", "gpu")["template"]["spec"].update(terminationGracePeriodSeconds=60),
        "the pod is killed after 60 s",
    ),
    "an idle GPU pod that waits": (
        lambda o: group(o, "RayCluster", "gpu")["template"]["spec"]["containers"][0]["lifecycle"]["preStop"][
            "exec"
        ].update(command=["sh", "-c", "ray drain-node --deadline-remaining-seconds=100; sleep 90; ray stop"]),
        "does not wait while a RayTrainWorker runs",
    ),
    "GPUs that never start": (
        lambda o: group(o, "RayCluster", "gpu")["template"]["spec"].update(tolerations=[]),
        "needs both a GPU and its toleration",
    ),
    "replicas that have no room": (
        lambda o: serve(o).update(max_replicas=9),
        "are more than maxReplicas pods",
    ),
    "an argument that the application lacks": (
        lambda o: serve(o).update(gpu=1),
        "Extra inputs are not permitted",
    ),
    "a second place for the storage URI": (
        lambda o: serve(o).update(storage_uri="s3://other"),
        "a second place for DDE_STORAGE_URI",
    ),
    "metrics for anyone": (
        lambda o: only(o, "NetworkPolicy", "dde-control")["spec"]["ingress"][1].pop("from"),
        "not {'anyone': {8080}",
    ),
    "a control plane that reads Secrets": (
        lambda o: only(o, "Role", "dde-control")["rules"].append(
            {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}
        ),
        "Role/dde-control: it permits",
    ),
    "a Secret that no script makes": (
        lambda o: only(o, "Deployment", "dde-control")["spec"]["template"]["spec"]["volumes"][2][
            "secret"
        ].update(secretName="dde-train"),
        "there is no Secret 'dde-train'",
    ),
    "fewer GPUs than the parts need": (
        lambda o: o.config.update(NAMESPACE_GPUS="25"),
        "requests.nvidia.com/gpu is not NAMESPACE_GPUS",
    ),
    "a queue that admits no RayJob": (
        lambda o: only(o, "ClusterQueue", "dde")["spec"]["resourceGroups"][0]["coveredResources"].remove(
            "memory"
        ),
        "but RayJobs request",
    ),
    "another version of Ray": (
        lambda o: only(o, "RayCluster", "dde-train")["spec"].update(rayVersion="2.59.0"),
        "is not the images'",
    ),
    "an autoscaled number that is reset": (
        lambda o: only(o, "Deployment", "dde-control")["spec"].update(replicas=2),
        "each `kubectl apply` resets the number",
    ),
    "a drain that is cut off": (
        lambda o: o.config.update(DDE_DRAIN_S="600"),
        "is not DDE_DRAIN_S + 30",
    ),
    "a setting that does not exist": (
        lambda o: o.config.update(DDE_MAX_JOBS="1"),
        "nothing reads ['DDE_MAX_JOBS']",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_named(production: Overlay, spoil: Callable[[Overlay], Any], message: str) -> None:
    spoiled = copy.deepcopy(production)
    spoil(spoiled)
    found = list(check.findings(spoiled))
    assert any(message in finding for finding in found), found


@needs_crds
def test_an_unknown_field_of_a_ray_document_is_refused(production: Overlay) -> None:
    spoiled = copy.deepcopy(production)
    rename(group(spoiled, "RayCluster", "gpu"), "maxReplicas", "maxReplica")
    assert any("maxReplica" in finding for finding in check.findings(spoiled))


def test_no_secret_is_rendered_and_settings_fill_in_everything(overlay: Overlay) -> None:
    assert overlay.of("Secret") == []
    assert "from-settings" not in json.dumps(overlay.documents)


# ---- what the rules take from Ray ----------------------------------------------------------------


def sources_of_ray(*folders: str) -> str:
    root = Path(ray.__file__).parent
    return "\n".join(path.read_text() for folder in folders for path in (root / folder).rglob("*.py"))


def test_the_actors_that_a_pod_waits_for_are_rays() -> None:
    assert f"\nclass {kuberay.BUSY['train']}:" in sources_of_ray("train/v2/_internal/execution/worker_group")
    assert f'return f"{kuberay.BUSY["serve"]}:{{self.app_name}}' in sources_of_ray("serve/_private")


def test_the_variables_of_ray_are_read_by_ray() -> None:
    text = sources_of_ray("dashboard/modules/job", "_private/authentication", "_private/runtime_env")
    assert [name for name in facts.JOB_STOP | facts.TOKEN if name not in text] == []


# ---- how a pod ends ------------------------------------------------------------------------------


def script_of(overlay: Overlay, part: str, group: str, process: subprocess.Popen[bytes]) -> str:
    """The script, on a pod whose only process is the one given."""
    (pod,) = [
        pod for pod in overlay.pods() if (pod.part, pod.group) == (part, group) and pod.kind != "RayJob"
    ]
    script = at(pod.own_containers[0], "lifecycle", "preStop", "exec", "command", 2, default="")
    assert "/proc/[0-9]*/" in script
    return script.replace("/proc/[0-9]*/", f"/proc/{process.pid}/")


@pytest.fixture
def ray_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a script in place of `ray` writes its calls: the real one would stop this machine's nodes."""
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\n')
    (tmp_path / "ray").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


@pytest.fixture
def worker(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the title that Ray gives to such an actor."""
    process = subprocess.Popen(["bash", "-c", f"exec -a '{request.param}' sleep 60"])
    yield process
    process.kill()
    process.wait()


ENDS = [("train", "gpu", "ray::TrainWorkerOfNobody"), ("serve", "serve", "ray::IDLE")]


@pytest.mark.parametrize(("part", "group", "worker"), ENDS, indirect=["worker"])
def test_an_idle_pod_ends_at_once(
    production: Overlay, ray_calls: Path, part: str, group: str, worker: Any
) -> None:
    start = time.monotonic()
    subprocess.run(["sh", "-c", script_of(production, part, group, worker)], check=True, timeout=20)
    assert ray_calls.read_text().split() == ["stop"]
    assert time.monotonic() - start < 5


BUSY = [
    ("train", "gpu", "ray::RayTrainWorker.execute"),
    ("train", "gpu-spot", "ray::RayTrainWorker"),
    ("serve", "serve", "ray::ServeReplica:dde:ImageServer"),
]


@pytest.mark.parametrize(("part", "group", "worker"), BUSY, indirect=["worker"])
def test_a_busy_pod_drains_its_node_and_ends_when_the_work_has_left(
    production: Overlay, ray_calls: Path, part: str, group: str, worker: subprocess.Popen[bytes]
) -> None:
    with subprocess.Popen(["sh", "-c", script_of(production, part, group, worker)]) as ending:
        time.sleep(1.5)
        assert ray_calls.read_text().split() == ["drain-node"]
        assert ending.poll() is None
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert ending.wait(timeout=10) == 0
    assert ray_calls.read_text().split() == ["drain-node", "stop"]


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:///dde.db", "scheme must be postgresql+psycopg"),
        ("postgresql://u:p@db/dde", "scheme must be postgresql+psycopg"),
        ("postgresql+psycopg://u:p@localhost/dde", "host must be one that pods can reach"),
        ("postgresql+psycopg://USER:PASSWORD@HOST/dde", "host must be one that pods can reach"),
        ("postgresql+psycopg://u@db/dde", "password is missing"),
        ("postgresql+psycopg://:p@db/dde", "user is missing"),
        ("postgresql+psycopg://u:p@db", "database must be one name"),
        ("postgresql+psycopg://u:p@db:port/dde", "host or port cannot be read"),
        ("postgresql+psycopg://u:p#w@db/dde", "host or port cannot be read"),
        ("postgresql+psycopg://u:p@db/dde#x", "'#' ends the URL"),
    ],
)
def test_a_wrong_database_url_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        facts.secrets_script().checked(url)


def test_a_right_database_url_is_kept_with_its_options() -> None:
    url = "postgresql+psycopg://dde:p%23w@db.internal:6432/dde?sslmode=verify-full"
    assert facts.secrets_script().checked(url) == url


def make_secrets(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(K8S / "make-secrets.py"), *arguments]
    clean = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, capture_output=True, text=True, env=clean | environment)


def test_the_secrets_of_a_machine_are_complete_and_differ_each_time() -> None:
    first, second = (json.loads(make_secrets("--local", "--print").stdout)["items"] for _ in range(2))
    made = {item["metadata"]["name"]: sorted(item["stringData"]) for item in first}
    assert made == {name: sorted(keys) for name, keys in facts.secret_keys("local").items()}
    values = [{item["metadata"]["name"]: item["stringData"] for item in items} for items in (first, second)]
    assert values[0]["dde-control"]["api_key"] != values[1]["dde-control"]["api_key"]
    assert len(values[0]["dde-ray-token"]["auth_token"]) == 64
    assert values[0]["dde-control"]["postgres_password"] in values[0]["dde-control"]["database_url"]


def test_missing_arguments_of_the_script_are_named() -> None:
    without = make_secrets("--print")
    assert (without.returncode, without.stdout) == (1, "")
    assert "--database-url: give it, or set DDE_DATABASE_URL" in without.stderr
    store = make_secrets("--print", "--object-store", AWS_ACCESS_KEY_ID="k")
    assert "AWS_SECRET_ACCESS_KEY is not set" in store.stderr


def test_a_cluster_that_does_not_answer_gets_no_secret() -> None:
    answer = make_secrets("--local", KUBECONFIG="/nowhere")
    assert answer.returncode == 1
    assert "make-secrets: " in answer.stderr


def test_an_overlay_with_blanks_is_not_applied(tmp_path: Path) -> None:
    answer = subprocess.run(["sh", str(K8S / "apply.sh"), "production"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "fill in the lines above" in answer.stderr
    assert "DDE_STORAGE_URI=s3://change-me/dde" in answer.stdout


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_starts_with_the_arguments_of_its_pod(production: Overlay, tmp_path: Path) -> None:
    (pod,) = [pod for pod in production.pods() if pod.part == "redis"]
    container = pod.own_containers[0]
    arguments = [
        a.replace("/data", str(tmp_path)).replace("$(REDIS_PASSWORD)", "secret") for a in container["args"]
    ]
    socket = tmp_path / "redis.sock"
    server = subprocess.Popen(
        [*container["command"], *arguments, "--port", "0", "--unixsocket", str(socket)],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        ask = ["redis-cli", "-s", str(socket), "--no-auth-warning"]
        refused = subprocess.run([*ask, "ping"], capture_output=True, text=True).stdout
        assert "NOAUTH" in refused
        policy = subprocess.run(
            [*ask, "-a", "secret", "config", "get", "*"], capture_output=True, text=True
        ).stdout
        settings = dict(zip(policy.split("\n")[::2], policy.split("\n")[1::2], strict=False))
        assert (settings["maxmemory-policy"], settings["appendonly"]) == ("noeviction", "yes")
    finally:
        server.terminate()
        server.wait()
