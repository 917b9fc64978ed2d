"""The meaning of a row of preference data, for each shape of rows."""

from __future__ import annotations

import json
import math
import pickle
from itertools import product

import pytest

from dde_core.latents.schema import pair_id
from services.pairs.row import MAX_CAPTION_CHARS, MAX_RANKED, Row, read_row

PAIR = {
    "jpg_0": b"0",
    "jpg_1": b"1",
    "label_0": 1.0,
    "label_1": 0.0,
    "caption": "text",
    "image_0_uid": "a",
    "image_1_uid": "b",
}
RANKING = {"images": ["a.png", "b.png", "c.png"], "ranks": [2, 1, 3], "caption": "text"}


def read(shape: str, cells: dict, **kwargs) -> Row:
    return read_row(shape, "f:0:7", cells, lambda path: path, **kwargs)


def pair(**changes) -> Row:
    return read("pair", PAIR | changes)


def ranking(**changes) -> Row:
    return read("ranking", RANKING | changes)


KINDS = [
    (1.0, 0.0, None, "decided"),
    (0.0, 1.0, True, "decided"),
    (0.7, 0.3, True, "decided"),
    (1, 0, 1, "decided"),
    (0.5, 0.5, True, "tie"),
    (0.0, 0.0, True, "tie"),
    (None, 1.0, True, "missing"),
    (None, None, True, "missing"),
    (1.0, 0.0, False, "missing"),
    (math.nan, 1.0, False, "missing"),
]


@pytest.mark.parametrize(("label_0", "label_1", "has_label", "kind"), KINDS)
def test_a_row_is_decided_a_tie_or_missing_and_only_a_decided_one_has_a_preference(
    label_0, label_1, has_label, kind
):
    row = pair(label_0=label_0, label_1=label_1, has_label=has_label)
    assert (row.kind, row.cause, len(row.preferences)) == (kind, "", int(kind == "decided"))


SHARES = [
    (0.67, 0.33, 0.67),
    (0.333, 0.666, 2 / 3),
    (0.33, 0.66, 2 / 3),  # thirds, cut after two digits
    (0.67, 0.34, 0.67 / 1.01),
    (3, 1, 0.75),  # votes
    (1.0, 9.0, 0.9),
    (0, 2, 1.0),
    (75, 25, 0.75),
    (True, False, 1.0),
    (False, True, 1.0),
    (0.39990234375, 0.60009765625, 0.60009765625),  # float16
    (0.10000000149, 0.89999997616, 0.89999997616),  # float32: stored as it is
]


@pytest.mark.parametrize(("label_0", "label_1", "share"), SHARES)
def test_shares_rounded_shares_votes_and_booleans_become_the_winners_share(label_0, label_1, share):
    (preference,) = pair(label_0=label_0, label_1=label_1).preferences
    assert preference.winner == (label_1 > label_0)
    assert preference.label == pytest.approx(share, abs=1e-12)


def test_labels_that_add_up_to_1_are_kept_to_the_bit():
    for label in (0.7, 0.1, 0.6000000000000001, 1 / 3):
        (preference,) = pair(label_0=label, label_1=1 - label).preferences
        assert preference.label == max(label, 1 - label)


@pytest.mark.parametrize("label", [0, 2, 0.5, 0.49, True, False, 10**30])
def test_equal_labels_are_a_tie_in_whatever_unit(label):
    assert pair(label_0=label, label_1=label).kind == "tie"


BAD = [
    ({"label_0": 0.9, "label_1": 0.3}, "label_sum"),
    ({"label_0": 5.3, "label_1": 4.1}, "label_sum"),
    ({"label_0": 0.5, "label_1": 0.47}, "label_sum"),
    ({"label_0": -1, "label_1": 1}, "label_sum"),
    ({"label_0": math.inf, "label_1": -math.inf}, "label_sum"),
    ({"label_0": 1e308, "label_1": 1.5e308}, "label_sum"),
    ({"label_0": None, "label_1": math.nan, "has_label": 3.5}, "wrong_type"),
    ({"label_0": math.nan}, "label_nan"),
    ({"label_1": 0.5}, "label_sum"),
    ({"label_0": 2.0, "label_1": -1.0}, "label_sum"),
    ({"label_0": math.inf}, "label_sum"),
    ({"label_0": 10**400}, "label_sum"),
    ({"label_0": "1"}, "wrong_type"),
    ({"has_label": "false"}, "wrong_type"),
    ({"caption": None}, "caption_missing"),
    ({"caption": " \n"}, "caption_missing"),
    ({"caption": "x" * (MAX_CAPTION_CHARS + 1)}, "caption_too_long"),
    ({"caption": "a\0b"}, "caption_null_byte"),
    ({"caption": b""}, "not_unicode"),
    ({"caption": "\ud83d"}, "not_unicode"),
    ({"caption": 3}, "wrong_type"),
    ({"image_0_uid": "a\0b"}, "uid_null_byte"),
    ({"image_1_uid": "u" * 5000}, "uid_too_long"),
    ({"image_1_uid": ["u"]}, "wrong_type"),
    ({"pair_id": "p\0"}, "uid_null_byte"),
    ({"jpg_0": 3}, "wrong_type"),
    ({"jpg_0": {"bytes": "text"}}, "wrong_type"),
]


@pytest.mark.parametrize(("changes", "cause"), BAD)
def test_an_unusable_row_is_bad_with_its_cause(changes, cause):
    row = pair(**changes)
    assert (row.kind, row.cause, row.preferences, row.key) == ("bad", cause, (), "f:0:7")


def test_a_null_label_is_missing_whatever_else_is_wrong():
    assert pair(label_0=None, caption=None, image_0_uid="\0").kind == "missing"


def test_the_longest_caption_is_kept_whole():
    assert pair(caption="ü" * MAX_CAPTION_CHARS).caption == "ü" * MAX_CAPTION_CHARS


def test_the_winner_has_the_larger_share_and_swapping_the_images_swaps_the_slots():
    (first,) = pair(label_0=0.8, label_1=0.2).preferences
    (second,) = pair(label_0=0.2, label_1=0.8).preferences
    assert (first.winner, first.loser, first.label) == (0, 1, 0.8)
    assert (second.winner, second.loser, second.label) == (1, 0, 0.8)


def test_an_image_against_itself_is_a_tie():
    assert pair(image_1_uid="a").kind == "tie"
    assert read("chosen", {"chosen": "a.png", "rejected": "a.png", "caption": "text"}).kind == "tie"


def test_a_uid_is_the_column_else_the_path_else_the_position_of_the_image():
    assert pair().uids == ("a", "b")
    assert pair(image_0_uid=None, image_1_uid=7, jpg_0="x.png").uids == ("x.png", "7")
    assert pair(image_0_uid=None, image_1_uid="").uids == ("f:0:7:0", "f:0:7:1")
    assert pair(image_0_uid=None, jpg_0={"bytes": b"0", "path": "same.jpg"}).uids[0] == "f:0:7:0"
    assert pair(image_0_uid=None, jpg_0={"bytes": None, "path": "same.jpg"}).uids[0] == "same.jpg"


def test_a_pair_id_is_the_column_else_the_hash_of_what_identifies_the_row():
    assert pair(pair_id="mine").preferences[0].pair_id == "mine"
    hashed = pair().preferences[0].pair_id
    assert hashed == pair_id("a", "b", "text", "f:0:7")
    assert hashed == pair(label_0=0.0, label_1=1.0).preferences[0].pair_id


def test_images_are_returned_only_on_request():
    assert pair().images == ()
    assert read("pair", PAIR | {"jpg_1": None}, with_images=True).images == (b"0", None)
    cells = {"jpg_0": {"bytes": b"x", "path": "p"}, "jpg_1": {"bytes": None, "path": "p"}}
    assert read("pair", PAIR | cells, with_images=True).images == (b"x", "p")


def test_chosen_is_preferred_to_rejected_with_the_whole_share():
    row = read("chosen", {"chosen": "a.png", "rejected": "b.png", "caption": "text"})
    (preference,) = row.preferences
    assert (preference.winner, preference.loser, preference.label, row.uids) == (
        0,
        1,
        1.0,
        ("a.png", "b.png"),
    )


@pytest.mark.parametrize(
    "ranks", [[1, 2, 3], [2, 1, 3], [3.5, 1, 1], [1, 1, 1], [4, 3, 2, 1], [1, 1, 2, 2, 3]]
)
def test_a_ranking_holds_every_two_images_of_different_rank_the_better_one_first(ranks):
    row = ranking(images=[f"{i}.png" for i in range(len(ranks))], ranks=ranks)
    better = {(i, j) for i, j in product(range(len(ranks)), repeat=2) if ranks[i] < ranks[j]}
    assert {(each.winner, each.loser) for each in row.preferences} == better
    assert len(row.preferences) == len(better) == len({each.pair_id for each in row.preferences})
    assert row.kind == ("decided" if better else "tie")
    assert row.ties == (math.comb(len(ranks), 2) - len(better) if better else 0)


@pytest.mark.parametrize("scores", [[1, 0], [0.2, -3, 0.9], [True, False], [5, 5, 7]])
def test_of_two_scores_the_greater_one_wins(scores):
    images = [f"{i}.png" for i in range(len(scores))]
    row = read("ranking", {"images": images, "scores": scores, "caption": "text"})
    better = {(i, j) for i, j in product(range(len(scores)), repeat=2) if scores[i] > scores[j]}
    assert {(each.winner, each.loser) for each in row.preferences} == better


def test_an_entry_of_the_wrong_type_is_shown_with_its_list():
    row = ranking(ranks=["1", "2", "3"])
    assert (row.cause, row.detail) == (
        "wrong_type",
        "ranks = ['1', '2', '3'], must be a list of numbers",
    )


def test_ranks_and_scores_of_one_row_must_agree():
    assert ranking(scores=[7, 9, 1]).kind == "decided"
    row = ranking(scores=[1, 2, 3])
    assert (row.cause, row.detail) == (
        "scores_against_ranks",
        "ranks = [2, 1, 3], scores = [1, 2, 3]: they order the images differently",
    )


def test_a_ranking_without_ranks_is_best_first():
    row = read("ranking", {"images": ["a", "b", "c"], "caption": "text"})
    assert [(each.winner, each.loser) for each in row.preferences] == [(0, 1), (0, 2), (1, 2)]


def test_a_rankings_pair_ids_differ_also_where_the_column_has_one_for_the_row():
    ids = [each.pair_id for each in ranking(pair_id="row").preferences]
    assert ids == ["row:0:1", "row:0:2", "row:1:2"]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"ranks": [1, 2]}, "ranks_length"),
        ({"ranks": [1, 2, math.nan]}, "ranks_nan"),
        ({"ranks": [1, 2, None]}, "ranks_nan"),
        ({"ranks": [1, 2, math.inf]}, "ranks_nan"),
        ({"ranks": 3}, "wrong_type"),
        ({"ranks": [1, 0, 0]}, "ranks_below_one"),
        ({"ranks": [0, 1, 2]}, "ranks_below_one"),
        ({"scores": [1]}, "scores_length"),
        ({"scores": [1, None, 2]}, "scores_nan"),
        ({"scores": "abc"}, "wrong_type"),
        ({"images": ["a"] * (MAX_RANKED + 1)}, "too_many_images"),
        ({"images": ["a"]}, "too_few_images"),
        ({"images": None}, "image_missing"),
        ({"images": "abc"}, "wrong_type"),
        ({"image_uids": ["a"]}, "uids_length"),
    ],
)
def test_a_ranking_that_cannot_be_used_is_bad(changes, cause):
    row = ranking(**changes)
    assert (row.kind, row.cause) == ("bad", cause)


def test_a_ranking_whose_ranks_are_null_is_missing():
    assert ranking(ranks=None).kind == "missing"
    assert ranking(scores=None).kind == "missing"


JUNK = [None, "", "x\0", "\udfff", b"", b"\xff", 0, -1, 10**400, math.nan, math.inf, True]
JUNK += [[], [None], {}, {"bytes": 3}, {"path": []}, {"path": "\udfff"}]


@pytest.mark.parametrize("shape", ["pair", "chosen", "ranking"])
def test_no_cell_of_any_kind_raises_and_every_row_survives_pickling_and_json(shape):
    good = {"pair": PAIR, "chosen": {"chosen": "a", "rejected": "b", "caption": "text"}, "ranking": RANKING}[
        shape
    ]
    for name in [*good, "has_label", "pair_id", "image_uids", "chosen_uid", "scores"]:
        for junk in JUNK:
            row = read(shape, good | {name: junk}, with_images=True)
            assert row.kind in ("decided", "tie", "missing", "bad")
            assert (row.kind == "bad") == bool(row.cause)
            assert (row.kind == "decided") == bool(row.preferences)
            json.dumps([row.uids, row.caption, row.cause]).encode()
            "".join([*row.uids, row.caption, row.detail]).encode()
            assert bool(row.detail) == (row.kind == "bad")
            assert len(row.detail) <= 200
            assert vars(pickle.loads(pickle.dumps(row))) == vars(row)
