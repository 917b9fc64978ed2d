"""The deployment files are consistent with each other, with KubeRay's schemas and rules, and with the code.

No cluster is needed. ``KUBERAY_CRDS`` names a folder with KubeRay's CRDs (ray.io_*.yaml); without it the
schema tests are skipped.
"""

from __future__ import annotations

import ast
import copy
import os
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import yaml
from ray.scripts.scripts import drain_node

from services.settings import Settings
from services.stages.specs import ENTRY_MODULES

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
MANIFESTS = sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")
KUSTOMIZATIONS = sorted(K8S.rglob("kustomization.yaml"))
MAX_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
CLUSTER_FIELD = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def documents(path: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def by_kind(*kinds: str) -> list[dict]:
    return [document for path in MANIFESTS for document in documents(path) if document["kind"] in kinds]


def only(kind: str, name: str) -> dict:
    (found,) = [document for document in by_kind(kind) if document["metadata"]["name"] == name]
    return found


def cluster_of(document: dict) -> dict:
    """The RayClusterSpec of a RayCluster, RayJob or RayService."""
    spec = document["spec"]
    return spec[CLUSTER_FIELD[document["kind"]]] if document["kind"] in CLUSTER_FIELD else spec


def groups(document: dict) -> list[dict]:
    cluster = cluster_of(document)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(document: dict) -> list[dict]:
    """The pod templates of a Ray document or a Deployment."""
    if document["kind"] == "Deployment":
        return [document["spec"]["template"]]
    return [group["template"] for group in groups(document)]


def containers(document: dict) -> Iterator[dict]:
    for pod in pods(document):
        yield from pod["spec"]["containers"]


def ports(container: dict) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


def variables(container: dict) -> dict[str, dict]:
    return {entry["name"]: entry for entry in container.get("env", [])}


def ray_pin() -> str:
    (pin,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return pin


RAY = by_kind("RayCluster", "RayJob", "RayService")
RAY_IDS = [document["metadata"]["name"] for document in RAY]
each_ray = pytest.mark.parametrize("document", RAY, ids=RAY_IDS)
each_pod_owner = pytest.mark.parametrize(
    "document", [*RAY, *by_kind("Deployment")], ids=[*RAY_IDS, "dde-control"]
)


# ---- files ---------------------------------------------------------------------------------------


def test_the_manifests_are_the_ones_that_these_tests_cover() -> None:
    assert sorted(RAY_IDS) == ["dde-align", "dde-serve", "dde-train"]


@pytest.mark.parametrize("path", [*MANIFESTS, *KUSTOMIZATIONS], ids=lambda path: str(path.relative_to(K8S)))
def test_every_document_has_kind_and_version_and_manifests_have_names(path: Path) -> None:
    found = documents(path)
    assert found
    assert all({"apiVersion", "kind"} <= set(document) for document in found)
    assert path.name == "kustomization.yaml" or all(document["metadata"]["name"] for document in found)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_a_kustomization_lists_every_manifest_beside_it(path: Path) -> None:
    (kustomization,) = documents(path)
    beside = {other.name for other in path.parent.glob("*.yaml")} - {path.name}
    assert sorted(kustomization["resources"]) == sorted(beside)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_a_kustomization_renames_every_image_that_its_manifests_use(path: Path) -> None:
    (kustomization,) = documents(path)
    listed = [document for name in kustomization["resources"] for document in documents(path.parent / name)]
    with_pods = [document for document in listed if document in RAY or document["kind"] == "Deployment"]
    used = {c["image"].split(":")[0] for document in with_pods for c in containers(document)}
    assert {image["name"] for image in kustomization["images"]} == used


def test_no_secret_is_committed_and_no_manifest_names_a_namespace() -> None:
    everything = [document for path in MANIFESTS for document in documents(path)]
    assert [document for document in everything if document["kind"] == "Secret"] == []
    assert [document for document in everything if "namespace" in document["metadata"]] == []


# ---- KubeRay's schemas ---------------------------------------------------------------------------


def close(schema: Any) -> Any:
    """The same schema, but refusing unknown fields. KubeRay's CRDs accept them."""
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: close(value) for key, value in schema.items() if key not in ("properties", "enum", "default")
    }
    closed |= {key: schema[key] for key in ("enum", "default") if key in schema}
    if "properties" in schema:
        closed["properties"] = {name: close(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    return closed


@cache
def validator(kind: str, api_version: str) -> jsonschema.Draft202012Validator:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS is not set: it names the folder of KubeRay's CRDs (ray.io_*.yaml)")
    crd = yaml.load(
        (Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text(),
        getattr(yaml, "CSafeLoader", yaml.SafeLoader),
    )
    (version,) = [v for v in crd["spec"]["versions"] if f"{crd['spec']['group']}/{v['name']}" == api_version]
    assert crd["spec"]["names"]["kind"] == kind
    return jsonschema.Draft202012Validator(close(version["schema"]["openAPIV3Schema"]))


def refusals(document: dict) -> list[str]:
    found = validator(document["kind"], document["apiVersion"]).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]


@each_ray
def test_a_ray_document_fits_kuberays_schema(document: dict) -> None:
    assert refusals(document) == []


def rename(mapping: dict, old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


@each_ray
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: rename(cluster_of(d), "rayVersion", "rayVerison"), "'rayVerison' was unexpected"),
        (lambda d: rename(groups(d)[1], "maxReplicas", "maxReplica"), "'maxReplica' was unexpected"),
        (
            lambda d: rename(groups(d)[1]["template"]["spec"]["containers"][0], "image", "imgae"),
            "'imgae' was unexpected",
        ),
        (lambda d: groups(d)[1].update(replicas="two"), "'two' is not of type 'integer'"),
        (lambda d: cluster_of(d)["authOptions"].update(mode="tokens"), "'tokens' is not one of"),
        (lambda d: groups(d)[0].pop("template"), "'template' is a required property"),
    ],
    ids=["field of the cluster", "field of a group", "field of a container", "type", "enum", "missing"],
)
def test_the_schema_refuses_a_mistake(document: dict, spoil: Callable[[dict], Any], message: str) -> None:
    spoiled = copy.deepcopy(document)
    spoil(spoiled)
    assert any(message in refusal for refusal in refusals(spoiled)), refusals(spoiled)


# ---- the operator's rules, which the schemas do not contain --------------------------------------


def check_name(document: dict) -> Iterator[str]:
    name, longest = document["metadata"]["name"], MAX_NAME[document["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"name {name!r} is not a DNS-1035 label"
    if len(name) > longest:
        yield f"name {name!r} is longer than {longest}"


def check_authentication(document: dict) -> Iterator[str]:
    cluster = cluster_of(document)
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token"
    if tuple(map(int, cluster["rayVersion"].split(".")[:2])) < (2, 52):
        yield "token authentication needs rayVersion 2.52"


def check_versions(document: dict) -> Iterator[str]:
    version = cluster_of(document)["rayVersion"]
    images = {container["image"] for container in containers(document)}
    if len(images) != 1:
        yield f"several images: {sorted(images)}"
    yield from (
        f"image {image} is not of Ray {version}" for image in images if not image.endswith(f"-ray{version}")
    )


def check_head(document: dict) -> Iterator[str]:
    head = cluster_of(document)["headGroupSpec"]
    if head["rayStartParams"].get("num-cpus") != "0":
        yield "head num-cpus is not '0'"
    exposed = ports(head["template"]["spec"]["containers"][0])
    yield from (f"head does not expose {name}" for name in ("gcs-server", "dashboard") if name not in exposed)


def check_groups(document: dict) -> Iterator[str]:
    for group in groups(document):
        name = group.get("groupName", "head")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(
            group.get("rayStartParams", {})
        ):
            yield f"{name}: resources both in rayStartParams and in resources"
        has_gpu = any(
            "nvidia.com/gpu" in c["resources"].get("limits", {})
            for c in group["template"]["spec"]["containers"]
        )
        tolerates = [t["key"] for t in group["template"]["spec"].get("tolerations", [])] == ["nvidia.com/gpu"]
        if has_gpu != tolerates:
            yield f"{name}: a group needs both a GPU and its toleration, or neither"


def check_containers(document: dict) -> Iterator[str]:
    for pod in pods(document):
        for container in pod["spec"]["containers"]:
            *before, last = " ".join(container["lifecycle"]["preStop"]["exec"]["command"]).split("; ")
            if not last.endswith("ray stop"):
                yield f"{container['name']}: preStop is not ray stop"
            waits = sum(
                int(command.removeprefix("sleep ")) for command in before if command.startswith("sleep ")
            )
            if waits >= pod["spec"].get("terminationGracePeriodSeconds", 30):
                yield f"{container['name']}: the pod is killed before its preStop is over"


def check_job(document: dict) -> Iterator[str]:
    spec = document["spec"]
    if document["kind"] != "RayJob":
        return
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("submissionMode") not in ("HTTPMode", "SidecarMode"):
        yield "submissionMode is neither HTTPMode nor SidecarMode"
    deadlines = ("activeDeadlineSeconds", "preRunningDeadlineSeconds")
    yield from (f"{name} is not positive" for name in deadlines if spec.get(name, 0) <= 0)
    if "backoffLimit" not in spec:
        yield "backoffLimit is left to its default"


def check_service(document: dict) -> Iterator[str]:
    if document["kind"] != "RayService":
        return
    head, *workers = groups(document)
    if head.get("headService", {}).get("metadata", {}).get("name"):
        yield "headService.metadata.name is set"
    yield from (
        f"group {g['groupName']} has no replicas of Serve" for g in workers if g["groupName"] != "serve"
    )
    if "serve" not in ports(head["template"]["spec"]["containers"][0]):
        yield "head does not expose serve"


RULES = [
    check_name,
    check_authentication,
    check_versions,
    check_head,
    check_groups,
    check_containers,
    check_job,
    check_service,
]


def broken_rules(document: dict) -> list[str]:
    return [message for rule in RULES for message in rule(document)]


@pytest.mark.parametrize(("kind", "name"), [("RayCluster", "dde-train"), ("RayJob", "dde-align")])
def test_a_training_pod_drains_its_ray_node_before_it_ends(kind: str, name: str) -> None:
    (gpu,) = [group for group in groups(only(kind, name)) if group.get("groupName") == "gpu"]
    _, _, script = gpu["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain = shlex.split(script.split(";")[0])
    parsed = drain_node.make_context("drain-node", drain[2:]).params
    assert drain[:2] == ["ray", "drain-node"]
    assert (parsed["reason"], parsed["deadline_remaining_seconds"]) == ("DRAIN_NODE_REASON_PREEMPTION", 100)


@each_ray
def test_a_ray_document_obeys_the_operators_rules(document: dict) -> None:
    assert broken_rules(document) == []


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("dde-train", lambda d: d["metadata"].update(name="dde_train"), "not a DNS-1035 label"),
        ("dde-train", lambda d: d["metadata"].update(name="1dde"), "not a DNS-1035 label"),
        ("dde-train", lambda d: d["metadata"].update(name="d" * 54), "longer than 53"),
        ("dde-serve", lambda d: d["metadata"].update(name="d" * 48), "longer than 47"),
        ("dde-train", lambda d: d["spec"].pop("authOptions"), "authOptions.mode is not token"),
        (
            "dde-train",
            lambda d: d["spec"].update(rayVersion="2.51.0"),
            "token authentication needs rayVersion 2.52",
        ),
        ("dde-train", lambda d: d["spec"].update(rayVersion="2.99.0"), "is not of Ray 2.99.0"),
        ("dde-train", lambda d: next(containers(d)).update(image="dde-ray:0.1.0-ray2.0.0"), "several images"),
        ("dde-train", lambda d: [c.update(image="dde-ray:latest") for c in containers(d)], "is not of Ray"),
        ("dde-train", lambda d: groups(d)[0]["rayStartParams"].pop("num-cpus"), "head num-cpus is not '0'"),
        ("dde-train", lambda d: next(containers(d)).pop("ports"), "head does not expose dashboard"),
        (
            "dde-train",
            lambda d: groups(d)[0].update(resources={"CPU": "0"}),
            "both in rayStartParams and in resources",
        ),
        (
            "dde-train",
            lambda d: pods(d)[2]["spec"].pop("tolerations"),
            "needs both a GPU and its toleration",
        ),
        (
            "dde-train",
            lambda d: next(containers(d))["lifecycle"]["preStop"]["exec"].update(command=["true"]),
            "not ray stop",
        ),
        (
            "dde-train",
            lambda d: pods(d)[2]["spec"].pop("terminationGracePeriodSeconds"),
            "killed before its preStop is over",
        ),
        ("dde-align", lambda d: d["spec"].pop("shutdownAfterJobFinishes"), "needs shutdownAfterJobFinishes"),
        (
            "dde-align",
            lambda d: d["spec"].update(submissionMode="K8sJobMode"),
            "neither HTTPMode nor SidecarMode",
        ),
        (
            "dde-align",
            lambda d: d["spec"].pop("activeDeadlineSeconds"),
            "activeDeadlineSeconds is not positive",
        ),
        ("dde-align", lambda d: d["spec"].pop("backoffLimit"), "backoffLimit is left to its default"),
        (
            "dde-serve",
            lambda d: groups(d)[0].update(headService={"metadata": {"name": "x"}}),
            "headService.metadata.name is set",
        ),
        ("dde-serve", lambda d: groups(d)[1].update(groupName="encode"), "group encode has no replicas"),
        ("dde-serve", lambda d: next(containers(d)).pop("ports"), "head does not expose serve"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rule_refuses_its_violation(name: str, spoil: Callable[[dict], Any], message: str) -> None:
    spoiled = copy.deepcopy(RAY[RAY_IDS.index(name)])
    spoil(spoiled)
    assert any(message in broken for broken in broken_rules(spoiled)), broken_rules(spoiled)


@each_ray
def test_the_clusters_ray_is_the_one_that_the_images_install(document: dict) -> None:
    assert cluster_of(document)["rayVersion"] == ray_pin()


# ---- pods ----------------------------------------------------------------------------------------


@each_pod_owner
def test_pods_are_not_root_and_state_what_they_use(document: dict) -> None:
    for pod in pods(document):
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["serviceAccountName"] == only("ServiceAccount", "dde")["metadata"]["name"]
    for container in containers(document):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", ["dde-train", "dde-align"])
def test_a_stopped_job_has_time_to_write_its_marker(name: str) -> None:
    head = variables(next(containers(RAY[RAY_IDS.index(name)])))
    assert head["RAY_JOB_STOP_SIGNAL"]["value"] == "SIGINT"
    assert 3 < int(head["RAY_JOB_STOP_WAIT_TIME_S"]["value"]) <= 12, "so its workers are free within 15 s"


def test_the_training_cluster_has_a_group_for_decoding_and_one_with_gpus() -> None:
    workers = {group["groupName"]: group for group in groups(only("RayCluster", "dde-train"))[1:]}
    gpus = {
        name: "nvidia.com/gpu" in g["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name, g in workers.items()
    }
    assert gpus == {"decode": False, "gpu": True}


# ---- the control plane ---------------------------------------------------------------------------


def control() -> dict:
    (container,) = containers(only("Deployment", "dde-control"))
    return container


def config() -> dict[str, str]:
    return only("ConfigMap", "dde-config")["data"]


def test_every_dde_variable_is_a_setting_and_required_settings_are_given() -> None:
    fields = {f"DDE_{name.upper()}": field for name, field in Settings.model_fields.items()}
    given = {name for name in [*config(), *variables(control())] if name.startswith("DDE_")}
    assert given - set(fields) == set()
    assert {name for name, field in fields.items() if field.is_required()} - given == set()
    assert [
        c["name"] for d in RAY for c in containers(d) if any(n.startswith("DDE_") for n in variables(c))
    ] == []


def test_the_values_in_the_config_are_valid_settings() -> None:
    values = {name.removeprefix("DDE_").lower(): value for name, value in config().items()}
    settings = Settings(api_key="k", database_url="postgresql+psycopg://h/d", **values)
    assert settings.use_gpu is True
    assert settings.port == ports(control())["http"]


def test_the_pod_reads_the_config_and_takes_secrets_from_secrets() -> None:
    assert {"configMapRef": {"name": "dde-config"}} in control()["envFrom"]
    secret = {
        name: entry["valueFrom"]["secretKeyRef"]
        for name, entry in variables(control()).items()
        if "valueFrom" in entry
    }
    assert secret == {
        "DDE_API_KEY": {"name": "dde-control", "key": "api_key"},
        "DDE_DATABASE_URL": {"name": "dde-control", "key": "database_url"},
        "RAY_AUTH_TOKEN": {"name": "dde-train", "key": "auth_token"},
    }
    assert not {"DDE_API_KEY", "DDE_DATABASE_URL"} & set(config())
    assert variables(control())["RAY_AUTH_MODE"]["value"] == "token"


def test_the_token_is_that_of_the_cluster_that_runs_the_jobs() -> None:
    cluster, url = only("RayCluster", "dde-train"), urlsplit(config()["DDE_RAY_URL"])
    assert url.hostname == f"{cluster['metadata']['name']}-head-svc"
    assert url.port == ports(next(containers(cluster)))["dashboard"]
    auth = cluster["spec"]["authOptions"]
    token = variables(control())["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert token["name"] == auth.get("secretName", cluster["metadata"]["name"])


def test_images_are_requested_from_the_services_serve_port() -> None:
    service, url = only("RayService", "dde-serve"), urlsplit(config()["DDE_SERVE_URL"])
    assert url.hostname == f"{service['metadata']['name']}-serve-svc"
    assert {ports(container)["serve"] for container in containers(service)} == {url.port}


def test_kubernetes_adds_no_variables_that_look_like_ours() -> None:
    assert only("Deployment", "dde-control")["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_probes_check_health_and_readiness_on_the_served_port() -> None:
    probes = {
        name: control()[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}  # fmt: skip
    assert all(probe["port"] in ports(control()) for probe in probes.values())


def test_the_service_selects_the_pods_and_their_port() -> None:
    service, deployment = only("Service", "dde-control")["spec"], only("Deployment", "dde-control")["spec"]
    assert (
        service["selector"]
        == deployment["selector"]["matchLabels"]
        == deployment["template"]["metadata"]["labels"]
    )
    assert service["ports"][0]["targetPort"] in ports(control())


# ---- network -------------------------------------------------------------------------------------


def admitted(part: str) -> dict[str, set[int | str]]:
    """The ports to which pods of a part admit connections, by sender: a part, "operator" or "anyone"."""
    (policy,) = [
        p for p in by_kind("NetworkPolicy") if p["spec"]["podSelector"] == {"matchLabels": {"dde-part": part}}
    ]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    found: dict[str, set[int | str]] = {}
    for rule in policy["spec"]["ingress"]:
        numbers = {port["port"] for port in rule.get("ports", [])} or {"all"}
        for peer in rule.get("from", [None]):
            labels = peer["podSelector"]["matchLabels"] if peer else {}
            is_operator = (
                labels == {"app.kubernetes.io/component": "kuberay-operator"}
                and peer["namespaceSelector"] == {}
            )
            who = "operator" if is_operator else labels["dde-part"] if peer else "anyone"
            found.setdefault(who, set()).update(numbers)
    return found


def test_pods_admit_connections_only_from_those_that_need_them() -> None:
    assert admitted("control") == {"anyone": {8080}}
    assert admitted("train") == {"train": {"all"}, "control": {8265}, "operator": {8265}}
    assert admitted("serve") == {"serve": {"all"}, "control": {8000}, "operator": {8265, 8000}}
    assert admitted("align") == {"align": {"all"}, "operator": {8265}}


@each_pod_owner
def test_every_pod_has_the_label_of_its_network_policy(document: dict) -> None:
    part = document["metadata"]["name"].removeprefix("dde-")
    assert [pod["metadata"]["labels"] for pod in pods(document)] == [{"dde-part": part}] * len(pods(document))


# ---- Serve and jobs ------------------------------------------------------------------------------


def shapes(serve_config: dict) -> list[tuple[str, str, str, set[str]]]:
    """Each application's name, route, import path and argument names."""
    return [
        (a["name"], a["route_prefix"], a["import_path"], set(a["args"])) for a in serve_config["applications"]
    ]


def in_cluster() -> dict:
    return yaml.safe_load(only("RayService", "dde-serve")["spec"]["serveConfigV2"])


def test_serve_reads_the_storage_that_the_control_plane_writes() -> None:
    (application,) = in_cluster()["applications"]
    assert application["args"]["storage_uri"] == config()["DDE_STORAGE_URI"]


def test_rays_own_schema_accepts_the_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(in_cluster())
    assert (schema.http_options.host, schema.http_options.port) == (
        "0.0.0.0",
        urlsplit(config()["DDE_SERVE_URL"]).port,
    )


def test_the_serve_application_is_in_the_repository() -> None:
    ((_, _, import_path, _),) = shapes(in_cluster())
    module, function = import_path.split(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert path.is_file(), f"{import_path}: there is no {path.relative_to(ROOT)}"
    assert function in {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    }


def test_the_cluster_runs_the_application_of_the_local_serve_config_with_the_same_arguments() -> None:
    local = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    assert shapes(in_cluster()) == shapes(local)


def test_the_sample_job_starts_a_stage_with_a_spec_in_storage() -> None:
    python, flag, module, option, spec = shlex.split(only("RayJob", "dde-align")["spec"]["entrypoint"])
    assert (python, flag, option) == ("python", "-m", "--spec")
    assert module in ENTRY_MODULES.values()
    assert spec.startswith(config()["DDE_STORAGE_URI"] + "/jobs/")


def test_pods_do_not_override_the_command_of_the_control_image() -> None:
    assert not {"command", "args"} & set(control())
