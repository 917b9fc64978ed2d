"""What a replica counts for Prometheus. ``Metrics`` knows no Ray, so the engine's callbacks can take any."""

from __future__ import annotations

from typing import Protocol

from dde_core.engine.contract import Turn

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]
RATIOS = [0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]


class Metrics(Protocol):
    """Counts what happens in a replica. Called from any thread."""

    def waited(self, seconds: float) -> None:
        """A request waited so long from its arrival to its first U-Net call."""

    def turn(self, turn: Turn) -> None:
        """The engine made a U-Net call."""

    def drawn(self, images: int) -> None:
        """So many images were finished."""

    def loaded(self, seconds: float) -> None:
        """A model was loaded."""

    def evicted(self) -> None:
        """A model left memory to make room."""

    def holds(self, size_bytes: int) -> None:
        """The models in memory have so many bytes now."""

    def refused(self, code: str) -> None:
        """A request was refused with this error code."""

    def cancelled(self, reason: str) -> None:
        """An accepted request ended early: its caller ``disconnected``, or its ``deadline`` passed."""


class Unmeasured:
    """``Metrics`` that counts nothing."""

    def waited(self, seconds: float) -> None: ...

    def turn(self, turn: Turn) -> None: ...

    def drawn(self, images: int) -> None: ...

    def loaded(self, seconds: float) -> None: ...

    def evicted(self) -> None: ...

    def holds(self, size_bytes: int) -> None: ...

    def refused(self, code: str) -> None: ...

    def cancelled(self, reason: str) -> None: ...


class RayMetrics:
    """``Metrics`` that Ray exports on each node's metrics port, with ``ray_`` before each name.

    Create it in the replica: there, Serve labels each with application, deployment and replica.
    """

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram  # only replicas load Ray Serve

        self._waited = Histogram(
            "dde_serve_queue_seconds", "From a request's arrival to its first U-Net call.", SECONDS
        )
        self._step = Histogram("dde_serve_step_seconds", "One U-Net call with its sampler steps.", SECONDS)
        self._fill = Histogram(
            "dde_serve_batch_fill_ratio", "Rows of a U-Net call over the most that it can have.", RATIOS
        )
        self._images = Counter("dde_serve_images_total", "Images drawn.")
        self._load = Histogram("dde_serve_model_load_seconds", "Loading a model into memory.", SECONDS)
        self._evictions = Counter("dde_serve_model_evictions_total", "Models that left memory to make room.")
        self._bytes = Gauge("dde_serve_model_bytes", "Bytes of the models in memory.")
        self._refused = Counter("dde_serve_refused_total", "Requests refused, by error code.", ("code",))
        self._cancelled = Counter(
            "dde_serve_cancelled_total", "Accepted requests that ended early, by reason.", ("reason",)
        )

    def waited(self, seconds: float) -> None:
        self._waited.observe(seconds)

    def turn(self, turn: Turn) -> None:
        self._step.observe(turn.seconds)
        self._fill.observe(turn.rows / turn.max_rows)

    def drawn(self, images: int) -> None:
        self._images.inc(images)

    def loaded(self, seconds: float) -> None:
        self._load.observe(seconds)

    def evicted(self) -> None:
        self._evictions.inc()

    def holds(self, size_bytes: int) -> None:
        self._bytes.set(size_bytes)

    def refused(self, code: str) -> None:
        self._refused.inc(tags={"code": code})

    def cancelled(self, reason: str) -> None:
        self._cancelled.inc(tags={"reason": reason})
