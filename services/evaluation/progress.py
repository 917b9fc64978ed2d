"""Progress of drawing and scoring, as metrics and events."""

from __future__ import annotations

from collections.abc import Sequence

from services.evaluation.chunks import Chunk, Scored, base_first
from services.stages.journal import Journal
from services.stages.pace import Pace
from services.stages.specs import EvaluateSpec


class Progress:
    """Counts images of all models. ``drawn`` are those that this run drew."""

    def __init__(self, spec: EvaluateSpec, chunks: Sequence[Chunk], journal: Journal) -> None:
        self._journal = journal
        self._total = sum(len(chunk.prompts) for chunk in chunks)
        self._done = 0
        self._seconds = {"draw": 0.0, "score": 0.0, "total": 0.0}
        self._pace = Pace()
        self.drawn = 0
        config = spec.evaluation
        names = ", ".join(model.name for model in base_first(spec))
        images = (
            f"{config.images_per_prompt} images each" if config.images_per_prompt > 1 else "an image each"
        )
        journal.event(f"{config.num_prompts} prompts, {images}, from {names}: {self._total} images")

    def add(self, scored: Scored) -> None:
        """Count a chunk and log its warnings."""
        self._done += len(scored.chunk.prompts)
        self.drawn += scored.drawn
        for name, seconds in scored.seconds.items():
            self._seconds[name] += seconds
        for warning in scored.warnings:
            self._journal.event(warning, "warning")
        if self._pace.metrics.has_elapsed():
            self._report()
        if self._pace.event.has_elapsed():
            rate, eta_s = self._pace.measure(self._done, self._total)
            self._journal.event(
                f"{self._done} of {self._total} images scored ({self.drawn} drawn), {rate:.1f} images/s, "
                f"{eta_s:.0f} s left"
            )
            self._pace.event.restart()

    def end(self) -> None:
        """Report that every image is scored."""
        self._report()
        self._journal.event(
            f"{self._done} images scored: {self.drawn} drawn, {self._done - self.drawn} reused"
        )

    def _report(self) -> None:
        rate, eta_s = self._pace.measure(self._done, self._total)
        values = {"pictures": self._done, "pictures_total": self._total, "pictures_drawn": self.drawn}
        metrics = {name: float(value) for name, value in values.items()}
        metrics |= {"pictures_per_s": rate, "eta_s": eta_s}
        metrics |= {f"{name}_s": seconds for name, seconds in self._seconds.items()}
        self._journal.metrics(self._done, metrics)
        self._pace.metrics.restart()
