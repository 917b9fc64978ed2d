"""A Ray cluster of several raylets on this machine, any of which but the head's may be lost and come again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from services.client.processes import Child, environment, executables, free_ports, wait_until
from services.client.ray_head import RayHead, ray_environment

OBJECT_STORE_BYTES = 100_000_000


class Nodes:
    """``head`` has one CPU; every further node has one. ``env`` is what drivers see."""

    def __init__(self, head: RayHead, logs: Path, mark: str) -> None:
        self.head, self._logs, self._mark = head, logs, mark
        self.address = f"127.0.0.1:{head.ports.gcs}"
        self.env = environment(mark, {"RAY_ADDRESS": self.address, "RAY_TRAIN_V2_ENABLED": "1", **head.auth})
        self._started = 0
        self.node: Child | None = None

    def add(self) -> None:
        """Start the second node. It is there a few seconds later."""
        assert self.node is None
        self._started += 1
        command = [
            *(str(executables() / "ray"), "start", "--block", "--disable-usage-stats", f"--address={self.address}"),
            *("--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        ]
        env = environment(self._mark, {**ray_environment(self.head.ports), **self.head.auth})
        self.node = Child("node", command, self._logs / f"node-{self._started}.log", env)

    def lose(self) -> None:
        """The second node is gone at once, with all that runs there."""
        assert self.node
        family = [psutil.Process(self.node.pid), *psutil.Process(self.node.pid).children(recursive=True)]
        for process in family:
            process.kill()
        self.node.stop(0.0)
        self.node = None

    def raylet(self) -> psutil.Process:
        """The second node's."""
        assert self.node
        return next(p for p in psutil.Process(self.node.pid).children(recursive=True) if p.name() == "raylet")

    def workers(self) -> list[psutil.Process]:
        """Training workers on both nodes."""
        roots = [self.head.child.pid, *([self.node.pid] if self.node else [])]
        children = [child for root in roots for child in psutil.Process(root).children(recursive=True)]
        return [child for child in children if _is_worker(child)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def two_nodes(folder: Path) -> Iterator[Nodes]:
    """Both are there when the block begins."""
    folder.mkdir(parents=True, exist_ok=True)
    with RayHead(folder, str(folder), num_cpus=1) as head:
        wait_until(head.answers, "Ray's dashboard does not answer", [head.child], 120)
        nodes = Nodes(head, folder, str(folder))
        nodes.add()
        try:
            yield nodes
        finally:
            if nodes.node:
                nodes.lose()
