"""Prompt files of every published form are read, or refused with the file, the line and the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dde_core.score_table import Prompt
from services.artifacts.prompts import all_prompts, read_prompts
from services.errors import BadRequest

FILES = {
    "plain": b"a cat\na dog\n",
    "no end of the last line": b"a cat\na dog",
    "a byte order mark": b"\xef\xbb\xbfa cat\na dog\n",
    "Windows": b"a cat\r\na dog\r\n",
    "an old Mac": b"a cat\ra dog\r",
    "blank lines": b"\n\na cat\n \t\n\r\na dog\n\n",
}
INSIDE = {
    "a line separator": "\u2028",
    "a paragraph separator": "\u2029",
    "a form feed": "\x0c",
    "a vertical tab": "\x0b",
    "a next line": "\x85",
    "a file separator": "\x1c",
    "a record separator": "\x1e",
}


def written(folder: Path, data: bytes, name: str = "prompts.txt") -> str:
    path = folder / name
    path.write_bytes(data)
    return path.as_uri()


@pytest.mark.parametrize("name", FILES)
def test_every_line_that_is_not_blank_is_a_prompt(name, tmp_path):
    assert all_prompts(written(tmp_path, FILES[name])) == [Prompt("a cat"), Prompt("a dog")]


@pytest.mark.parametrize("name", INSIDE)
def test_a_separator_that_ends_no_line_of_a_text_file_stays_inside_the_prompt(name, tmp_path):
    prompt = f"a cat{INSIDE[name]}on a mat"
    uri = written(tmp_path, f"{prompt}\na dog\n".encode())
    assert all_prompts(uri) == [Prompt(prompt), Prompt("a dog")]
    assert read_prompts(uri, 1, skip=1) == [Prompt("a dog")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a cat\n".encode("utf-16"), "is not UTF-8 text (byte 0): save it as UTF-8"),
        ("a cat\na dog".encode("utf-16-le"), "holds a null byte in line 1: save it as UTF-8"),
        (b"a cat\na caf\xe9\n", "is not UTF-8 text (byte 11): save it as UTF-8"),
        (b"a cat\na\0dog\n", "holds a null byte in line 2: save it as UTF-8"),
    ],
)
def test_a_file_that_is_not_text_in_utf_8_is_refused_with_the_place_and_not_its_content(
    data, message, tmp_path
):
    uri = written(tmp_path, data)
    with pytest.raises(BadRequest) as refused:
        all_prompts(uri)
    assert str(refused.value) == f"{uri!r} {message}"
    assert refused.value.code == "not_utf8"


PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    'A robot. The words "Fly" are on it.\tOutdoor Scenes\tComplex\t\n'
    '"no end of a quote\tAbstract\tBasic\tBiology\n'
)
DRAWBENCH = 'Prompts,Category\nA red car.,Colors\n"A sign that says ""Hi"", twice.",Text\n"two\nlines",\n'
HPD = json.dumps(["a cat", "a caf\u00e9", ' "quoted" '])
GENEVAL = (
    '{"prompt": "two cats", "atom_count": 3, "vqa_list": [["q", "a"]], "skills": ["count"]}\n'
    '\n{"prompt": "a dog", "category": "animals"}\n{"prompt": "a cow", "category": null}\n'
)
PUBLISHED: dict[str, tuple[str, list[tuple[str, str | None]]]] = {
    "PartiPrompts.tsv": (
        PARTI,
        [
            ('A robot. The words "Fly" are on it.', "Outdoor Scenes"),
            ('"no end of a quote', "Abstract"),
        ],
    ),
    "DrawBench.csv": (
        DRAWBENCH,
        [("A red car.", "Colors"), ('A sign that says "Hi", twice.', "Text"), ("two\nlines", None)],
    ),
    "anime.json": (HPD, [("a cat", None), ("a caf\u00e9", None), ('"quoted"', None)]),
    "geneval2.jsonl": (GENEVAL, [("two cats", None), ("a dog", "animals"), ("a cow", None)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("is_named", [True, False], ids=["by name", "by content"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_published_prompt_sets_are_read_with_their_categories(name, is_named, mark, line_end, tmp_path):
    text, expected = PUBLISHED[name]
    data = (mark + text.replace("\n", line_end)).encode()
    prompts = all_prompts(written(tmp_path, data, name if is_named else "prompts.txt"))
    expected_prompts = [Prompt(text.replace("\n", line_end), category) for text, category in expected]
    assert prompts == expected_prompts


@pytest.mark.parametrize("text", ["[a cat]\n{a dog}\n", "prompt\na, b\n", "a cat, category\nb\n"])
def test_text_that_only_resembles_a_table_or_json_stays_text(text, tmp_path):
    assert [prompt.text for prompt in all_prompts(written(tmp_path, text.encode()))] == text.splitlines()


HOSTILE = {
    "a column is missing": ("p.tsv", "Text\tCategory\na\tb\n", "line 1 has no column 'Prompt' or 'Prompts'"),
    "a TSV that is CSV": (
        "p.tsv",
        "Prompt,Category\na,b\n",
        "line 1 has no column 'Prompt' or 'Prompts', only 'Prompt,Category'; its columns are separated by "
        "commas: name the file .csv",
    ),
    "a CSV that is TSV": (
        "p.csv",
        "Prompt\tCategory\na\tb\n",
        "its columns are separated by tabs: name the file .tsv",
    ),
    "a column twice": (
        "p.tsv",
        "Prompt\tprompts\na\tb\n",
        "line 1 names the column 'Prompt' and 'prompts' twice",
    ),
    "a field too many": (
        "p.csv",
        "Prompts,Category\na cat, black,Animals\n",
        "line 2 has 3 fields, the header has 2: 'Prompts', 'Category'",
    ),
    "a field too few": ("p.tsv", "Prompt\tCategory\n\na cat\n", "line 3 has 1 fields, the header has 2"),
    "an open quote": ("p.csv", 'Prompts,Category\na,b\n"a cat,Animals\n', "line 3 cannot be read as CSV"),
    "text after a quote": ("p.csv", 'Prompts,Category\n"a" cat,b\n', "line 2 cannot be read as CSV"),
    "an empty prompt": ("p.tsv", "Prompt\tCategory\n \tAnimals\n", "line 2 field 'Prompt' is empty"),
    "an empty table": ("p.csv", "\n", "line 1 holds no header"),
    "an empty string": ("p.json", '["a", " "]', "item 2 field 'prompt' is empty"),
    "a number": (
        "p.json",
        '["a", 3]',
        "item 2 must be a string or an object with a field 'prompt', got a number",
    ),
    "an object": ("p.json", '{\n"a": 1}', "line 1 is no JSON"),
    "a broken list": ("p.json", '["a",\n"b"', "line 2 is no JSON"),
    "no prompt": ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no field 'prompt', only 'text'"),
    "a prompt that is a list": (
        "p.jsonl",
        '{"prompt": ["a"]}\n',
        "line 1 field 'prompt' must be a string, got a list",
    ),
    "a category that is a number": (
        "p.jsonl",
        '{"prompt": "a", "category": 1}\n',
        "line 1 field 'category' must be a string, got a number",
    ),
    "a null character": (
        "p.jsonl",
        '{"prompt": "a\\u0000b"}\n',
        "line 1 field 'prompt' holds a null character",
    ),
    "half a character": ("p.json", '["\\ud800"]', "item 1 field 'prompt' holds half of a surrogate pair"),
    "deep nesting": ("p.jsonl", "[" * 100_000, "line 1 is no JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_not_what_it_says_is_refused_with_the_line_and_the_field(case, tmp_path):
    name, text, message = HOSTILE[case]
    uri = written(tmp_path, text.encode(), name)
    with pytest.raises(BadRequest) as refused:
        all_prompts(uri)
    assert str(refused.value).startswith(f"{uri!r} ")
    assert message in str(refused.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_that_are_no_text_are_refused_in_every_form(name, tmp_path):
    data = PUBLISHED[name][0].encode()
    for broken in (
        data.replace(b"a", b"\xff", 1),
        data.replace(b"a", b"\0", 1),
        data.decode().encode("utf-16"),
    ):
        with pytest.raises(BadRequest) as refused:
            all_prompts(written(tmp_path, broken, name))
        assert refused.value.code == "not_utf8"


def test_too_few_prompts_are_refused_with_both_numbers(tmp_path):
    uri = written(tmp_path, DRAWBENCH.encode(), "p.csv")
    assert [prompt.category for prompt in read_prompts(uri, 2, skip=1)] == ["Text", None]
    with pytest.raises(BadRequest, match=r"num_prompts is 3 after the first 1, .* holds 3"):
        read_prompts(uri, 3, skip=1)
