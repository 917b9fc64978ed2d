"""From scored images to a dataset: the spread of every scorer, then the pairs of each chunk as Parquet."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from dde_core.errors import DataError
from dde_core.latents.schema import pair_id
from dde_core.scorers.ranking import KEEP, Keep, Preference, num_candidates, spreads, utilities
from services.api.records import PairsResult
from services.api.requests import DatasetSource
from services.ingest import scored
from services.pairs.source import open_source
from services.pairs.validation import inspect
from services.stages import layout
from services.stages.journal import Journal
from services.storage import files, sources

READ_THREADS = 16
WRITERS_PER_ACTOR = 2
_COUNTS = ("pairs", "ties", "empty", "agreed")


@dataclass(frozen=True)
class Rule:
    """How scores become pairs: each scorer's name and weight, which pairs to keep, and the least margin."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    keep: Keep
    margin: float


def finished(folder: str) -> PairsResult | None:
    """The result of an earlier attempt that committed the pairs; deletes what it may have left."""
    uri = layout.made_record_uri(folder)
    if not files.exists(uri):
        return None
    scored.clear(folder)
    return PairsResult.model_validate_json(files.read_bytes(uri))


def commit(folder: str, result: PairsResult) -> None:
    """Commit the pairs, then delete the scored images."""
    files.write_bytes(layout.made_record_uri(folder), result.model_dump_json(indent=1).encode())
    scored.clear(folder)


def make_pairs(
    folder: str, num_chunks: int, num_images: int, rule: Rule, actors: int, journal: Journal
) -> PairsResult:
    """Pair the scored images and check the pairs as registration does.

    Raises DataError where no pair is left, and where not all of ``num_images`` are scored or counted as bad.
    """
    began = time.monotonic()
    spread, found = _measure(folder, range(num_chunks))
    if found["images"] + 2 * found["bad"].total() != num_images:
        message = (
            f"{found['images']} images are scored and {found['bad'].total()} pairs are bad, {num_images}"
        )
        raise DataError(f"{message} images were expected: an earlier version began this; request it again")
    named = {name: float(value) for name, value in zip(rule.names, spread, strict=True)}
    journal.event(f"{found['images']} images are scored; the spreads are {_shown(named)}")
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    for row in pair_chunks(folder, num_chunks, rule, spread.tolist(), actors):
        counts.update({name: row[name] for name in _COUNTS})
    if not counts["pairs"]:
        message = f"no pair is left of {found['groups']}: {counts['ties']} differ by at most the margin "
        raise DataError(f"{message}{rule.margin:g}, in units of the spreads {_shown(named)}")
    uri = layout.made_pairs_folder(folder)
    source = open_source(DatasetSource(uri=uri))
    registered, digest, example = inspect(source)
    if registered.pairs != counts["pairs"]:
        raise DataError(f"{counts['pairs']} pairs were written to {uri!r}, {registered.pairs} are read")
    return PairsResult(
        digest=digest,
        counts=registered,
        example=example,
        prompts=found["groups"],
        images=found["images"],
        ties=counts["ties"],
        prompts_without_pair=counts["empty"],
        spreads=named,
        agreement=counts["agreed"] / counts["pairs"] if found["preferred"] else None,
        bad=dict(found["bad"]),
        seconds=time.monotonic() - began,
    )


def _shown(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in spread.items())


def _measure(folder: str, numbers: Iterable[int]) -> tuple[np.ndarray, dict[str, Any]]:
    """The spread of each scorer, and the counts: images, groups, preferred (by people), bad (by cause)."""
    bad: Counter[str] = Counter()
    groups: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    preferred = 0
    read = partial(scored.read, folder, columns=["group", "scores", "preferred"])
    with sources.in_threads(read, numbers, READ_THREADS) as tables:
        for table in tables:
            bad += scored.bad_of(table)
            groups.append(table["group"].to_numpy())
            flat = table["scores"].combine_chunks().flatten().to_numpy()
            scores.append(flat.reshape(len(table), -1) if len(table) else np.empty((0, 0)))
            preferred += sum(1 for value in table["preferred"].to_pylist() if value)
    group = np.concatenate(groups)
    if not len(group):
        raise DataError(f"no pair is left: all have an image or a row that cannot be used ({dict(bad)})")
    found = {"images": len(group), "groups": len(np.unique(group)), "preferred": preferred, "bad": bad}
    return spreads(np.concatenate([each for each in scores if len(each)]), group), found


def pair_chunks(
    folder: str, num_chunks: int, rule: Rule, spread: Sequence[float], actors: int
) -> Iterator[dict[str, Any]]:
    """Write the pairs of every chunk. Yields what ``pair_chunk`` returns, in any order."""
    items = [{"number": number} for number in range(num_chunks)]
    paired = ray.data.from_items(items, override_num_blocks=min(num_chunks, 1000)).map(
        partial(pair_chunk, folder=folder, rule=rule, spread=spread),
        compute=ray.data.TaskPoolStrategy(size=WRITERS_PER_ACTOR * actors),
        num_cpus=1,
    )
    yield from paired.iter_rows()


def pair_chunk(row: dict[str, Any], folder: str, rule: Rule, spread: Sequence[float]) -> dict[str, Any]:
    """Write the pairs of one chunk, a file that may have none.

    In: ``number``. Out: ``pairs``, ``ties``, ``empty`` (groups without a pair) and ``agreed`` (pairs whose
    winner people preferred, too).
    """
    rows: list[dict[str, Any]] = []
    counts = Counter(dict.fromkeys(_COUNTS, 0))
    images = scored.read(folder, row["number"]).to_pylist()
    for _, members in groupby(images, key=lambda image: image["group"]):
        group = list(members)
        kept = _preferences(group, rule, np.array(spread))
        rows += [_pair(group, each, rule.names) for each in kept]
        counts["pairs"] += len(kept)
        counts["ties"] += num_candidates(rule.keep, len(group)) - len(kept)
        counts["empty"] += not kept
        counts["agreed"] += sum(bool(group[each.winner]["preferred"]) for each in kept)
    table = pa.Table.from_pylist(rows, _schema(rule.names))
    data = scored.parquet_bytes(table, ["jpg_0", "jpg_1"])
    files.write_bytes(layout.made_pairs_uri(folder, row["number"]), data)
    return {name: counts[name] for name in _COUNTS}


def _preferences(group: list[dict[str, Any]], rule: Rule, spread: np.ndarray) -> list[Preference]:
    """The preferences among a group's images. Two that are the same image are a tie."""
    scores = np.array([image["scores"] for image in group], dtype=np.float64)
    kept = KEEP[rule.keep](utilities(scores, rule.weights, spread), rule.margin)
    return [each for each in kept if group[each.winner]["uid"] != group[each.loser]["uid"]]


def _pair(group: list[dict[str, Any]], preference: Preference, names: tuple[str, ...]) -> dict[str, Any]:
    """A row in Pick-a-Pic's columns. The images stay in their order, so the winner may be on either side."""
    slots = sorted((preference.winner, preference.loser))
    images = [group[slot] for slot in slots]
    caption = images[0]["caption"]
    made_id = pair_id(images[0]["uid"], images[1]["uid"], caption, f"{images[0]['group']}:{slots}")
    row: dict[str, Any] = {
        "caption": caption,
        "has_label": True,
        "pair_id": images[0]["pair_id"] or made_id,
        "margin": preference.margin,
    }
    for side, image in enumerate(images):
        row[f"jpg_{side}"] = image["image"]
        row[f"image_{side}_uid"] = image["uid"]
        row[f"label_{side}"] = float(slots[side] == preference.winner)
        row |= {score_column(side, name): score for name, score in zip(names, image["scores"], strict=True)}
    return row


def score_column(side: int, name: str) -> str:
    """The column with a scorer's score of the image on one side. Whoever reads the pairs does not read it."""
    return f"score_{side}_{name}"


def _schema(names: tuple[str, ...]) -> pa.Schema:
    fields: dict[str, pa.DataType] = {"jpg_0": pa.binary(), "jpg_1": pa.binary()}
    fields |= {"label_0": pa.float64(), "label_1": pa.float64(), "has_label": pa.bool_()}
    fields |= {"caption": pa.string(), "image_0_uid": pa.string(), "image_1_uid": pa.string()}
    fields |= {"pair_id": pa.string(), "margin": pa.float64()}
    fields |= {score_column(side, name): pa.float64() for name in names for side in (0, 1)}
    return pa.schema(fields)
