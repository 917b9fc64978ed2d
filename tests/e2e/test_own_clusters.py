"""A job with clusters of its own, end to end: POST, one RayJob for each stage on real Ray, a served model."""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from dde_core.config import ObjectiveConfig, SampleConfig, TrainConfig
from dde_core.shapes import MODEL_DIR, PROMPTS_FILE
from services.api.images import ImageRequest
from services.api.records import FINAL_STATUSES
from services.api.requests import AlignmentJobCreate, EvaluationConfig
from services.client.api import Client
from services.client.local import LocalSystem
from services.client.processes import Child, free_ports, wait_until
from tests.support.kube import KubeServer, serve_kube
from tests.support.kube.processes import ProcessOperator
from tests.support.kube.samples import TOKEN_SECRET
from tests.support.namespaces import network_or_skip
from tests.support.open_sources import EVERYWHERE
from tests.support.pairs_file import pair_rows, write_pairs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "k8s" / "base" / "rayjob-template.yaml"
RULES = [
    {
        "apiGroups": ["ray.io"],
        "resources": ["rayjobs"],
        "verbs": ["create", "get", "list", "watch", "delete"],
    },
    {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["pods", "events"], "verbs": ["get", "list"]},
]
"""What the control plane's account may do."""


def small_template(path: Path) -> Path:
    """The template that is shipped, with pods that fit on this machine: one CPU each, no GPU."""
    template = yaml.safe_load(TEMPLATE.read_text())
    template["spec"]["ttlSecondsAfterFinished"] = 0
    cluster = template["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        container = group["template"]["spec"]["containers"][0]
        container["resources"] = {"limits": {"cpu": "1", "memory": "1Gi"}}
    path.write_text(yaml.safe_dump(template))
    return path


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Iterator[tuple[Client, KubeServer, ProcessOperator]]:
    """Ray with Serve, and a control plane whose jobs have clusters of their own in a stand-in Kubernetes."""
    folder = tmp_path_factory.mktemp("own")
    crds = Path(os.environ["KUBERAY_CRDS"]) if "KUBERAY_CRDS" in os.environ else None
    with ExitStack() as undo:
        network = undo.enter_context(network_or_skip())
        server = undo.enter_context(serve_kube(crds))
        server.allow("account", RULES)
        system = undo.enter_context(
            LocalSystem(folder / "state", fresh=True, allow=EVERYWHERE.allowed, num_cpus=1)
        )
        secret = base64.b64encode(system.ray.token.encode()).decode()
        body = {"metadata": {"name": TOKEN_SECRET}, "data": {"auth_token": secret}}
        server.store.create("secrets", "default", body)
        operator = undo.enter_context(ProcessOperator(server, folder, network))
        (port,) = free_ports(1)
        settings = {
            "DDE_PORT": str(port),
            "DDE_DATABASE_URL": f"sqlite:///{folder / 'own.db'}",
            "DDE_CLUSTER": "own",
            "DDE_RAYJOB_TEMPLATE": str(small_template(folder / "rayjob.yaml")),
            "DDE_RAYJOB_NAMESPACE": "default",
            "DDE_KUBECONFIG": str(server.kubeconfig(folder / "kubeconfig", "account")),
        }
        env = psutil.Process(system.control.pid).environ() | settings
        system.control.stop(10.0)
        control = Child("control", [sys.executable, "-m", "services.control"], folder / "control.log", env)
        undo.callback(control.stop, 10.0)
        client = undo.enter_context(Client(f"http://127.0.0.1:{port}", system.key))
        wait_until(client.ready, "the control plane is not ready", [control], 300.0)
        yield client, server, operator


def test_a_posted_job_runs_each_stage_as_a_rayjob_and_its_model_is_served(installation, tmp_path):
    client, server, operator = installation
    pairs = write_pairs(tmp_path / "pairs.parquet", pair_rows(40))
    base = client.create_model("shapes", MODEL_DIR.as_uri()).name
    dataset = client.create_dataset("scenes", pairs.as_uri()).id
    job = client.create_job(
        AlignmentJobCreate(
            name="aligned",
            model=base,
            dataset=dataset,
            objective=ObjectiveConfig(beta=2000.0, calibration_bins=10),
            training=TrainConfig(steps=4, batch_size=8, learning_rate=1e-4, checkpoint_every=4),
            workers=1,
            evaluation=EvaluationConfig(
                prompts_uri=PROMPTS_FILE.as_uri(),
                num_prompts=4,
                sample=SampleConfig(steps=2, guidance_scale=3.0),
            ),
        )
    )
    last_seen: dict[str, str] = {}  # RayJobs that have ended are deleted while later stages run
    ends = time.monotonic() + 3000
    while (finished := client.job(job.id)).status not in FINAL_STATUSES:
        assert time.monotonic() < ends
        for each in operator.store.list("rayjobs", None, lambda item: True):
            stage = each["metadata"]["labels"]["dde-stage"]
            last_seen[stage] = each.get("status", {}).get("jobDeploymentStatus", "")
        time.sleep(0.5)
    assert finished.status == "succeeded", finished.reason
    print(f"\n{finished.name}: RayJobs {last_seen}")
    assert list(last_seen) == ["encode", "train", "evaluate"]
    assert {last_seen["encode"], last_seen["train"]} == {"Complete"}
    answer = client.generate(ImageRequest(model="aligned", prompt="a red circle", steps=2, seed=1))
    image = Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))
    assert image.size[0] > 0
    left = ("rayclusters", "pods", "services")
    wait_until(
        lambda: not any(server.store.list(plural, None, lambda item: True) for plural in left),
        "pods are left",
        [],
        120.0,
    )
