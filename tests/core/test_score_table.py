import numpy as np
import pytest

from dde_core.errors import DataError
from dde_core.score_table import Prompt, ScoreRow, ScoreTable, place_rows


def table(**changes):
    given = {
        "models": ["base", "tuned"],
        "prompts": [Prompt("a cat"), Prompt("a dog", "animals")],
        "images_per_prompt": 3,
        "kinds": {"clip": "clip", "spread": "diversity", "away": "drift"},
        "scores": {
            "clip": np.zeros((2, 2, 3)),
            "spread": np.zeros((2, 2)),
            "away": np.array([np.nan, 0.5]),
        },
    }
    return ScoreTable(**(given | changes))


def rows(num_models=2, num_prompts=2, num_images=3):
    return [
        ScoreRow(m, p, i, {"clip": 100.0 * m + 10 * p + i, "hps": -float(i)})
        for m in range(num_models)
        for p in range(num_prompts)
        for i in range(num_images)
    ]


def test_scorers_are_listed_by_the_level_of_their_kind():
    assert table().scorers("image", "prompt") == ["clip", "spread"]
    assert table().scorers("model") == ["away"]
    assert table().by_prompt("spread").shape == (2, 2, 1)
    assert table().by_prompt("clip").shape == (2, 2, 3)
    assert not table().kind("away").higher_is_better


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["base"]}, r"at least one candidate, got \['base'\]"),
        ({"models": ["a", "a"]}, "different names"),
        ({"prompts": []}, "0 prompts"),
        ({"kinds": {"clip": "clip"}}, r"kinds are of scorers \['clip'\]"),
        (
            {"kinds": {"clip": "clip"}, "scores": {"clip": np.zeros((2, 3, 2))}},
            r"scorer 'clip': scores must be float64 \[2, 2, 3\], got float64 \[2, 3, 2\]",
        ),
        (
            {"kinds": {"away": "drift"}, "scores": {"away": np.array([0.1, np.nan])}},
            r"scorer 'away': scores must be finite, got nan at \[1\]",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused_by_scorer_and_place(changes, message):
    with pytest.raises(DataError, match=message):
        table(**changes)


def test_rows_in_any_order_fill_the_same_table():
    one = place_rows(rows(), ["clip", "hps"], 2, 2, 3)
    other = place_rows(rows()[::-1], ["hps", "clip"], 2, 2, 3)
    assert one["clip"][1, 0, 2] == 102
    assert all((one[scorer] == other[scorer]).all() for scorer in ("clip", "hps"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (rows()[:-2], "2 images are not scored, the first is image 1 of prompt 1 of model 1"),
        ([*rows(), rows()[4]], "image 1 of prompt 1 of model 0 is scored twice"),
        (rows(3), "image 0 of prompt 0 of model 2 is outside of 2 models x 2 x 3"),
        ([ScoreRow(0, 0, 0, {"clip": 1.0})], r"has scores of \['clip'\], expected \['clip', 'hps'\]"),
        ([ScoreRow(0, -1, 0, {"clip": 1.0, "hps": 0.0})], "is outside of"),
    ],
)
def test_rows_that_are_missing_or_too_many_are_refused_by_image(given, message):
    with pytest.raises(DataError, match=message):
        place_rows(given, ["clip", "hps"], 2, 2, 3)
