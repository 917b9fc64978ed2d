"""A line of a prompt file is one prompt, whatever wrote the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.artifacts.prompts import prompt_lines, read_prompts
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


def written(folder: Path, data: bytes) -> str:
    path = folder / "prompts.txt"
    path.write_bytes(data)
    return path.as_uri()


@pytest.mark.parametrize("name", FILES)
def test_every_line_that_is_not_blank_is_a_prompt(name, tmp_path):
    assert prompt_lines(written(tmp_path, FILES[name])) == ["a cat", "a dog"]


@pytest.mark.parametrize("name", INSIDE)
def test_a_separator_that_ends_no_line_of_a_text_file_stays_inside_the_prompt(name, tmp_path):
    prompt = f"a cat{INSIDE[name]}on a mat"
    uri = written(tmp_path, f"{prompt}\na dog\n".encode())
    assert prompt_lines(uri) == [prompt, "a dog"]
    assert read_prompts(uri, 1, skip=1) == ["a dog"]


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
        prompt_lines(uri)
    assert str(refused.value) == f"{uri!r} {message}"
    assert refused.value.code == "not_utf8"
