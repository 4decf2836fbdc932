"""Reading of JSON that others have written: a value, or one message."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.data import files
from mpilm.data.files import MAX_JSON_DEPTH, parse_json, read_json
from mpilm.errors import DataError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "x is not JSON: it is nested more than 200 levels deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "x is not JSON: it is nested more than 200 levels deep"),
        ('{"a": "\\\\", "b": ' + "[" * 201 + "]" * 201 + "}", "x is not JSON: it is nested more than 200 levels deep"),
        ('{"a" 1}', "x is not JSON: Expecting ':' delimiter: character 6"),
        ('{\n"a" 1}', "x is not JSON: Expecting ':' delimiter: line 2, character 5"),
        (b'{"a": "\xff"}', "x is not JSON: 'utf-8' codec can't decode byte 0xff in position 7"),
        ('{"a": ' + "9" * 5000 + "}", "x is not JSON: Exceeds the limit"),
        ("[1]", "x is not a JSON object, but list"),
    ],
)
def test_parse_json_refuses_with_one_message(text, message):
    with pytest.raises(DataError) as caught:
        parse_json(text, "x")
    assert str(caught.value).startswith(message)


def test_parse_json_counts_no_brackets_in_strings():
    value = {"text": '\\"[{' * 1000, "\\": ["[" * 1000, "é\ud800" + "{" * 300], "n": [[[]]] * 300}
    assert parse_json(json.dumps(value), "x") == value
    assert parse_json("\ufeff{}".encode(), "x") == {}


@given(depth=st.integers(1, 2 * MAX_JSON_DEPTH), text=st.text('"\\[]{}a', max_size=20), siblings=st.integers(1, 20))
def test_parse_json_is_limited_by_depth_alone(depth, text, siblings):
    value = [[text] * siblings] * siblings
    for _ in range(depth - 3):
        value = [text, value]
    if 3 <= depth <= MAX_JSON_DEPTH:
        assert parse_json(json.dumps({"a": value}), "x") == {"a": value}
    elif depth > MAX_JSON_DEPTH:
        with pytest.raises(DataError, match="nested"):
            parse_json(json.dumps({"a": value}), "x")


def test_read_json_is_limited_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text('{"a": 123}')
    assert read_json(tmp_path / "x.json") == {"a": 123}
    (tmp_path / "x.json").write_text('{"a": 1234}')
    with pytest.raises(DataError, match=r"x\.json is larger than 10 bytes"):
        read_json(tmp_path / "x.json")
