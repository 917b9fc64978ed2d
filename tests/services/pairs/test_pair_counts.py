"""Repeated and contradicted pairs, soft labels, and captions that every tokenizer of CLIP cuts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from dde_core.models.folder import ModelFolder
from dde_core.models.tokens import are_cut
from dde_core.shapes import MODEL_DIR
from services.pairs.pair_counts import PairTally, count_repeats, is_beyond_clip, pair_key
from services.pairs.row import Preference, Row

A_B = pair_key("a", "b", "text")
B_A = pair_key("b", "a", "text")
OTHERS = [pair_key("a", "c", "text"), pair_key("a", "b", "texts"), pair_key("c", "b", "text")]


def test_pairs_are_counted_that_repeat_an_earlier_one_and_that_another_one_contradicts():
    assert count_repeats(b"") == (0, 0)
    assert count_repeats(A_B) == (0, 0)
    assert count_repeats(b"".join([A_B, *OTHERS])) == (0, 0)
    assert count_repeats(A_B * 3 + OTHERS[0]) == (2, 0)
    assert count_repeats(A_B + B_A + OTHERS[0]) == (0, 2)
    assert count_repeats(A_B * 3 + B_A * 2 + OTHERS[1]) == (3, 5)


@given(st.text(max_size=5), st.text(max_size=5), st.text(max_size=5))
def test_turning_a_pair_round_changes_the_lowest_bit_of_its_key_alone(first, second, caption):
    one, other = (
        int.from_bytes(pair_key(*images, caption), "little") for images in ((first, second), (second, first))
    )
    assert one ^ other == (first != second)


def test_a_rankings_pairs_are_told_apart_and_images_may_be_named_better_than_by_uid():
    ranked = tuple(Preference(i, j, 1.0, f"{i}{j}") for i in range(3) for j in range(i + 1, 3))
    tally = PairTally()
    tally.add(Row("0", ("a", "b", "c"), "text", ranked))
    tally.add(Row("1", ("d", "e"), "text", (Preference(0, 1, 0.8, "p"),)), ("b", "a"))
    counts = tally.counts()
    assert (counts.pairs, counts.soft, counts.duplicates, counts.contradicting) == (4, 1, 0, 2)


@pytest.mark.parametrize(
    ("caption", "is_beyond"),
    [
        ("word " * 75, False),
        ("word " * 76, True),
        ("w" * 10_000, False),  # one word: how many tokens it is depends on the vocabulary
        ("7" * 75, False),
        ("7" * 76, True),
        ("a, " * 38, True),
        ("it's " * 37, False),
        ("it's " * 38, True),
        ("." * 1000, False),
        ("e\u0301" * 200, False),  # letters once they are composed
        ("<|endoftext|>" * 75, False),
    ],
)
def test_a_caption_is_beyond_clip_if_its_words_digits_and_punctuation_are_more_than_75(caption, is_beyond):
    assert is_beyond_clip(caption) == is_beyond


LETTERS = "aB1 2'’_-.,é\u0301ü漢½Ⅷ\u2028\u00a0\x0c\u200d🙂🏽sSreELl<|>"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return ModelFolder(MODEL_DIR).tokenizers()[0]


@settings(deadline=None)
@given(caption=st.text(LETTERS, min_size=150, max_size=400))
def test_whatever_is_beyond_clip_has_more_than_77_tokens(tokenizer, caption):
    tokens = len(tokenizer(caption, truncation=False, verbose=False).input_ids)
    assert tokens > 77 or not is_beyond_clip(caption)


def test_a_caption_is_cut_where_its_tokens_and_the_two_around_it_exceed_the_length(tokenizer):
    room = tokenizer.model_max_length - 2
    captions = ["red " * room, "red " * (room + 1), "", "red"]
    assert are_cut([tokenizer], captions).tolist() == [False, True, False, False]
    assert are_cut([tokenizer, tokenizer], captions).tolist() == [False, True, False, False]
