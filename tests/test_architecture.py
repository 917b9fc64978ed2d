"""Who may import whom. Checked on the source, and once by importing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "settings"}),
    frozenset({"api", "storage", "stages"}),
    frozenset({"pairs"}),
    frozenset({"artifacts"}),
    frozenset({"rollout"}),
    frozenset({"ingest", "training", "evaluation", "serving", "control", "client"}),
)
"""Packages of services/, lowest layer first. A package imports from its own layer and from those below."""

PROCESSES = LAYERS[-1]
"""Each runs by itself, so none imports another."""

PACKAGE_ORDER = ("storage", "api", "stages")
"""Within the second layer: each imports only those before it."""

NOT_FOR_CORE = {"ray", "fastapi", "sqlalchemy", "boto3", "httpx", "services"}
NOT_FOR_TRAINING = "dde_core.planning"
HEAVY = {"torch", "diffusers", "transformers", "safetensors"}


def imports_of(source: str) -> Iterator[str]:
    """Full names of what a module imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def package_of(path: Path) -> str:
    """``services/pairs/row.py`` -> ``pairs``; ``services/errors.py`` -> ``errors``."""
    return path.relative_to(ROOT / "services").parts[0].removesuffix(".py")


def layer_of(package: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


def forbidden(package: str, imported: set[str]) -> set[str]:
    """Packages that a module of ``package`` imports and must not."""
    others = imported - {package}
    upward = {other for other in others if layer_of(other) > layer_of(package)}
    if package in PROCESSES:
        return upward | (others & PROCESSES)
    if package in PACKAGE_ORDER:
        return upward | {other for other in others & set(PACKAGE_ORDER) if later(other, package)}
    return upward


def later(other: str, package: str) -> bool:
    return PACKAGE_ORDER.index(other) > PACKAGE_ORDER.index(package)


def test_every_package_of_services_is_in_the_layer_table():
    packages = {package_of(path) for path in sources("services")} - {"__init__"}
    assert packages == set().union(*LAYERS)


def test_the_root_of_services_holds_two_modules():
    modules = {path.name for path in (ROOT / "services").glob("*.py")}
    assert modules == {"__init__.py", "settings.py", "errors.py"}


@pytest.mark.parametrize("path", sources("services"), ids=lambda path: str(path.relative_to(ROOT)))
def test_services_import_downward_and_processes_never_one_another(path: Path):
    used = {name.split(".")[1] for name in imports_of(path.read_text()) if name.startswith("services.")}
    if package_of(path) != "__init__":
        assert not forbidden(package_of(path), used)


@pytest.mark.parametrize(
    ("package", "imported", "caught"),
    [
        ("pairs", {"artifacts"}, {"artifacts"}),
        ("artifacts", {"pairs", "storage", "control"}, {"control"}),
        ("training", {"evaluation", "stages"}, {"evaluation"}),
        ("storage", {"stages", "errors"}, {"stages"}),
        ("client", {"api", "errors", "settings"}, set()),
    ],
)
def test_the_layer_rule_catches_what_points_upward_or_sideways(
    package: str, imported: set[str], caught: set[str]
):
    assert forbidden(package, imported) == caught


OPENS_FILES = {"pathlib.Path", "shutil", "io.open", "services.storage.s3", "boto3", "fsspec"}


def opened_past_the_rules(source: str) -> set[str]:
    """What a module opens files with but for ``services/storage/sources.py``, which knows what is allowed."""
    found = OPENS_FILES.intersection(imports_of(source))
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("pq.ParquetFile", "pa.memory_map"):  # a path is what sources.resolve returned
            found |= {name} if ast.unparse(node.args[0]) not in ("stream", "path") else set()
        elif name == "open" or name.startswith(("fs.", "os.", "pa.OSFile")):
            found |= {name} - {"fs.FileSelector", "os.path.realpath"}
        elif name.startswith("files."):
            found |= {name} - {"files.join", "files.as_uri"}
    return found


@pytest.mark.parametrize("path", sources("services/pairs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_pairs_are_opened_through_the_rules_of_sources_alone(path: Path):
    assert not opened_past_the_rules(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "from pathlib import Path\nPath('a').read_text()",
        "open(uri)",
        "import pyarrow.parquet as pq\npq.ParquetFile(uri)",
        "files.read_bytes(uri)",
        "fs.FileSystem.from_uri(uri)",
        "pa.memory_map(uri)",
        "os.scandir(path)",
    ],
)
def test_an_opening_past_the_rules_is_caught(source: str):
    assert opened_past_the_rules(source)


@pytest.mark.parametrize("path", sources("dde_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_neither_ray_nor_http_nor_clouds(path: Path):
    assert not {name for name in imports_of(path.read_text()) if name.split(".")[0] in NOT_FOR_CORE}


@pytest.mark.parametrize(
    "path",
    [path for path in sources("dde_core") if "planning" not in path.parts] + sources("services/training"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_training_does_not_depend_on_planning(path: Path):
    assert not {name for name in imports_of(path.read_text()) if name.startswith(NOT_FOR_TRAINING)}


WITHOUT_TENSORS = [
    "dde_core.config",
    "dde_core.methods",
    "dde_core.parallelism",
    "dde_core.planning.plan",
    "services.api.requests",
    "services.api.answers",
    "services.api.reports",
    "services.stages.specs",
    "services.control.app",
    "services.client.cli",
    "services.evaluation.evaluate",
    "services.ingest.generate",
    "services.ingest.relabel",
]


WITH_TOKENIZERS = ["dde_core.models.folder_files", "services.ingest.encode"]
"""They load transformers, for its tokenizers, and nothing else that is heavy."""


def test_what_leaves_tensors_to_others_loads_no_torch():
    """In one process: the first module that loads any of it is named."""
    modules = [*WITHOUT_TENSORS, *WITH_TOKENIZERS]
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    print(module, sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    expected = [f"{module} []" for module in WITHOUT_TENSORS]
    expected += [f"{module} ['transformers']" for module in WITH_TOKENIZERS]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr
