"""Captions as token ids: several threads may share a tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from dde_core.models.tokens import are_cut, load_tokenizers, tokenize
from dde_core.shapes import MODEL_DIR


@pytest.fixture
def switch_threads_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switch_threads_often")
def test_captions_are_tokenized_by_several_threads_at_once():
    tokenizers = load_tokenizers(MODEL_DIR, "sd15")
    captions = ["a red circle " * n for n in (1, 30, 100)]
    wanted = tokenize(tokenizers, captions)

    def both(_: int) -> bool:
        is_cut = are_cut(tokenizers, captions)
        return is_cut.tolist() == [False, True, True] and bool(
            (tokenize(tokenizers, captions) == wanted).all()
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(both, range(200)))
