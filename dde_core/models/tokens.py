"""Captions as token ids. Imports no torch, so that a process that only tokenizes starts fast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Bool, Int32
from transformers import BertTokenizer, CLIPTokenizer

from dde_core.errors import ModelError
from dde_core.family import COMPONENTS, Family

Tokenizer = TypeVar("Tokenizer", CLIPTokenizer, BertTokenizer)
WORDS = ("red", "big")
"""Words that a tokenizer must tell apart. Without a vocabulary all of one length have the same ids."""

_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_getting_a_lock = threading.Lock()


def load_tokenizers(path: Path, family: Family) -> list[CLIPTokenizer]:
    """One tokenizer for each text encoder of a diffusers folder. Raises ModelError if one cannot be
    loaded."""
    return [
        load_proven(
            f"{name} of {str(path)!r}",
            partial(CLIPTokenizer.from_pretrained, str(path / name), local_files_only=True),
        )
        for name in COMPONENTS[family]
        if name.startswith("tokenizer")
    ]


def load_proven(where: str, load: Callable[[], Tokenizer]) -> Tokenizer:
    """The tokenizer that ``load`` returns, if it has a vocabulary. ``where`` is it in errors.

    Raises ModelError.
    """
    try:
        tokenizer = load()
        first, second = (tokenizer(word).input_ids for word in WORDS)
    except Exception as error:  # transformers raises whatever its parsers do
        raise ModelError(f"{where} cannot be loaded: {error}") from error
    if first == second:
        words = " and ".join(map(repr, WORDS))
        raise ModelError(f"{where} gives {words} the same ids: its vocabulary is missing")
    return tokenizer


def encode(tokenizer: CLIPTokenizer | BertTokenizer, texts: Sequence[str], **how: Any) -> Any:
    """What the tokenizer returns for texts, called with ``how``; in any thread.

    A text is text only: the name of a special token in it, such as ``<|endoftext|>``, does not end it. A call
    stores its truncation and padding in the tokenizer, so calls of several threads wait for each other.
    """
    with _getting_a_lock:
        lock = _locks.setdefault(tokenizer, threading.Lock())
    with lock:
        return tokenizer(list(texts), split_special_tokens=True, **how)


def tokenize(tokenizers: Sequence[CLIPTokenizer], captions: Sequence[str]) -> Int32[np.ndarray, "b k s"]:
    """Token ids of b captions by k tokenizers, padded and truncated to the tokenizer's length s."""
    ids = []
    for tokenizer in tokenizers:
        encoded = encode(
            tokenizer,
            captions,
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="np",
        )
        ids.append(encoded.input_ids)
    return np.stack(ids, axis=1).astype(np.int32)


def are_cut(tokenizers: Sequence[CLIPTokenizer], captions: Sequence[str]) -> Bool[np.ndarray, " b"]:
    """Which of b captions have more tokens than some tokenizer's length: ``tokenize`` cuts them."""
    is_cut = np.zeros(len(captions), np.bool_)
    for tokenizer in tokenizers:
        encoded = encode(tokenizer, captions, truncation=False, verbose=False)
        is_cut |= np.array([len(ids) > tokenizer.model_max_length for ids in encoded.input_ids], np.bool_)
    return is_cut


def count_tokens(tokenizers: Sequence[CLIPTokenizer], caption: str) -> tuple[int, int]:
    """A caption's tokens, and how many of them ``tokenize`` keeps at most; both without start and end mark.

    They are of the tokenizer that cuts the most, or of the first one.
    """
    counts = []
    for tokenizer in tokenizers:
        (ids,) = encode(tokenizer, [caption], truncation=False, verbose=False).input_ids
        marks = tokenizer.num_special_tokens_to_add()
        counts.append((len(ids) - marks, tokenizer.model_max_length - marks))
    return max(counts, key=lambda count: max(0, count[0] - count[1]))
