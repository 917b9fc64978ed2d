"""Preference pairs in, latent shards and a manifest out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

from transformers import CLIPTokenizer

from dde_core.errors import DataError
from dde_core.family import COMPONENTS
from dde_core.latents.schema import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    dataset_digest,
    pair_id,
    shard_schema,
    token_columns,
)
from dde_core.latents.writer import shard_table, write_shard
from dde_core.models.folder import ModelFolder
from dde_core.models.text import tokenize
from services import pairs, registry, storage
from services.contracts import EncodeResult, EncodeSpec
from services.errors import BadRequest
from services.ingest.stages import Unit, encode_dataset
from services.observability import Journal
from services.pairs import PairRow

PAIRS_PER_SHARD = 1000
QUARANTINE = "quarantine.jsonl"

Images = dict[str, dict[str, Any]]
"""Encoded images by uid: latents, sha256, size, crop, error."""


def encode(spec: EncodeSpec, journal: Journal) -> EncodeResult:
    """Encode a dataset, or find that it was encoded before with the same content, encoder and settings."""
    began = time.monotonic()
    folder = ModelFolder(*registry.fetch(spec.model))
    settings = {"resolution": folder.picture_size(), "crop": "centre", "flip": "none"}
    encoder_digest = _encoder_digest(folder)
    identity = [SCHEMA_VERSION, spec.dataset_digest, encoder_digest, settings]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    target = storage.join(spec.output, key)
    reused = storage.exists(storage.join(target, MANIFEST))
    if reused:
        journal.event(f"dataset {key} is encoded already")
        manifest = Manifest.from_json(storage.read_bytes(storage.join(target, MANIFEST)))
    else:
        manifest = _encode_new(spec, journal, folder, settings, encoder_digest, target)
    journal.event(f"{manifest.counts['pairs']} pairs encoded: {manifest.counts}")
    return EncodeResult(
        dataset=target, digest=manifest.digest, counts=manifest.counts, reused=reused, seconds=time.monotonic() - began
    )


def _encode_new(
    spec: EncodeSpec, journal: Journal, folder: ModelFolder, settings: dict, encoder_digest: str, target: str
) -> Manifest:
    rows = list(pairs.read_rows(spec.dataset_uri))
    if (found := pairs.summarise(spec.dataset_uri, rows)[1]) != spec.dataset_digest:
        message = f"dataset {spec.dataset_uri!r} has changed: digest {found}, registered as {spec.dataset_digest}"
        raise BadRequest(message, param="dataset", code="dataset_changed")
    decided = [row for row in rows if row.kind == "pair"]
    units = plan_units(spec.dataset_uri, decided)
    images: Images = {}
    total, began = sum(len(unit["wanted"]) for unit in units), time.monotonic()
    journal.event(f"{len(decided)} decided pairs of {len(rows)} rows: {total} pictures to encode")
    for block in encode_dataset(units, spec.model, settings["resolution"], spec.actors, spec.use_gpu):
        images |= {uid: {name: values[i] for name, values in block.items()} for i, uid in enumerate(block["uid"])}
        rate = len(images) / (time.monotonic() - began)
        journal.metrics(len(images), {"images": len(images), "images_total": total, "images_per_s": rate})

    usable = [row for row in decided if not images[row.uid_0]["error"] and not images[row.uid_1]["error"]]
    _quarantine(target, decided, images, journal)
    if not usable:
        raise DataError(
            f"dataset {spec.dataset_uri!r} has no pair left: all {len(decided)} decided pairs hold a corrupt picture"
        )
    latent_shape, tokenizers = images[usable[0].uid_0]["latents"].shape, folder.tokenizers()
    shards = tuple(_write_shards(target, usable, images, tokenizers, latent_shape))
    manifest = Manifest(
        digest=dataset_digest(settings, encoder_digest, [_identity(row, images) for row in usable]),
        encoder_digest=encoder_digest,
        settings=settings,
        latent_shape=latent_shape,
        num_tokenizers=len(tokenizers),
        num_tokens=tokenizers[0].model_max_length,
        counts=_counts(rows, decided, usable, images),
        shards=shards,
    )
    storage.write_bytes(storage.join(target, MANIFEST), manifest.to_json())
    return manifest


def plan_units(uri: str, decided: list[PairRow]) -> list[Unit]:
    """One unit for each row group; together they hold every image uid once, where it first stands."""
    seen: set[str] = set()
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in decided:
        for uid, column in ((row.uid_0, "jpg_0"), (row.uid_1, "jpg_1")):
            if uid not in seen:
                seen.add(uid)
                groups.setdefault((row.file, row.row_group), []).append({"row": row.row, "column": column, "uid": uid})
    return [{"uri": uri, "file": file, "row_group": group, "wanted": wanted} for (file, group), wanted in groups.items()]


def _pair_id(row: PairRow) -> str:
    return pair_id(row.uid_0, row.uid_1, row.caption, row.key)


def _identity(row: PairRow, images: Images) -> tuple[str, str, str, float]:
    uid_w, uid_l, label = row.winner_first
    return _pair_id(row), str(images[uid_w]["sha256"]), str(images[uid_l]["sha256"]), label


def _write_shards(
    target: str, usable: list[PairRow], images: Images, tokenizers: list[CLIPTokenizer], latent_shape: tuple[int, int, int]
) -> Iterator[Shard]:
    schema = shard_schema(latent_shape, len(tokenizers), tokenizers[0].model_max_length)
    for number, start in enumerate(range(0, len(usable), PAIRS_PER_SHARD)):
        rows = usable[start : start + PAIRS_PER_SHARD]
        chosen = [row.winner_first for row in rows]
        columns: dict[str, list] = {
            "pair_id": [_pair_id(row) for row in rows],
            "label": [label for *_, label in chosen],
        }
        token_ids = tokenize(tokenizers, [row.caption for row in rows])
        columns |= {name: list(token_ids[:, k]) for k, name in enumerate(token_columns(len(tokenizers)))}
        for side, uids in (("w", [uid for uid, _, _ in chosen]), ("l", [uid for _, uid, _ in chosen])):
            of_side = [images[uid] for uid in uids]
            columns[f"uid_{side}"] = uids
            columns[f"latents_{side}"] = [image["latents"].ravel() for image in of_side]
            columns[f"size_{side}"] = [image["size"] for image in of_side]
            columns[f"crop_{side}"] = [image["crop"] for image in of_side]
        yield write_shard(
            number, shard_table(columns, schema), lambda name, data: storage.write_bytes(storage.join(target, name), data)
        )


def _quarantine(target: str, decided: list[PairRow], images: Images, journal: Journal) -> None:
    """Write the pairs that cannot be used, with their causes, beside the shards."""
    lines = []
    for row in decided:
        causes = {uid: str(images[uid]["error"]) for uid in (row.uid_0, row.uid_1) if images[uid]["error"]}
        if causes:
            lines.append(json.dumps({"row": row.key, "pair_id": _pair_id(row), "caption": row.caption, "causes": causes}))
    if lines:
        journal.event(
            f"{len(lines)} pairs hold a picture that cannot be read; see {storage.join(target, QUARANTINE)}", "warning"
        )
        storage.write_bytes(storage.join(target, QUARANTINE), ("\n".join(lines) + "\n").encode())


def _counts(rows: list[PairRow], decided: list[PairRow], usable: list[PairRow], images: Images) -> dict[str, int]:
    kinds = [row.kind for row in rows]
    return {
        "rows": len(rows),
        "pairs": len(usable),
        "ties": kinds.count("tie"),
        "missing": kinds.count("missing"),
        "corrupt": len(decided) - len(usable),
        "duplicates": len(usable) - len({(row.uid_0, row.uid_1, row.caption) for row in usable}),
        "images": sum(not image["error"] for image in images.values()),
    }


def _encoder_digest(folder: ModelFolder) -> str:
    """sha256 of what decides a picture's latents and a caption's tokens: the VAE's and the tokenizers' files."""
    names = [name for name in COMPONENTS[folder.family] if name == "vae" or name.startswith("tokenizer")]
    parts = [registry.folder_digest(storage.as_uri(folder.path / name)) for name in names]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
