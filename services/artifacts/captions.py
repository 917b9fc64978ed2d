"""Captions that a dataset's pairs hold out of training, as a file of prompts.

Training holds whole captions out, by the hash of their tokens (dde_core/latents/held_out.py). Here the same
rule runs on the captions of the dataset's rows, before they are encoded.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dde_core.family import COMPONENTS, Family
from dde_core.latents.held_out import caption_keys, held_out_captions
from services.api.records import ModelRecord
from services.artifacts.apart import call_apart
from services.artifacts.models import folder_digest
from services.storage import files

Tokenizers = tuple[str, Family]
"""The folder of a model, and its family: which tokenizers it has."""


def held_out(captions: Mapping[str, int], models: Sequence[ModelRecord], num_pairs: int) -> list[str]:
    """The captions that ``num_pairs`` held-out pairs keep out of training, whichever model is trained.

    ``captions`` counts the decided pairs of each. Of captions with the same tokens there is the first. The
    order is that of the first model's keys. Raises ModelError for a tokenizer that cannot be loaded.
    """
    texts = list(captions)
    pairs = np.fromiter(captions.values(), np.int64, len(texts))
    found: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="dde-tokenizers-") as scratch:
        for number, (uri, family) in enumerate(_distinct(models).values()):
            folder = files.local_path(uri) or _copied(uri, family, Path(scratch) / str(number))
            keys = call_apart("tokenizing the captions", _keys, folder, family, texts)
            found.append(held_out_captions(texts, pairs, keys, num_pairs))
    in_all = set.intersection(*map(set, found))
    return [caption for caption in found[0] if caption in in_all]


def digest_of(models: Sequence[ModelRecord]) -> str:
    """Equal for equal tokenizers."""
    return hashlib.sha256(json.dumps(sorted(_distinct(models))).encode()).hexdigest()


def _distinct(models: Sequence[ModelRecord]) -> dict[str, Tokenizers]:
    """Each set of tokenizers once, by its digest. Those of adapters are of the model that they modify."""
    found: dict[str, Tokenizers] = {}
    for model in models:
        uri = (model.adapter_of or model).uri
        digests = [folder_digest(files.join(uri, name)) for name in _names(model.family)]
        found.setdefault("\0".join(digests), (uri, model.family))
    return found


def _names(family: Family) -> list[str]:
    return [name for name in COMPONENTS[family] if name.startswith("tokenizer")]


def _copied(uri: str, family: Family, folder: Path) -> Path:
    for name in _names(family):
        files.copy_folder(files.join(uri, name), files.as_uri(folder / name))
    return folder


def _keys(folder: Path, family: Family, texts: list[str]) -> np.ndarray:
    from dde_core.models.tokens import load_tokenizers, tokenize  # only here: they load transformers

    return caption_keys(tokenize(load_tokenizers(folder, family), texts))
