"""The tables of the paper that printed the method, with our rows beside theirs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dde_core.score_table import ScoreTable
from dde_core.scorers.kinds import KindName
from services.api.reports import Comparison, PublishedRow, PublishedTable

SOURCE = "DDE, arXiv 2411.14871v3, {}"
COLUMNS: dict[KindName, str] = {"clip": "CLIP", "hps": "HPS", "pickscore": "PickScore"}
"""The scorers of its tables, in their order."""
SCALE = 10
"""The tables print 10 times the cosine."""
CONDITIONS = (
    "Theirs: {model} aligned on Pick-a-Pic v2, the 300-odd prompts of its validation set, 8 images each; "
    "sampler, guidance, resolution and the scorers' checkpoints are not printed. Ours: the prompts and "
    "settings of this report. Compare differences between rows of one source rather than rows of two."
)
Printed = dict[str, tuple[tuple[float, float], ...]]

SD15: Printed = {
    "SD1.5": ((3.200, 0.657), (2.622, 0.208), (2.049, 0.131)),
    "SFT": ((3.306, 0.685), (2.714, 0.245), (2.101, 0.137)),
    "Uniform": ((3.313, 0.748), (2.703, 0.234), (2.105, 0.134)),
    "Discounted": ((3.317, 0.730), (2.720, 0.248), (2.083, 0.145)),
    "DDE": ((3.414, 0.627), (2.725, 0.216), (2.112, 0.137)),
    "DDE-Single": ((3.386, 0.722), (2.723, 0.204), (2.117, 0.129)),
    "DDE-Step": ((3.168, 0.671), (2.600, 0.671), (2.056, 0.123)),
}
SDXL: Printed = {
    "SDXL": ((3.664, 0.579), (2.803, 0.172), (2.154, 0.145)),
    "Uniform": ((3.699, 0.542), (2.806, 0.168), (2.191, 0.134)),
    "Discounted": ((3.677, 0.540), (2.742, 0.155), (2.136, 0.130)),
    "DDE": ((3.715, 0.521), (2.831, 0.175), (2.224, 0.137)),
}
BEAT_RATIOS: dict[str, tuple[float, ...]] = {
    "SFT": (0.5798, 0.7362, 0.6840),
    "Uniform": (0.6043, 0.6840, 0.6656),
    "Discounted": (0.5767, 0.7301, 0.5951),
    "DDE": (0.6564, 0.7669, 0.7270),
}


def published_tables(table: ScoreTable, comparisons: Sequence[Comparison]) -> list[PublishedTable]:
    """Tables 2 (SD1.5), 3 (SDXL) and 4 (beat ratios against SD1.5) with our rows, none without their scorers.

    A column has our scores of the first scorer of its kind, in alphabetical order. Table 4's ratios are all
    k / 326, so theirs count prompts; ours are the prompts whose mean score rose, ties half.
    """
    columns = [_scorer_of(table, kind) for kind in COLUMNS]
    if not any(columns):
        return []
    ours = [_mean_row(table, model, columns) for model in range(len(table.models))]
    won = [_won_row(candidate, columns, comparisons) for candidate in table.models[1:]]
    theirs = [
        PublishedRow(name=name, is_ours=False, values=list(row), deviations=[None] * len(row))
        for name, row in BEAT_RATIOS.items()
    ]
    won_conditions = CONDITIONS.format(model="SD1.5") + " The share of prompts that beat the base."
    return [
        _table("Mean scores x 10, SD1.5", "Table 2", CONDITIONS.format(model="SD1.5"), _printed(SD15) + ours),
        _table("Mean scores x 10, SDXL", "Table 3", CONDITIONS.format(model="SDXL"), _printed(SDXL) + ours),
        _table("Beat ratios against SD1.5", "Table 4", won_conditions, theirs + won),
    ]


def _table(title: str, number: str, conditions: str, rows: list[PublishedRow]) -> PublishedTable:
    return PublishedTable(
        title=title,
        source=SOURCE.format(number),
        conditions=conditions,
        columns=list(COLUMNS.values()),
        rows=rows,
    )


def _printed(printed: Printed) -> list[PublishedRow]:
    return [
        PublishedRow(
            name=name,
            is_ours=False,
            values=[value for value, _ in row],
            deviations=[deviation for _, deviation in row],
        )
        for name, row in printed.items()
    ]


def _scorer_of(table: ScoreTable, kind: KindName) -> str | None:
    return next((scorer for scorer in table.scorers("image") if table.kinds[scorer] == kind), None)


def _mean_row(table: ScoreTable, model: int, columns: Sequence[str | None]) -> PublishedRow:
    scores = [SCALE * np.sort(table.scores[name][model].ravel()) if name else None for name in columns]
    return PublishedRow(
        name=table.models[model],
        is_ours=True,
        values=[None if each is None else float(each.mean()) for each in scores],
        deviations=[None if each is None else float(each.std(ddof=1)) for each in scores],
    )


def _won_row(
    candidate: str, columns: Sequence[str | None], comparisons: Sequence[Comparison]
) -> PublishedRow:
    tests = {each.scorer: each.sign_test for each in comparisons if each.candidate == candidate}
    found = [tests[name] if name else None for name in columns]
    values = [
        None if test is None else (test.wins + test.ties / 2) / (test.wins + test.losses + test.ties)
        for test in found
    ]
    return PublishedRow(name=candidate, is_ours=True, values=values, deviations=[None] * len(columns))
