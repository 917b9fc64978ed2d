"""The two images, built by buildah without a registry and run as a container runtime would run them.

The stand-in for the base image is a Debian bookworm with its Python 3.11, made by debootstrap. It is kept in
build/images. A container here is a process in mount and process namespaces of its own: the image's files
read-only, /tmp and /dev/shm in memory, the image's user without capabilities and without a way to new ones,
its variables and its folder. It shares the machine's network.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from services.client.processes import Child

ROOT = Path(__file__).parents[2]
BASE = "localhost/dde-base:bookworm"
BASE_ARCHIVE = ROOT / "build" / "images" / "bookworm.tar"
BASE_PACKAGES = "python3.11,python3-pip,ca-certificates,netbase,tzdata"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu/torch/"
NEEDED = ("buildah", "debootstrap", "unshare")
PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private")
"""What runs a command whose mounts nobody else sees and which end with it."""
FILES = ("/etc/hosts", "/etc/resolv.conf")
"""What a container runtime takes from the machine."""


def missing() -> list[str]:
    """What this machine lacks to build and run images; empty where it lacks nothing."""
    return [
        *(() if os.getuid() == 0 else ("root",)),
        *(name for name in NEEDED if shutil.which(name) is None),
    ]


@dataclass(frozen=True)
class Image:
    """A built image: its files, its configuration (OCI), how long its build took."""

    name: str
    root: Path
    config: dict[str, Any]
    seconds: float

    @property
    def environment(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.config["Env"])

    @property
    def num_bytes(self) -> int:
        """The bytes of all files, each hard link once."""
        listed = subprocess.run(["du", "-s", "-B1", self.root], check=True, capture_output=True, text=True)
        return int(listed.stdout.split()[0])

    def read(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def command(
        self,
        argv: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        mounts: Mapping[Path, str] | None = None,
    ) -> list[str]:
        """The command that runs ``argv`` (by default the image's) in a container.

        ``mounts`` are writable: a folder of this machine -> its place in the container, made if missing.
        When the command is killed, everything in the container ends, and its mounts are gone.
        """
        root = shlex.quote(str(self.root))
        folders = {
            shlex.quote(str(folder.resolve())): shlex.quote(place) for folder, place in (mounts or {}).items()
        }
        user, group = self.config["User"].split(":")
        variables = [f"{name}={value}" for name, value in (self.environment | dict(env or {})).items()]
        steps = [
            f"mount --bind {root} {root}",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp",
            *(f"touch {root}{file}" for file in FILES),
            *(f"chroot {root} mkdir -p {place}" for place in folders.values()),
            f"mount -o remount,bind,ro {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm",
            *(f"mount --bind {file} {root}{file}" for file in FILES),
            *(
                f'mount --bind {folder} {root}"$(chroot {root} realpath {place})"'
                for folder, place in folders.items()
            ),
            f"exec env -i /usr/sbin/chroot --userspec={user}:{group} --groups= {root}"
            f" /usr/bin/setpriv --no-new-privs /usr/bin/env -C {shlex.quote(self.config['WorkingDir'])} "
            + shlex.join([*variables, *(argv or self.config["Cmd"])]),
        ]
        return [*PRIVATE_MOUNTS, "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(steps)]

    def run(self, argv: Sequence[str], timeout_s: float = 300.0, **given: Any) -> str:
        """The output of a command in a container. Raises AssertionError with it if the command fails."""
        ended = subprocess.run(
            self.command(argv, **given), capture_output=True, text=True, timeout=timeout_s, cwd="/"
        )
        assert ended.returncode == 0, f"{shlex.join(argv)}: {ended.returncode}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def start(self, name: str, log: Path, argv: Sequence[str] | None = None, **given: Any) -> Child:
        """A container that goes on running; its output goes to ``log``."""
        return Child(name, self.command(argv, **given), log, dict(os.environ))


class ImageStore:
    """Images below ``folder``, and nowhere else on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buildah("from", "--name", "base", "scratch")
        if not BASE_ARCHIVE.exists():
            make_base(BASE_ARCHIVE)
        self._buildah("add", "--quiet", "base", str(BASE_ARCHIVE), "/")
        self._buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin", "base")
        self._buildah("commit", "--quiet", "--rm", "base", BASE)

    def build(self, name: str, **arguments: str) -> Image:
        """Build docker/{name}.Dockerfile with these build arguments, on the stand-in base."""
        wheels = os.environ.get("PIP_FIND_LINKS", CPU_WHEELS)
        given = {"BASE": BASE, "TORCH": "cpu", "TORCH_WHEELS": wheels, **arguments}
        if "PIP_INDEX_URL" in os.environ:
            given["PIP_INDEX_URL"] = os.environ["PIP_INDEX_URL"]
        options = [word for item in given.items() for word in ("--build-arg", "=".join(item))]
        if Path(wheels).is_dir():
            options += ["--volume", f"{wheels}:{wheels}:ro"]
        if bundle := os.environ.get("SSL_CERT_FILE", ssl.get_default_verify_paths().cafile):
            options += ["--secret", f"id=ca,src={bundle}"]
        began = time.monotonic()
        dockerfile = ROOT / "docker" / f"{name}.Dockerfile"
        self._buildah("bud", "--isolation", "chroot", "--network", "host", "--pull-never", *options,
                      "--file", str(dockerfile), "--tag", name, str(ROOT))  # fmt: skip
        seconds = time.monotonic() - began
        described = json.loads(self._buildah("inspect", "--type", "image", name))
        return Image(name, self._files(described["FromImageID"]), described["OCIv1"]["config"], seconds)

    def _files(self, image: str) -> Path:
        """The folder with the files of an image: that of its last layer, for the vfs driver copies layers."""
        images = json.loads((self._folder / "store" / "vfs-images" / "images.json").read_text())
        (layer,) = [each["layer"] for each in images if each["id"] == image]
        return self._folder / "store" / "vfs" / "dir" / layer

    def _buildah(self, *words: str) -> str:
        command = ["buildah", "--storage-driver", "vfs", "--root", str(self._folder / "store"),
                   "--runroot", str(self._folder / "run")]  # fmt: skip
        temporary = self._folder / "tmp"
        temporary.mkdir(exist_ok=True)
        return output_of([*command, *words], {"TMPDIR": str(temporary)})


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent``, removed at the end.

    An image has links to /proc and /sys. TemporaryDirectory of Python 3.11.7 and older may follow them and
    change the rights of this machine's files (CVE-2023-6597).
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def output_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """A command's standard output. Raises AssertionError with the end of what it wrote if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})})
    assert ended.returncode == 0, f"{shlex.join(command)}:\n{ended.stdout[-4000:]}{ended.stderr[-4000:]}"
    return ended.stdout


def make_base(archive: Path) -> None:
    """Write the files of the stand-in base to a tar archive: about 200 MB, in a few minutes.

    If it fails, nothing is left behind.
    """
    with working_folder(archive.parent) as working:
        folder = working / "root"
        include = f"--include={BASE_PACKAGES}"
        output_of([*PRIVATE_MOUNTS, "debootstrap", "--variant=minbase", include, "bookworm", str(folder)])
        (folder / "usr/bin/python").symlink_to("python3.11")
        (folder / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
        for package in (folder / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        shutil.rmtree(folder / "var/lib/apt/lists")
        unfinished = working / archive.name
        output_of(["tar", "-C", str(folder), "-cf", str(unfinished), "."])
        unfinished.rename(archive)
