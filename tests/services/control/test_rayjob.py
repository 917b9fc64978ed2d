"""The RayJob of a run: what is filled in, and the templates that are refused when the app starts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from services.control.launchers import rayjob
from services.control.launchers.contract import Needs, Run
from services.control.launchers.rayjob import Options, Template
from services.errors import BadRequest, Refused
from tests.services.control.test_launchers import TEMPLATE, crds
from tests.support.kube import rules
from tests.support.kube.schema import read_crd, unknown_fields, violations

JOB = "ajob_" + 24 * "0"
RUN = Run(
    id=f"{JOB}-train-a2",
    command="python -m services.training --spec s3://bucket/a/spec.json",
    prefix="s3://bucket/a",
    metadata={"job": JOB, "stage": "train", "attempt": "2", "project": "team-"},
)
HERE = Options("here")


@pytest.fixture
def body() -> dict:
    """The template that k8s/ has."""
    return yaml.safe_load(TEMPLATE.read_text())


def build(body: dict, run: Run = RUN, options: Options = HERE) -> dict:
    return Template(body).rayjob(run, options)


def run_of(**fields) -> Run:
    return Run(**{**vars(RUN), **fields})


def workers(built: dict) -> dict:
    groups = built["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return next(group for group in groups if group["groupName"] == "workers")


def size(built: dict) -> tuple[int, int, int]:
    return tuple(workers(built)[field] for field in ("replicas", "minReplicas", "maxReplicas"))


def set_gpus(body: dict, gpus: int | str) -> None:
    workers(body)["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = gpus


def test_the_template_of_the_manifests_can_be_used():
    assert Template.load(TEMPLATE, with_gpus=True).body["kind"] == "RayJob"


def test_a_rayjob_is_named_and_labeled_after_its_run_and_has_no_owner(body):
    meta = build(body)["metadata"]
    assert meta["name"] == f"ajob-{24 * '0'}-train-a2"
    assert meta["labels"] == {
        "app.kubernetes.io/managed-by": "dde-control",
        "dde-installation": "here",
        "dde-job": JOB,
        "dde-stage": "train",
        "dde-attempt": "2",
        "dde-project": "team",
    }
    assert meta["annotations"]["dde-prefix"] == RUN.prefix
    assert "ownerReferences" not in meta


def test_kueue_finds_its_queue_and_priority_in_the_labels(body):
    labels = build(body, options=Options("here", queue="gpus", priority="low"))["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert labels["kueue.x-k8s.io/priority-class"] == "low"


def test_a_rayjob_runs_its_command_once_and_removes_its_cluster(body):
    spec = build(body, run_of(starts_within_s=1800.2))["spec"]
    cluster = spec.pop("rayClusterSpec")
    assert spec == {
        "entrypoint": RUN.command,
        "jobId": RUN.id,
        "metadata": RUN.metadata,
        "submissionMode": "HTTPMode",
        "backoffLimit": 0,
        "preRunningDeadlineSeconds": 1801,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
    }
    assert cluster["authOptions"] == {"mode": "token", "secretName": "dde-ray-token"}


def test_only_a_run_with_a_budget_has_a_deadline(body):
    assert "activeDeadlineSeconds" not in build(body)["spec"]
    assert "preRunningDeadlineSeconds" not in build(body)["spec"]
    assert build(body, run_of(ends_within_s=0.5))["spec"]["activeDeadlineSeconds"] == 1


def test_authentication_and_rays_version_are_filled_in_where_the_template_has_none(body):
    cluster = body["spec"]["rayClusterSpec"]
    del cluster["authOptions"], cluster["rayVersion"]
    built = build(body)["spec"]["rayClusterSpec"]
    assert built["authOptions"] == {"mode": "token", "secretName": "dde-ray-token"}
    assert rules.refusal(build(body)) is None
    assert built["rayVersion"] == "2.60.0"


@pytest.mark.parametrize(
    ("needs", "gpus_of_pod", "expected"),
    [
        (Needs(4, 4, 1), 1, (4, 4, 4)),
        (Needs(4, 4, 1), 8, (1, 1, 1)),
        (Needs(9, 9, 1), 8, (2, 2, 2)),
        (Needs(3, 3, 2), 4, (2, 2, 2)),
        (Needs(3, 3, 2), 3, (3, 3, 3)),
        (Needs(3, 3, 0), 8, (3, 3, 3)),
        (Needs(1, 4, 1), 1, (1, 1, 1)),
    ],
)
def test_the_group_of_workers_is_as_large_as_a_run_needs(body, needs, gpus_of_pod, expected):
    set_gpus(body, gpus_of_pod)
    built = build(body, run_of(needs=needs))
    assert size(built) == expected
    assert "enableInTreeAutoscaling" not in built["spec"]["rayClusterSpec"]
    decode = built["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (decode["groupName"], decode["replicas"]) == ("decode", 1)


def test_an_elastic_run_grows_where_the_template_has_an_autoscaler(body):
    body["spec"]["rayClusterSpec"]["autoscalerOptions"] = {"idleTimeoutSeconds": 60}
    built = build(body, run_of(needs=Needs(2, 6, 1)))
    assert size(built) == (2, 2, 6)
    assert built["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    fixed = build(body, run_of(needs=Needs(2, 2, 1)))
    assert "enableInTreeAutoscaling" not in fixed["spec"]["rayClusterSpec"]


def test_all_pods_have_the_image_of_the_settings_and_the_label_of_their_run(body):
    image = "registry.example.com/dde-ray@sha256:" + 64 * "0"
    cluster = build(body, options=Options("here", image=image))["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len(groups) == 3
    for group in groups:
        assert group["template"]["spec"]["containers"][0]["image"] == image
        assert group["template"]["metadata"]["labels"]["dde-run"] == rayjob.name_of(RUN.id)
        assert group["template"]["metadata"]["labels"]["dde-part"] == "align"


def test_the_digest_is_of_the_spec_and_building_leaves_the_template_as_it_is(body):
    before = copy.deepcopy(body)
    digests = [build(body)["metadata"]["annotations"][rayjob.DIGEST] for _ in range(2)]
    assert digests[0] == digests[1]
    other = build(body, options=Options("here", image="other"))["metadata"]["annotations"][rayjob.DIGEST]
    assert other != digests[0]
    assert body == before


def test_the_schema_and_the_operator_accept_what_is_built(body):
    body["spec"]["rayClusterSpec"]["autoscalerOptions"] = {"idleTimeoutSeconds": 60}
    needs = Needs(1, 3, 1)
    run = run_of(needs=needs, starts_within_s=7 * 86_400, ends_within_s=3600)
    built = build(body, run, Options("here", image="i", queue="q", priority="p"))
    assert rules.refusal(built) is None
    if crds() is None:
        pytest.skip("KUBERAY_CRDS is not set")
    schema = read_crd(crds() / "ray.io_rayjobs.yaml").schema
    assert (unknown_fields(schema, built), violations(schema, built)) == ([], [])


def test_a_run_whose_id_cannot_be_a_name_is_refused(body):
    for id in (f"{JOB}-evaluate-a{10**8}", "Job", "1-train-a1"):
        with pytest.raises(Refused, match=r"the name of a RayJob has at most 47"):
            build(body, run_of(id=id))


# ---- templates that no RayJob can be made from

CLUSTER = "spec.rayClusterSpec"
GROUPS = f"{CLUSTER}.workerGroupSpecs"
FILLED = (
    "entrypoint",
    "jobId",
    "metadata",
    "submissionMode",
    "backoffLimit",
    "suspend",
    "shutdownAfterJobFinishes",
    "preRunningDeadlineSeconds",
    "activeDeadlineSeconds",
)
WRONG: list[tuple[str, object, str]] = [
    ("apiVersion", "ray.io/v1alpha1", "apiVersion must be ray.io/v1, got 'ray.io/v1alpha1'"),
    ("kind", "RayCluster", "kind must be RayJob, got 'RayCluster'"),
    ("status", {}, "the document has unknown fields: status"),
    ("metadata.namespace", "x", "metadata has unknown fields: namespace"),
    ("metadata.labels", {"a": 1}, "metadata.labels.a must be a string, got 1"),
    ("spec", None, "spec must be an object, got None"),
    *((f"spec.{field}", 1, f"spec.{field} is filled in for each run: remove it") for field in FILLED),
    ("spec.ttlSecondsAfterFinish", 1, "spec has unknown fields: ttlSecondsAfterFinish"),
    ("spec.ttlSecondsAfterFinished", "600", "spec.ttlSecondsAfterFinished must be a number of seconds"),
    ("spec.ttlSecondsAfterFinished", -1, "spec.ttlSecondsAfterFinished must be a number of seconds, got -1"),
    (CLUSTER, None, f"{CLUSTER} must be an object"),
    (f"{CLUSTER}.headgroupSpec", {}, f"{CLUSTER} has unknown fields: headgroupSpec"),
    (f"{CLUSTER}.suspend", True, f"{CLUSTER}.suspend is filled in"),
    (f"{CLUSTER}.enableInTreeAutoscaling", True, f"{CLUSTER}.enableInTreeAutoscaling is filled in"),
    (f"{CLUSTER}.rayVersion", "2.51.0", f"{CLUSTER}.rayVersion must be a text from 2.52 on, got '2.51.0'"),
    (f"{CLUSTER}.rayVersion", 2.6, f"{CLUSTER}.rayVersion must be a text from 2.52 on, got 2.6"),
    (f"{CLUSTER}.authOptions.mode", "disabled", f"{CLUSTER}.authOptions.mode must be token, got 'disabled'"),
    (f"{CLUSTER}.authOptions.secretName", "", f"{CLUSTER}.authOptions.secretName must name the Secret"),
    (f"{CLUSTER}.headGroupSpec", None, f"{CLUSTER}.headGroupSpec must be an object"),
    (
        f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus",
        0,
        f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus must be a string, got 0",
    ),
    (
        f"{CLUSTER}.headGroupSpec.template.spec.containers",
        [],
        f"{CLUSTER}.headGroupSpec.template.spec.containers must have the Ray container first",
    ),
    (
        f"{CLUSTER}.headGroupSpec.template.spec.containers.0.image",
        "",
        f"{CLUSTER}.headGroupSpec.template.spec.containers[0].image must be a text, got ''",
    ),
    (GROUPS, None, f"{GROUPS} must be a list of groups"),
    (f"{GROUPS}.1.groupName", "gpu", f"{GROUPS} must have one group named 'workers', and others"),
    (f"{GROUPS}.0.groupName", "workers", f"{GROUPS} must have one group named 'workers', and others"),
    (f"{GROUPS}.1.groupName", None, f"{GROUPS}[1].groupName must be a name, got None"),
    (f"{GROUPS}.1.maxReplicas", 8, f"{GROUPS}[1].maxReplicas is filled in"),
    (f"{GROUPS}.1.numOfHosts", 2, f"{GROUPS}[1].numOfHosts must be 1 or absent, got 2"),
    (f"{GROUPS}.0.replicas", None, f"{GROUPS}[0].replicas must be a number of pods, got None"),
    (
        f"{GROUPS}.1.template.spec.containers.0.resources.limits.nvidia.com/gpu",
        "1.5",
        f"{GROUPS}[1].template.spec.containers[0].resources.limits.nvidia.com/gpu must be at least 1",
    ),
    (
        f"{GROUPS}.1.template.spec.containers.0.resources.limits.nvidia.com/gpu",
        0,
        f"{GROUPS}[1].template.spec.containers[0].resources.limits.nvidia.com/gpu must be at least 1, as ",
    ),
]


def change(body: dict, field: str, value: object) -> None:
    """Set a field by its path, in which a number is an index."""
    path = field.replace("nvidia.com/gpu", "GPU").split(".")
    names = [int(each) if each.isdigit() else each.replace("GPU", "nvidia.com/gpu") for each in path]
    for name in names[:-1]:
        body = body[name] if isinstance(name, int) else body.setdefault(name, {})
    body[names[-1]] = value


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[f"{f}={v!r}" for f, v, _ in WRONG])
def test_a_template_is_refused_with_the_field_that_is_wrong(field, value, message, body, tmp_path):
    change(body, field, value)
    path = tmp_path / "rayjob.yaml"
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(BadRequest) as refused:
        Template.load(path, with_gpus=True)
    assert str(refused.value).startswith(f"rayjob_template {path}: {message}")
    assert refused.value.param == "rayjob_template"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: .*No such file"),
        ("a: [", "cannot be read: "),
        ("", "must have one document, got 0"),
        ("a: 1\n---\nb: 1\n", "must have one document, got 2"),
        ("- a\n", "the document must be an object"),
    ],
)
def test_a_file_that_is_no_template_is_refused(text, message, tmp_path: Path):
    path = tmp_path / "rayjob.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadRequest, match=f"rayjob_template {path}: {message}"):
        Template.load(path)


def test_a_group_without_gpus_will_do_where_no_run_uses_any(body, tmp_path):
    del workers(body)["template"]["spec"]["containers"][0]["resources"]
    path = tmp_path / "rayjob.yaml"
    path.write_text(yaml.safe_dump(body))
    assert size(build(Template.load(path).body, run_of(needs=Needs(2, 2)))) == (2, 2, 2)
