"""k8s/: every overlay passes the validator, and the validator notices mistakes.

``KUBERAY_CRDS`` names a folder with KubeRay's CRDs (ray.io_*.yaml); without it, Ray documents are checked by
rules alone and the tests of mutations are skipped.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.validate_k8s import check, facts, kuberay, mutate, schemas
from tests.validate_k8s.overlay import OVERLAYS, Overlay, build, cluster_of

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
    result = mutate.run(overlay, lambda index: index % 41 == 0)
    made, caught = sum(result.made.values()), sum(result.caught.values())
    assert made > 60
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
    "nodes that give up a lost head": (
        lambda o: group(o, "RayCluster", "gpu")["template"]["spec"]["containers"][0].pop("env"),
        "the wait for a lost head is {}",
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
    text = sources_of_ray("dashboard", "_private/authentication", "_private/runtime_env")
    assert [name for name in facts.OF_JOBS | facts.TOKEN if name not in text] == []
    raylet = (Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet").read_bytes()
    assert [name for name in facts.OF_NODES if name.removeprefix("RAY_").encode() not in raylet] == []
