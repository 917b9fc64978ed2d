"""The report of a study as one HTML page: tables, and learning curves as SVG. It loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from services.api.records import Contrast, Interval, StudyReport, StudySetting

WIDTH, HEIGHT, MARGIN = 420, 240, 44
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a8a")
"""Those of Okabe & Ito, which color-blind people tell apart."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } caption { text-align: left; font-weight: 600; }
td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } svg { margin: 0 1em 1em 0; } .sure { font-weight: 600; }
"""
Curve = Sequence[tuple[int, float]]


def page(
    name: str,
    report: StudyReport,
    curves: Mapping[str, Mapping[str, Curve]],
    settings_of: Mapping[str, str],
    conventions: str,
) -> str:
    """The page. ``curves`` are by metric and cell; ``settings_of`` is the setting of each cell."""
    colors = _colors([setting.setting for setting in report.settings])
    figures = [
        _figure(metric, {label: curve for label, curve in of_metric.items() if curve}, settings_of, colors)
        for metric, of_metric in curves.items()
    ]
    body = [
        f"<h1>{escape(name)}</h1>",
        _settings_table(report),
        _contrasts_table(report.contrasts),
        _costs_table(report),
        "<h2>Learning curves</h2>",
        _legend(colors),
        *figures,
        f"<p>{escape(conventions)}.</p>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _colors(settings: Sequence[str]) -> dict[str, str]:
    """A color for each setting: of many, evenly spaced hues."""
    if len(settings) <= len(COLORS):
        return dict(zip(settings, COLORS, strict=False))
    return {name: f"hsl({360 * i // len(settings)} 70% 40%)" for i, name in enumerate(settings)}


def _table(caption: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>\n" + "\n".join(lines) + "</table>"


def _settings_table(report: StudyReport) -> str:
    scorers = report.scorers()
    means = [f"{report.base_scores[name]:.4f}" if name in report.base_scores else "-" for name in scorers]
    rows = [["base", "", *means]]
    for each in report.settings:
        scores = [f"{each.scores[name]:.4f}" if name in each.scores else "-" for name in scorers]
        rows.append([escape(each.setting), f"{each.models} of {each.cells}", *scores])
    return _table("Settings: mean scores over models and prompts", ("setting", "models", *scorers), rows)


def _contrasts_table(contrasts: Sequence[Contrast]) -> str:
    rows = []
    for each in contrasts:
        kind = "sure" if each.adjusted_p <= 0.05 else ""
        difference = f'<span class="{kind}">{interval(each.difference)}</span>'
        names = f"{escape(each.setting)} - {escape(each.against or 'base')}"
        numbers = (str(each.seeds), str(each.prompts), each.by, f"{each.p:.3g}", f"{each.adjusted_p:.3g}")
        rows.append([names, escape(each.scorer), difference, *numbers])
    columns = ("contrast", "scorer", "difference [95%]", "seeds", "prompts", "interval", "p", "adjusted p")
    return _table("Contrasts; bold: adjusted p is at most .05", columns, rows)


def _costs_table(report: StudyReport) -> str:
    stages = list(dict.fromkeys(stage for each in report.settings for stage in each.seconds))
    rows = [_costs_row(each, stages) for each in report.settings]
    last = ["evaluations", *("" for _ in stages), f"{report.seconds:.0f}", str(report.images)]
    columns = ("setting", *stages, "seconds", "images")
    return _table("Cost: seconds of each stage, images drawn", columns, [*rows, last])


def _costs_row(setting: StudySetting, stages: Sequence[str]) -> list[str]:
    seconds = [setting.seconds.get(stage, 0.0) for stage in stages]
    numbers = [f"{value:.0f}" for value in (*seconds, sum(seconds))]
    return [escape(setting.setting), *numbers, str(setting.images)]


def interval(found: Interval) -> str:
    """``+0.012 [+0.003, +0.021]``."""
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _legend(colors: Mapping[str, str]) -> str:
    items = [f'<span style="color:{color}">&#9632;</span> {escape(name)}' for name, color in colors.items()]
    return "<p>" + " &nbsp; ".join(items) + "</p>"


def _figure(
    metric: str, curves: Mapping[str, Curve], settings_of: Mapping[str, str], colors: Mapping[str, str]
) -> str:
    """A metric by steps, a line for each cell in the color of its setting."""
    steps = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    first_step, last_step = min(steps), max(steps)
    low, high = min(values), max(values)
    width = (last_step - first_step) or 1
    height = (high - low) or 1.0

    def place(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - MARGIN - 8) * (step - first_step) / width
        y = 24 + (HEIGHT - 48) * (high - value) / height
        return f"{x:.1f},{y:.1f}"

    lines = [
        f'<polyline fill="none" stroke="{colors[settings_of[label]]}" stroke-width="1.5" points="'
        + " ".join(place(step, value) for step, value in curve)
        + f'"><title>{escape(label)}</title></polyline>'
        for label, curve in curves.items()
    ]
    texts = [
        f'<text x="{MARGIN}" y="14" font-weight="600">{escape(metric)}</text>',
        f'<text x="2" y="30">{high:.3g}</text><text x="2" y="{HEIGHT - 22}">{low:.3g}</text>',
        f'<text x="{MARGIN}" y="{HEIGHT - 6}">step {first_step}</text>',
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{last_step}</text>',
    ]
    frame = f'width="{WIDTH}" height="{HEIGHT}" font-size="11" role="img"'
    return f"<svg {frame}>" + "".join(texts + lines) + "</svg>"
