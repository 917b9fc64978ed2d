"""The stand-in API server answers the kubernetes client as an API server with KubeRay's CRDs does."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
from kubernetes import client, config, watch
from urllib3 import Retry
from urllib3.exceptions import HTTPError

from tests.support.kube import Fault, serve_kube
from tests.support.kube.samples import ray_job
from tests.support.kube.schema import Cause, read_crd, unknown_fields, violations
from tests.support.s3_server import first

PLACE = ("ray.io", "v1", "default", "rayjobs")
ROLE = [
    {
        "apiGroups": ["ray.io"],
        "resources": ["rayjobs"],
        "verbs": ["create", "get", "list", "watch", "delete"],
    },
    {"apiGroups": [""], "resources": ["pods", "events"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"], "resourceNames": ["dde-rayjob"]},
]


@pytest.fixture
def crds() -> Path:
    if "KUBERAY_CRDS" not in os.environ:
        pytest.skip("KUBERAY_CRDS does not name a folder with KubeRay's CRDs")
    return Path(os.environ["KUBERAY_CRDS"])


class Api:
    """The kubernetes client's calls, for a user who may do everything, and for the ServiceAccount."""

    def __init__(self, server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self.jobs = client.CustomObjectsApi(self.connect("admin"))
        self.core = client.CoreV1Api(self.connect("admin"))

    def connect(self, token: str) -> client.ApiClient:
        path = self.server.kubeconfig(self.folder / f"kubeconfig-{token}", token)
        connected = config.new_client_from_config(str(path))
        connected.configuration.retries = Retry(0)
        return client.ApiClient(connected.configuration)

    def create(self, body, **options):
        return self.jobs.create_namespaced_custom_object(*PLACE, body, **options)

    def get(self, name: str):
        return self.jobs.get_namespaced_custom_object(*PLACE, name)

    def list(self, **options):
        return self.jobs.list_namespaced_custom_object(*PLACE, **options)

    def names(self, **options) -> list[str]:
        return [each["metadata"]["name"] for each in self.list(**options)["items"]]

    def patch(self, name: str, patch, **options):
        return self.jobs.patch_namespaced_custom_object(*PLACE, name, patch, **options)

    def patch_status(self, name: str, status):
        return self.jobs.patch_namespaced_custom_object_status(*PLACE, name, {"status": status})

    def replace(self, name: str, body, **options):
        return self.jobs.replace_namespaced_custom_object(*PLACE, name, body, **options)

    def delete(self, name: str, **options):
        return self.jobs.delete_namespaced_custom_object(*PLACE, name, **options)

    def watch(self, count: int, **options) -> list[tuple[str, str]]:
        """Type and name of the first events, at most of one second."""
        events = watch.Watch().stream(
            self.jobs.list_namespaced_custom_object, *PLACE, timeout_seconds=1, **options
        )
        return [(each["type"], each["object"]["metadata"]["name"]) for each in islice(events, count)]


@pytest.fixture
def api(tmp_path) -> Iterator[Api]:
    """A server that does not check specs."""
    with serve_kube() as server:
        yield Api(server, tmp_path)


@pytest.fixture
def checked(tmp_path, crds) -> Iterator[Api]:
    """A server that checks RayJobs by their CRD."""
    with serve_kube(crds) as server:
        yield Api(server, tmp_path)


class Refused:
    """Expects that the client raises an answer of the server; ``status`` is its Status object."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason

    def __enter__(self) -> SimpleNamespace:
        self.answer = SimpleNamespace(message="", details={}, headers={})
        return self.answer

    def __exit__(self, kind, error, trace) -> bool:
        assert isinstance(error, client.ApiException), f"not refused: {error}"
        status = json.loads(error.body)
        assert (error.status, status["reason"]) == (self.code, self.reason), status
        assert (status["kind"], status["code"]) == ("Status", self.code)
        self.answer.message = status["message"]
        self.answer.details = status["details"]
        self.answer.headers = error.headers
        return True


# What is stored.


def test_an_object_is_created_with_the_fields_that_a_server_sets(api):
    made = api.create(ray_job("ajob-a"))
    assert made == api.get("ajob-a")
    meta = made["metadata"]
    assert meta["generation"] == 1
    assert meta["namespace"] == "default"
    assert meta["uid"]
    assert meta["creationTimestamp"].endswith("Z")
    assert int(meta["resourceVersion"]) > 0


def test_a_second_object_of_the_same_name_already_exists(api):
    api.create(ray_job("ajob-a"))
    with Refused(409, "AlreadyExists") as answer:
        api.create(ray_job("ajob-a"))
    assert answer.message == 'rayjobs.ray.io "ajob-a" already exists'


def test_an_unknown_name_namespace_or_path_is_not_found(api):
    with Refused(404, "NotFound") as answer:
        api.get("ajob-a")
    assert answer.details == {"name": "ajob-a", "group": "ray.io", "kind": "rayjobs"}
    with Refused(404, "NotFound") as answer:
        api.jobs.create_namespaced_custom_object("ray.io", "v1", "other", "rayjobs", ray_job("ajob-a"))
    assert answer.message == 'namespaces "other" not found'
    with Refused(404, "NotFound"):
        api.jobs.list_namespaced_custom_object("ray.io", "v1", "default", "rayclowders")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"kind": "RayCluster"}, "kind"),
        ({"apiVersion": "ray.io/v2"}, "apiVersion"),
        ({"metadata": {"name": "ajob-a", "namespace": "other"}}, "namespace"),
    ],
)
def test_an_object_of_another_kind_or_namespace_is_a_bad_request(api, change, names):
    with Refused(400, "BadRequest") as answer:
        api.create(ray_job("ajob-a") | change)
    assert names in answer.message


@pytest.mark.parametrize(
    ("meta", "field"),
    [
        ({}, "metadata.name"),
        ({"name": "Upper"}, "metadata.name"),
        ({"name": "a" * 254}, "metadata.name"),
        ({"name": "a", "labels": {"stage": "a b"}}, "metadata.labels"),
        ({"name": "a", "labels": {"stage": "a" * 64}}, "metadata.labels"),
        ({"name": "a", "labels": {"-stage": "a"}}, "metadata.labels"),
        ({"name": "a", "annotations": {"sha256": "a" * 300_000}}, "metadata.annotations"),
    ],
)
def test_metadata_that_no_object_may_have_is_invalid(api, meta, field):
    with Refused(422, "Invalid") as answer:
        api.create(ray_job("x") | {"metadata": meta})
    assert [each["field"] for each in answer.details["causes"]] == [field]


def test_a_change_of_another_version_conflicts(api):
    old = api.create(ray_job("ajob-a"))
    api.patch("ajob-a", {"metadata": {"labels": {"stage": "train"}}})
    with Refused(409, "Conflict") as answer:
        api.replace("ajob-a", old)
    assert "the object has been modified" in answer.message
    with Refused(409, "Conflict"):
        api.patch("ajob-a", {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}})
    new = api.get("ajob-a")
    new["spec"]["entrypoint"] = "false"
    assert api.replace("ajob-a", new)["spec"]["entrypoint"] == "false"


def test_a_custom_object_is_not_replaced_without_its_version(checked):
    made = checked.create(ray_job("ajob-a"))
    del made["metadata"]["resourceVersion"]
    with Refused(422, "Invalid") as answer:
        checked.replace("ajob-a", made)
    assert [each["field"] for each in answer.details["causes"]] == ["metadata.resourceVersion"]


def test_the_status_changes_by_its_subresource_alone(checked):
    made = checked.create(ray_job("ajob-a") | {"status": {"jobStatus": "RUNNING"}})
    assert "status" not in made
    assert "status" not in checked.patch("ajob-a", {"status": {"jobStatus": "RUNNING"}})
    told = checked.patch_status("ajob-a", {"jobStatus": "RUNNING"})
    assert told["status"]["jobStatus"] == "RUNNING"
    assert told["metadata"]["generation"] == 1
    body = told | {"spec": {**told["spec"], "entrypoint": "false"}, "status": {"jobStatus": "FAILED"}}
    changed = checked.replace("ajob-a", body)
    assert changed["status"]["jobStatus"] == "RUNNING"
    assert changed["metadata"]["generation"] == 2
    left = checked.jobs.replace_namespaced_custom_object_status(
        *PLACE, "ajob-a", changed | {"spec": {"entrypoint": "x"}, "status": {"jobStatus": "FAILED"}}
    )
    assert left["spec"] == changed["spec"]
    assert left["status"]["jobStatus"] == "FAILED"


def test_core_objects_are_read_as_the_clients_models(api):
    store = api.server.store
    data = {"metadata": {"name": "dde-rayjob"}, "data": {"rayjob.yaml": "kind: RayJob"}}
    api.core.create_namespaced_config_map("default", data)
    assert api.core.read_namespaced_config_map("dde-rayjob", "default").data == data["data"]
    pod = {"metadata": {"name": "head", "labels": {"a": "b"}}, "status": {"phase": "Pending"}}
    store.create("pods", "default", pod)
    pods = api.core.list_namespaced_pod(
        "default", label_selector="a=b", field_selector="status.phase=Pending"
    )
    assert [each.metadata.name for each in pods.items] == ["head"]
    assert api.core.read_namespaced_pod("head", "default").status.phase == "Pending"


# What is found.


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("stage=train", ["b"]),
        ("stage==train", ["b"]),
        ("stage!=train", ["a", "c"]),
        ("stage in (train, encode)", ["a", "b"]),
        ("stage notin (train)", ["a", "c"]),
        ("stage", ["a", "b"]),
        ("!stage", ["c"]),
        ("stage,stage!=encode", ["b"]),
    ],
)
def test_a_list_holds_what_the_labels_select(api, selector, found):
    for name, labels in (("a", {"stage": "encode"}), ("b", {"stage": "train"}), ("c", {})):
        api.create(ray_job("x") | {"metadata": {"name": name, "labels": labels}})
    assert api.names(label_selector=selector) == found


def test_a_field_that_cannot_select_is_a_bad_request(api):
    api.create(ray_job("ajob-a"))
    assert api.names(field_selector="metadata.name=ajob-b") == []
    with Refused(400, "BadRequest") as answer:
        api.list(field_selector="spec.entrypoint=true")
    assert answer.message == 'field label not supported: "spec.entrypoint"'


def test_a_long_list_comes_in_pages(api):
    names = [f"ajob-{index}" for index in range(5)]
    for name in names:
        api.create(ray_job(name))
    page = api.list(limit=2)
    found = []
    while True:
        found += [each["metadata"]["name"] for each in page["items"]]
        token = page["metadata"].get("continue")
        if not token:
            break
        page = api.list(limit=2, _continue=token)
    assert found == names


# What changes.


def test_a_watch_resumes_after_the_version_of_a_list(api):
    api.create(ray_job("ajob-a"))
    version = api.list()["metadata"]["resourceVersion"]
    api.create(ray_job("ajob-b"))
    api.patch("ajob-a", {"metadata": {"labels": {"a": "b"}}})
    api.delete("ajob-a")
    expected = [("ADDED", "ajob-b"), ("MODIFIED", "ajob-a"), ("DELETED", "ajob-a")]
    assert api.watch(3, resource_version=version) == expected
    assert api.watch(2) == [("ADDED", "ajob-b")]


def test_a_watch_hears_of_a_change_while_it_waits(api):
    stream = watch.Watch().stream(api.jobs.list_namespaced_custom_object, *PLACE, timeout_seconds=10)
    api.create(ray_job("ajob-a"))
    assert next(stream)["object"]["metadata"]["name"] == "ajob-a"
    api.server.store.patch(
        "rayjobs", "default", "ajob-a", {"status": {"jobStatus": "RUNNING"}}, part="status"
    )
    event = next(stream)
    assert (event["type"], event["object"]["status"]) == ("MODIFIED", {"jobStatus": "RUNNING"})
    stream.close()


def test_a_watch_with_a_selector_is_told_what_begins_and_ceases_to_match(api):
    version = api.list()["metadata"]["resourceVersion"]
    api.create(ray_job("ajob-a"))
    for stage in ("train", "train2"):
        api.patch("ajob-a", {"metadata": {"labels": {"stage": stage}}})
    events = api.watch(2, resource_version=version, label_selector="stage=train")
    assert events == [("ADDED", "ajob-a"), ("DELETED", "ajob-a")]


def test_a_watch_ends_with_a_bookmark(api):
    api.create(ray_job("ajob-a"))
    response = api.jobs.list_namespaced_custom_object(
        *PLACE, watch=True, allow_watch_bookmarks=True, timeout_seconds=1, _preload_content=False
    )
    last = json.loads(response.data.decode().splitlines()[-1])
    assert last["type"] == "BOOKMARK"
    assert last["object"]["metadata"]["resourceVersion"] == str(api.server.store.version)


def test_a_watch_of_a_forgotten_version_is_too_old(api):
    api.create(ray_job("ajob-a"))
    version = api.list()["metadata"]["resourceVersion"]
    api.create(ray_job("ajob-b"))
    api.server.store.compact()
    with pytest.raises(client.ApiException) as error:
        api.watch(1, resource_version=version)
    assert error.value.status == 410
    version = api.list()["metadata"]["resourceVersion"]
    api.create(ray_job("ajob-c"))
    assert api.watch(1, resource_version=version) == [("ADDED", "ajob-c")]


def test_a_page_of_a_forgotten_version_is_too_old(api):
    for name in ("a", "b"):
        api.create(ray_job(name))
    token = api.list(limit=1)["metadata"]["continue"]
    api.delete("a")
    api.server.store.compact()
    with Refused(410, "Expired"):
        api.list(limit=1, _continue=token)


# What is deleted.


def _owned(api, name: str, owner, kind: str = "rayclusters") -> None:
    meta = owner["metadata"]
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
    }
    reference["blockOwnerDeletion"] = True
    body = {"metadata": {"name": name, "ownerReferences": [reference]}}
    if kind == "rayclusters":
        body |= {"apiVersion": "ray.io/v1", "kind": "RayCluster", "spec": {}}
    api.server.store.create(kind, "default", body)


def test_a_finalizer_keeps_an_object_that_is_being_deleted(api):
    body = ray_job("ajob-a")
    body["metadata"]["finalizers"] = ["ray.io/rayjob-finalizer"]
    made = api.create(body)
    kept = api.delete("ajob-a")
    assert kept["metadata"]["deletionTimestamp"]
    assert kept["metadata"]["generation"] == made["metadata"]["generation"] + 1
    again = api.delete("ajob-a")
    assert again["metadata"]["deletionTimestamp"] == kept["metadata"]["deletionTimestamp"]
    api.patch("ajob-a", {"metadata": {"finalizers": None}})
    with Refused(404, "NotFound"):
        api.get("ajob-a")


def test_foreground_deletion_ends_after_what_the_object_owns(api):
    job = api.create(ray_job("ajob-a"))
    _owned(api, "cluster", job)
    _owned(api, "head", api.server.store.get("rayclusters", "default", "cluster"), "pods")
    spec = {"nodeName": "node", "containers": []}
    api.server.store.patch("pods", "default", "head", {"spec": spec})
    held = api.delete("ajob-a", propagation_policy="Foreground")
    assert held["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert api.server.store.get("rayclusters", "default", "cluster")["metadata"]["deletionTimestamp"]
    assert api.core.read_namespaced_pod("head", "default").metadata.deletion_grace_period_seconds == 30
    api.core.delete_namespaced_pod("head", "default", grace_period_seconds=0)
    assert api.names() == []
    assert api.server.store.find("rayclusters", "default", "cluster") is None


def test_background_deletion_ends_at_once_and_garbage_follows(api):
    job = api.create(ray_job("ajob-a"))
    _owned(api, "cluster", job)
    api.server.store.holds_garbage = True
    answer = api.delete("ajob-a")
    assert (answer["kind"], answer["status"]) == ("Status", "Success")
    assert api.server.store.find("rayclusters", "default", "cluster")
    api.server.store.holds_garbage = False
    api.server.store.collect()
    assert api.server.store.find("rayclusters", "default", "cluster") is None


def test_orphans_stay_without_their_owner(api):
    job = api.create(ray_job("ajob-a"))
    _owned(api, "cluster", job)
    api.delete("ajob-a", propagation_policy="Orphan")
    assert api.names() == []
    assert api.server.store.get("rayclusters", "default", "cluster")["metadata"]["ownerReferences"] == []


def test_a_precondition_spares_another_object_of_the_same_name(api):
    old = api.create(ray_job("ajob-a"))
    api.delete("ajob-a")
    api.create(ray_job("ajob-a"))
    options = client.V1DeleteOptions(preconditions=client.V1Preconditions(uid=old["metadata"]["uid"]))
    with Refused(409, "Conflict"):
        api.delete("ajob-a", body=options)
    assert api.names() == ["ajob-a"]


# Who may what.


def test_a_token_is_valid_until_it_is_rotated(api):
    api.server.allow("old", ROLE)
    jobs = client.CustomObjectsApi(api.connect("old"))
    jobs.create_namespaced_custom_object(*PLACE, ray_job("ajob-a"))
    api.server.rotate("old", "new")
    with Refused(401, "Unauthorized"):
        jobs.get_namespaced_custom_object(*PLACE, "ajob-a")
    renewed = client.CustomObjectsApi(api.connect("new"))
    assert renewed.get_namespaced_custom_object(*PLACE, "ajob-a")["metadata"]["name"] == "ajob-a"


def test_a_role_allows_what_it_names_and_nothing_else(api):
    api.server.allow("t", ROLE)
    jobs = client.CustomObjectsApi(api.connect("t"))
    core = client.CoreV1Api(api.connect("t"))
    jobs.create_namespaced_custom_object(*PLACE, ray_job("ajob-a"))
    jobs.list_namespaced_custom_object(*PLACE)
    core.list_namespaced_event("default")
    api.core.create_namespaced_config_map("default", {"metadata": {"name": "dde-rayjob"}})
    core.read_namespaced_config_map("dde-rayjob", "default")
    with Refused(403, "Forbidden") as answer:
        jobs.patch_namespaced_custom_object(*PLACE, "ajob-a", {})
    assert 'cannot patch resource "rayjobs" in API group "ray.io"' in answer.message
    assert "system:serviceaccount:default:dde-control" in answer.message
    for forbidden in (
        lambda: core.read_namespaced_config_map("dde-config", "default"),
        lambda: core.list_namespaced_secret("default"),
        lambda: core.delete_namespaced_pod("head", "default"),
        lambda: jobs.patch_namespaced_custom_object_status(*PLACE, "ajob-a", {}),
        lambda: jobs.list_namespaced_custom_object("ray.io", "v1", "default", "rayclusters"),
    ):
        with Refused(403, "Forbidden"):
            forbidden()


def test_a_quota_forbids_one_more(api):
    api.server.store.quotas["rayjobs.ray.io"] = 1
    api.create(ray_job("ajob-a"))
    with Refused(403, "Forbidden") as answer:
        api.create(ray_job("ajob-b"))
    assert "exceeded quota" in answer.message
    assert "used: count/rayjobs.ray.io=1, limited: count/rayjobs.ray.io=1" in answer.message
    api.delete("ajob-a")
    api.create(ray_job("ajob-b"))


# What goes wrong.


@pytest.mark.parametrize(
    ("code", "reason"),
    [(500, "InternalError"), (503, "ServiceUnavailable"), (504, "Timeout"), (401, "Unauthorized")],
)
def test_a_fault_answers_instead_of_the_server(api, code, reason):
    api.server.inject(Fault(code, first(1), "POST", "/rayjobs"))
    with Refused(code, reason):
        api.create(ray_job("ajob-a"))
    assert api.names() == []
    api.create(ray_job("ajob-a"))
    assert api.server.counts[str(code)] == 1


def test_too_many_requests_say_when_to_return(api):
    api.server.inject(Fault(429, first(1), retry_after_s=7))
    with Refused(429, "TooManyRequests") as answer:
        api.create(ray_job("ajob-a"))
    assert answer.headers["Retry-After"] == "7"
    assert answer.details["retryAfterSeconds"] == 7


def test_a_reply_is_lost_although_the_request_was_carried_out(api):
    api.server.inject(Fault(None, first(1), "POST"))
    with pytest.raises(HTTPError):
        api.create(ray_job("ajob-a"))
    assert api.names() == ["ajob-a"]
    with Refused(409, "AlreadyExists"):
        api.create(ray_job("ajob-a"))
    api.server.inject(Fault(None, first(1), "DELETE"))
    with pytest.raises(HTTPError):
        api.delete("ajob-a")
    with Refused(404, "NotFound"):
        api.delete("ajob-a")


def test_a_request_is_lost_before_it_is_carried_out(api):
    api.server.inject(Fault(None, first(1), "POST", carried_out=False))
    with pytest.raises(HTTPError):
        api.create(ray_job("ajob-a"))
    assert api.names() == []


def test_a_watch_is_cut(api):
    api.create(ray_job("ajob-a"))
    api.server.inject(Fault(None, first(1), "GET", "watch=", seconds=0.1))
    began = time.monotonic()
    response = api.jobs.list_namespaced_custom_object(
        *PLACE, watch=True, timeout_seconds=30, _preload_content=False
    )
    with pytest.raises(HTTPError):
        response.read()
    assert time.monotonic() - began < 5


# What the CRDs say.


def test_unknown_fields_are_refused_if_the_request_is_strict(checked):
    body = ray_job("ajob-a", entryPoint="x")
    body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imag"] = "x"
    body["metadata"]["lables"] = {}
    with Refused(400, "BadRequest") as answer:
        checked.create(body, field_validation="Strict")
    for field in (
        "spec.entryPoint",
        "spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].imag",
        "metadata.lables",
    ):
        assert f'unknown field "{field}"' in answer.message
    assert checked.names() == []


def test_unknown_fields_are_dropped_with_a_warning_otherwise(checked):
    body = ray_job("ajob-a", entryPoint="x")
    made, code, headers = checked.jobs.create_namespaced_custom_object_with_http_info(*PLACE, body)
    assert code == 201
    assert "entryPoint" not in made["spec"]
    assert headers["Warning"] == '299 - "unknown field \\"spec.entryPoint\\""'


def test_fields_that_are_absent_have_the_defaults_of_the_schema(checked):
    body = ray_job("ajob-a")
    for name in ("submissionMode", "backoffLimit", "ttlSecondsAfterFinished"):
        del body["spec"][name]
    spec = checked.create(body)["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert (spec["backoffLimit"], spec["ttlSecondsAfterFinished"]) == (0, 0)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            {"entrypoint": 3},
            'spec.entrypoint: Invalid value: "integer": spec.entrypoint in body must be of type string',
        ),
        (
            {"preRunningDeadlineSeconds": 0},
            "spec.preRunningDeadlineSeconds: Invalid value: 0: spec.preRunningDeadlineSeconds in body should "
            "be greater than or equal to 1",
        ),
        (
            {"rayClusterSpec": {"headGroupSpec": {}}},
            "spec.rayClusterSpec.headGroupSpec.template: Required value",
        ),
        (
            {"activeDeadlineSeconds": 2**31},
            "spec.activeDeadlineSeconds: Invalid value: 2147483648: spec.activeDeadlineSeconds in body must "
            "be of type int32: 2147483648",
        ),
        ({"backoffLimit": True}, 'must be of type integer: "boolean"'),
        ({"metadata": {"stage": 1}}, 'spec.metadata.stage in body must be of type string: "integer"'),
    ],
)
def test_a_value_that_the_schema_refuses_is_invalid(checked, change, cause):
    with Refused(422, "Invalid") as answer:
        checked.create(ray_job("ajob-a", **change))
    assert answer.message.startswith('RayJob.ray.io "ajob-a" is invalid: ')
    assert cause in answer.message


NAMES = ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]
POLICY = {"policy": "DeleteSelf"}
CONDITION = {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "ttlSeconds": 0}
BROKEN_RULES = {
    "legacy policies (onSuccess/onFailure) and deletionRules cannot be used together within the same "
    "deletionStrategy": {
        "deletionStrategy": {
            "onSuccess": POLICY,
            "onFailure": POLICY,
            "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}],
        }
    },
    "deletionStrategy requires either BOTH onSuccess and onFailure, OR the deletionRules field (cannot be "
    "empty)": {"deletionStrategy": {"onSuccess": POLICY}},
    "JobStatus and JobDeploymentStatus cannot be used together within the same deletion condition.": {
        "deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": CONDITION}]}
    },
    "the deletion condition requires either the JobStatus or the JobDeploymentStatus field.": {
        "deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}
    },
    "the managedBy field value must be either 'ray.io/kuberay-operator' or 'kueue.x-k8s.io/multikueue'": {
        "managedBy": "me"
    },
}
"""By the message of a CEL rule: a spec that breaks it."""
BROKEN_CHANGES = {
    "the managedBy field is immutable": ({"managedBy": NAMES[0]}, {"managedBy": NAMES[1]}),
    "gcsFaultToleranceOptions.backend is immutable": (
        {"gcsFaultToleranceOptions": {"backend": "redis"}},
        {"gcsFaultToleranceOptions": {"backend": "rocksdb"}},
    ),
}
"""By the message of a CEL rule: a change of a spec that breaks it."""


@pytest.mark.parametrize("message", list(BROKEN_RULES))
def test_a_spec_that_breaks_a_rule_of_the_schema_is_invalid(checked, message):
    with Refused(422, "Invalid") as answer:
        checked.create(ray_job("ajob-a", **BROKEN_RULES[message]))
    assert message in answer.message
    assert checked.names() == []


def test_a_change_of_what_is_immutable_is_invalid(checked):
    before, after = BROKEN_CHANGES["the managedBy field is immutable"]
    checked.create(ray_job("ajob-a", **before))
    checked.patch("ajob-a", {"spec": before})
    with Refused(422, "Invalid") as answer:
        checked.patch("ajob-a", {"spec": after})
    assert "the managedBy field is immutable" in answer.message
    assert checked.get("ajob-a")["spec"]["managedBy"] == NAMES[0]


def test_a_cluster_within_a_job_obeys_the_same_rules(checked):
    body = ray_job("ajob-a")
    body["spec"]["rayClusterSpec"]["managedBy"] = "me"
    with Refused(422, "Invalid") as answer:
        checked.create(body)
    assert [each["field"] for each in answer.details["causes"]] == ["spec.rayClusterSpec.managedBy"]
    before, after = BROKEN_CHANGES["gcsFaultToleranceOptions.backend is immutable"]
    checked.create(ray_job("ajob-b"))
    checked.patch("ajob-b", {"spec": {"rayClusterSpec": before}})
    with Refused(422, "Invalid") as answer:
        checked.patch("ajob-b", {"spec": {"rayClusterSpec": after}})
    assert "gcsFaultToleranceOptions.backend is immutable" in answer.message


def test_each_rule_of_the_schema_has_a_test(crds):
    schema = read_crd(crds / "ray.io_rayjobs.yaml").schema
    rules = {
        rule["message"] for _, node in _nodes(schema, ()) for rule in node.get("x-kubernetes-validations", [])
    }
    assert rules == {*BROKEN_RULES, *BROKEN_CHANGES}


@pytest.mark.parametrize("plural", ["rayjobs", "rayclusters"])
def test_each_required_field_is_missed_as_a_json_schema_misses_it(crds, plural):
    """Objects with just the required fields along each path of the schema are accepted, and refused without
    one, by ours and by jsonschema alike.
    """
    schema = read_crd(crds / f"ray.io_{plural}.yaml").schema
    reference = jsonschema.Draft202012Validator(schema)
    missed = 0
    for steps, node in _nodes(schema, ()):
        for name in node.get("required", []):
            whole = _sample(node)
            assert _required_causes(schema, _wrap(schema, steps, whole)) == []
            broken = _wrap(schema, steps, {key: value for key, value in whole.items() if key != name})
            path = "".join("[0]" if step == "[]" else f".{step}" for step in (*steps, name)).lstrip(".")
            assert _required_causes(schema, broken) == [Cause(path, "FieldValueRequired", "Required value")]
            assert [each.validator for each in reference.iter_errors(broken)] == ["required"]
            missed += 1
    assert missed > 400


@pytest.mark.parametrize("plural", ["rayjobs", "rayclusters"])
def test_each_field_is_known_and_its_misspelling_is_not(crds, plural):
    schema = read_crd(crds / f"ray.io_{plural}.yaml").schema
    checked = 0
    for steps, node in _nodes(schema, ()):
        for name in node.get("properties", {}):
            if not steps:
                continue
            path = "".join("[0]" if step == "[]" else f".{step}" for step in (*steps, name)).lstrip(".")
            known = _wrap(schema, steps, {name: _sample(node["properties"][name])})
            wrong = _wrap(schema, steps, {f"{name}x": _sample(node["properties"][name])})
            assert unknown_fields(schema, known) == []
            assert unknown_fields(schema, wrong) == [f"{path}x"]
            checked += 1
    assert checked > 2000


def _nodes(schema, steps) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Each part of a schema with the steps to it: names, and [] for an item."""
    yield steps, schema
    for name, part in schema.get("properties", {}).items():
        yield from _nodes(part, (*steps, name))
    if "items" in schema:
        yield from _nodes(schema["items"], (*steps, "[]"))


def _sample(schema):
    """The smallest value that a schema accepts."""
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        return {name: _sample(schema["properties"][name]) for name in schema.get("required", [])}
    texts = ["A", "1", "2026-01-01T00:00:00Z"]
    if schema.get("format") == "date-time":
        texts.reverse()
    number = max(1, schema.get("minimum", 1))
    by_type = {"array": [], "string": texts[0], "integer": number, "number": number, "boolean": True}
    if schema.get("minItems"):
        by_type["array"] = [_sample(schema["items"])]
    return by_type.get(schema.get("type"), 1)


def _wrap(schema, steps, value):
    """An object with the value at the steps, and along the way just what is required."""
    if not steps:
        return value
    if steps[0] == "[]":
        return [_wrap(schema["items"], steps[1:], value)]
    own = _sample(schema) if schema.get("type") == "object" else {}
    return own | {steps[0]: _wrap(schema["properties"][steps[0]], steps[1:], value)}


def _required_causes(schema, value) -> list[Cause]:
    return [each for each in violations(schema, value) if each.reason == "FieldValueRequired"]
