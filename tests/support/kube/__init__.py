"""A stand-in Kubernetes API server with KubeRay's resources, and KubeRay's operator, scripted.

Real HTTP on 127.0.0.1, for the real ``kubernetes`` client; what it answers is what kube-apiserver answers::

    with serve_kube(crds) as server:                  # the folder of KubeRay's CRDs; None: specs go unchecked
        server.allow("token-1", ROLE["rules"])        # a ServiceAccount's bearer token and its Role's rules
        config = server.kubeconfig(folder / "kubeconfig", "token-1")
        operator = Operator(server)
        ... create the RayJob "ajob-x" with the client ...
        operator.see("ajob-x")                        # "" -> Initializing, or ValidationFailed, or Suspended
        operator.provision("ajob-x")                  # its pods run: Running, jobStatus ""
        operator.run("ajob-x")                        # jobStatus RUNNING
        operator.finish("ajob-x", "FAILED", "exit 1") # Failed, AppFailed
        ... DELETE it with the client: it stays with a deletionTimestamp ...
        operator.finalize("ajob-x")                   # 404

Resources: rayjobs, rayclusters (ray.io/v1), pods, events, services, configmaps, secrets. Verbs: create, get,
list (selectors, limit, continue), watch (resourceVersion, bookmarks, 410), update and merge patch (409 for
another resourceVersion), /status, delete (finalizers, foreground, background, orphan, preconditions, grace).
400 for unknown fields with fieldValidation=Strict, else they are dropped with a warning; 422 by the CRDs'
schemas and CEL rules. ``server.store`` is the content itself, for tests: no token, no fault.

Faults: ``server.inject(Fault(503, first(2), "POST", "/rayjobs"))``: an answer instead (401, 403, 429 with
Retry-After, 500, 503, 504); ``Fault(None, first(1), "POST")``: carried out, and the reply is lost;
``carried_out=False``: the connection closes before. ``server.rotate(old, new)``: a token expires.
``server.store.quotas["rayjobs.ray.io"] = 2``: 403 above. ``server.store.compact()``: watches get 410.
``server.store.holds_garbage``: no garbage collector.

``processes.ProcessOperator(server, folder, network)`` plays by itself what ``Operator`` plays step by step,
with real Ray nodes as pods; GPUs are counts alone where the machine has none.

``LIFE_CYCLES`` lists the operator's steps for every line of the table of a RayJob's states, each with the
state that a launcher reports after it.
"""

from tests.support.kube.cycles import LIFE_CYCLES, LifeCycle, Step
from tests.support.kube.faults import Fault
from tests.support.kube.objects import ApiError
from tests.support.kube.operator import FINALIZER, Operator
from tests.support.kube.server import ALL, KubeServer, serve_kube
from tests.support.kube.store import Store

__all__ = [
    "ALL",
    "FINALIZER",
    "LIFE_CYCLES",
    "ApiError",
    "Fault",
    "KubeServer",
    "LifeCycle",
    "Operator",
    "Step",
    "Store",
    "serve_kube",
]
