"""The encode stage: preference pairs in, latent shards and a manifest out. Plan, encode, quarantine, join."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dde_core.errors import DataError
from dde_core.family import COMPONENTS
from dde_core.latents.schema import SCHEMA_VERSION, Manifest, Shard, dataset_digest, identifying
from dde_core.models.folder_files import FolderFiles
from services.api.records import EncodeResult
from services.artifacts import models
from services.errors import BadRequest
from services.ingest import committed
from services.ingest.joining import ShardWork
from services.ingest.pipelines import encode_blocks, join_shards
from services.ingest.plan import Plan, Planner, images_per_block
from services.ingest.progress import Progress
from services.ingest.quarantine import Quarantine
from services.pairs.pair_counts import count_repeats
from services.pairs.source import Source, open_source
from services.pairs.validation import Summary, check_bad
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import EncodeSpec
from services.storage import files

SHARD_BYTES = 64 * 1024**2
PAIRS_PER_SHARD = 1000
DIGEST_BYTES = 32
SUMMED = ("soft", "long_captions", "transparent")
"""Counts that each shard has."""


@dataclass(frozen=True)
class Joined:
    """The shards in order, the digest of every pair, and the manifest's counts of pairs."""

    shards: tuple[Shard, ...]
    digests: list[bytes]
    counts: dict[str, int]


def encode(spec: EncodeSpec, journal: Journal) -> EncodeResult:
    """Encode a dataset, resume where a killed run stopped, or reuse an encoded one.

    A dataset is reused for the same content, encoder and settings. Raises BadRequest where the source has
    changed or too many rows are bad, DataError where no pair is left.
    """
    started = time.monotonic()
    folder = FolderFiles(*models.fetch(spec.model))
    source = open_source(spec.source)
    size = spec.data.resolution or folder.resolution()
    settings: dict[str, Any] = {
        "resolution": size,
        "crop": "centre",
        "flip": spec.data.flip,
        "background": spec.data.background,
        "posterior": spec.data.posterior,
    }
    encoder_digest = _encoder_digest(folder)
    key = _dataset_key(spec.source_digest, encoder_digest, settings)
    target = layout.dataset_folder(spec.output, key)
    manifest = _read_manifest(target)
    reused = manifest is not None
    if manifest is None:
        manifest = _encode_and_write(spec, journal, source, folder, settings, encoder_digest, target)
    else:
        journal.event(f"dataset {key} is already encoded")
    check_bad(manifest.counts["bad"], manifest.counts["rows"], manifest.bad, spec.data.max_bad_fraction)
    committed.clear(target)  # also for a run that was killed after it wrote the manifest
    journal.event(f"{manifest.counts['pairs']} pairs encoded: {manifest.counts}")
    for remark in _remarks(manifest):
        journal.event(remark, "warning")
    return EncodeResult(
        dataset=target,
        digest=manifest.digest,
        counts=manifest.counts,
        bad=manifest.bad,
        reused=reused,
        seconds=time.monotonic() - started,
    )


def _dataset_key(source_digest: str, encoder_digest: str, settings: dict[str, Any]) -> str:
    """Equal for equal content, encoder, settings and blocks."""
    block_images = images_per_block(settings["resolution"])
    identity = [SCHEMA_VERSION, source_digest, encoder_digest, identifying(settings), block_images]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _read_manifest(target: str) -> Manifest | None:
    uri = layout.manifest_uri(target)
    return Manifest.from_json(files.read_bytes(uri)) if files.exists(uri) else None


def _encode_and_write(
    spec: EncodeSpec,
    journal: Journal,
    source: Source,
    folder: FolderFiles,
    settings: dict[str, Any],
    encoder_digest: str,
    target: str,
) -> Manifest:
    """Encode the dataset and write its manifest; where another run was faster, return that run's manifest."""
    try:
        manifest = _encode_new(spec, journal, source, folder, settings, encoder_digest, target)
        finished = _read_manifest(target)
        if finished is None:
            files.write_bytes(layout.manifest_uri(target), manifest.to_json())
            return manifest
    except Exception:
        finished = _read_manifest(target)
        if finished is None:
            raise
        # Another run has finished and deleted the blocks that this one needed.
    return finished


def _encode_new(
    spec: EncodeSpec,
    journal: Journal,
    source: Source,
    folder: FolderFiles,
    settings: dict[str, Any],
    encoder_digest: str,
    target: str,
) -> Manifest:
    size = settings["resolution"]
    latent_shape = folder.latent_shape(size)
    tokenizers = folder.tokenizers()
    plan = _plan(spec, source, size)
    finished = _read_manifest(target)
    if finished is not None:
        return finished
    quarantine = Quarantine(plan, spec.data.max_bad_fraction)
    try:
        quarantine.check()
        _encode_images(spec, journal, source, plan, quarantine, settings, target)
    except BadRequest:
        _write_quarantine(quarantine, source, target, journal)
        raise
    _write_quarantine(quarantine, source, target, journal)
    latent_bytes = 2 * int(np.prod(latent_shape))
    pairs_per_shard = max(1, min(PAIRS_PER_SHARD, SHARD_BYTES // (2 * latent_bytes)))
    joined = _join(spec, source, plan, quarantine, pairs_per_shard, target, latent_shape)
    if not joined.digests:
        raise DataError(f"dataset {spec.source.uri!r} has no pair left: all decided pairs hold a bad image")
    counts = plan.counts
    return Manifest(
        digest=dataset_digest(_seen(settings, joined), encoder_digest, joined.digests),
        encoder_digest=encoder_digest,
        settings=settings,
        latent_shape=latent_shape,
        num_tokenizers=len(tokenizers),
        num_tokens=tokenizers[0].model_max_length,
        counts={
            "rows": counts.rows,
            "ties": counts.ties,
            "missing": counts.missing,
            "bad": quarantine.num_rows,
            "images": plan.num_images - quarantine.num_bad_images,
            **joined.counts,
        },
        bad=quarantine.by_cause,
        shards=joined.shards,
    )


def _seen(settings: dict[str, Any], joined: Joined) -> dict[str, Any]:
    """The settings that the content depends on: without a transparent image, no background is seen."""
    has_background = joined.counts["transparent"] > 0
    return {name: value for name, value in settings.items() if name != "background" or has_background}


def _remarks(manifest: Manifest) -> Iterator[str]:
    """What people should know of the pairs before they train on them."""
    counts = manifest.counts
    remarks = {
        "soft": "have a soft label: objective.label decides what is made of it",
        "duplicates": "repeat an earlier pair: the same images and caption, the same winner",
        "contradicting": "are contradicted by another pair: the same images and caption, the other winner",
        "long_captions": f"have a caption of more than {manifest.num_tokens} tokens: the rest is not read",
        "transparent": f"have a transparent image: it shows {manifest.settings['background']} "
        "(data.background)",
    }
    for name, remark in remarks.items():
        if counts[name]:
            yield f"{counts[name]} of {counts['pairs']} pairs {remark}"


def _write_quarantine(quarantine: Quarantine, source: Source, target: str, journal: Journal) -> None:
    uri = quarantine.write(source, target)
    if uri is not None:
        message = f"{quarantine.num_rows} rows are quarantined, see {uri}: {quarantine.by_cause}"
        journal.event(message, "warning")


def _plan(spec: EncodeSpec, source: Source, size: int) -> Plan:
    """Plan in one pass over the rows. Raises BadRequest where they differ from those that were registered."""
    summary = Summary(source)
    planner = Planner(images_per_block(size))
    for unit in source.units():
        planner.add(unit, summary.observe(source.rows(unit)))
    summary.check_digest(spec.source_digest, "dataset")
    return planner.plan()


def _encode_images(
    spec: EncodeSpec,
    journal: Journal,
    source: Source,
    plan: Plan,
    quarantine: Quarantine,
    settings: dict[str, Any],
    target: str,
) -> None:
    """Encode and commit every block that an earlier run has not, and record the bad images of all blocks."""
    done = committed.committed_blocks(target)
    committed.delete_uncommitted(target, done)
    for block, bad in committed.bad_images(target, done):
        quarantine.add(block, bad)
    progress = Progress(plan, quarantine, journal, done)
    for row in encode_blocks(plan, done, source, target, spec.model, settings, spec.actors, spec.use_gpu):
        quarantine.add(row["block"], row["bad"])
        progress.add(row["block"], row["images"])
    progress.end()


def _join(
    spec: EncodeSpec,
    source: Source,
    plan: Plan,
    quarantine: Quarantine,
    pairs_per_shard: int,
    target: str,
    latent_shape: tuple[int, int, int],
) -> Joined:
    """Write the shards."""
    work: list[ShardWork] = []
    for number, blocks in enumerate(plan.shards(pairs_per_shard)):
        slots = slice(blocks[0].slots.start, blocks[-1].slots.stop)
        shard_work = ShardWork(
            number=number,
            row_ranges=tuple((plan.units[block.unit], block.start, block.stop) for block in blocks),
            block_of_slot=plan.block_of_slot[slots].tobytes(),
            bad=quarantine.of_slots(slots).tobytes(),
        )
        work.append(shard_work)
    shards: dict[int, Shard] = {}
    digests = bytearray()
    keys = bytearray()
    counts: Counter[str] = Counter()
    joined = join_shards(
        work, spec.actors, source=source, folder=target, model=spec.model, latent_shape=latent_shape
    )
    for row in joined:
        if row["rows"]:
            shards[row["number"]] = Shard(name=row["name"], rows=row["rows"], sha256=row["sha256"])
            digests += row["pairs"]
            keys += row["keys"]
            counts.update({name: row[name] for name in SUMMED})
    pairs = [bytes(digests[start : start + DIGEST_BYTES]) for start in range(0, len(digests), DIGEST_BYTES)]
    duplicates, contradicting = count_repeats(bytes(keys))
    of_pairs = {"pairs": len(pairs), "duplicates": duplicates, "contradicting": contradicting}
    of_pairs |= {name: counts[name] for name in SUMMED}
    return Joined(tuple(shards[number] for number in sorted(shards)), pairs, of_pairs)


def _encoder_digest(folder: FolderFiles) -> str:
    """sha256 of the files that determine latents and tokens: those of the VAE and the tokenizers."""
    names = [name for name in COMPONENTS[folder.family] if name == "vae" or name.startswith("tokenizer")]
    parts = [models.folder_digest(files.as_uri(folder.path / name)) for name in names]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
