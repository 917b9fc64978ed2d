"""One contract for all launchers, held on the fake, on real Ray (slow) and on a stand-in API server.

``pytest -s`` prints the table case x launcher.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from services.api.records import ModelRecord
from services.api.requests import DatasetSource
from services.client.processes import wait_until
from services.client.ray_head import RayHead
from services.control.launchers import kubernetes_api, rayjob
from services.control.launchers.contract import Launcher, Needs, Run, RunStatus
from services.control.launchers.kuberay import KubeRayLauncher
from services.control.launchers.kubernetes_api import KubernetesApi
from services.control.launchers.ray_jobs import RayJobsLauncher
from services.errors import Refused, Unavailable
from services.stages import layout
from services.stages.specs import EncodeSpec
from services.storage import files
from tests.services.control import fakes
from tests.services.control.test_streams import listening
from tests.support.jobs_api import jobs_api
from tests.support.kube import Fault, KubeServer, Operator, serve_kube
from tests.support.s3_server import first

ROOT = Path(__file__).parents[3]
TEMPLATE = ROOT / "k8s" / "base" / "rayjob-template.yaml"
ROLE = [
    {
        "apiGroups": ["ray.io"],
        "resources": ["rayjobs"],
        "verbs": ["create", "get", "list", "watch", "delete"],
    },
    {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "list"]},
    {"apiGroups": [""], "resources": ["pods", "events"], "verbs": ["get", "list"]},
]
"""What the control plane's account may do."""
NUMBERS = itertools.count(1)


def crds() -> Path | None:
    """The folder of KubeRay's CRDs; without it the stand-in does not check specs."""
    return Path(os.environ["KUBERAY_CRDS"]) if "KUBERAY_CRDS" in os.environ else None


class World(ABC):
    """A launcher, and what runs the runs that it submits. ``cannot`` names the cases that have no meaning."""

    cannot: frozenset[str] = frozenset()
    launcher: Launcher

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, **fields) -> Run:
        """A run that has not been submitted."""
        id = f"ajob_{next(NUMBERS):024x}-encode-a1"
        prefix = (self.folder / id).as_uri()
        metadata = {"job": id.partition("-")[0], "stage": "encode", "attempt": "1", "project": "default"}
        return Run(id, self.command(id, prefix), prefix, metadata, **fields)

    @abstractmethod
    def command(self, id: str, prefix: str) -> str:
        """What its driver runs."""

    @abstractmethod
    def goes_on(self, run: Run) -> None:
        """Its driver works."""

    @abstractmethod
    def ends(self, run: Run, code: int) -> None:
        """Its driver exits."""

    @abstractmethod
    def count(self) -> int:
        """The runs that were ever started."""

    @abstractmethod
    def carries_out_stops(self, run: Run) -> None:
        """What the outside does after a stop."""

    @abstractmethod
    def disconnected(self) -> Launcher:
        """The same launcher, of something that does not answer."""

    def awaited(self, run: Run, *states: str, timeout_s: float = 60.0) -> RunStatus:
        """The first status in one of these states."""
        deadline = time.monotonic() + timeout_s
        while (status := self.launcher.status(run.id)).state not in states:
            assert time.monotonic() < deadline, f"{status}, not one of {states}"
            time.sleep(0.1)
        return status


class FakeWorld(World):
    cannot = frozenset({"lost reply", "refused", "no room"})

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.launcher = self.fake = fakes.FakeLauncher(encode=lambda spec: "pending")

    def command(self, id: str, prefix: str) -> str:
        model = ModelRecord(id="m", name="m", uri="file:///m", family="sd15", digest="d", created_at=0)
        source = DatasetSource(uri="file:///u")
        spec = EncodeSpec(
            job=id, attempt=1, prefix=prefix, source=source, source_digest="d", model=model, output="o"
        )
        files.write_json(layout.spec_uri(prefix), spec.model_dump(mode="json"))
        return f"python -m services.ingest encode --spec {layout.spec_uri(prefix)}"

    def goes_on(self, run: Run) -> None:
        self.fake.states[run.id] = "running"

    def ends(self, run: Run, code: int) -> None:
        self.fake.states[run.id] = "failed" if code else "succeeded"

    def count(self) -> int:
        return len(self.fake.submitted)

    def carries_out_stops(self, run: Run) -> None:
        """Nothing: it stops by itself."""

    def disconnected(self) -> Launcher:
        away = fakes.FakeLauncher()
        away.down = True
        return away


DRIVER = """
import sys, time
from pathlib import Path
print("the driver works", flush=True)
ends = Path(sys.argv[1])
while not ends.exists():
    time.sleep(0.1)
sys.exit(int(ends.read_text()))
"""


class RayWorld(World):
    """Real Ray: drivers are processes that end when a file says so."""

    cannot = frozenset({"lost reply", "refused"})

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.launcher = RayJobsLauncher(url)
        self.url = url
        self.started: list[str] = []

    def command(self, id: str, prefix: str) -> str:
        return shlex.join([sys.executable, "-c", DRIVER, str(self.folder / f"{id}.ends")])

    def goes_on(self, run: Run) -> None:
        self.awaited(run, "running")

    def ends(self, run: Run, code: int) -> None:
        (self.folder / f"{run.id}.ends.part").write_text(str(code))
        (self.folder / f"{run.id}.ends.part").rename(self.folder / f"{run.id}.ends")

    def count(self) -> int:
        from ray.job_submission import JobSubmissionClient

        return len([each for each in JobSubmissionClient(self.url).list_jobs() if each.submission_id])

    def carries_out_stops(self, run: Run) -> None:
        """Nothing: it stops by itself."""

    def disconnected(self) -> Launcher:
        return RayJobsLauncher("http://127.0.0.1:1")

    def without_room(self) -> Launcher:
        return RayJobsLauncher(self.url, driver_cpus=1000.0)


class KubeWorld(World):
    """The stand-in API server, an operator that acts when it is told to, and a dashboard that answers."""

    def __init__(self, folder: Path, server: KubeServer, dashboard: str, jobs: dict[str, str]) -> None:
        super().__init__(folder)
        self.server = server
        self.operator = Operator(server)
        self.dashboard = dashboard.removeprefix("http://")
        self.jobs = jobs
        self.token = folder / "token"
        self.token.write_text("token-1")
        server.allow("token-1", ROLE)
        self.launcher = self.connected()

    def connected(self, clock: Callable[[], float] = time.time, **options) -> KubeRayLauncher:
        """A launcher as the control plane's account."""

        def account():
            path = self.server.kubeconfig(self.folder / "kubeconfig", self.token)
            return kubernetes_api.kubeconfig_account(path)

        template = rayjob.Template.load(TEMPLATE)
        made = rayjob.Options(**{"installation": "here", **options})
        return KubeRayLauncher(KubernetesApi("default", account), template, made, clock)

    def command(self, id: str, prefix: str) -> str:
        return f"python -m services.ingest encode --spec {prefix}/spec.json"

    def name(self, run: Run) -> str:
        return rayjob.name_of(run.id)

    def goes_on(self, run: Run) -> None:
        name = self.name(run)
        self.operator.see(name)
        self.operator.provision(name, self.dashboard)
        self.operator.run(name)
        self.works(run)

    def works(self, run: Run) -> None:
        """What the driver does first, and what its dashboard says then."""
        self.jobs[run.id] = "RUNNING"
        files.write_json(layout.started_uri(run.prefix), {})

    def ends(self, run: Run, code: int) -> None:
        self.operator.finish(self.name(run), "FAILED" if code else "SUCCEEDED", f"exit code {code}")
        self.jobs[run.id] = "FAILED" if code else "SUCCEEDED"

    def count(self) -> int:
        return len(self.operator.jobs())

    def carries_out_stops(self, run: Run) -> None:
        name = self.name(run)
        if self.server.store.find("rayjobs", "default", name):
            self.operator.finalize(name)

    def disconnected(self) -> Launcher:
        def account():
            path = self.folder / "nowhere"
            text = self.server.kubeconfig(path, self.token).read_text()
            path.write_text(text.replace(self.server.url, "http://127.0.0.1:1"))
            return kubernetes_api.kubeconfig_account(path)

        template = rayjob.Template.load(TEMPLATE)
        return KubeRayLauncher(KubernetesApi("default", account), template, rayjob.Options("here"))

    def without_room(self) -> Launcher:
        return self.launcher


# ---- the cases


def unknown_until_submitted(world: World) -> None:
    run = world.run()
    assert world.launcher.status(run.id).state == "unknown"
    world.launcher.stop(run.id)
    assert world.launcher.log_tail(run.id) == ""
    assert world.launcher.status(run.id).state == "unknown"


def pending_running_succeeded(world: World) -> None:
    run = world.run()
    world.launcher.submit(run)
    assert world.launcher.status(run.id).state in ("pending", "running")
    world.goes_on(run)
    assert world.awaited(run, "running", timeout_s=0).state == "running"
    world.ends(run, 0)
    assert world.awaited(run, "succeeded", "failed", "stopped").state == "succeeded"


def failed_with_the_reason(world: World) -> None:
    run = world.run()
    world.launcher.submit(run)
    world.goes_on(run)
    world.ends(run, 3)
    status = world.awaited(run, "succeeded", "failed", "stopped")
    assert (status.state, status.is_final, status.is_evicted) == ("failed", False, False)
    if not isinstance(world, FakeWorld):
        assert "exit code 3" in str(status)


def submitted_twice_runs_once(world: World) -> None:
    run = world.run()
    before = world.count()
    for _ in range(2):
        world.launcher.submit(run)
    world.goes_on(run)
    world.launcher.submit(run)
    assert world.count() == before + 1
    assert world.launcher.status(run.id).state == "running"
    world.ends(run, 0)
    world.awaited(run, "succeeded")
    world.launcher.submit(run)
    assert world.launcher.status(run.id).state == "succeeded"


def stopped_on_request(world: World) -> None:
    run = world.run()
    other = world.run()
    for each in (run, other):
        world.launcher.submit(each)
        world.goes_on(each)
    world.launcher.stop(run.id)
    assert world.launcher.status(run.id).state in ("running", "stopped")
    world.carries_out_stops(run)
    world.awaited(run, "stopped", "unknown")
    world.launcher.stop(run.id)
    assert world.launcher.status(other.id).state == "running"
    world.ends(other, 0)


def stopped_while_it_waits(world: World) -> None:
    run = world.run()
    world.launcher.submit(run)
    world.launcher.stop(run.id)
    world.carries_out_stops(run)
    world.awaited(run, "stopped", "unknown")


def stopped_after_its_end(world: World) -> None:
    run = world.run()
    world.launcher.submit(run)
    world.goes_on(run)
    world.ends(run, 0)
    world.awaited(run, "succeeded")
    world.launcher.stop(run.id)
    world.carries_out_stops(run)
    assert world.launcher.status(run.id).state in ("succeeded", "stopped", "unknown")


def output_of_the_driver(world: World) -> None:
    run = world.run()
    world.launcher.submit(run)
    world.goes_on(run)
    deadline = time.monotonic() + 10
    while not (tail := world.launcher.log_tail(run.id)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert {FakeWorld: "last words", RayWorld: "the driver works", KubeWorld: "line 99"}[type(world)] in tail
    assert len(tail.splitlines()) <= 40
    world.ends(run, 0)


def unavailable_without_an_answer(world: World) -> None:
    away = world.disconnected()
    run = world.run()
    for call in (
        lambda: away.submit(run),
        lambda: away.status(run.id),
        lambda: away.stop(run.id),
        lambda: away.log_tail(run.id),
    ):
        with pytest.raises(Unavailable, match="does not answer"):
            call()


def pending_without_room(world: World) -> None:
    run = world.run()
    world.without_room().submit(run)
    if isinstance(world, KubeWorld):
        world.operator.see(world.name(run))
        world.operator.lose_room(world.name(run))
        assert "Insufficient nvidia.com/gpu" in str(world.launcher.status(run.id))
    else:
        time.sleep(3)
    status = world.launcher.status(run.id)
    assert status.state == "pending"
    assert status.message, "what it waits for"
    world.launcher.stop(run.id)


def lost_reply(world: KubeWorld) -> None:
    run = world.run()
    before = world.count()
    world.server.inject(Fault(None, first(1), "POST"))
    with pytest.raises(Unavailable):
        world.launcher.submit(run)
    assert world.count() == before + 1, "the request arrived"
    world.launcher.submit(run)
    assert world.count() == before + 1
    assert world.launcher.status(run.id).state == "pending"


def refused_for_good(world: KubeWorld) -> None:
    run = world.run(needs=Needs(), starts_within_s=1e12)  # more than the field's 32 bits
    with pytest.raises(Refused, match=r"422: .*preRunningDeadlineSeconds"):
        world.launcher.submit(run)
    assert world.launcher.status(run.id).state == "unknown"


CASES: dict[str, Callable] = {
    "unknown until it is submitted": unknown_until_submitted,
    "pending, running, succeeded": pending_running_succeeded,
    "failed, with the reason": failed_with_the_reason,
    "submitted again, it runs once": submitted_twice_runs_once,
    "stopped on request, alone": stopped_on_request,
    "stopped while it waits": stopped_while_it_waits,
    "stopped after its end": stopped_after_its_end,
    "the end of its output": output_of_the_driver,
    "unavailable without an answer": unavailable_without_an_answer,
    "no room": pending_without_room,
    "lost reply": lost_reply,
    "refused": refused_for_good,
}


@contextmanager
def fake(folder: Path) -> Iterator[World]:
    yield FakeWorld(folder)


@contextmanager
def real_ray(folder: Path) -> Iterator[World]:
    with RayHead(folder, str(folder), num_cpus=8) as head, pytest.MonkeyPatch.context() as patch:
        for name, value in head.auth.items():
            patch.setenv(name, value)
        wait_until(head.is_ready, "Ray's dashboard does not answer", [head.child], 120)
        yield RayWorld(folder, head.url)


@contextmanager
def stand_in(folder: Path) -> Iterator[World]:
    jobs: dict[str, str] = {}
    with serve_kube(crds()) as server, listening(jobs_api(jobs)) as url:
        yield KubeWorld(folder, server, url, jobs)


WORLDS = {"fake": fake, "Ray Jobs": real_ray, "KubeRay": stand_in}
CLASSES = {"fake": FakeWorld, "Ray Jobs": RayWorld, "KubeRay": KubeWorld}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> Iterator[Callable[[str], World]]:
    """Each world, once for the module."""
    with ExitStack() as undo:
        known: dict[str, World] = {}

        def world(name: str) -> World:
            if name not in known:
                known[name] = undo.enter_context(WORLDS[name](tmp_path_factory.mktemp("runs")))
            return known[name]

        yield world


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, str], str]]:
    """case, launcher -> outcome; printed at the end."""
    outcomes: dict[tuple[str, str], str] = {}
    yield outcomes
    print(f"\n{'':34}{''.join(f'{name:>12}' for name in WORLDS)}")
    for case in CASES:
        cells = [outcomes.get((case, name), "-" if case in CLASSES[name].cannot else "") for name in WORLDS]
        print(f"{case:34}{''.join(f'{cell:>12}' for cell in cells)}")


HELD = [
    pytest.param(case, name, id=f"{name}: {case}", marks=[pytest.mark.slow] if name == "Ray Jobs" else [])
    for name in WORLDS
    for case in CASES
    if case not in CLASSES[name].cannot
]


@pytest.mark.parametrize(("case", "name"), HELD)
def test_every_launcher_keeps_the_contract(case, name, worlds, table):
    if case == "refused" and crds() is None:
        pytest.skip("KUBERAY_CRDS is not set: the stand-in checks no specs")
    world = worlds(name)
    table[case, name] = "FAILED"
    if isinstance(world, KubeWorld):
        world.server.inject()
    CASES[case](world)
    table[case, name] = "passed"
