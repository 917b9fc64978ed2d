"""Where a job runs: as its request says, else as the settings do; and what is deleted once none needs it."""

from __future__ import annotations

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from services.control import stages
from services.control.database import Database
from services.control.launchers.clusters import Clusters, installation
from services.control.launchers.contract import RunStatus
from services.control.launchers.kuberay import KubeRayLauncher
from services.control.launchers.sweeper import ORPHAN_S, Sweeper
from services.control.reconciler import Reconciler
from services.control.tables import Job
from services.errors import BadRequest
from services.settings import Settings
from tests.services.control import fakes
from tests.services.control.conftest import Clock
from tests.services.control.fakes import FakeLauncher
from tests.services.control.test_launchers import TEMPLATE, KubeWorld, stand_in


def settings(tmp_path, **changes) -> Settings:
    storage = (tmp_path / "store").as_uri()
    return Settings(api_key=SecretStr("k"), storage_uri=storage, **changes)


@pytest.fixture
def own_plane(plane):
    """A control plane that can start clusters."""
    plane.settings.rayjob_template = TEMPLATE
    plane.app_settings.rayjob_template = TEMPLATE
    return plane


# ---- requests


def test_jobs_share_a_cluster_unless_they_or_the_settings_say_otherwise(own_plane):
    plane = own_plane
    evaluations = "/v1/evaluations"
    assert plane.job()["cluster"] == "shared"
    own = plane.job(cluster="own")["id"]
    plane.app_settings.cluster = "own"
    assert plane.job()["cluster"] == "own"
    assert plane.job(cluster="shared")["cluster"] == "shared"
    assert plane.post(evaluations, plane.evaluation_body())["cluster"] == "own"
    assert plane.post(evaluations, plane.evaluation_body(cluster="shared"))["cluster"] == "shared"
    plane.app_settings.cluster = "shared"
    assert plane.get(f"/v1/alignment/jobs/{own}")["cluster"] == "own", "a job stays where it began"


def test_its_own_cluster_is_refused_where_none_can_be_started(plane):
    body = plane.job_body(cluster="own")
    for path, given, param in (
        ("/v1/alignment/jobs", body, "cluster"),
        ("/v1/evaluations", plane.evaluation_body(cluster="own"), "cluster"),
    ):
        error = plane.error(path, given)
        assert (error["param"], error["code"]) == (param, "no_own_clusters")
        assert error["message"].startswith(
            "cluster: must be 'shared', as this installation starts no clusters"
        )


def test_a_made_dataset_names_the_field_of_its_cluster(plane):
    generate = {
        "model": "shapes",
        "prompts_uri": str(plane.root / "prompts.txt"),
        "num_prompts": 3,
        "scorers": {"shape": 1.0},
        "cluster": "own",
    }
    error = plane.error("/v1/datasets", {"name": "made", "generate": generate})
    assert error["param"] == "generate.cluster"
    relabel = {"dataset": plane.dataset["id"], "scorer": "shape", "cluster": "own"}
    error = plane.error("/v1/datasets", {"name": "made", "relabel": relabel})
    assert error["param"] == "relabel.cluster"


def test_a_study_is_refused_before_it_starts_for_a_cell_on_its_own_cluster(plane):
    body = plane.job_body()
    evaluation = {"prompts_uri": body["evaluation"]["prompts_uri"], "num_prompts": 2}
    grid = {"cluster": ["shared", "own"]}
    study = {"name": "s", "base": body, "grid": grid, "evaluation": evaluation}
    error = plane.error("/v1/studies", study)
    assert "own" in error["message"]
    assert "starts no clusters" in error["message"]
    assert plane.get("/v1/studies")["data"] == []


def test_an_unknown_cluster_is_refused(plane):
    assert plane.error("/v1/alignment/jobs", plane.job_body(cluster="mine"))["param"] == "cluster"


# ---- launchers


def test_each_job_runs_by_its_own_launcher(own_plane):
    plane = own_plane
    own = FakeLauncher()
    clusters = Clusters(plane.launcher, own)
    here = plane.job(name="here")["id"]
    apart = plane.job(cluster="own", name="apart")["id"]
    reconciler = Reconciler(plane.database, plane.settings, clusters, plane.clock)
    for _ in range(60):
        if not reconciler.once():
            plane.clock.now += plane.settings.poll_interval_s
    assert {each.partition("-")[0] for each in plane.launcher.submitted} == {here}
    assert {each.partition("-")[0] for each in own.submitted} == {apart}
    assert plane.get(f"/v1/alignment/jobs/{apart}")["status"] == "succeeded"


def test_a_job_with_its_own_clusters_waits_while_none_can_be_started(own_plane):
    plane = own_plane
    job = plane.job(cluster="own")["id"]
    plane.settle()  # with a reconciler that has the shared cluster alone
    assert plane.launcher.submitted == []
    assert any("rayjob_template is not set any more" in event for event in plane.events(job))


def test_an_eviction_is_no_failure_of_the_job(plane):
    """Kueue may take the machines as often as it likes."""
    plane.settings.max_attempts = 1
    plane.launcher.plays["train"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    for attempt in (1, 2, 3):
        run = f"{job}-train-a{attempt}"
        assert plane.launcher.submitted[-1] == run
        evicted = RunStatus("stopped", "Suspended", "the cluster took its machines back", is_evicted=True)
        plane.launcher.statuses[run] = evicted
        plane.settle(looks=60)
    assert plane.launcher.submitted[-1] == f"{job}-train-a4"
    assert plane.get(f"/v1/alignment/jobs/{job}")["status"] == "running"
    assert any("Suspended: the cluster took its machines back" in event for event in plane.events(job))
    plane.launcher.statuses[f"{job}-train-a4"] = RunStatus("stopped", "Complete")
    plane.settle(looks=60)
    assert plane.get(f"/v1/alignment/jobs/{job}")["status"] == "failed", "a driver that died counts"


def test_a_run_that_failed_for_good_fails_its_job_at_once(plane):
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    failed = RunStatus("failed", "DeadlineExceeded", "it took too long", is_final=True)
    plane.launcher.statuses[f"{job}-encode-a1"] = failed
    plane.settle(looks=60)
    assert plane.launcher.submitted == [f"{job}-encode-a1"]
    view = plane.get(f"/v1/alignment/jobs/{job}")
    assert view["status"] == "failed"
    assert "DeadlineExceeded: it took too long" in view["reason"]["message"]


def test_the_stored_log_is_shown_where_the_cluster_has_none(plane):
    plane.launcher.plays["encode"] = fakes.runs
    plane.launcher.log_tail = lambda run_id: ""
    job = plane.job()["id"]
    plane.settle()
    spec = plane.launcher.specs[f"{job}-encode-a1"]
    lines = "\n".join(f"line {number}" for number in range(50))
    fakes.files.write_bytes(f"{spec.prefix}/driver.log", lines.encode())
    plane.launcher.statuses[f"{job}-encode-a1"] = RunStatus("failed", "AppFailed")
    plane.settle(looks=60)
    shown = next(event for event in plane.events(job) if event.startswith("line "))
    assert shown.splitlines() == [f"line {number}" for number in range(10, 50)]


# ---- settings


def test_own_clusters_need_a_template_that_can_be_used(tmp_path):
    with pytest.raises(BadRequest, match="rayjob_template must be set, as cluster is 'own'"):
        Clusters.of(settings(tmp_path, cluster="own"))
    path = tmp_path / "rayjob.yaml"
    path.write_text("kind: RayJob\n")
    with pytest.raises(BadRequest, match=r"rayjob\.yaml: apiVersion must be ray\.io/v1, got None"):
        Clusters.of(settings(tmp_path, rayjob_template=path))
    with pytest.raises(BadRequest, match="rayjob_namespace must be set outside of a pod"):
        Clusters.of(settings(tmp_path, rayjob_template=TEMPLATE))
    clusters = Clusters.of(settings(tmp_path, rayjob_template=TEMPLATE, rayjob_namespace="dde"))
    assert isinstance(clusters.own, KubeRayLauncher)
    assert Clusters.of(settings(tmp_path)).own is None


def test_installations_of_different_storage_do_not_touch_one_another():
    first, second = installation("s3://a/one"), installation("s3://a/two")
    assert first == installation("s3://a/one") != second
    assert len(first) == 16


# ---- the sweeper


@pytest.fixture
def world(tmp_path):
    with stand_in(tmp_path) as world:
        yield world


@pytest.fixture
def swept(plane, world: KubeWorld):
    clock = Clock()
    return Sweeper(plane.database, world.launcher, clock), clock


def test_rayjobs_that_no_job_needs_are_deleted_ended_ones_at_once(plane, world: KubeWorld, swept):
    sweeper, clock = swept
    ended, running, others = world.run(), world.run(), world.run()
    world.connected(installation="there").submit(others)
    for run in (ended, running):
        world.launcher.submit(run)
        world.goes_on(run)
    world.ends(ended, 0)
    assert sweeper.sweep() == [ended.id]
    clock.now += ORPHAN_S - 1
    assert sweeper.sweep() == []
    clock.now += 2
    assert sweeper.sweep() == [running.id]
    assert world.jobs[running.id] == "STOPPED"
    assert sweeper.sweep() == [], "they are being deleted"
    assert "deletionTimestamp" not in world.operator.job(world.name(others))["metadata"]


def test_the_rayjob_of_a_current_attempt_stays_until_the_job_goes_on_without_it(plane, world, swept):
    sweeper, clock = swept
    plane.launcher.plays["encode"] = fakes.runs
    job = plane.job()["id"]
    plane.settle()
    database: Database = plane.database
    with database.read() as session:
        row = session.scalar(select(Job).where(Job.id == job))
        run = stages.run(row, stages.root(row, plane.settings), plane.settings)
    world.launcher.submit(run)
    world.goes_on(run)
    world.ends(run, 0)
    clock.now += 10 * ORPHAN_S
    assert sweeper.sweep() == []
    plane.post(f"/v1/alignment/jobs/{job}/cancel", {})
    plane.settle(looks=60)
    assert sweeper.sweep() == [run.id]
