"""Print the CycloneDX document of the image in which this runs: its Python and its Debian packages.

    python sbom.py NAME VERSION > sbom.cdx.json

``cyclonedx-py`` finds the Python packages; it is in a folder of its own, named by TOOLS, so that it does not
list itself. The Debian packages are those of dpkg's database.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import quote

TOOLS = Path("/opt/sbom")
FIELDS = "${binary:Package}\t${Version}\t${Architecture}\n"


def python_packages() -> dict:
    """The document of the packages of this interpreter, without those in TOOLS."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "python.json"
        run = (
            f"import runpy, sys; sys.path.append({str(TOOLS)!r});"
            " runpy.run_module('cyclonedx_py', run_name='__main__', alter_sys=True)"
        )
        command = [sys.executable, "-c", run, "environment", "--no-validate", "--output-reproducible",
                   "--output-format", "JSON", "--output-file", str(found), sys.executable]  # fmt: skip
        subprocess.run(command, check=True)
        return json.loads(found.read_text())


def debian_packages() -> list[dict]:
    release = platform.freedesktop_os_release()
    listed = subprocess.run(["dpkg-query", "-W", "-f", FIELDS], check=True, capture_output=True, text=True)
    components = []
    for line in listed.stdout.splitlines():
        name, version, architecture = line.split("\t")
        name = name.partition(":")[0]
        distro = f"{release['ID']}-{release['VERSION_ID']}"
        purl = f"pkg:deb/debian/{name}@{quote(version, safe='')}?arch={architecture}&distro={distro}"
        components.append(
            {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        )
    return components


def main(name: str, version: str) -> None:
    document = python_packages()
    document["components"] += debian_packages()
    document["metadata"]["component"] = {
        "type": "container",
        "name": name,
        "version": version,
        "bom-ref": name,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
