"""From prompts to token ids, as a scorer's authors make them, and which prompts are too long.

A prompt is text only: the name of a special token in it, such as ``<|endoftext|>``, neither ends it nor
stands for that token.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
from jaxtyping import Int64
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer

from dde_core.errors import ConfigError, DataError, ModelError
from dde_core.models.configs import TextEncoderFields
from dde_core.models.json_files import refuse_pointer
from dde_core.models.tokens import Tokenizer, encode, load_proven
from dde_core.models.vocabulary import END_OF_WORD, check_tokenizer

Text = dict[str, Int64[Tensor, "n tokens"]]
"""``input_ids`` and ``attention_mask`` of n prompts."""

BERT_LIMIT = 35
"""ImageReward's number of tokens, with [CLS] and [SEP]."""
ADDED_TO_BERT = ("[DEC]", "[ENC]")
"""Tokens that BLIP adds to BERT's vocabulary: two rows of its embedding."""


class Prompts:
    """Makes token ids of prompts, in any thread. ``limit``: the most tokens of a prompt, start and end
    included."""

    def __init__(
        self, tokenizer: CLIPTokenizer | BertTokenizer, limit: int, clean: Callable[[str], str] = str
    ) -> None:
        self.limit = limit
        self._tokenizer = tokenizer
        self._clean = clean

    def __call__(self, prompts: Sequence[str]) -> Text:
        """The ids, padded to ``limit``; longer prompts are cut before their end token."""
        encoded = self._encode(
            prompts, max_length=self.limit, padding="max_length", truncation=True, return_tensors="pt"
        )
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        """Indices of the prompts that are cut."""
        encoded = self._encode(prompts, truncation=False, verbose=False)
        return [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > self.limit]

    def _encode(self, prompts: Sequence[str], **how: Any) -> Any:  # Any: transformers is untyped
        texts = [self._clean(prompt) for prompt in prompts]
        return encode(self._tokenizer, texts, **how)


def open_clip_clean(prompt: str) -> str:
    """The text that open_clip's tokenizer splits into words: repaired, entities resolved, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split()).lower()


def read_clip_prompts(folder: Path, encoder: TextEncoderFields, *, cleans: bool, is_exact: bool) -> Prompts:
    """The CLIP tokenizer in a folder, proven against its text encoder.

    ``cleans``: as open_clip. ``is_exact``: every row of the encoder's embedding must have a token. Raises
    DataError.
    """

    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    where = f"tokenizer in {str(folder)!r}"
    try:
        check_tokenizer(where, read, encoder)
    except (ModelError, ConfigError) as error:
        raise DataError(str(error)) from error
    tokenizer = _load(where, lambda: CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
    vocabulary = tokenizer.get_vocab()
    for letter in _byte_letters():
        for token in (letter, f"{letter}{END_OF_WORD}"):
            if token not in vocabulary:
                reason = f"lacks {token!r}: a prompt with this byte would end there"
                raise DataError(f"{where} {reason}. Use the whole vocabulary of CLIP")
    end = tokenizer.eos_token_id
    if encoder.end_id is None and end != max(vocabulary.values()):
        raise DataError(
            f"{where}: the id of its end token must be the greatest, where text is pooled, got {end}"
        )
    if is_exact and len(vocabulary) != encoder.vocabulary:
        reason = f"has {len(vocabulary)} tokens, the text encoder's embedding {encoder.vocabulary} rows"
        raise DataError(f"{where} does not belong to the text encoder: it {reason}")
    return Prompts(tokenizer, encoder.positions, open_clip_clean if cleans else str)


def read_bert_prompts(folder: Path, rows: int, positions: int) -> Prompts:
    """The BERT vocabulary in a folder, proven against the rows of its embedding. Raises DataError."""
    where = f"tokenizer in {str(folder)!r}"
    path = folder / "vocab.txt"
    if not path.is_file():
        raise DataError(f"{where} lacks vocab.txt, the vocabulary of BERT")
    data = path.read_bytes()
    try:
        refuse_pointer(data, "vocab.txt")
        tokens = data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except (ModelError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: vocab.txt cannot be read: {error}") from error
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"):
        if token not in vocabulary:
            raise DataError(f"{where}: vocab.txt lacks {token}")
    for token in ADDED_TO_BERT:
        vocabulary.setdefault(token, len(vocabulary))
    if len(vocabulary) != rows:
        reason = f"vocab.txt and {' and '.join(ADDED_TO_BERT)} are {len(vocabulary)} tokens"
        raise DataError(
            f"{where} does not belong to the text encoder, whose embedding has {rows} rows: {reason}"
        )
    return Prompts(_load(where, lambda: BertTokenizer(vocab=vocabulary)), min(BERT_LIMIT, positions))


def _load(where: str, load: Callable[[], Tokenizer]) -> Tokenizer:
    try:
        return load_proven(where, load)
    except ModelError as error:
        raise DataError(str(error)) from error


def _byte_letters() -> list[str]:
    """The letters that stand for the 256 bytes in CLIP's vocabulary; printable ones stand for themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
