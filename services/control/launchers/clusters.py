"""Where jobs run: on the Ray cluster that all share, or each stage on a cluster of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

from services.api.requests import AlignmentJobCreate, Cluster, EvaluationCreate, GeneratePairs, Relabel
from services.control.launchers import kubernetes_api
from services.control.launchers.contract import Launcher
from services.control.launchers.kuberay import KubeRayLauncher
from services.control.launchers.kubernetes_api import KubernetesApi
from services.control.launchers.ray_jobs import RayJobsLauncher
from services.control.launchers.rayjob import Options, Template
from services.control.tables import Job
from services.errors import BadRequest, Unavailable
from services.settings import Settings

Request = TypeVar("Request", AlignmentJobCreate, EvaluationCreate, GeneratePairs, Relabel)


@dataclass(frozen=True)
class Clusters:
    """The launchers of an installation. ``own`` is None where jobs cannot have their own clusters."""

    shared: Launcher
    own: KubeRayLauncher | None = None

    @classmethod
    def of(cls, settings: Settings) -> Clusters:
        """Those that the settings ask for. Raises BadRequest, naming setting and field, for unusable ones."""
        shared = RayJobsLauncher(settings.ray_url, settings.driver_cpus, settings.driver_memory)
        return cls(shared, _own(settings))

    def launcher(self, job: Job) -> Launcher:
        """The one that runs the job's stages.

        Raises Unavailable for a job that has its own clusters where none are configured any more.
        """
        if of_job(job) == "shared":
            return self.shared
        if self.own is None:
            raise Unavailable(f"job {job.id} has its own clusters, and rayjob_template is not set any more")
        return self.own


def of_job(job: Job) -> Cluster:
    """Where the job runs, as decided when it was created. Jobs of earlier versions share a cluster."""
    return cast(Cluster, job.request.get("cluster") or "shared")


def placed(settings: Settings, request: Request, param: str = "cluster") -> Request:
    """The request with its cluster: a later change of the setting must not move a job that runs.

    Raises BadRequest, naming ``param``, for its own cluster where none is configured.
    """
    cluster = request.cluster or settings.cluster
    if cluster == "own" and settings.rayjob_template is None:
        message = f"{param}: must be 'shared', as this installation starts no clusters (rayjob_template)"
        raise BadRequest(f"{message}, got 'own'", param=param, code="no_own_clusters")
    return request.model_copy(update={"cluster": cluster})


def _own(settings: Settings) -> KubeRayLauncher | None:
    if settings.rayjob_template is None:
        if settings.cluster == "own":
            message = "rayjob_template must be set, as cluster is 'own': it is what RayJobs are made from"
            raise BadRequest(message, param="rayjob_template")
        return None
    template = Template.load(settings.rayjob_template, with_gpus=settings.use_gpu)
    account = kubernetes_api.pod_account
    if settings.kubeconfig is not None:
        account = partial(kubernetes_api.kubeconfig_account, settings.kubeconfig)
    namespace = settings.rayjob_namespace or kubernetes_api.pod_namespace()
    options = Options(
        installation=installation(settings.storage_uri),
        image=settings.rayjob_image,
        queue=settings.rayjob_queue,
        priority=settings.rayjob_priority,
    )
    return KubeRayLauncher(KubernetesApi(namespace, account), template, options)


def installation(storage_uri: str) -> str:
    """A label for all that belongs to one installation: to its replicas, which share its storage."""
    return hashlib.sha256(storage_uri.encode()).hexdigest()[:16]
