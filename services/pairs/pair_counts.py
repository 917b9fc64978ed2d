"""Counts of what is odd about pairs: soft labels, repetitions, contradictions, captions that are too long."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from services.api.records import PairCounts
from services.pairs.row import Row

CLIP_TOKENS = 77
"""What the text encoders of SD1.5 and SDXL read of a caption, with the two tokens around it."""
PAIR_KEY_BYTES = 8
_PIECES = re.compile(
    r"<\|(?:start|end)oftext\|>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+", re.IGNORECASE
)
"""CLIP's tokenizer makes one token or more of each of these."""


class PairTally:
    """Counts pairs. Holds PAIR_KEY_BYTES of each."""

    def __init__(self) -> None:
        self._pairs = 0
        self._soft = 0
        self._long_captions = 0
        self._keys = bytearray()

    def add(self, row: Row, images: Sequence[str] = ()) -> None:
        """Count a row's pairs. ``images`` identify its images better than their uids do."""
        images = images or row.uids
        self._pairs += len(row.preferences)
        self._long_captions += len(row.preferences) * is_beyond_clip(row.caption)
        for preference in row.preferences:
            self._soft += preference.label < 1
            self._keys += pair_key(images[preference.winner], images[preference.loser], row.caption)

    def counts(self) -> PairCounts:
        """The counts of the pairs so far."""
        duplicates, contradicting = count_repeats(bytes(self._keys))
        return PairCounts(
            pairs=self._pairs,
            soft=self._soft,
            duplicates=duplicates,
            contradicting=contradicting,
            long_captions=self._long_captions,
        )


def is_beyond_clip(caption: str) -> bool:
    """Whether CLIP's tokenizer, whatever its vocabulary, must cut the caption.

    Words, digits and runs of punctuation are counted. Rare words are several tokens, so a caption may be cut
    although this is false; the encode stage counts with the model's own tokenizers.
    """
    most = CLIP_TOKENS - 2
    return len(caption) > most and len(_PIECES.findall(unicodedata.normalize("NFC", caption))) > most


def pair_key(winner: str, loser: str, caption: str) -> bytes:
    """PAIR_KEY_BYTES that identify a pair. The lowest bit alone says which of the two images won."""
    low, high = sorted((winner, loser))
    digest = blake2b("\0".join((low, high, caption)).encode(), digest_size=PAIR_KEY_BYTES).digest()
    return bytes([digest[0] & 0xFE | (winner == high)]) + digest[1:]


def count_repeats(keys: bytes) -> tuple[int, int]:
    """From the keys of all pairs: how many repeat an earlier one, and how many another one contradicts."""
    numbers = np.frombuffer(keys, "<u8")
    distinct, counts = np.unique(numbers, return_counts=True)
    is_contradicted = np.isin(distinct ^ np.uint64(1), distinct)
    return len(numbers) - len(distinct), int(counts[is_contradicted].sum())
