"""Draw or read images, score them and commit them in chunks: two Ray Data pipelines.

generate: a chunk has all images of its prompts
    {number, first, prompts}    --Drawer (one actor a GPU)------------>  {number, images}
relabel: a chunk has both images of some pairs
    {unit, chunks}              --read_chunks (CPU tasks)------------->  {number, table, bad}
    {number, table, bad}        --Labeler (one actor a GPU)----------->  {number, images}

A chunk depends on the request alone, so a resumed run has the same ones. Only actors load torch: the driver
starts without it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from dde_core.errors import NonFiniteError
from dde_core.scorers.kinds import Scorer
from services.api.records import ScorerRecord
from services.artifacts import scorers
from services.artifacts.models import fetch
from services.ingest import scored
from services.ingest.reading import LOAD_THREADS, load
from services.pairs.columnar import Unit
from services.pairs.images import BadImage, decode_whole, to_png
from services.pairs.row import Preference, Row
from services.pairs.source import Source
from services.stages.specs import GenerateSpec, RelabelSpec
from services.storage import sources

READERS_PER_ACTOR = 2
BATCH_PIXELS = 1 << 24
"""Decoded pixels that are scored at once; one image may have more."""


@dataclass(frozen=True)
class Chunk:
    """Rows ``start`` to ``stop`` of a unit; ``first`` is the number of its first pair in the dataset."""

    number: int
    start: int
    stop: int
    first: int


# ---- generate


def draw_chunks(spec: GenerateSpec, chunks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Draw, score and commit these chunks of prompts. Yields {number, images} in any order."""
    items = ray.data.from_items(chunks, override_num_blocks=len(chunks))
    yield from _on_actors(items, Drawer, spec, min(spec.actors, len(chunks)))


class Drawer:
    """The model and the scorers of one actor."""

    def __init__(self, spec: GenerateSpec) -> None:
        import torch

        from dde_core.generation import TextToImage
        from dde_core.models.folder import ModelFolder

        torch.set_num_threads(1)
        device = "cuda" if spec.use_gpu else "cpu"
        self._spec = spec
        self._model = TextToImage(ModelFolder(*fetch(spec.model)), device)
        self._scorers = load_scorers(spec.scorers, device)

    def __call__(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Draw, score and commit one chunk. Raises NonFiniteError, naming the model or the scorer."""
        wanted = self._spec.generate
        per_prompt = wanted.images_per_prompt
        prompts = [str(prompt) for prompt in chunk["prompts"]]
        groups = [chunk["first"] + i for i in range(len(prompts)) for _ in range(per_prompt)]
        captions = [prompt for prompt in prompts for _ in range(per_prompt)]
        start = wanted.seed + chunk["first"] * per_prompt
        try:
            images = self._model(captions, range(start, start + len(captions)), wanted.sample)
        except NonFiniteError as error:
            raise NonFiniteError(f"model {self._spec.model.name}: {error}") from error
        scores = scores_of(self._scorers, list(images), captions)
        drawn = [
            {"group": group, "caption": caption, "scores": values, **_file(image)}
            for group, caption, image, values in zip(groups, captions, images, scores, strict=True)
        ]
        scored.commit(self._spec.output, chunk["number"], drawn, {})
        return {"number": chunk["number"], "images": len(drawn)}


def _file(image: NDArray[np.uint8]) -> dict[str, Any]:
    """The image as PNG, which loses nothing of what was scored, and its content's hash as its uid."""
    png = to_png(image)
    return {"image": png, "uid": hashlib.sha256(png).hexdigest()}


# ---- relabel


def label_chunks(spec: RelabelSpec, source: Source, work: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Read, score and commit the chunks of each unit in ``work``. Yields {number, images} in any order."""
    units = ray.data.from_items(work, override_num_blocks=len(work))
    tables = units.flat_map(
        partial(read_chunks, source=source),
        compute=ray.data.TaskPoolStrategy(size=READERS_PER_ACTOR * spec.actors),
        num_cpus=1,
    )
    yield from _on_actors(tables, Labeler, spec, spec.actors)


def read_chunks(work: dict[str, Any], source: Source) -> Iterator[dict[str, Any]]:
    """Read the images of these chunks of a unit. Yields one row for each chunk.

    Out: ``number``, ``table`` (of ``scored.SCHEMA``, without scores) and ``bad`` (JSON: how many pairs have
    an image that cannot be loaded, by cause).
    """
    unit: Unit = work["unit"]
    chunks: list[Chunk] = work["chunks"]
    position = chunks[0].start
    rows = source.rows(unit, with_images=True, start=position, stop=chunks[-1].stop)
    for chunk in chunks:
        for _ in islice(rows, chunk.start - position):  # the rows of a committed chunk in between
            pass
        images: list[dict[str, Any]] = []
        bad: Counter[str] = Counter()
        group = chunk.first
        for row in islice(rows, chunk.stop - chunk.start):
            with sources.in_threads(partial(load, source), row.images, LOAD_THREADS) as images_read:
                loaded = list(images_read)
            for preference in row.preferences:
                pair, cause = _pair(row, preference, loaded)
                images += [image | {"group": group} for image in pair]
                bad.update([cause] if cause else [])
                group += 1
        table = _packed(pa.Table.from_pylist(images, scored.SCHEMA))
        yield {"number": chunk.number, "table": table, "bad": json.dumps(bad)}
        position = chunk.stop


def _pair(
    row: Row, preference: Preference, loaded: list[bytes | BadImage | None]
) -> tuple[list[dict[str, Any]], str]:
    """Both images of a preference in the order of the row, or why one of them cannot be loaded."""
    pair: list[dict[str, Any]] = []
    for slot in sorted((preference.winner, preference.loser)):
        data = loaded[slot]
        if isinstance(data, BadImage):
            return [], data.cause
        image = {"caption": row.caption, "uid": row.uids[slot], "image": data}
        pair.append(image | {"pair_id": preference.pair_id, "preferred": slot == preference.winner})
    return pair, ""


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


class Labeler:
    """The scorer of one actor."""

    def __init__(self, spec: RelabelSpec) -> None:
        import torch

        torch.set_num_threads(1)
        self._spec = spec
        self._scorers = load_scorers(spec.scorers, "cuda" if spec.use_gpu else "cpu")

    def __call__(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Score and commit one chunk. A pair with an image that cannot be decoded is counted and left out."""
        rows = pa.ipc.open_stream(chunk["table"]).read_all().to_pylist()
        scores, causes = self._score({(row["uid"], row["caption"]): row["image"] for row in rows})
        kept: list[dict[str, Any]] = []
        bad = Counter(json.loads(chunk["bad"]))
        for _, pair in groupby(rows, key=lambda row: row["group"]):
            images = list(pair)
            cause = next((causes[row["uid"]] for row in images if row["uid"] in causes), None)
            if cause:
                bad[cause] += 1
            else:
                kept += [row | {"scores": scores[row["uid"], row["caption"]]} for row in images]
        scored.commit(self._spec.output, chunk["number"], kept, bad)
        return {"number": chunk["number"], "images": len(kept)}

    def _score(
        self, images: Mapping[tuple[str, str], bytes | None]
    ) -> tuple[dict[tuple[str, str], list[float]], dict[str, str]]:
        """Scores of each uid and caption; why an image cannot be used, by its uid."""
        scores: dict[tuple[str, str], list[float]] = {}
        causes: dict[str, str] = {}
        batch: dict[tuple[str, str], NDArray[np.uint8]] = {}
        for key, data in images.items():
            try:
                batch[key] = decode_whole(data, self._spec.relabel.background)
            except BadImage as error:
                causes[key[0]] = error.cause
            if sum(image.shape[0] * image.shape[1] for image in batch.values()) >= BATCH_PIXELS:
                scores |= self._scores_of(batch)
                batch = {}
        return scores | self._scores_of(batch), causes

    def _scores_of(self, batch: dict[tuple[str, str], NDArray[np.uint8]]) -> dict[tuple[str, str], Any]:
        found = scores_of(self._scorers, list(batch.values()), [caption for _, caption in batch])
        return dict(zip(batch, found, strict=True))


# ---- both


def _on_actors(
    rows: ray.data.Dataset, actor: type[Any], spec: GenerateSpec | RelabelSpec, actors: int
) -> Iterator[dict[str, Any]]:
    done = rows.map(
        actor,
        fn_constructor_args=(spec,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=1 if spec.use_gpu else 0,
    )
    yield from done.iter_rows()


def load_scorers(records: Sequence[ScorerRecord], device: str) -> dict[str, Scorer]:
    """The scorers by their names, in the order of the records."""
    return {record.name: scorers.load(record, device) for record in records}


def scores_of(
    loaded: Mapping[str, Scorer], images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]
) -> list[list[float]]:
    """For each image, which may differ in size, its scores in the order of the scorers.

    Raises NonFiniteError, naming the scorer and the prompt, for a score that is not finite.
    """
    scores = np.empty((len(images), len(loaded)))
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(index)
    for indices in by_shape.values():
        same_size = np.stack([images[index] for index in indices])
        for column, scorer in enumerate(loaded.values()):
            scores[indices, column] = scorer(same_size, [prompts[index] for index in indices])
    for index, name in np.argwhere(~np.isfinite(scores)).tolist():
        value = scores[index, name]
        raise NonFiniteError(f"scorer {list(loaded)[name]} gives {value} for the prompt {prompts[index]!r}")
    return scores.tolist()
