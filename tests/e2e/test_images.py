"""Both images are built from nothing and run: not root, files read-only, as pods run them.

Needs root, buildah, debootstrap, packages from an index, about 20 minutes, and 9 GB of disk until the end.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from packaging.utils import canonicalize_name

from services.api.records import EncodeResult
from services.client.processes import Child, free_ports, wait_until
from services.storage import files
from tests.support.images import BASE_ARCHIVE, ROOT, Image, ImageStore, missing, working_folder
from tests.support.pairs_file import pair_rows, write_pairs
from tests.support.stage_runs import StageRuns, shapes_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing()), reason=f"building images needs {', '.join(missing())}"),
]
USER = 1000
OBJECT_STORE_BYTES = 100_000_000
VALIDATOR = "cyclonedx-python-lib[json-validation]"
TOKEN = "a" * 64
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def store() -> Iterator[ImageStore]:
    with working_folder(BASE_ARCHIVE.parent) as folder:
        yield ImageStore(folder)


@pytest.fixture(scope="module")
def control(store: ImageStore) -> Image:
    return store.build("control", REVISION=REVISION)


@pytest.fixture(scope="module")
def ray(store: ImageStore) -> Image:
    return store.build("ray", REVISION=REVISION)


@pytest.fixture(scope="module")
def validator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages that validate an SBOM, in a folder of their own.

    Beside Ray they would cost every one of its processes a second: jsonschema, which Ray imports, builds the
    grammar of rfc3987-syntax where that is installed.
    """
    folder = tmp_path_factory.mktemp("validator")
    wanted = ["--target", folder, "--constraint", ROOT / "constraints.txt", VALIDATOR]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return folder


def validate(validator: Path, text: str) -> None:
    """Raises CalledProcessError unless ``text`` is a CycloneDX document, by the strict schema."""
    script = (
        "import json, sys; from cyclonedx.schema import SchemaVersion;"
        "from cyclonedx.validation.json import JsonStrictValidator; text = sys.stdin.read();"
        "schema = SchemaVersion.from_version(json.loads(text)['specVersion']);"
        "found = JsonStrictValidator(schema).validate_str(text); sys.exit(found and str(found))"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(validator)}
    subprocess.run(command, input=text, text=True, check=True, env=environment)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that containers may write to, as they may to an object store."""
    folder = tmp_path / "shared"
    folder.mkdir()
    os.chown(folder, USER, USER)
    return folder


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start containers; all end with the test."""
    children: list[Child] = []

    def start(image: Image, name: str, *argv: str, **given) -> Child:
        children.append(image.start(name, tmp_path / f"{name}.log", argv or None, **given))
        return children[-1]

    yield start
    for child in reversed(children):
        child.stop(0.1)


def report(image: Image) -> None:
    print(f"\n{image.name}: built in {image.seconds:.0f} s, {image.num_bytes / 1e9:.2f} GB")


# ---- what both hold to ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["control", "ray"])
def test_an_image_runs_without_rights_and_writes_nothing_but_tmp(
    name: str, request: pytest.FixtureRequest
) -> None:
    image: Image = request.getfixturevalue(name)
    report(image)
    assert image.run(["id", "-u"]).strip() == str(USER)
    status = image.run(["cat", "/proc/self/status"])
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert (int(fields["CapEff"], 16), fields["NoNewPrivs"]) == (0, "1")
    assert image.run(["bash", "-c", "cd; pwd"]).strip() == "/tmp"
    for folder in ("/", "/home/dde", "/usr/local/share/dde"):
        refused = f"! touch {folder}/new 2>/tmp/why && grep -q 'Read-only file system' /tmp/why"
        image.run(["bash", "-c", refused])


@pytest.mark.parametrize("name", ["control", "ray"])
def test_an_image_contains_its_locks_an_sbom_of_all_packages_and_no_leftovers(
    name: str, validator: Path, request: pytest.FixtureRequest
) -> None:
    image: Image = request.getfixturevalue(name)
    text = image.read("/usr/local/share/dde/sbom.cdx.json")
    validate(validator, text)
    document = json.loads(text)
    listed = {(each["name"].lower(), each["version"]) for each in document["components"]}
    script = (
        "import importlib.metadata as m, json;"
        "print(json.dumps([(d.metadata['Name'].lower(), d.version) for d in m.distributions()]))"
    )
    installed = {tuple(each) for each in json.loads(image.run(["python", "-c", script]))}
    assert installed <= listed
    locks = [path.read_text() for path in image.root.glob("usr/local/share/dde/locks/*.txt")]
    locked = {pin for lock in locks for pin in re.findall(r"^(\S+)==(\S+)", lock, re.MULTILINE)}
    assert ("torch", "2.13.0+cpu") in locked
    assert locked <= {(canonicalize_name(name), version) for name, version in installed}
    packages = image.run(["dpkg-query", "-W", "-f", "${Package} ${Version}\n"]).splitlines()
    assert {tuple(line.split()) for line in packages} <= listed
    assert document["metadata"]["component"]["name"] == f"dde-{name}"

    left = ["/root/.cache", "/tmp/*", "/opt/sbom", "/var/lib/apt/lists/*", "/var/cache/apt/archives/*.deb"]
    assert [str(found) for place in left for found in image.root.glob(place[1:])] == []
    assert not any("cyclonedx" in name for name, _ in installed)


@pytest.mark.parametrize("name", ["control", "ray"])
def test_an_image_says_which_version_and_revision_it_is(name: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(name)
    labels = image.config["Labels"]
    version = image.run(["python", "-c", "import importlib.metadata as m; print(m.version('dde-align'))"])
    assert labels["org.opencontainers.image.version"] == version.strip()
    assert labels["org.opencontainers.image.revision"] == REVISION
    assert labels["org.opencontainers.image.base.name"] == "localhost/dde-base:bookworm"


# ---- the control plane ---------------------------------------------------------------------------


def test_the_control_image_migrates_a_database_and_serves_on_it(
    control: Image, shared: Path, start: Callable[..., Child]
) -> None:
    port, metrics = free_ports(2)
    env = {
        "DDE_API_KEY": "key",
        "DDE_STORAGE_URI": "file:///shared/storage",
        "DDE_DATABASE_URL": "sqlite:////shared/dde.db",
        "DDE_PORT": str(port),
        "DDE_METRICS_PORT": str(metrics),
        "DDE_MIGRATE": "false",
        "RAY_AUTH_MODE": "disabled",
    }
    given = {"env": env, "mounts": {shared: "/shared"}}
    control.run(["python", "-m", "services.control", "migrate"], **given)
    assert (shared / "dde.db").stat().st_uid == USER

    serving = start(control, "control", **given)
    address = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(f"{address}/healthz"), "/healthz does not answer", [serving], 240)
    jobs = httpx.get(f"{address}/v1/alignment/jobs", headers={"Authorization": "Bearer key"}, timeout=60)
    assert (jobs.status_code, jobs.json()["data"]) == (200, [])


def answers(url: str, headers: dict[str, str] | None = None) -> bool:
    try:
        return httpx.get(url, timeout=5.0, headers=headers).status_code == 200
    except httpx.TransportError:
        return False


# ---- Ray -----------------------------------------------------------------------------------------


def test_the_features_of_the_ray_image_that_need_extras_are_in_it(ray: Image, shared: Path) -> None:
    script = """
import bitsandbytes, mlflow, torch, wandb
weights = torch.nn.Parameter(torch.ones(8192))
optimizer = bitsandbytes.optim.AdamW8bit([weights], lr=0.1)
weights.sum().backward()
optimizer.step()
assert weights.max() < 1, weights
run = wandb.init(mode="offline", dir="/shared", project="images")
run.log({"loss": 1.0})
run.finish()
mlflow.set_tracking_uri("file:///shared/mlflow")
with mlflow.start_run():
    mlflow.log_metric("loss", 1.0)
"""
    env = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    ray.run(["python", "-c", script], env=env, mounts={shared: "/shared"})
    assert list(shared.glob("wandb/offline-run-*/*.wandb"))
    assert list(shared.glob("mlflow/*/*/metrics/loss"))


def test_libraries_of_a_driver_that_gke_mounts_are_found(ray: Image, shared: Path) -> None:
    build = "echo 'int cuInit(int flags) { return 7; }' | gcc -shared -x c - -o /shared/libcuda.so.1"
    ray.run(["bash", "-c", build], mounts={shared: "/shared"})
    load = "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"
    assert ray.run(["python", "-c", load], mounts={shared: "/usr/local/nvidia/lib64"}).strip() == "7"


def test_a_job_of_the_ray_image_encodes_pairs_on_a_worker_that_joined_its_head(
    ray: Image, shared: Path, tmp_path: Path, start: Callable[..., Child]
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "auth_token").write_text(TOKEN)
    gcs, dashboard, client, *others = free_ports(7)
    address = f"http://127.0.0.1:{dashboard}"
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": "/var/run/secrets/ray/auth_token",
        "RAY_API_SERVER_ADDRESS": address,
    }
    given = {"mounts": {shared: str(shared), secret: "/var/run/secrets/ray"}, "env": env}

    head = start(ray, "head", *ray_start(others[:2], "--head", f"--port={gcs}", "--num-cpus=0",
                 f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"), **given)  # fmt: skip
    key = {"Authorization": f"Bearer {TOKEN}"}
    wait_until(lambda: answers(f"{address}/api/version", key), "the head does not answer", [head], 240)
    start(ray, "worker", *ray_start(others[2:], f"--address=127.0.0.1:{gcs}", "--num-cpus=2"), **given)

    spec_uri, done_uri = encode_spec(ray, shared)
    submit = ["ray", "job", "submit", "--", "python", "-m", "services.ingest", "encode", "--spec", spec_uri]
    print(ray.run(submit, timeout_s=900, **given)[-2000:])
    result = EncodeResult.model_validate_json(files.read_bytes(done_uri))
    assert (result.counts["pairs"], result.counts["ties"], result.counts["bad"]) == (36, 4, 0)


def ray_start(ports: list[int], *options: str) -> list[str]:
    """The command of a node, as KubeRay gives it to a container."""
    same = ["--block", "--node-ip-address=127.0.0.1", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    own = [f"--dashboard-agent-listen-port={ports[0]}", f"--metrics-export-port={ports[1]}"]
    return ["/bin/bash", "-lc", "--", shlex.join(["ray", "start", *same, *own, *options])]


def encode_spec(ray: Image, folder: Path) -> tuple[str, str]:
    """The URIs of a spec for 40 pairs in ``folder``, of which 4 are ties, and of its done.json."""
    where = ray.run(["python", "-c", "from dde_core.shapes import MODEL_DIR; print(MODEL_DIR.as_uri())"])
    model = shapes_record().model_copy(update={"uri": where.strip()})
    pairs = write_pairs(folder / "pairs.parquet", pair_rows(40))
    spec = StageRuns(folder / "storage", {}).encode_spec("job", pairs.as_uri(), model)
    uri = files.join(spec.prefix, "spec.json")
    files.write_json(uri, spec.model_dump(mode="json"))
    for path in folder.rglob("*"):
        os.chown(path, USER, USER)
    return uri, files.join(spec.prefix, "done.json")
