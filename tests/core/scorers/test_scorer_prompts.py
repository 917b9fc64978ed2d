"""Token ids of prompts, against tokenizers in plain Python."""

from __future__ import annotations

import itertools
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex
from transformers import CLIPTokenizer

from dde_core.models.configs import TextEncoderFields
from dde_core.models.tokens import are_cut, tokenize
from dde_core.scorers.prompts import Prompts, open_clip_clean, read_bert_prompts, read_clip_prompts
from dde_core.shapes import MODEL_DIR
from dde_core.shapes.scenes import all_captions
from tests.support import scorers as tiny

END = "<|endoftext|>"
ROWS = tiny.VOCABULARY
ENCODER = TextEncoderFields(
    vocabulary=ROWS, positions=77, width=32, mlp_width=40, layers=2, projected_width=32, end_id=ROWS - 1
)
HARD = [
    "a red star",
    "A  Red\tSTAR",
    "“the star’s end”",
    "star &amp;amp; text",
    "ﬁne — ½ é 星",
    f"a {END} star",
    f"{END} {END}",
    "<|startoftext|> big",
    "",
    "a " * 100,
]


def byte_pairs(word: str) -> list[int]:
    """CLIP's ids of a word: bytes as letters, then the earliest merge first."""
    vocabulary, merges = tiny.clip_vocabulary()
    ranks = {pair: i for i, pair in enumerate(merges)}
    letters = [tiny.byte_letters()[byte] for byte in word.encode()]
    parts = [*letters[:-1], f"{letters[-1]}</w>"]
    while True:
        pairs = list(itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)), default=None)
        if best not in ranks:
            return [vocabulary[part] for part in parts]
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]


def clip_ids(text: str) -> list[int]:
    """Ids of one prompt with start and end, cut to 77 and padded with the end."""
    ids = [number for word in regex.findall(WORD, text) for number in byte_pairs(word)]
    framed = [ROWS - 2, *ids[:75], ROWS - 1]
    return framed + [ROWS - 1] * (77 - len(framed))


WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""How CLIP's authors split text; special tokens are no words here."""


def read(folder: Path, *, cleans: bool) -> Prompts:
    return read_clip_prompts(tiny.write_clip_tokenizer(folder), ENCODER, cleans=cleans, is_exact=True)


@pytest.mark.parametrize("prompt", HARD)
def test_clip_reads_prompts_as_the_tokenizer_of_transformers(prompt: str, tmp_path: Path):
    text = " ".join(unicodedata.normalize("NFC", prompt).split()).lower()
    found = read(tmp_path, cleans=False)([prompt])
    assert found["input_ids"][0].tolist() == clip_ids(text)


@pytest.mark.parametrize("prompt", HARD)
def test_hps_reads_prompts_as_open_clip(prompt: str, tmp_path: Path):
    found = read(tmp_path, cleans=True)([prompt])
    assert found["input_ids"][0].tolist() == clip_ids(CLEANED.get(prompt, prompt.lower()))


CLEANED = {
    "“the star’s end”": '"the star\'s end"',
    "star &amp;amp; text": "star & text",
    "ﬁne — ½ é 星": "fine — ½ é 星",
}
"""What open_clip makes of the text before it splits it into words."""


@pytest.mark.parametrize("prompt", CLEANED)
def test_text_is_repaired_as_in_open_clip(prompt: str):
    assert open_clip_clean(prompt) == CLEANED[prompt]


@pytest.mark.parametrize("prompt", CLEANED)
def test_the_two_tokenizers_differ_on_text_that_one_of_them_repairs(prompt: str, tmp_path: Path):
    plain = read(tmp_path / "a", cleans=False)([prompt])["input_ids"]
    cleaned = read(tmp_path / "b", cleans=True)([prompt])["input_ids"]
    assert (plain != cleaned).any()


@pytest.mark.parametrize("cleans", [False, True])
def test_a_special_token_in_a_prompt_does_not_end_it(cleans: bool, tmp_path: Path):
    prompts = read(tmp_path, cleans=cleans)
    ids = prompts([f"a {END} star"])["input_ids"][0].numpy()
    first_end = int(np.argmax(ids == ROWS - 1))
    assert ids[first_end - 1] == tiny.clip_vocabulary()[0]["star</w>"]


@pytest.mark.parametrize("cleans", [False, True])
def test_long_prompts_are_cut_and_counted(cleans: bool, tmp_path: Path):
    prompts = read(tmp_path, cleans=cleans)
    lengths = (75, 76, 100, 1)
    assert prompts.truncated(["star " * n for n in lengths]) == [1, 2]
    ids = prompts(["star " * n for n in lengths])["input_ids"]
    assert ids.shape == (4, 77)
    assert (ids[:3, -1] == ROWS - 1).all()
    assert (ids[0] == ids[2]).all()


@pytest.mark.parametrize("cleans", [False, True])
def test_a_tokenizer_saved_by_transformers_gives_the_same_ids(cleans: bool, tmp_path: Path):
    """As one file, tokenizer.json, in place of vocab.json and merges.txt."""
    wanted = read(tmp_path / "old", cleans=cleans)(HARD)["input_ids"]
    tokenizer = CLIPTokenizer.from_pretrained(str(tmp_path / "old"), local_files_only=True)
    tokenizer.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "vocab.json").exists()
    saved = read_clip_prompts(tmp_path / "new", ENCODER, cleans=cleans, is_exact=True)
    assert saved(HARD)["input_ids"].tolist() == wanted.tolist()


def test_prompts_are_read_by_several_threads_at_once(tmp_path: Path):
    prompts = read(tmp_path, cleans=True)
    texts = ["star " * n for n in (1, 30, 100)]
    wanted = prompts(texts)["input_ids"]

    def both(_: int) -> bool:
        return prompts.truncated(texts) == [2] and bool((prompts(texts)["input_ids"] == wanted).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(both, range(200)))


# ---- BERT


def word_pieces(word: str) -> list[int]:
    """BERT's ids of a word: the longest known piece first."""
    vocabulary = {token: i for i, token in enumerate(tiny.bert_vocabulary())}
    found = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if prefix + word[start:end] in vocabulary), None)
        if end is None:
            return [vocabulary["[UNK]"]]
        found.append(vocabulary[prefix + word[start:end]])
        start = end
    return found


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a Red star", ["a", "red", "star"]),
        ("the stars, [SEP]", ["the", "stars", ",", "[", "sep", "]"]),
        ("[ENC] é 星", ["[", "enc", "]", "e", "星"]),
        ("", []),
        ("star " * 100, ["star"] * 100),
    ],
)
def test_image_reward_reads_35_word_pieces(prompt: str, words: list[str], tmp_path: Path):
    rows = len(tiny.bert_vocabulary()) + 2
    prompts = read_bert_prompts(tiny.write_bert_vocabulary(tmp_path), rows, 64)
    ids = [2, *[i for word in words for i in word_pieces(word)][:33], 3]
    found = prompts([prompt])
    assert found["input_ids"][0].tolist() == ids + [0] * (35 - len(ids))
    assert found["attention_mask"][0].tolist() == [1] * len(ids) + [0] * (35 - len(ids))
    assert prompts.truncated([prompt]) == ([0] if len(words) > 33 else [])


# ---- the tokenizer of training


def test_training_reads_a_special_token_in_a_caption_as_text(tmp_path: Path):
    folder = tiny.write_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    caption = f"a {END} star"
    ids = tokenize([tokenizer], [caption])[0, 0]
    assert ids.tolist() == clip_ids(caption)
    assert (tokenizer(caption).input_ids != ids[: len(tokenizer(caption).input_ids)]).any()
    assert are_cut([tokenizer], [END * 20]).tolist() == [True]


def test_training_gives_ordinary_captions_the_ids_that_it_always_gave():
    """So encoded datasets keep their identity."""
    tokenizer = CLIPTokenizer.from_pretrained(str(MODEL_DIR / "tokenizer"), local_files_only=True)
    captions = [*sorted(all_captions())[:200], "", "A Big, red star!", "star " * 40, "it's 2 stars — é"]
    before = tokenizer(captions, max_length=16, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(tokenize([tokenizer], captions)[:, 0], before.input_ids)
    assert not any(re.search(r"<\|", caption) for caption in captions)
