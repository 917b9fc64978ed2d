"""What the manifests refer to outside of themselves: settings, images, commands, Secrets."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from services.settings import ServingSettings, Settings, TrackerSettings, TrainingSettings
from tests.validate_k8s.overlay import K8S, ROOT


@dataclass(frozen=True)
class Image:
    """What an image contains. ``ports``: None where the command decides. ``user``: the uid it is made for."""

    pattern: str
    executables: frozenset[str]
    user: int
    variables: frozenset[str] = frozenset()
    ports: frozenset[int] | None = None


def ray_version() -> str:
    (pin,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return pin


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def dde_variables(*settings: type) -> frozenset[str]:
    """The variables that the settings classes read."""
    names = set()
    for one in settings:
        prefix = one.model_config.get("env_prefix", "")  # type: ignore[attr-defined]
        names |= {f"{prefix}{field}".upper() for field in one.model_fields}  # type: ignore[attr-defined]
    return frozenset(names)


AWS = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"})
TOKEN = frozenset({"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"})
OF_JOBS = frozenset({"RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_JOB_START_TIMEOUT_SECONDS"})
OF_NODES = frozenset({"RAY_gcs_rpc_server_reconnect_timeout_s"})
"""Read by Ray: tests/test_k8s.py finds each name in its sources."""


@cache
def images() -> dict[str, Image]:
    """By the last part of the image's name."""
    digest = r"(@sha256:[0-9a-f]{64})?"
    shell = frozenset({"sh", "sleep"})
    own = {
        "dde-control": Image(
            rf"(\S+/)?dde-control:{re.escape(version())}{digest}",
            shell | {"python"},
            _user("control"),
            dde_variables(Settings) | TOKEN | AWS | {"BUCKET"},
        ),
        "dde-ray": Image(
            rf"(\S+/)?dde-ray:{re.escape(version())}-ray{re.escape(ray_version())}{digest}",
            shell | {"python", "ray"},
            _user("ray"),
            dde_variables(TrainingSettings, ServingSettings, TrackerSettings) | OF_JOBS | OF_NODES | AWS,
        ),
    }
    others = {
        "redis": Image(
            rf"redis:7\.2\.7-bookworm{digest}",
            frozenset({"redis-server"}),
            999,
            frozenset({"REDIS_PASSWORD"}),
            frozenset({6379}),
        ),
        "postgres": Image(
            rf"postgres:17\.5-bookworm{digest}",
            frozenset({"pg_isready"}),
            999,
            frozenset({"POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD", "PGDATA"}),
            frozenset({5432}),
        ),
        "seaweedfs": Image(
            rf"chrislusf/seaweedfs:4\.47{digest}", frozenset({"weed"}), 1000, AWS, frozenset({8333})
        ),
    }
    return {**own, **others}


def image_of(reference: str) -> Image | None:
    """The image that a reference names; None for an unknown one."""
    name = reference.split("@")[0].rsplit("/", 1)[-1].split(":")[0]
    found = images().get(name)
    return found if found and re.fullmatch(found.pattern, reference) else None


def _user(name: str) -> int:
    (user,) = re.findall(r"^USER (\d+)", (ROOT / "docker" / f"{name}.Dockerfile").read_text(), re.MULTILINE)
    return int(user)


@cache
def secrets_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_secrets", K8S / "make-secrets.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def secret_keys(overlay: str) -> dict[str, list[str]]:
    """The Secrets that make-secrets.py makes for the overlay, with their keys."""
    script = secrets_script()
    return script.LOCAL_KEYS if overlay == "local" else script.KEYS


def optional_secrets(overlay: str) -> set[str]:
    """Secrets that a pod must do without where nobody made them."""
    return {"dde-registry", "dde-trackers"} | (set() if overlay == "local" else {"dde-object-store"})


@cache
def runs_as_module(module: str) -> bool:
    """Whether ``python -m module`` runs something of this repository."""
    return ROOT.joinpath(*module.split("."), "__main__.py").is_file()


@cache
def words_of(module: str) -> frozenset[str]:
    """The string constants in a module's ``__main__``: its subcommands are among them."""
    tree = ast.parse(ROOT.joinpath(*module.split("."), "__main__.py").read_text())
    return frozenset(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@cache
def has_function(module: str, function: str) -> bool:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not path.is_file():
        return False
    return function in {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}


@cache
def routes() -> frozenset[str]:
    """The paths that the control plane's sources declare."""
    text = "\n".join(path.read_text() for path in (ROOT / "services" / "control").rglob("*.py"))
    return frozenset(re.findall(r"\"(/[a-z]+)\"", text))


@cache
def ray_start_options() -> frozenset[str]:
    from ray.scripts.scripts import start

    return frozenset(option.lstrip("-") for parameter in start.params for option in parameter.opts)
