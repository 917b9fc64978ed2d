"""One client for each tracker: TensorBoard's event files, a run in MLflow, a run in Weights & Biases.

Each raises what its library raises. The libraries are imported on use: MLflow's and Weights & Biases' are
optional, and all of them are slow to import.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL import Image

from services.settings import TrackerSettings
from services.stages import layout
from services.stages.specs import TrainSpec
from services.storage import files

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

GIVES_UP_AFTER_S = 10.0
"""How long one tracker may occupy the thread that serves all of them."""
CLOSES_WITHIN_S = 40.0
"""All trackers together, when training ends: half to deliver what is waiting, half to close."""
ROTATED_BYTES = 4_000_000
"""A TensorBoard file is closed at this size and a new one started: every upload sends the whole file."""

Kind = Literal["training", "validation"]


class Tracker(Protocol):
    """Shows the metrics of one run. Steps of each kind arrive in ascending order, validation's later."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a training step."""

    def log_validation(self, step: int, values: dict[str, float], image: bytes | None) -> None:
        """Log what validation measured after ``step`` steps (0: the base), and its image grid as PNG."""

    def flush(self) -> None:
        """Make everything visible."""

    def close(self) -> None:
        """Flush, and release all resources."""


class Mirror:
    """A local folder whose files are uploaded to storage as they grow."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._scratch = tempfile.TemporaryDirectory(prefix="dde-tracker-")
        self.folder = Path(self._scratch.name)
        self._sizes: dict[Path, int] = {}

    def upload(self, pattern: str) -> None:
        """Upload the files that match and whose size has changed since their last upload."""
        for file in sorted(self.folder.glob(pattern)):
            if file.is_file() and (size := file.stat().st_size) != self._sizes.get(file):
                files.upload(file, files.join(self._target, *file.relative_to(self.folder).parts))
                self._sizes[file] = size

    def close(self) -> None:
        """Delete the local folder."""
        self._scratch.cleanup()


class TensorBoard:
    """Event files below {run}/tensorboard, as two runs: training and validation.

    Every process writes new files. They start by hiding what older files hold from their own first step on:
    nobody knows how complete those are, and every later step is logged again.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self._mirror = Mirror(layout.tensorboard_folder(spec.run))
        self._writers: dict[Kind, SummaryWriter] = {}

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self._add_scalars("training", step, values)

    def log_validation(self, step: int, values: dict[str, float], image: bytes | None) -> None:
        self._add_scalars("validation", step, values)
        if image:
            pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
            self._writer("validation", step).add_image("pictures", pixels, step, dataformats="HWC")

    def _add_scalars(self, kind: Kind, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer(kind, step).add_scalar(name, value, step)

    def _writer(self, kind: Kind, step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        if kind not in self._writers:
            self._writers[kind] = SummaryWriter(str(self._mirror.folder / kind), purge_step=step)
        return self._writers[kind]

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()
        self._mirror.upload("*/*")
        for kind, writer in self._writers.items():
            newest_file = max((self._mirror.folder / kind).iterdir())
            if newest_file.stat().st_size >= ROTATED_BYTES:
                writer.close()  # the next value starts a new file

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._mirror.upload("*/*")
        self._mirror.close()


class MLflow:
    """A run in MLflow, found by its tag. Its metric ``training_step`` is the last step that was logged."""

    TAG = "dde.job"

    def __init__(self, settings: TrackerSettings, spec: TrainSpec) -> None:
        from mlflow import MlflowClient, environment_variables

        # The client retries for minutes by default. It reads these settings from the environment alone.
        variables: Any = environment_variables
        variables.MLFLOW_HTTP_REQUEST_TIMEOUT.set(int(GIVES_UP_AFTER_S))
        variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(0)
        self._steps = spec.training.steps
        self._client = MlflowClient(tracking_uri=settings.mlflow_tracking_uri)
        self._run = self._find(settings.mlflow_experiment_name, spec)
        self._last: dict[Kind, int] = {
            "training": self._last_step("training"),
            "validation": self._last_step("validation"),
        }
        self._sent_ms: dict[tuple[Kind, int], int] = {}

    def _find(self, experiment_name: str, spec: TrainSpec) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(experiment_name)
        if experiment:
            experiment_id = experiment.experiment_id
        else:
            experiment_id = self._client.create_experiment(experiment_name)
        job = f"tags.`{self.TAG}` = '{spec.job}'"
        runs = self._client.search_runs([experiment_id], job, order_by=["start_time ASC"])
        if runs:
            run = runs[0]
        else:
            tags = {self.TAG: spec.job}
            run = self._client.create_run(experiment_id, tags=tags, run_name=spec.name)
        if not run.data.params:
            params = [Param(name, str(value)) for name, value in settings_of(spec).items()]
            self._client.log_batch(run.info.run_id, params=params, synchronous=True)
        self._client.update_run(run.info.run_id, status="RUNNING")
        run_id: str = run.info.run_id
        return run_id

    def _last_step(self, kind: Kind) -> int:
        history = self._client.get_metric_history(self._run, f"{kind}_step")
        return max((metric.step for metric in history), default=-1)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self._log("training", step, values)

    def log_validation(self, step: int, values: dict[str, float], image: bytes | None) -> None:
        if image and step > self._last["validation"]:
            grid = Image.open(io.BytesIO(image))
            self._client.log_image(self._run, grid, key="validation", step=step, synchronous=True)
        self._log("validation", step, values)

    def _log(self, kind: Kind, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self._last[kind]:
            # A response may be lost. MLflow stores a metric only once if it is sent again with its timestamp.
            at_ms = self._sent_ms.setdefault((kind, step), int(time.time() * 1000))
            named = {f"{kind}/{name}": value for name, value in values.items()} | {f"{kind}_step": step}
            metrics = [Metric(name, value, at_ms, step) for name, value in named.items()]
            self._client.log_batch(self._run, metrics, synchronous=True)
            self._sent_ms.clear()
            self._last[kind] = step

    def flush(self) -> None:
        """Nothing to do: every step was a request of its own."""

    def close(self) -> None:
        is_complete = self._last["training"] == self._steps
        self._client.set_terminated(self._run, "FINISHED" if is_complete else "KILLED")


class WandB:
    """A run in Weights & Biases with the job's id. Offline files go to {run}/wandb, for `wandb sync`."""

    def __init__(self, settings: TrackerSettings, spec: TrainSpec) -> None:
        import wandb

        self._steps = spec.training.steps
        self._mirror = Mirror(layout.wandb_folder(spec.run))
        self._run = wandb.init(
            project=settings.wandb_project,
            id=spec.job,
            name=spec.name,
            resume="allow",
            config=settings_of(spec),
            dir=str(self._mirror.folder),
            settings=wandb.Settings(
                init_timeout=GIVES_UP_AFTER_S,
                finish_timeout=CLOSES_WITHIN_S / 2,
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
            ),
        )
        summary: Any = self._run.summary  # of earlier attempts
        self._last: dict[Kind, int] = {
            "training": summary.get("training_step", -1),
            "validation": summary.get("validation_step", -1),
        }
        for kind in self._last:
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}_step")

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self._log("training", step, values)

    def log_validation(self, step: int, values: dict[str, float], image: bytes | None) -> None:
        import wandb

        images = {"pictures": wandb.Image(Image.open(io.BytesIO(image)))} if image else {}
        self._log("validation", step, values | images)

    def _log(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        if step > self._last[kind]:
            named = {f"{kind}/{name}": value for name, value in values.items()}
            self._run.log({f"{kind}_step": step, **named})
            self._last[kind] = step

    def flush(self) -> None:
        for pattern in ("*.wandb", "files/**/*"):
            self._mirror.upload(f"wandb/offline-run-*/{pattern}")

    def close(self) -> None:
        import wandb

        self._run.finish(exit_code=0 if self._last["training"] == self._steps else 1)
        wandb.teardown()  # offline, `finish` returns before everything is on the disk
        self.flush()
        self._mirror.close()


def settings_of(spec: TrainSpec) -> dict[str, Any]:
    """The run's settings, flat: ``objective.beta``, ``training.steps``, ..."""
    parts = spec.model_dump(mode="json", include={"objective", "training"})
    return {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}
