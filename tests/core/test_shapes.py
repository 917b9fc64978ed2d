"""The shapes world: captions and scenes invert one another, scorers rank, shipped files are sound."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from transformers import CLIPTokenizer

from dde_core.errors import DataError
from dde_core.shapes import MODEL_DIR, PAIRS_FILE, PROMPTS_FILE
from dde_core.shapes.pairs import label_pairs
from dde_core.shapes.scenes import Scene, all_captions, all_scenes, caption, parse, render
from dde_core.shapes.scorers import score

FULL = Scene(shape="circle", color="red", size="large", place="centre", background="black")


def scores(scene: Scene, text: str) -> dict[str, float]:
    return {name: float(values[0]) for name, values in score(render(scene)[None], [text]).items()}


def test_captions_and_scenes_invert_one_another():
    assert all(caption(parse(text)) == text for text in all_captions())
    assert all(parse(caption(scene)) == scene for scene in all_scenes())
    assert len(set(all_captions())) == 3456
    assert len(all_scenes()) == 1800


def test_a_caption_outside_the_grammar_is_refused_with_its_text():
    with pytest.raises(DataError, match="'a plaid sphere'"):
        parse("a plaid sphere")


def test_a_drawn_scene_matches_its_caption_and_has_full_fidelity():
    found = scores(FULL, caption(FULL))
    assert found["match"] > 0.99
    assert found["fidelity"] > 0.99


@pytest.mark.parametrize(
    "wrong", [{"color": "blue"}, {"shape": "cross"}, {"place": "left"}, {"background": "white"}]
)
def test_each_wrong_attribute_costs_a_fifth_of_the_match(wrong: dict[str, str]):
    other = Scene(**{**FULL.stated(), **wrong})
    assert scores(other, caption(FULL))["match"] == pytest.approx(0.8, abs=0.02)


def test_taste_prefers_large_centred_and_high_contrast_where_the_caption_is_silent():
    text = "a red circle"
    best = scores(Scene(**{**FULL.stated(), "background": "white"}), text)["taste"]
    for worse in ({"size": "small"}, {"place": "left"}, {"background": "pink"}):
        scene = Scene(**{**FULL.stated(), "background": "white", **worse})
        assert scores(scene, text)["taste"] < best - 0.05, worse
        assert scores(scene, text)["match"] > 0.9, worse


def test_taste_follows_the_caption_where_it_speaks():
    small = Scene(**{**FULL.stated(), "size": "small"})
    assert scores(small, "a small red circle")["taste"] > scores(FULL, "a small red circle")["taste"]


def test_spoiling_a_picture_costs_fidelity():
    rng = np.random.default_rng(0)
    spoilt = np.clip(render(FULL) + rng.normal(0, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
    assert score(spoilt[None], ["a red circle"])["fidelity"][0] < 0.5


def test_pictures_of_another_size_are_refused():
    with pytest.raises(DataError, match=r"\[1, 16, 16, 3\]"):
        score(np.zeros((1, 16, 16, 3), np.uint8), ["a red circle"])


def test_the_annotator_prefers_the_better_picture_and_calls_near_equals_ties():
    good, bad = render(FULL), render(Scene(**{**FULL.stated(), "color": "green", "shape": "cross"}))
    table = label_pairs(["a red circle"] * 40, np.stack([good, bad, bad, bad] * 40), np.random.default_rng(0))
    first_is_good = [row["label_0"] == 1.0 for row in table.to_pylist()]
    assert {row["label_0"] + row["label_1"] for row in table.to_pylist()} == {1.0}
    assert 5 < sum(first_is_good) < 35, "the better picture stands on either side"
    ties = label_pairs(["a red circle"] * 5, np.stack([good] * 20), np.random.default_rng(0))
    assert ties["label_0"].to_pylist() == [0.5] * 5


def test_every_word_of_the_world_is_one_token():
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    lengths = {len(tokenizer(text).input_ids) - len(text.split()) for text in all_captions()}
    assert lengths == {2}, "begin and end"


def test_the_shipped_weights_are_float32_and_fit_their_budget():
    files = list(MODEL_DIR.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {str(value.dtype) for path in files for value in load_file(path).values()} == {"float32"}


def test_the_shipped_pairs_have_pick_a_pics_columns_ties_and_no_held_out_prompt():
    table = pq.read_table(PAIRS_FILE)
    assert table.column_names == [
        "jpg_0",
        "jpg_1",
        "label_0",
        "label_1",
        "caption",
        "image_0_uid",
        "image_1_uid",
    ]
    assert table.num_rows == 2000
    assert 10 < table["label_0"].to_pylist().count(0.5) < 400
    assert PAIRS_FILE.stat().st_size <= 6e6
    prompts = PROMPTS_FILE.read_text().splitlines()
    assert len(set(prompts)) == 200
    assert not set(prompts) & set(table["caption"].to_pylist())
