"""Requests to the Kubernetes API, as the account of the pod, in one namespace. Objects are JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.errors import BadRequest, Conflict, NotFound, Refused, Unavailable

Object = dict[str, Any]
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes puts a pod's token, its CA and the name of its namespace."""
GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
TIMEOUT_S = 10.0
REFUSALS = (400, 413, 422)
"""Answers to a request that fails in the same way when it is repeated. 403 is none: a quota may be free
later, and an operator can grant a right.
"""


def pod_namespace() -> str:
    """The namespace of this pod. Raises BadRequest outside of a pod."""
    try:
        return (ACCOUNT / "namespace").read_text().strip()
    except OSError as error:
        message = "rayjob_namespace must be set outside of a pod, and in a pod that mounts no account"
        raise BadRequest(f"{message}: {error}", param="rayjob_namespace") from error


def pod_account() -> Any:
    """The configuration of the client in a pod; it reads the token's file again every minute."""
    from kubernetes import client, config

    configuration = client.Configuration()
    config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    return configuration


def kubeconfig_account(path: Path) -> Any:
    """The configuration of the client outside of a pod, by the current context of a kubeconfig."""
    from kubernetes import client, config

    configuration = client.Configuration()
    load: Any = config.load_kube_config
    load(config_file=str(path), client_configuration=configuration)
    return configuration


class KubernetesApi:
    """The API server that ``account`` names. Connects at first use.

    Every method raises Unavailable without an answer, for a lacking right and for a used-up quota; NotFound
    for an object that does not exist; Conflict for one that exists already; Refused for one that is invalid.
    """

    def __init__(self, namespace: str, account: Callable[[], Any] = pod_account) -> None:
        self.namespace = namespace
        self._account = account
        self._lock = threading.Lock()
        self._client: Any = None

    def create_rayjob(self, body: Object) -> None:
        """Create it. An unknown field is refused, not dropped."""
        self._of_rayjobs("create_namespaced_custom_object", body=body, field_validation="Strict")

    def rayjob(self, name: str) -> Object:
        """The RayJob with its status."""
        found: Object = self._of_rayjobs("get_namespaced_custom_object", name=name)
        return found

    def rayjobs(self, selector: str) -> list[Object]:
        """The RayJobs with these labels."""
        found = self._of_rayjobs("list_namespaced_custom_object", label_selector=selector)
        items: list[Object] = found["items"]
        return items

    def rayclusters(self, selector: str) -> list[Object]:
        """The RayClusters with these labels."""
        found = self._of_rayjobs(
            "list_namespaced_custom_object", plural="rayclusters", label_selector=selector
        )
        items: list[Object] = found["items"]
        return items

    def delete_rayjob(self, name: str, uid: str) -> None:
        """Delete this RayJob after everything that it owns. Another one of the same name is a Conflict."""
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        self._of_rayjobs("delete_namespaced_custom_object", name=name, body=body)

    def pods(self, selector: str) -> list[Object]:
        """The pods with these labels."""
        return self._of_core("list_namespaced_pod", label_selector=selector)

    def warnings(self, name: str) -> list[Object]:
        """The warning Events about objects of this name, oldest first."""
        selector = f"involvedObject.name={name},type=Warning"
        found = self._of_core("list_namespaced_event", field_selector=selector)
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    def _of_rayjobs(self, method: str, plural: str = PLURAL, **arguments: Any) -> Any:
        names = {"group": GROUP, "version": VERSION, "namespace": self.namespace, "plural": plural}
        return self._answer("CustomObjectsApi", method, **names, **arguments)

    def _of_core(self, method: str, **arguments: Any) -> list[Object]:
        """The items of a list, as JSON: the client's own classes reject what a newer server adds."""
        arguments |= {"namespace": self.namespace, "_preload_content": False}
        answer = self._answer("CoreV1Api", method, **arguments)
        items: list[Object] = json.loads(answer.data)["items"]
        return items

    def _answer(self, api: str, method: str, **arguments: Any) -> Any:
        """The answer to a request. A refused token is read again, once: Kubernetes renews it."""
        from kubernetes.client.exceptions import ApiException

        try:
            return self._call(api, method, arguments)
        except ApiException as error:
            if error.status != 401:
                raise _meaning(error) from error
        self._client = None
        try:
            return self._call(api, method, arguments)
        except ApiException as error:
            raise _meaning(error) from error

    def _call(self, api: str, method: str, arguments: dict[str, Any]) -> Any:
        """Raises ApiException for an answer of the server that is an error."""
        from kubernetes import client
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        try:
            function = getattr(getattr(client, api)(self._connected()), method)
            return function(**arguments, _request_timeout=TIMEOUT_S)
        except (HTTPError, OSError, ConfigException, ValueError) as error:
            self._client = None
            raise Unavailable(f"the Kubernetes API does not answer: {error}") from error

    def _connected(self) -> Any:
        from kubernetes import client

        with self._lock:
            if self._client is None:
                configuration = self._account()
                configuration.retries = False  # a review of the job is repeated anyway
                self._client = client.ApiClient(configuration)
            return self._client


def _meaning(error: Any) -> NotFound | Conflict | Refused | Unavailable:
    """The error of ours for an answer with an error status."""
    message = f"the Kubernetes API answers {error.status}: {_message(error)}"
    if error.status == 404:
        return NotFound(message)
    if error.status == 409:
        return Conflict(message)
    if error.status in REFUSALS:
        return Refused(message)
    return Unavailable(message)


def _message(error: Any) -> str:
    """The message of the Status object that Kubernetes sends with an error, else the text of the answer."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, KeyError, ValueError):
        return str(error.body or error.reason).strip()[:500]
