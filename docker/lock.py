"""Write docker/locks/: every package of the images with its version and the SHA-256 of its wheels.

    python docker/lock.py [--torch-wheels PAGE_OR_FOLDER]

The versions are those of constraints.txt; run it again whenever that file or a list in pyproject.toml
changes. It needs `uv`. The locks hold the wheels of x86-64 Linux and Python 3.11, without source archives, so
that a build of an image compiles and resolves nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "docker" / "locks"
EXTRAS = {"control": ["control"], "ray": ["ray", "8bit", "wandb", "mlflow"]}
SBOM_TOOL = "cyclonedx-bom"
TORCH_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"
"""PyTorch's page of builds for CPUs. PyPI's build of torch is for CUDA."""

Pins = dict[str, str]
"""A package's name -> its line of a lock."""


def resolve(sources: list[str], options: list[str]) -> Pins:
    """What uv selects for requirements files and options.

    Raises SystemExit with uv's message if there is no solution, or a package without a wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "pylock.toml"
        command = ["uv", "pip", "compile", "--quiet", *sources, *options, "--constraints", "constraints.txt",
                   "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--no-build",
                   "--format", "pylock.toml", "--output-file", str(found)]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode != 0:
            raise SystemExit(f"uv resolves no lock for {' '.join([*sources, *options])}:\n{ended.stderr}")
        packages = tomllib.loads(found.read_text())["packages"]
    return {package["name"]: _line(package) for package in packages}


def _line(package: dict) -> str:
    hashes = sorted({wheel["hashes"]["sha256"] for wheel in package["wheels"]})
    parts = [f"{package['name']}=={package['version']}", *(f"--hash=sha256:{each}" for each in hashes)]
    return " \\\n    ".join(parts)


def write(name: str, pins: Pins) -> None:
    lines = [f"# Written by docker/lock.py: {len(pins)} packages.", *(pins[each] for each in sorted(pins))]
    (LOCKS / f"{name}.txt").write_text("\n".join(lines) + "\n")
    print(f"docker/locks/{name}.txt: {len(pins)} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-wheels", default=TORCH_WHEELS, help="where torch's builds for CPUs are")
    on_cpus = ["--find-links", parser.parse_args().torch_wheels]

    images = {}
    for image, extras in EXTRAS.items():
        options = [word for extra in extras for word in ("--extra", extra)]
        images[image] = resolve(["pyproject.toml"], [*options, *on_cpus])
    on_gpus = resolve(["pyproject.toml"], ["--extra", "core"])
    torch_alone = {"torch": images["ray"]["torch"]}
    shared = {*images["ray"], *images["control"]} - {"torch"}

    LOCKS.mkdir(exist_ok=True)
    write("torch-cpu", torch_alone)
    write("torch-cuda", {name: line for name, line in on_gpus.items() if name not in shared})
    for image, pins in images.items():
        write(image, {name: line for name, line in pins.items() if name != "torch"})
    with tempfile.NamedTemporaryFile("w", suffix=".in") as requirement:
        requirement.write(f"{SBOM_TOOL}\n")
        requirement.flush()
        write("sbom", resolve([requirement.name], []))


if __name__ == "__main__":
    main()
