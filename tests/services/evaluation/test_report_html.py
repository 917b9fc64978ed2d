"""The structure of the page, read with html.parser: what it loads, escapes, names and shows."""

import base64
import io
import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import services.evaluation.html
from dde_core.score_table import Prompt
from services.api.records import Interval
from services.api.reports import CompareSettings
from services.evaluation.html import data_uri, interval, number, p_value, render
from services.evaluation.report import compare
from tests.support.score_tables import PROVENANCE, png, score_table

VOID = {"meta", "img", "br", "line", "rect", "circle"}
HOSTILE = "<script>alert('x')</script> \" onerror=\"alert(1) & {{ 7 * 7 }} </title></style>"
CSS = (Path(services.evaluation.html.__file__).parent / "report.css").read_text()


class Page(HTMLParser):
    """Every element with its attributes and text; fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", "parents": [each["tag"] for each in self._open], **dict(attrs)}
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open[-1]["tag"] == tag, f"</{tag}> closes {self._open[-1]}"
        self._open.pop()

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data

    def all(self, *tags):
        return [element for element in self.elements if element["tag"] in tags]


def made(prompts=None, gains=None, drift=(0.1, 0.5), **settings):
    table = score_table(20, 3, gains=gains, prompts=prompts, drift=drift)
    settings = {"resamples": 1000, "grid_prompts": 2, "cases": 1} | settings
    return compare(table, CompareSettings(**settings), PROVENANCE)


@pytest.fixture(scope="module")
def report():
    prompts = [Prompt(HOSTILE, HOSTILE), *(Prompt(f"prompt {i}", "other") for i in range(19))]
    gains = {name: {"pickscore": 0.4, "clip": 0.0, "diversity": -1.0} for name in ("tuned", "sft")}
    return made(prompts, gains, drift=(0.1, 0.5, 0.05))


@pytest.fixture(scope="module")
def text(report):
    return render(report, png)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_nothing_on_the_page_comes_from_elsewhere(page, text):
    assert not page.all("script", "link", "iframe", "object", "embed", "base", "form", "video", "audio")
    for element in page.elements:
        for name, value in element.items():
            assert not name.startswith("on"), element
            if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster", "background"):
                assert value.startswith("data:image/"), element
            assert name != "style", element
    (style,) = page.all("style")
    assert "url(" not in style["text"]
    assert "@import" not in style["text"]
    assert "http://" not in text
    assert "https://" not in text
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_prompts_and_names_are_text_wherever_they_stand(page):
    assert any(each["text"] == HOSTILE for each in page.all("bdi"))
    assert any(HOSTILE in each["alt"] for each in page.all("img"))
    assert sum(HOSTILE in each["text"] for each in page.all("th")) == 1


def test_a_hostile_command_digest_and_setting_are_text_too(report):
    provenance = PROVENANCE.model_copy(
        update={"command": HOSTILE, "digests": {HOSTILE: HOSTILE}, "settings": {HOSTILE: HOSTILE}}
    )
    hostile = Page(render(report.model_copy(update={"provenance": provenance}), png))
    assert not hostile.all("script")
    assert hostile.all("pre")[0]["text"] == HOSTILE
    assert [each["text"] for each in hostile.all("code")] == [HOSTILE]


def test_the_verdict_in_words_comes_first(page, report):
    headings = page.all("h1", "h2", "h3")
    assert [each["text"] for each in headings[:2]] == ["tuned, sft against base", "Verdict"]
    order = [each["text"] for each in page.all("p", "table", "svg")]
    assert order[1:3] == [each.sentence for each in report.summary]
    levels = [int(each["tag"][1]) for each in headings]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert levels.count(1) == 1


def test_the_page_has_a_section_for_everything(page):
    assert [each["text"] for each in page.all("h2")] == [
        "Verdict",
        "Differences from base",
        "Scores",
        "Is a scorer gamed?",
        "Drift from base",
        "Ranking of all models",
        "Categories",
        "Images",
        "Best and worst cases",
        "Where scorers disagree",
        "Beside published numbers",
        "Repeat it",
    ]


def test_sections_without_content_are_left_out():
    bare = Page(render(made(gains={"tuned": {"taste": 0.1}}, drift=None, grid_prompts=0, cases=0), png))
    assert [each["text"] for each in bare.all("h2")] == [
        "Verdict",
        "Differences from base",
        "Scores",
        "Is a scorer gamed?",
        "Categories",
        "Repeat it",
    ]
    assert not bare.all("img")
    assert any("Not measured: diversity and drift" in each["text"] for each in bare.all("p"))


def test_every_table_names_itself_its_columns_and_its_rows(page):
    captions = page.all("caption")
    assert len(captions) == len(page.all("table"))
    assert all(each["text"].strip() for each in captions)
    assert all(each["scope"] in ("col", "row", "rowgroup") for each in page.all("th"))
    regions = [each for each in page.elements if each.get("role") == "region"]
    assert len(regions) == len(page.all("table"))
    assert all(each["aria-label"] and each["tabindex"] == "0" for each in regions)


def test_every_row_of_a_table_has_as_many_cells_as_its_head(text):
    for table in re.findall(r"<table.*?</table>", text, re.S):
        width = len(re.findall(r'scope="col"', table))
        below = []
        for row in re.findall(r"<tr.*?</tr>", table, re.S)[1:]:
            cells = [int(span or 1) for span in re.findall(r'<t[hd](?=[ >])(?:[^>]*?colspan="(\d+)")?', row)]
            below = [rows - 1 for rows in below if rows > 1]
            assert sum(cells) + len(below) == width, row
            below += [int(rows) for rows in re.findall(r'rowspan="(\d+)"', row)]


def test_labels_point_at_elements_that_exist_once(page):
    ids = Counter(each["id"] for each in page.elements if "id" in each)
    assert set(ids.values()) == {1}
    for element in page.elements:
        assert set(element.get("aria-labelledby", "").split()) <= set(ids)
    (language,) = [each["lang"] for each in page.all("html")]
    assert language == "en"
    assert any(each.get("name") == "viewport" for each in page.all("meta"))


def test_the_images_are_those_of_the_grid_and_the_cases_each_read_once(report):
    read = Counter()

    def reader(model, prompt, image):
        read[model, prompt, image] += 1
        return png(model, prompt, image)

    shown = Page(render(report, reader))
    grid = {(m, p, i) for m in range(3) for p in range(2) for i in range(3)}
    cases = {
        (m, case.prompt, case.image)
        for each in report.cases
        for case in each.best + each.worst
        for m in (0, report.models.index(each.candidate))
    }
    assert set(read) == grid | cases
    assert set(read.values()) == {1}
    assert all(
        each["alt"].startswith(("base, image ", "tuned, image ", "sft, image ")) for each in shown.all("img")
    )


def test_of_many_seeds_the_grid_has_the_first_four_and_says_so():
    table = score_table(5, 6, gains={"tuned": {"clip": 0.1}})
    settings = CompareSettings(resamples=1000, grid_prompts=1, cases=0)
    shown = Page(render(compare(table, settings, PROVENANCE), png))
    assert len(shown.all("img")) == 2 * 4
    assert any("the first 4 of 6" in each["text"] for each in shown.all("p"))


def test_an_image_is_beside_the_name_of_its_model_and_its_place(page):
    second_row = [each for each in page.all("img") if each["alt"] == "tuned, image 2 of the prompt: prompt 0"]
    assert second_row[0]["src"] == data_uri(png(1, 1, 1))


def test_large_images_are_made_smaller_and_small_ones_stay_as_they_are():
    def opened(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small, large = opened(data_uri(png(1, 2, 3, 64))), opened(data_uri(png(1, 2, 3, 600)))
    assert (small.format, large.format, large.size) == ("PNG", "JPEG", (256, 256))
    assert small.tobytes() == Image.open(io.BytesIO(png(1, 2, 3, 64))).tobytes()


def test_the_plot_has_each_interval_on_one_scale_and_says_it_in_words(page, report):
    (plot,) = page.all("svg")
    assert plot["role"] == "img"
    lines = [each for each in page.all("line") if each["class"].startswith("interval")]
    assert len(lines) == len(report.comparisons) == 6
    x = [float(each["x1"][:-1]) for each in lines]
    ends = [each.difference.low / each.base_deviation for each in report.comparisons]
    slope = (x[1] - x[0]) / (ends[1] - ends[0])
    assert x == pytest.approx([x[0] + slope * (end - ends[0]) for end in ends], abs=0.01)
    assert all(0 <= float(each[name][:-1]) <= 100 for each in lines for name in ("x1", "x2"))
    (words,) = page.all("desc")
    assert words["text"].count("tuned") == 3
    classes = {"better": "up", "worse": "down", "no difference that matters": "same", "undecided": "open"}
    assert [each["class"].split()[1] for each in lines] == [classes[c.verdict] for c in report.comparisons]


def test_the_table_has_every_scorer_and_model_with_its_numbers(text, report):
    for each in report.comparisons:
        assert f"<td>{interval(each.difference, True)}</td><td>{interval(each.beat_ratio)}</td>" in text
        assert f"{number(each.mean)} ± {number(each.deviation)}" in text
    assert "3.414 ± 0.627" in text
    assert PROVENANCE.command in text
    assert PROVENANCE.digests["base"] in text


def test_numbers_of_the_plot_move_below_labels_that_leave_them_no_room():
    def places(model):
        shown = Page(render(made(gains={model: {"clip": 0.1}}, drift=None), png))
        return [int(each["y"]) for each in shown.all("text") if each["class"] in ("label", "number")]

    assert places("tuned") == [16, 16]
    assert places("a-model-with-a-long-name") == [16, 34]


@pytest.mark.parametrize(
    ("value", "plain", "signed"),
    [
        (0.12345, "0.123", "+0.123"),
        (-0.1, "−0.100", "−0.100"),
        (12.345, "12.3", "+12.3"),
        (0.99999, "1.00", "+1.00"),
        (1234.5, "1,234", "+1,234"),
        (0.000123, "0.000123", "+0.000123"),
        (0.0, "0", "0"),
        (-1e-12, "0", "0"),
    ],
)
def test_numbers_have_three_digits_and_a_sign_where_they_are_differences(value, plain, signed):
    assert number(value) == plain
    assert number(value, True) == signed


def test_an_interval_has_the_same_decimals_throughout():
    assert interval(Interval(value=0.1234, low=0.0999, high=0.1456)) == "0.123 [0.100, 0.146]"
    assert interval(Interval(value=0.01, low=-0.002, high=12.0), True) == "0.0 [0.0, +12.0]"
    assert interval(None) == "none"


def test_small_p_values_are_said_to_be_below_the_smallest():
    assert [p_value(p) for p in (1.0, 0.0496, 0.00012, 0.00001)] == ["1.000", "0.050", "0.0001", "<0.0001"]


def contrast(first, second):
    """The contrast ratio of two colors #rrggbb: WCAG 2.2."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


def test_text_has_the_contrast_that_wcag_asks_in_light_dark_and_print():
    palettes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", CSS, re.S)
    ]
    assert len(palettes) == 3
    for colors in palettes:
        pairs = [("text", "back"), ("muted", "back"), ("text", "raised"), ("text", "same-back")]
        pairs += [(name, f"{name}-back") for name in ("up", "down", "same", "open")]
        pairs += [("text", "open-back"), ("open", "open-back")]
        for front, back in pairs:
            assert contrast(colors[front], colors[back]) >= 4.5, (front, back)
        for name in ("up", "down", "same", "open"):  # lines of the plot
            assert contrast(colors[name], colors["back"]) >= 3
            assert contrast(colors[name], colors["band"]) >= 3
