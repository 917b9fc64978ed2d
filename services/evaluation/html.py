"""The report as one HTML page: without scripts, and with every style and image inside."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dde_core.verdict import Verdict
from services.api.records import Interval
from services.api.reports import Comparison, EvaluationReport

ImageReader = Callable[[int, int, int], bytes]
"""PNG bytes of (model, prompt, image), counted from 0."""

MAX_SEEDS = 4
"""Images of a prompt and a model in the grid."""
THUMBNAIL_PX = 256
JPEG_QUALITY = 85
CLASSES: dict[Verdict, str] = {
    "better": "up",
    "worse": "down",
    "no difference that matters": "same",
    "undecided": "open",
}
SIGNS: dict[Verdict, str] = {
    "better": "▲",
    "worse": "▼",
    "no difference that matters": "=",
    "undecided": "?",
}
SMALLEST_P = 1e-4

_FOLDER = Path(__file__).parent
_ROW_PX = 52
_TEXT_PX = 18
_LONG_LABEL = 22
"""Characters that leave no room for the numbers beside them on a phone: they move below."""
_EDGE_PERCENT = 3.0


def render(report: EvaluationReport, image: ImageReader) -> str:
    """The page. Prompts and names are escaped wherever they stand; images above 256 px become JPEG.

    ``image`` is called only for images on the page: those of the first ``grid_prompts`` prompts, up to 4 a
    model, and of the best and worst cases.
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    measured = set(report.kinds.values())
    not_measured = [kind for kind in ("diversity", "drift") if kind not in measured]
    return environment.get_template("report.html.j2").render(
        report=report,
        forest=_forest(report.comparisons),
        by_scorer=_by_scorer(report.comparisons),
        grid=range(min(report.settings.grid_prompts, len(report.prompts))),
        seeds=range(min(report.images_per_prompt, MAX_SEEDS)),
        not_measured=" and ".join(not_measured),
        positions={model: position for position, model in enumerate(report.models)},
        image_uri=cache(lambda model, prompt, number: data_uri(image(model, prompt, number))),
        image_settings=_as_json(report.provenance.settings),
        compare_settings=_as_json(report.settings.model_dump(mode="json")),
        classes=CLASSES,
        signs=SIGNS,
        number=number,
        interval=interval,
        p_value=p_value,
        whole=whole,
        percent=percent,
        correlation=correlation,
        printed=printed,
        count=count,
    )


def data_uri(png: bytes) -> str:
    """An image as a data URI, at most THUMBNAIL_PX wide and high."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGB")
    out = io.BytesIO()
    if max(picture.size) > THUMBNAIL_PX:
        picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        picture.save(out, "JPEG", quality=JPEG_QUALITY)
        kind = "jpeg"
    else:
        picture.save(out, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def number(value: float | None, has_sign: bool = False) -> str:
    """Three significant digits: 0.123, 1.20, 12.3, 1,230; "+0.123" and "−0.123" with a sign."""
    if value is None:
        return "none"
    decimals = _decimals(value)
    return _fixed(value, decimals, has_sign) if round(value, decimals) else "0"


def interval(estimate: Interval | None, has_sign: bool = False) -> str:
    """Value [low, high], with the decimals that give the largest of them three significant digits."""
    if estimate is None:
        return "none"
    decimals = _decimals(max(abs(estimate.value), abs(estimate.low), abs(estimate.high)))
    value, low, high = (
        _fixed(each, decimals, has_sign) for each in (estimate.value, estimate.low, estimate.high)
    )
    return f"{value} [{low}, {high}]"


def p_value(p: float) -> str:
    """Three decimals, four below 0.001, or that it is below 0.0001."""
    if p < SMALLEST_P:
        return f"<{SMALLEST_P:.4f}"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.4f}"


def whole(value: int | None) -> str:
    """1,234, or "none"."""
    return "none" if value is None else f"{value:,}"


def percent(share: float) -> str:
    """A share of 0 to 1 as "12%"."""
    return f"{100 * share:.0f}%"


def correlation(value: float | None) -> str:
    """Two decimals with a sign."""
    return "none" if value is None else _fixed(value, 2, has_sign=True)


def printed(value: float | None) -> str:
    """Three decimals, as the papers' tables have."""
    return "–" if value is None else f"{value:.3f}"


def count(amount: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _decimals(value: float) -> int:
    """Decimals that leave three significant digits after rounding; at most 9."""
    if value == 0:
        return 0
    exponent = int(f"{value:.2e}".partition("e")[2])
    return min(9, max(0, 2 - exponent))


def _fixed(value: float, decimals: int, has_sign: bool) -> str:
    text = f"{abs(value):,.{decimals}f}"
    is_zero = not text.strip("0.,")
    if is_zero:
        return text
    sign = "−" if value < 0 else ("+" if has_sign else "")
    return sign + text


def _by_scorer(comparisons: Sequence[Comparison]) -> list[tuple[str, list[Comparison]]]:
    return [(scorer, [*rows]) for scorer, rows in itertools.groupby(comparisons, lambda each: each.scorer)]


def _forest(comparisons: Sequence[Comparison]) -> dict[str, Any] | None:
    """Positions in the plot: x in percent, y in pixels. Scorers without deviation are left out."""
    shown = [each for each in comparisons if each.base_deviation > 0]
    if not shown:
        return None
    ends = [
        end / each.base_deviation
        for each in shown
        for end in (each.difference.low, each.difference.high, each.margin, -each.margin)
    ]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = (100 - 2 * _EDGE_PERCENT) / ((high - low) or 1)

    def x(deviations: float) -> float:
        return round(_EDGE_PERCENT + (deviations - low) * scale, 3)

    labels = [f"{each.scorer}, {each.candidate}" for each in shown]
    below = _TEXT_PX if max(map(len, labels)) > _LONG_LABEL else 0
    row_px = _ROW_PX + below
    rows = [
        {
            "label": labels[i],
            "text": interval(_in_deviations(each), True),
            "verdict": each.verdict,
            "label_y": i * row_px + 16,
            "text_y": i * row_px + 16 + below,
            "line_y": i * row_px + 34 + below,
            "low": x(each.difference.low / each.base_deviation),
            "high": x(each.difference.high / each.base_deviation),
            "value": x(each.difference.value / each.base_deviation),
            "margin_x": x(-each.margin / each.base_deviation),
            "margin_width": round(2 * each.margin / each.base_deviation * scale, 3),
        }
        for i, each in enumerate(shown)
    ]
    axis_y = len(rows) * row_px
    ticks = [
        {"x": x(tick), "text": f"{tick:+g}".replace("-", "−") if tick else "0", "is_zero": tick == 0}
        for tick in _ticks(low, high)
    ]
    return {"rows": rows, "ticks": ticks, "axis_y": axis_y, "height": axis_y + 26}


def _in_deviations(each: Comparison) -> Interval:
    difference = each.difference
    return Interval(
        value=difference.value / each.base_deviation,
        low=difference.low / each.base_deviation,
        high=difference.high / each.base_deviation,
    )


def _ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten: 2 to 6 of them between the ends."""
    span = (high - low) or 1
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)
