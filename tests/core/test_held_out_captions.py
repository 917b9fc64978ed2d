"""The captions of an evaluation that no pair is trained with, chosen by training's own rule."""

from __future__ import annotations

import numpy as np
import pytest

from dde_core.latents.held_out import held_out_captions, hold_out


@pytest.mark.parametrize("num_pairs", [0, 1, 7, 40, 10_000])
@pytest.mark.parametrize("lost", [0.0, 0.1, 0.9])
def test_no_held_out_caption_is_trained_whichever_pairs_are_lost_to_bad_images(num_pairs, lost):
    rng = np.random.default_rng(num_pairs)
    captions = [f"c{i}" for i in range(60)]
    keys = rng.integers(0, 40, len(captions)).astype(np.uint64) * np.uint64(2**58)  # some share a key
    pairs = rng.integers(1, 6, len(captions))
    found = held_out_captions(captions, pairs, keys, num_pairs)
    of_pairs = np.repeat(np.arange(len(captions)), pairs)
    kept = of_pairs[rng.random(len(of_pairs)) >= lost]
    trained = kept[~hold_out(keys[kept], num_pairs)]
    trained_keys = set(keys[trained].tolist())
    found_keys = [keys[captions.index(caption)] for caption in found]
    assert not trained_keys.intersection(int(key) for key in found_keys)
    assert found_keys == sorted(set(found_keys))
    if not lost:
        everything = set(keys.tolist())
        assert {int(key) for key in found_keys} == everything - trained_keys


def test_of_captions_with_one_key_the_first_is_taken():
    keys = np.array([5, 1, 1], np.uint64)
    assert held_out_captions(["c", "b", "a"], np.array([1, 1, 1]), keys, 3) == ["b", "c"]
    assert held_out_captions(["c", "b", "a"], np.array([1, 1, 1]), keys, 2) == ["b"]
    assert held_out_captions(["c", "b", "a"], np.array([1, 1, 1]), keys, 0) == []
