"""How many tokens a caption has, and how many of them text encoders read."""

from __future__ import annotations

import pytest

from dde_core.models.tokens import are_cut, count_tokens, load_tokenizers, tokenize
from dde_core.shapes import MODEL_DIR


@pytest.mark.parametrize("words", [0, 1, 13, 14, 15, 40])
def test_a_caption_is_cut_where_it_has_more_tokens_than_are_read(words: int):
    """The shapes model's tokenizer has a length of 16: start, 14 tokens, end."""
    tokenizers = load_tokenizers(MODEL_DIR, "sd15")
    caption = " ".join(["red"] * words)
    assert count_tokens(tokenizers, caption) == (words, 14)
    assert are_cut(tokenizers, [caption]).tolist() == [words > 14]
    red = tokenizers[0].convert_tokens_to_ids("red</w>")
    assert (tokenize(tokenizers, [caption]) == red).sum() == min(words, 14)


def test_of_two_tokenizers_the_one_that_cuts_most_counts():
    long, short = (load_tokenizers(MODEL_DIR, "sd15")[0] for _ in range(2))
    short.model_max_length = 10
    for tokenizers in ([long, short], [short, long]):
        assert count_tokens(tokenizers, " ".join(["red"] * 12)) == (12, 8)
    assert count_tokens([long, short], "red") == (1, 14)
