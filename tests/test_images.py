"""The Dockerfiles and their locks agree with each other, with the code and with the documentation.

Nothing is built here; tests/e2e/test_images.py builds and runs the images.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
LOCKS = sorted((ROOT / "docker" / "locks").glob("*.txt"))
EXTRAS = {"control": ["control"], "ray": ["ray", "8bit", "wandb", "mlflow"]}
DRIVERS = {"13": "580", "12": "525"}
"""The least NVIDIA driver of each CUDA, by NVIDIA's table of minor version compatibility."""
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
each_lock = pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined) if word]


def all_of(path: Path, wanted: str) -> list[str]:
    return [rest for word, rest in instructions(path) if word == wanted]


def arguments(path: Path) -> dict[str, str]:
    """Each build argument's default; empty where it has none."""
    named = [rest.partition("=") for rest in all_of(path, "ARG")]
    return {name: "" for name, _, _ in named} | {name: value for name, _, value in named if value}


def sources(path: Path) -> set[str]:
    """What a Dockerfile takes from the repository, an argument in a name replaced by ``*``."""
    copied = [word for rest in all_of(path, "COPY") for word in rest.split()[:-1]]
    mounted = [
        word for rest in all_of(path, "RUN") for word in re.findall(r" /(?:context|(?=docker/))(\S+)", rest)
    ]
    return {re.sub(r"\$\{\w+\}", "*", name).strip("/") for name in [*copied, *mounted]}


@cache
def pins(path: Path) -> dict[str, str]:
    """The versions of a lock or of constraints.txt, by the normalized name."""
    found = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return {str(canonicalize_name(name)): version for name, version in found}


def lock(name: str) -> dict[str, str]:
    return pins(ROOT / "docker" / "locks" / f"{name}.txt")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(extras: list[str]) -> set[str]:
    """The packages that pyproject.toml lists for these extras, those of extras within extras too."""
    listed = [Requirement(line) for line in project()["dependencies"]]
    for extra in extras:
        listed += [Requirement(line) for line in project()["optional-dependencies"][extra]]
    nested = [name for each in listed if each.name == project()["name"] for name in each.extras]
    names = {str(canonicalize_name(each.name)) for each in listed if each.name != project()["name"]}
    return names | (required(nested) if nested else set())


# ---- Dockerfiles ---------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    ended = subprocess.run([hadolint, *DOCKERFILES], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


@each_dockerfile
def test_files_that_an_image_takes_exist_and_are_sent_to_the_builder(path: Path) -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    taken = sources(path)
    assert {"pyproject.toml", "README.md", "dde_core", "services", "docker/sbom.py"} <= taken
    assert [name for name in taken if not list(ROOT.glob(name))] == []
    assert [name for name in taken if name not in sent and name.rpartition("/")[0] not in sent] == []


@each_dockerfile
def test_an_image_starts_from_one_base_by_digest_and_is_not_root(path: Path) -> None:
    assert all_of(path, "FROM") == ["${BASE}"]
    assert re.fullmatch(
        r"docker\.io/library/python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", arguments(path)["BASE"]
    )
    assert arguments(path)["BASE"] == arguments(DOCKERFILES[0])["BASE"]
    assert all_of(path, "USER") == ["1000:1000"]


@each_dockerfile
def test_nothing_is_installed_whose_hash_is_not_in_a_lock(path: Path) -> None:
    installs = [part for rest in all_of(path, "RUN") for part in rest.split("&&") if "pip install" in part]
    assert len(installs) == 4
    for install in installs:
        assert "--no-deps" in install
        assert ("--require-hashes" in install) != ("--no-index --no-build-isolation /tmp/source" in install)
        assert "--no-cache-dir" in install


@each_dockerfile
def test_the_labels_tell_the_version_of_the_code(path: Path) -> None:
    assert arguments(path)["VERSION"] == project()["version"]
    (labels,) = all_of(path, "LABEL")
    assert 'image.version="${VERSION}"' in labels
    assert 'image.revision="${REVISION}"' in labels
    assert 'base.name="${BASE}"' in labels


def test_the_ray_image_tells_its_ray_its_cuda_and_the_driver_that_this_needs() -> None:
    path = ROOT / "docker" / "ray.Dockerfile"
    (labels,) = all_of(path, "LABEL")
    (variables,) = all_of(path, "ENV")
    cuda = ".".join(lock("torch-cuda")["nvidia-cuda-runtime"].split(".")[:2])
    driver = DRIVERS[cuda.split(".")[0]]
    assert f'dde.ray="{lock("ray")["ray"]}"' in labels
    assert f'dde.least-nvidia-driver="{driver}"' in labels
    assert f'NVIDIA_REQUIRE_CUDA="cuda>={cuda}"' in variables
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in variables.split()
    assert arguments(path)["TORCH"] == "cuda"
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert f"CUDA {cuda}" in page
    assert f"driver {driver}" in page


def test_the_ray_image_has_the_tools_of_kuberays_probes_and_no_command_of_its_own() -> None:
    path = ROOT / "docker" / "ray.Dockerfile"
    (install,) = [rest for rest in all_of(path, "RUN") if "apt-get install" in rest]
    assert {"wget", "gcc"} <= set(install.split())
    assert all_of(path, "CMD") + all_of(path, "ENTRYPOINT") == []


def test_the_control_image_starts_the_control_plane() -> None:
    assert all_of(ROOT / "docker" / "control.Dockerfile", "CMD") == ['["python", "-m", "services.control"]']


@each_dockerfile
def test_every_argument_and_secret_of_a_build_is_documented(path: Path) -> None:
    page = (ROOT / "docs" / "deploy.md").read_text()
    section = page.partition("## Images\n")[2].partition("\n## ")[0]
    secrets = {name for rest in all_of(path, "RUN") for name in re.findall(r"type=secret,id=(\w+)", rest)}
    assert secrets == {"ca", "pip"}
    names = {*arguments(path), *secrets}
    assert {name for name in names if not re.search(rf"^\|[^|]*\b{name}\b", section, re.MULTILINE)} == set()


# ---- locks ---------------------------------------------------------------------------------------


@each_lock
def test_every_package_of_a_lock_has_a_hash_and_the_version_of_the_constraints(path: Path) -> None:
    entries = path.read_text().replace(" \\\n", "").splitlines()
    assert re.fullmatch(rf"# Written by docker/lock.py: {len(pins(path))} packages\.", entries[0])
    assert [e for e in entries[1:] if not re.fullmatch(r"\S+==\S+( +--hash=sha256:[0-9a-f]{64})+", e)] == []
    known = pins(ROOT / "constraints.txt")
    of_cuda = set(lock("torch-cuda")) - {"torch"}
    assert {name for name in pins(path) if name not in known} <= of_cuda
    assert {n: v for n, v in pins(path).items() if n in known and v.removesuffix("+cpu") != known[n]} == {}


@pytest.mark.parametrize("image", EXTRAS)
def test_the_locks_of_an_image_have_what_its_extras_list(image: str) -> None:
    assert required(EXTRAS[image]) - {*lock(image), *lock("torch-cpu")} == set()
    assert not set(lock(image)) & set(lock("torch-cuda"))


def test_the_build_for_cpus_is_that_of_the_same_torch() -> None:
    assert lock("torch-cpu") == {"torch": f"{lock('torch-cuda')['torch']}+cpu"}
