"""Who may import whom. Held by walking the source, and once by importing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SERVICES = {path.name for path in (ROOT / "services").iterdir() if (path / "__init__.py").exists()}
NOT_FOR_CORE = {"ray", "fastapi", "sqlalchemy", "boto3", "httpx", "services"}
HEAVY = {"torch", "diffusers", "transformers", "safetensors"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def test_there_are_six_services():
    assert SERVICES == {"ingest", "training", "evaluation", "serving", "control", "client"}


@pytest.mark.parametrize("path", sources("dde_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_neither_ray_nor_http_nor_clouds(path: Path):
    assert not {name for name in imports(path) if name.split(".")[0] in NOT_FOR_CORE}


@pytest.mark.parametrize("path", sources("services"), ids=lambda path: str(path.relative_to(ROOT)))
def test_services_never_import_one_another(path: Path):
    own = path.relative_to(ROOT / "services").parts[0]
    others = SERVICES - {own}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("services.")}
    assert not used & others


@pytest.mark.parametrize(
    "module",
    [
        "services.control.app",
        "services.client.cli",
        "services.api.requests",
        "services.stages.specs",
        "dde_core.config",
    ],
)
def test_what_people_and_the_control_plane_run_loads_no_torch(module: str):
    code = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
