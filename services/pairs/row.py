"""The meaning of a row of preference data: one definition for every file format (source.py lists them).

A row has one of three shapes:

    pair      ``jpg_0`` and ``jpg_1``; ``label_0`` and ``label_1`` hold each one's share of the preference
    chosen    ``chosen`` was preferred to ``rejected``
    ranking   ``images`` with ``ranks`` (from 1, the best) or ``scores`` (more is better); without either
              the list is best first

and is one of four kinds:

    decided   at least two of its images differ in preference; a ranking contributes every such pair
    tie       equal labels, ranks or scores, or the same image (uid) on both sides
    missing   a label, the ranks or the scores are null, or ``has_label`` is false; nothing else is checked
    bad       unusable; ``cause`` says why, and ``detail`` which columns and values

No content of a row raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from dde_core.latents.schema import pair_id
from services.pairs.details import detail_of

Shape = Literal["pair", "chosen", "ranking"]
Cells = Mapping[str, Any]
"""One row by canonical name (``services.api.requests.Column``). Text that is not UTF-8 is empty bytes."""

MAX_CAPTION_CHARS = 10_000
MAX_UID_CHARS = 1024
MAX_RANKED = 64
MAX_ROUNDING = 0.02
"""How far from 1 the sum of two rounded shares may be: 0.33 and 0.66 are thirds."""
SLOTS: dict[Shape, tuple[tuple[str, str], ...]] = {
    "pair": (("jpg_0", "image_0_uid"), ("jpg_1", "image_1_uid")),
    "chosen": (("chosen", "chosen_uid"), ("rejected", "rejected_uid")),
}
"""(image column, uid column) of each slot; a ranking has lists instead."""


@dataclass(frozen=True)
class Preference:
    """``winner`` and ``loser`` are slots: indices into the row's images.

    ``label`` is the winner's share of the preference, above 0.5 and at most 1.
    """

    winner: int
    loser: int
    label: float
    pair_id: str


@dataclass(frozen=True, eq=False)
class Row:
    """One row.

    ``key`` is its position in the source, "file:group:row". ``uids`` has one entry for each image (none where
    the row is missing or bad). ``ties`` counts the equal pairs of a decided ranking. ``images`` are filled on
    request only: bytes, a path relative to the dataset's folder, or a URI.
    """

    key: str
    uids: tuple[str, ...] = ()
    caption: str = ""
    preferences: tuple[Preference, ...] = ()
    ties: int = 0
    cause: str = ""
    kind: Literal["decided", "tie", "missing", "bad"] = "decided"
    images: tuple[bytes | str | None, ...] = ()
    detail: str = ""


class _BadRow(ValueError):
    """A row that cannot be used."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def bad_row(key: str, cause: str, caption: str = "", detail: str = "") -> Row:
    """``detail`` may name a file whose name is not UTF-8."""
    shown = detail.encode(errors="backslashreplace").decode()
    return Row(key, caption=caption, cause=cause, kind="bad", detail=shown)


def read_row(
    shape: Shape, key: str, cells: Cells, locate: Callable[[str], str], *, with_images: bool = False
) -> Row:
    """Interpret one row; an unusable one becomes a bad row.

    ``locate`` turns an image's path as the file has it into one relative to the dataset's folder.
    """
    caption = ""
    try:
        if _is_missing(shape, cells):
            return Row(key, kind="missing")
        caption = _caption(cells["caption"])
        image_cells, uid_cells = _slot_cells(shape, cells)
        images = [_located(image, locate) for image in image_cells]
        uids = tuple(
            _uid(uid, image, f"{key}:{slot}")
            for slot, (uid, image) in enumerate(zip(uid_cells, images, strict=True))
        )
        ordered = [
            (winner, loser, label)
            for winner, loser, label in _ordered_slots(shape, cells, len(uids))
            if uids[winner] != uids[loser]
        ]
        return Row(
            key,
            uids,
            caption,
            _preferences(shape, key, cells, uids, caption, ordered),
            ties=math.comb(len(uids), 2) - len(ordered) if ordered else 0,
            kind="decided" if ordered else "tie",
            images=tuple(_content(image) for image in images) if with_images else (),
        )
    except _BadRow as error:
        return bad_row(key, error.cause, caption, detail_of(error.cause, cells))


def _is_missing(shape: Shape, cells: Cells) -> bool:
    has_label = cells.get("has_label")
    if has_label is not None and not isinstance(has_label, bool | int):
        raise _BadRow("wrong_type")
    labels = {"pair": ("label_0", "label_1"), "chosen": (), "ranking": ("ranks", "scores")}[shape]
    return has_label in (False, 0) or any(name in cells and cells[name] is None for name in labels)


def _caption(value: Any) -> str:
    if value is None or value == "":
        raise _BadRow("caption_missing")
    text = _text(value)
    if len(text) > MAX_CAPTION_CHARS:
        raise _BadRow("caption_too_long")
    if "\0" in text:
        raise _BadRow("caption_null_byte")
    if not text.strip():
        raise _BadRow("caption_missing")
    return text


def _text(value: Any) -> str:
    """Text that can be encoded as UTF-8: JSON can hold half a surrogate pair."""
    if isinstance(value, bytes):
        raise _BadRow("not_unicode")
    if not isinstance(value, str):
        raise _BadRow("wrong_type")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRow("not_unicode") from error
    return value


def _slot_cells(shape: Shape, cells: Cells) -> tuple[list[Any], list[Any]]:
    """The row's image cells and uid cells, one for each slot."""
    if shape != "ranking":
        slots = SLOTS[shape]
        return [cells.get(image) for image, _ in slots], [cells.get(uid) for _, uid in slots]
    images = cells["images"]
    if images is None:
        raise _BadRow("image_missing")
    if not isinstance(images, list):
        raise _BadRow("wrong_type")
    if len(images) < 2:
        raise _BadRow("too_few_images")
    if len(images) > MAX_RANKED:
        raise _BadRow("too_many_images")
    uids = cells.get("image_uids")
    if uids is None:
        return images, [None] * len(images)
    if not isinstance(uids, list) or len(uids) != len(images):
        raise _BadRow("uids_length")
    return images, uids


def _located(image: Any, locate: Callable[[str], str]) -> Any:
    """The image cell, with a path that will be read made relative to the dataset's folder.

    A struct's path is read only where it has no bytes. Neither path nor bytes: None.
    """
    if isinstance(image, dict):
        content = image.get("bytes")
        path = image.get("path")
        if not isinstance(content, bytes | None) or not isinstance(path, str | None):
            raise _BadRow("wrong_type")
        if content is not None or not path:
            return image
        return locate(_text(path))
    if isinstance(image, str):
        return locate(_text(image)) if image else None
    if not isinstance(image, bytes | None):
        raise _BadRow("wrong_type")
    return image


def _content(image: Any) -> bytes | str | None:
    """An image's bytes, path or URI."""
    return image.get("bytes") if isinstance(image, dict) else image


def _uid(value: Any, image: Any, default: str) -> str:
    """The uid column, else the path that the image is read from, else ``default``."""
    if value is None or value == "":
        value = image if isinstance(image, str) else default
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    text = str(value) if is_integer else _text(value)
    if "\0" in text:
        raise _BadRow("uid_null_byte")
    if len(text) > MAX_UID_CHARS:
        raise _BadRow("uid_too_long")
    return text


def _ordered_slots(shape: Shape, cells: Cells, count: int) -> list[tuple[int, int, float]]:
    """(winner, loser, the winner's share) of every two slots that differ in preference."""
    if shape == "chosen":
        return [(0, 1, 1.0)]
    if shape == "pair":
        first, second = _labels(cells)
        if first == second:
            return []
        return [(0, 1, first)] if first > second else [(1, 0, second)]
    places = _places(cells, count)
    unequal = [(i, j) for i, j in combinations(range(count), 2) if places[i] != places[j]]
    return [(i, j, 1.0) if places[i] < places[j] else (j, i, 1.0) for i, j in unequal]


def _labels(cells: Cells) -> tuple[float, float]:
    """The labels of a pair: equal, or shares that add up to 1.

    A file holds shares, which may be rounded, or votes: whole numbers. True is 1 and false is 0.
    """
    first = _label(cells["label_0"])
    second = _label(cells["label_1"])
    if math.isnan(first) or math.isnan(second):
        raise _BadRow("label_nan")
    total = first + second
    if min(first, second) < 0 or not math.isfinite(total):
        raise _BadRow("label_sum")
    if first == second or _is_one(total, 1e-6):
        return first, second
    are_votes = first.is_integer() and second.is_integer()
    if not are_votes and not _is_one(total, MAX_ROUNDING):
        raise _BadRow("label_sum")
    return first / total, second / total


def _is_one(total: float, tolerance: float) -> bool:
    return abs(total - 1) <= tolerance + 1e-9


def _label(value: Any) -> float:
    """A label, which may be true or false, as a number."""
    return float(value) if isinstance(value, bool) else _number(value)


def _places(cells: Cells, count: int) -> list[float]:
    """A number for each image of a ranking, less is better: its rank, minus its score, or its position.

    Ranks count from 1, so that a column where more is better, such as [1, 0], is not mistaken for ranks.
    """
    scores = [-score for score in _numbers(cells, "scores", count)] if "scores" in cells else []
    if "ranks" not in cells:
        return scores or [float(position) for position in range(count)]
    ranks = _numbers(cells, "ranks", count)
    if min(ranks) < 1:
        raise _BadRow("ranks_below_one")
    if scores and any(_order(ranks, i, j) != _order(scores, i, j) for i, j in combinations(range(count), 2)):
        raise _BadRow("scores_against_ranks")
    return ranks


def _order(places: list[float], i: int, j: int) -> int:
    """-1 where i comes before j, 1 where it comes after, 0 for a tie."""
    return (places[i] > places[j]) - (places[i] < places[j])


def _numbers(cells: Cells, column: str, count: int) -> list[float]:
    """The numbers of a ranking's images. Raises _BadRow where they are not finite, or not one an image."""
    values = cells[column]
    if not isinstance(values, list):
        raise _BadRow("wrong_type")
    if len(values) != count:
        raise _BadRow(f"{column}_length")
    is_score = column == "scores"  # where HPDv2 has 1 for the preferred image, others have true
    numbers = [
        math.nan if value is None else _number(int(value) if is_score and isinstance(value, bool) else value)
        for value in values
    ]
    if not all(map(math.isfinite, numbers)):
        raise _BadRow(f"{column}_nan")
    return numbers


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _BadRow("wrong_type")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _preferences(
    shape: Shape,
    key: str,
    cells: Cells,
    uids: tuple[str, ...],
    caption: str,
    ordered: list[tuple[int, int, float]],
) -> tuple[Preference, ...]:
    """The row's preferences, with their pair ids.

    A pair id is the mapped column, else a hash of what identifies the row; a ranking's also name the slots.
    """
    value = cells.get("pair_id")
    row_id = None if value is None or value == "" else _uid(value, None, key)

    def identify(winner: int, loser: int) -> str:
        low, high = sorted((winner, loser))
        slots = f":{low}:{high}" if shape == "ranking" else ""
        if row_id:
            return f"{row_id}{slots}"
        return pair_id(uids[low], uids[high], caption, key + slots)

    return tuple(
        Preference(winner, loser, label, identify(winner, loser)) for winner, loser, label in ordered
    )
