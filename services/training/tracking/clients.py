"""The trackers themselves: TensorBoard's files, a run of MLflow's, one of Weights & Biases. Each raises what its client raises.

Their clients are imported where they are used: those of MLflow and Weights & Biases are optional, and all of them are slow.
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
from services.stages.specs import TrainSpec
from services.storage import files

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

GIVES_UP_AFTER_S = 10.0
"""So long may a tracker keep the thread that tells all of them."""
CLOSES_WITHIN_S = 40.0
"""All of them together, when training ends: half of it for what waits, half for letting go."""
ROTATED_BYTES = 4_000_000
"""TensorBoard's files are begun anew at this size: to be seen in storage, a file is uploaded whole."""

Kind = Literal["training", "validation"]


class Tracker(Protocol):
    """One place where metrics are shown. Steps of each kind are told in growing order; those of validation come late."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a training step."""

    def validation(self, step: int, values: dict[str, float], picture: bytes | None) -> None:
        """What was measured of the model after ``step`` steps (0: the base), and its sheet of pictures as PNG."""

    def flush(self) -> None:
        """Bring everything to where it can be seen."""

    def close(self) -> None:
        """Flush and let go."""


class Mirror:
    """A local folder whose files are brought to storage as they grow."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._scratch = tempfile.TemporaryDirectory(prefix="dde-tracker-")
        self.folder = Path(self._scratch.name)
        self._sizes: dict[Path, int] = {}

    def upload(self, pattern: str) -> None:
        """The files of this pattern that have changed their size since they were uploaded."""
        for file in sorted(self.folder.glob(pattern)):
            if file.is_file() and (size := file.stat().st_size) != self._sizes.get(file):
                files.upload(file, files.join(self._target, *file.relative_to(self.folder).parts))
                self._sizes[file] = size

    def close(self) -> None:
        """Drop the local folder."""
        self._scratch.cleanup()


class TensorBoard:
    """Event files below {run}/tensorboard, as two runs: training and validation.

    Every process writes files of its own, which begin by hiding what earlier ones have said from the first step on that it is
    told: what they lack is not known, and all that follows comes again.
    """

    def __init__(self, spec: TrainSpec) -> None:
        self._mirror = Mirror(files.join(spec.run, "tensorboard"))
        self._writers: dict[Kind, SummaryWriter] = {}

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._scalars("training", step, values)

    def validation(self, step: int, values: dict[str, float], picture: bytes | None) -> None:
        self._scalars("validation", step, values)
        if picture:
            pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
            self._writer("validation", step).add_image("pictures", pixels, step, dataformats="HWC")

    def _scalars(self, kind: Kind, step: int, values: dict[str, float]) -> None:
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
            newest = max((self._mirror.folder / kind).iterdir())
            if newest.stat().st_size >= ROTATED_BYTES:
                writer.close()  # what is added next begins a file

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._mirror.upload("*/*")
        self._mirror.close()


class MLflow:
    """A run of MLflow's, found again by its tag. ``training_step`` and ``validation_step`` are the last it was told."""

    TAG = "dde.job"

    def __init__(self, settings: TrackerSettings, spec: TrainSpec) -> None:
        from mlflow import MlflowClient, environment_variables

        # The client's own patience is minutes, and it takes it from the environment alone.
        for variable, value in (("TIMEOUT", GIVES_UP_AFTER_S), ("MAX_RETRIES", 0)):
            getattr(environment_variables, f"MLFLOW_HTTP_REQUEST_{variable}").set(int(value))
        self._steps = spec.training.steps
        self._client = MlflowClient(tracking_uri=settings.mlflow_tracking_uri)
        self._run = self._find(settings.mlflow_experiment_name, spec)
        self._last: dict[Kind, int] = {
            "training": self._last_step("training"),
            "validation": self._last_step("validation"),
        }
        self._tried_ms: dict[tuple[Kind, int], int] = {}

    def _find(self, experiment_name: str, spec: TrainSpec) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(experiment_name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
        found = self._client.search_runs(
            [place], f"tags.`{self.TAG}` = '{spec.job}'", order_by=["start_time ASC"]
        )
        run = (
            found[0]
            if found
            else self._client.create_run(place, tags={self.TAG: spec.job}, run_name=spec.name)
        )
        if not run.data.params:
            params = [Param(name, str(value)) for name, value in settings_of(spec).items()]
            self._client.log_batch(run.info.run_id, params=params, synchronous=True)
        self._client.update_run(run.info.run_id, status="RUNNING")
        return run.info.run_id

    def _last_step(self, kind: Kind) -> int:
        return max(
            (each.step for each in self._client.get_metric_history(self._run, f"{kind}_step")), default=-1
        )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._tell("training", step, values)

    def validation(self, step: int, values: dict[str, float], picture: bytes | None) -> None:
        if picture and step > self._last["validation"]:
            image = Image.open(io.BytesIO(picture))
            self._client.log_image(self._run, image, key="validation", step=step, synchronous=True)
        self._tell("validation", step, values)

    def _tell(self, kind: Kind, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self._last[kind]:
            # An answer may be lost: MLflow keeps what comes again at the same time but once.
            at_ms = self._tried_ms.setdefault((kind, step), int(time.time() * 1000))
            told = {f"{kind}/{name}": value for name, value in values.items()} | {f"{kind}_step": step}
            metrics = [Metric(name, value, at_ms, step) for name, value in told.items()]
            self._client.log_batch(self._run, metrics, synchronous=True)
            self._tried_ms.clear()
            self._last[kind] = step

    def flush(self) -> None:
        """Every step was a request."""

    def close(self) -> None:
        done = self._last["training"] == self._steps
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")


class WandB:
    """A run of Weights & Biases with the job's id. What is written offline lies below {run}/wandb, for `wandb sync`."""

    def __init__(self, settings: TrackerSettings, spec: TrainSpec) -> None:
        import wandb

        self._steps, self._mirror = spec.training.steps, Mirror(files.join(spec.run, "wandb"))
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
        told = self._run.summary  # of the attempts before
        self._last: dict[Kind, int] = {
            "training": told.get("training_step", -1),
            "validation": told.get("validation_step", -1),
        }
        for kind in self._last:
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}_step")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._tell("training", step, values)

    def validation(self, step: int, values: dict[str, float], picture: bytes | None) -> None:
        import wandb

        shown = {"pictures": wandb.Image(Image.open(io.BytesIO(picture)))} if picture else {}
        self._tell("validation", step, values | shown)

    def _tell(self, kind: Kind, step: int, values: dict[str, Any]) -> None:
        if step > self._last[kind]:
            self._run.log(
                {f"{kind}_step": step, **{f"{kind}/{name}": value for name, value in values.items()}}
            )
            self._last[kind] = step

    def flush(self) -> None:
        for pattern in ("*.wandb", "files/**/*"):
            self._mirror.upload(f"wandb/offline-run-*/{pattern}")

    def close(self) -> None:
        import wandb

        self._run.finish(exit_code=0 if self._last["training"] == self._steps else 1)
        wandb.teardown()  # offline, `finish` returns before all of it is on the disk
        self.flush()
        self._mirror.close()


def settings_of(spec: TrainSpec) -> dict[str, Any]:
    """What the run was told, flat: ``objective.beta``, ``training.steps``, ..."""
    parts = spec.model_dump(mode="json", include={"objective", "training"})
    return {f"{part}.{name}": value for part, fields in parts.items() for name, value in fields.items()}
