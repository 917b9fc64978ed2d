"""Preference pairs in, latent shards and a manifest out. Read it top to bottom: find, plan, encode, join, tell."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np

from dde_core.errors import DataError
from dde_core.family import COMPONENTS
from dde_core.latents.schema import SCHEMA_VERSION, Manifest, Shard, dataset_digest
from dde_core.models.folder import ModelFolder
from services.api.records import EncodeResult
from services.artifacts import models
from services.errors import BadRequest
from services.ingest import committed
from services.ingest.joining import ShardWork
from services.ingest.pipelines import encode_blocks, join_shards
from services.ingest.plan import Plan, Planner, images_per_block
from services.ingest.progress import Progress
from services.ingest.quarantine import Quarantine
from services.pairs.source import Source, open_source
from services.pairs.validation import Summary, check_bad
from services.stages import layout
from services.stages.journal import Journal
from services.stages.specs import EncodeSpec
from services.storage import files

SHARD_BYTES = 64 * 1024**2
PAIRS_PER_SHARD = 1000


def encode(spec: EncodeSpec, journal: Journal) -> EncodeResult:
    """Encode a dataset, go on where a killed run ended, or find that it is encoded with this content, encoder and settings.

    Raises BadRequest where the source has changed or too many rows are bad, DataError where no pair is left.
    """
    began = time.monotonic()
    folder, source = ModelFolder(*models.fetch(spec.model)), open_source(spec.source)
    size = spec.data.resolution or folder.image_size()
    settings: dict[str, Any] = {"resolution": size, "crop": "centre", "flip": spec.data.flip}
    encoder_digest = _encoder_digest(folder)
    identity = [SCHEMA_VERSION, spec.source_digest, encoder_digest, settings, images_per_block(size)]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    target = layout.dataset_folder(spec.output, key)
    manifest = _find(target)
    if reused := manifest is not None:
        journal.event(f"dataset {key} is encoded already")
    else:
        try:
            made = _encode_new(spec, journal, source, folder, settings, encoder_digest, target)
            if (
                manifest := _find(target)
            ) is None:  # else another run was faster, and its shards may be in use
                files.write_bytes(layout.manifest_uri(target), made.to_json())
                manifest = made
        except Exception:
            if (manifest := _find(target)) is None:  # else another run has cleared the blocks away
                raise
    check_bad(manifest.counts["bad"], manifest.counts["rows"], manifest.bad, spec.data.max_bad_fraction)
    committed.clear(target)  # a run that was killed after its manifest has left them
    journal.event(f"{manifest.counts['pairs']} pairs encoded: {manifest.counts}")
    return EncodeResult(
        dataset=target,
        digest=manifest.digest,
        counts=manifest.counts,
        bad=manifest.bad,
        reused=reused,
        seconds=time.monotonic() - began,
    )


def _find(target: str) -> Manifest | None:
    uri = layout.manifest_uri(target)
    return Manifest.from_json(files.read_bytes(uri)) if files.exists(uri) else None


def _encode_new(
    spec: EncodeSpec,
    journal: Journal,
    source: Source,
    folder: ModelFolder,
    settings: dict[str, Any],
    encoder_digest: str,
    target: str,
) -> Manifest:
    size = settings["resolution"]
    latent_shape, tokenizers = folder.latent_shape(size), folder.tokenizers()
    plan = _plan(spec, source, size)
    if found := _find(target):
        return found
    quarantine = Quarantine(plan, spec.data.max_bad_fraction)
    try:
        quarantine.check()
        _encode_images(spec, journal, source, plan, quarantine, settings, target)
    except BadRequest:
        _tell(quarantine, source, target, journal)
        raise
    _tell(quarantine, source, target, journal)
    pairs_per_shard = max(1, min(PAIRS_PER_SHARD, SHARD_BYTES // (2 * 2 * int(np.prod(latent_shape)))))
    shards, pairs = _join(spec, source, plan, quarantine, pairs_per_shard, target, latent_shape)
    if not pairs:
        raise DataError(f"dataset {spec.source.uri!r} has no pair left: all decided pairs hold a bad image")
    counts = plan.counts
    return Manifest(
        digest=dataset_digest(settings, encoder_digest, pairs),
        encoder_digest=encoder_digest,
        settings=settings,
        latent_shape=latent_shape,
        num_tokenizers=len(tokenizers),
        num_tokens=tokenizers[0].model_max_length,
        counts={
            "rows": counts.rows,
            "pairs": len(pairs),
            "ties": counts.ties,
            "missing": counts.missing,
            "bad": quarantine.num_rows,
            "duplicates": counts.duplicates,
            "images": plan.num_images - quarantine.num_bad_images,
        },
        bad=quarantine.by_cause,
        shards=shards,
    )


def _tell(quarantine: Quarantine, source: Source, target: str, journal: Journal) -> None:
    if written := quarantine.write(source, target):
        journal.event(
            f"{quarantine.num_rows} rows are quarantined, see {written}: {quarantine.by_cause}", "warning"
        )


def _plan(spec: EncodeSpec, source: Source, size: int) -> Plan:
    """One pass over the rows. Raises BadRequest where they are not those that were registered."""
    summary = Summary(source)
    planner = Planner(images_per_block(size))
    for unit in source.units():
        planner.add(unit, summary.observe(source.rows(unit)))
    if (found := summary.digest()) != spec.source_digest:
        message = (
            f"dataset {spec.source.uri!r} has changed: digest {found}, registered as {spec.source_digest}"
        )
        message += " (by an earlier version perhaps: register it again)"
        raise BadRequest(message, param="dataset", code="dataset_changed")
    return planner.plan()


def _encode_images(
    spec: EncodeSpec,
    journal: Journal,
    source: Source,
    plan: Plan,
    quarantine: Quarantine,
    settings: dict,
    target: str,
) -> None:
    done = committed.committed_blocks(target)
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
) -> tuple[tuple[Shard, ...], list[bytes]]:
    """The shards in their order, and the digest of every pair."""
    work = []
    for number, blocks in enumerate(plan.shards(pairs_per_shard)):
        slots = slice(blocks[0].slots.start, blocks[-1].slots.stop)
        stretches = tuple((plan.units[block.unit], block.start, block.stop) for block in blocks)
        work.append(
            ShardWork(number, stretches, plan.homes[slots].tobytes(), quarantine.of_slots(slots).tobytes())
        )
    shards: dict[int, Shard] = {}
    pairs: list[bytes] = []
    for row in join_shards(
        work, spec.actors, source=source, folder=target, model=spec.model, latent_shape=latent_shape
    ):
        if row["rows"]:
            shards[row["number"]] = Shard(name=row["name"], rows=row["rows"], sha256=row["sha256"])
            pairs += [row["pairs"][start : start + 32] for start in range(0, len(row["pairs"]), 32)]
    return tuple(shards[number] for number in sorted(shards)), pairs


def _encoder_digest(folder: ModelFolder) -> str:
    """sha256 of what decides an image's latents and a caption's tokens: the VAE's and the tokenizers' files."""
    names = [name for name in COMPONENTS[folder.family] if name == "vae" or name.startswith("tokenizer")]
    parts = [models.folder_digest(files.as_uri(folder.path / name)) for name in names]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
