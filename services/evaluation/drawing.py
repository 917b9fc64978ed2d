"""Draw and score chunks in a pool of Ray actors, or find them in storage.

Only actors load torch: the driver starts without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data

from dde_core.errors import DataError, NonFiniteError
from dde_core.scorers.kinds import Scorer
from services.api.records import ModelRecord, ScorerRecord
from services.api.requests import ImageFolder
from services.artifacts import image_cache, models, scorers
from services.artifacts.external_images import read_images as read_external
from services.artifacts.image_cache import Damaged
from services.evaluation.chunks import Chunk, Scored, base_first, key_of_external, key_of_scorer
from services.stages import layout
from services.stages.specs import EvaluateSpec
from services.storage import sources

if TYPE_CHECKING:
    from dde_core.generation import TextToImage

MAX_BLOCKS = 4096
"""Of Ray Data; beyond, a block has several chunks."""


def score_chunks(spec: EvaluateSpec, chunks: Sequence[Chunk]) -> Iterator[Scored]:
    """Yield every chunk in any order, its images and scores stored.

    Raises NonFiniteError, naming the model, if one gives infinite or NaN values, and DataError for images
    that a scorer cannot score.
    """
    items = [{"chunk": chunk} for chunk in chunks]
    scored = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map(
        ChunkScorer,
        fn_constructor_args=(spec,),
        compute=ray.data.ActorPoolStrategy(size=min(spec.actors, len(items))),
        num_cpus=1,
        num_gpus=1 if spec.use_gpu else 0,
    )
    for row in scored.iter_rows():
        yield row["scored"]


class ChunkScorer:
    """One actor. It holds one model at a time, loaded when the first of its chunks has to be drawn."""

    def __init__(self, spec: EvaluateSpec) -> None:
        from dde_core.models.policy import use_deterministic_kernels

        use_deterministic_kernels()
        sources.hold_to(spec.sources)
        self._spec = spec
        self._models = base_first(spec)
        self._device = "cuda" if spec.use_gpu else "cpu"
        self._loaded: tuple[int, TextToImage] | None = None
        self._scorers: dict[str, Scorer] = {}
        self._seconds: dict[str, float] = {}
        self._warnings: list[str] = []

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """In: ``chunk``. Out: ``scored``."""
        chunk: Chunk = row["chunk"]
        self._seconds = {"draw": 0.0, "score": 0.0, "total": 0.0}
        self._warnings = []
        with self._timed("total"):
            model = self._models[chunk.model]
            if isinstance(model, ImageFolder):
                key, drawn, pngs = self._copy(chunk, model)
            else:
                key, drawn, pngs = self._draw(chunk, model)
            images: list[np.ndarray] = []
            scores: dict[str, np.ndarray] = {}
            for scorer in self._spec.scorers:
                uri = layout.scores_uri(chunk.folder, key, key_of_scorer(scorer, self._spec.use_gpu))
                found = self._read(image_cache.read_scores, uri, "scores are computed again")
                if found is None:
                    images = images or [image_cache.decode_png(pngs)]
                    found = self._score(scorer, images[0], chunk.prompts)
                    image_cache.write_scores(uri, found)
                scores[scorer.name] = found
        scored = Scored(
            chunk=chunk,
            uri=layout.images_uri(chunk.folder, key),
            drawn=drawn,
            scores=scores,
            seconds=self._seconds,
            warnings=tuple(self._warnings),
        )
        return {"scored": scored}

    def _draw(self, chunk: Chunk, model: ModelRecord) -> tuple[str, int, list[bytes]]:
        """The chunk's key, how many images were drawn, and all images as PNG."""
        uri = layout.images_uri(chunk.folder, chunk.key)
        found = self._read(image_cache.read_images, uri, f"images of {model.name} are drawn again")
        if found is not None:
            return chunk.key, 0, found
        draw = self._model(chunk.model, model)
        with self._timed("draw"):
            try:
                images = draw(chunk.prompts, chunk.seeds, self._spec.evaluation.sample)
            except NonFiniteError as error:
                raise NonFiniteError(f"model {model.name}: {error}") from error
        pngs = image_cache.encode_png(images)
        image_cache.write_images(uri, chunk.prompts, chunk.seeds, pngs)
        return chunk.key, len(images), pngs

    def _copy(self, chunk: Chunk, folder: ImageFolder) -> tuple[str, int, list[bytes]]:
        """Like ``_draw`` for images that were drawn elsewhere. They are read anew, and copied once."""
        contents, images = read_external(folder, chunk.names)
        if images.shape[1:3] != chunk.size:
            _, height, width, _ = images.shape
            size = f"{chunk.size[1]}x{chunk.size[0]} px"
            message = f"images of {folder.name} must have {size}, {chunk.names[0]} has {width}x{height} px"
            raise DataError(message)
        key = key_of_external(chunk.prompts, contents)
        uri = layout.images_uri(chunk.folder, key)
        found = self._read(image_cache.read_images, uri, f"images of {folder.name} are copied again")
        if found is None:
            found = image_cache.encode_png(images)
            image_cache.write_images(uri, chunk.prompts, chunk.seeds, found)
        return key, 0, found

    def _read(self, read: Callable[[str], Any], uri: str, remedy: str) -> Any:
        try:
            return read(uri)
        except Damaged as error:
            self._warnings.append(f"{error}; {remedy}")
            return None

    def _score(self, record: ScorerRecord, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        if record.name not in self._scorers:
            self._scorers[record.name] = scorers.load(record, self._device)
        with self._timed("score"):
            return np.asarray(self._scorers[record.name](images, prompts), dtype=np.float64)

    def _model(self, place: int, record: ModelRecord) -> TextToImage:
        """The model, in place of the one before. Its files are proven: images are stored by their digest."""
        if self._loaded is not None and self._loaded[0] == place:
            return self._loaded[1]
        import torch

        from dde_core.generation import TextToImage
        from dde_core.models.folder import ModelFolder

        self._loaded = None
        if self._spec.use_gpu:
            torch.cuda.empty_cache()
        models.check_digests(record)
        model = TextToImage(ModelFolder(*models.fetch(record)), self._device)
        self._loaded = (place, model)
        return model

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began
