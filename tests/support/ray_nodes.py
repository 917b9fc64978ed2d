"""A Ray cluster of two raylets on this machine. The second one can be killed, drained and started again."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from services.client.processes import Child, StartFailed, environment, executables, free_ports, wait_until
from services.client.ray_head import RayHead, ray_environment

OBJECT_STORE_BYTES = 100_000_000


class Nodes:
    """A head and a second node with ``num_cpus`` CPUs each. ``env`` is the drivers' environment.

    Between ``add`` and ``lose`` a second node that has ended is started again, as an operator does with a
    pod: on a busy machine a raylet may give up while it starts.
    """

    def __init__(self, head: RayHead, logs: Path, mark: str, num_cpus: int) -> None:
        self.head = head
        self._num_cpus = num_cpus
        self._logs = logs
        self._mark = mark
        self.address = f"127.0.0.1:{head.ports.gcs}"
        self.env = environment(mark, {"RAY_ADDRESS": self.address, "RAY_TRAIN_V2_ENABLED": "1", **head.auth})
        self.node: Child | None = None
        self._started = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                if self.node and ended(self.node):
                    self._start()

    def _start(self) -> None:
        self._started += 1
        command = [
            *(
                str(executables() / "ray"),
                "start",
                "--block",
                "--disable-usage-stats",
                f"--address={self.address}",
            ),
            *(f"--num-cpus={self._num_cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        ]
        env = environment(self._mark, {**ray_environment(self.head.ports), **self.head.auth})
        self.node = Child("node", command, self._logs / f"node-{self._started}.log", env)

    def add(self) -> None:
        """Start the second node. It joins the cluster a few seconds later."""
        with self._lock:
            assert self.node is None
            self._start()

    def lose(self) -> None:
        """Kill the second node and all its processes."""
        with self._lock:
            assert self.node
            family = [
                *_children(self.node.pid),
                *([] if ended(self.node) else [psutil.Process(self.node.pid)]),
            ]
            for process in family:
                with suppress(psutil.Error):
                    process.kill()
            self.node.stop(0.0)
            self.node = None

    def drain(self) -> None:
        """Announce to Ray that the second node is preempted, as a pod's preStop hook does."""
        raylet = self.raylet()
        assert raylet
        node = next(argument for argument in raylet.cmdline() if argument.startswith("--node_id="))
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=preempted"]
        command = [
            str(executables() / "ray"),
            "drain-node",
            f"--address={self.address}",
            node.replace("_", "-"),
            *reason,
        ]
        subprocess.run(command, env=self.env, check=True, capture_output=True)

    def close(self) -> None:
        """Stop the restarts, then kill the second node."""
        self._closed.set()
        self._keeper.join()
        if self.node:
            self.lose()

    def raylet(self) -> psutil.Process | None:
        """The second node's raylet, if it runs."""
        with self._lock:
            children = _children(self.node.pid) if self.node else []
        return next((child for child in children if child.name() == "raylet"), None)

    def workers(self) -> list[psutil.Process]:
        """Training workers on both nodes."""
        roots = [self.head.child.pid, *([self.node.pid] if self.node else [])]
        return [child for root in roots for child in _children(root) if _is_worker(child)]


def ended(child: Child) -> bool:
    """Whether the process has ended."""
    try:
        child.check()
    except StartFailed:
        return True
    return False


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def two_nodes(folder: Path, num_cpus: int = 1) -> Iterator[Nodes]:
    """A head and a second node that has been started. Both are stopped after the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with RayHead(folder, str(folder), num_cpus=num_cpus) as head:
        wait_until(head.is_ready, "Ray's dashboard does not answer", [head.child], 120)
        nodes = Nodes(head, folder, str(folder), num_cpus)
        nodes.add()
        try:
            yield nodes
        finally:
            nodes.close()
