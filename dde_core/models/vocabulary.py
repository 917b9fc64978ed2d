"""A CLIP tokenizer's files, proven against the text encoder that reads its ids. Imports no torch.

A tokenizer whose vocabulary or merges are missing or cut off still loads, and gives every caption the same or
other ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dde_core.errors import ConfigError, IncompleteModelError, ModelError
from dde_core.models.configs import TextEncoderFields
from dde_core.models.json_files import Fields, parse_object, refuse_pointer

CONFIG = "tokenizer_config.json"
SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
"""The special tokens, and those of a config that does not name them."""
LEAST_LENGTH = 3
"""Start, a token and end."""
END_OF_WORD = "</w>"
TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

Read = Callable[[str], bytes | None]
"""The contents of a file in the tokenizer's folder; None if there is no such file."""


def check_tokenizer(part: str, read: Read, encoder: TextEncoderFields) -> None:
    """Raises ModelError or ConfigError for files that give other ids than the encoder was trained on."""
    config = _object(part, CONFIG, read)
    if config is None:
        raise IncompleteModelError(f"{part} lacks {CONFIG}")
    fields = Fields(part, config)
    kind = fields.get("tokenizer_class", "CLIPTokenizer")
    if kind not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise fields.refusal("tokenizer_class", "must be 'CLIPTokenizer'")
    fields.one_of("padding_side", "right", ("right", "left"))
    if fields.whole("model_max_length", None, least=LEAST_LENGTH) > encoder.positions:
        positions = f"max_position_embeddings = {encoder.positions}"
        raise fields.refusal("model_max_length", f"must be at most the text encoder's {positions}")
    try:
        vocabulary, merges = _vocabulary(part, read)
        ids = vocabulary | dict(_added(part, config, read))
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{part} has tokens or merges that cannot be read: {error}") from error
    outside = [token for token, number in ids.items() if not _is_row(number, encoder.vocabulary)]
    if outside:
        reason = f"must be one of the text encoder's vocab_size = {encoder.vocabulary} rows"
        raise ConfigError(f"{part}: the id of {outside[0]!r}", ids[outside[0]], reason)
    _check_merges(part, vocabulary, merges)
    special = {name: _content(fields.get(name, default)) for name, default in SPECIAL.items()}
    for name, token in special.items():
        if token not in ids:
            raise ConfigError(f"{part}.{name}", token, "must be in the vocabulary")
    if encoder.end_id not in (None, ids[special["eos_token"]]):
        reason = f"must be the text encoder's eos_token_id, {encoder.end_id}, where text is pooled"
        raise ConfigError(f"{part}: the id of eos_token", ids[special["eos_token"]], reason)


def _is_row(value: object, rows: int) -> bool:
    return isinstance(value, int) and 0 <= value < rows


def _object(part: str, name: str, read: Read) -> dict[str, Any] | None:
    data = read(name)
    return None if data is None else parse_object(data, f"{part}/{name}")


def _vocabulary(part: str, read: Read) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The ids of tokens, and the pairs that are merged, from the files that transformers reads."""
    whole = _object(part, "tokenizer.json", read)
    if whole is not None:
        model = whole.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise ModelError(f"{part}/tokenizer.json must hold a model with a vocab")
        merges = model.get("merges")
        if not isinstance(merges, list):
            raise ModelError(f"{part}/tokenizer.json must hold a model with merges")
        return model["vocab"], [_pair(each) for each in merges]
    vocabulary = _object(part, "vocab.json", read)
    data = read("merges.txt")
    if vocabulary is None or data is None:
        raise IncompleteModelError(f"{part} lacks tokenizer.json, or vocab.json and merges.txt")
    refuse_pointer(data, f"{part}/merges.txt")
    lines = data.decode().split("\n")
    return vocabulary, [_pair(line) for line in lines if line.strip() and not line.startswith("#version")]


def _pair(merge: Any) -> tuple[str, str]:
    """The tokens of a merge. Raises TypeError or ValueError if it is not one of two."""
    first, second = merge.split() if isinstance(merge, str) else merge
    return str(first), str(second)


def _check_merges(part: str, vocabulary: Mapping[str, int], merges: list[tuple[str, str]]) -> None:
    """Words must reach different tokens, and every token of several characters must be reached by merges."""
    ends = {vocabulary.get(f"{letter}{END_OF_WORD}") for letter in "abcdefghijklmnopqrstuvwxyz"}
    if len(ends - {None}) < 2:
        raise ModelError(f"{part} has no vocabulary of CLIP: different words would get the same ids")
    merged = {"".join(pair) for pair in merges}
    if unknown := merged - set(vocabulary):
        raise ModelError(f"{part} merges to {min(unknown)!r}, which is not in its vocabulary")
    characters = (token for token in vocabulary if len(token.removesuffix(END_OF_WORD)) > 1)
    unreached = [token for token in characters if token not in merged and not token.startswith("<|")]
    if unreached:
        count = f"{len(unreached)} of {len(vocabulary)} tokens"
        raise ModelError(
            f"{part} has no merges for {count}, such as {unreached[0]!r}: its merges are cut off"
        )


def _added(part: str, config: Mapping[str, Any], read: Read) -> Iterator[tuple[str, Any]]:
    """Tokens that are added to the vocabulary, from each of the files that may name them."""
    whole = _object(part, "tokenizer.json", read) or {}
    for token in whole.get("added_tokens") or ():
        yield _content(token), token.get("id")
    for number, token in (config.get("added_tokens_decoder") or {}).items():
        yield _content(token), int(number)
    yield from (_object(part, "added_tokens.json", read) or {}).items()


def _content(token: Any) -> str:
    """A token's text: it is written as text, or as an object that holds it."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)
