"""The prepare command on one rank, statistics and the progress line."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.comm.base import SelfComm
from mpilm.config.parse import parse
from mpilm.config.schema import DataConfig
from mpilm.data.prepare import count_scripts, prepare_command
from mpilm.errors import ConfigError
from mpilm.formatting import ProgressLine
from mpilm.prepare import PrepareArguments


def configure(*words):
    return parse(words, PrepareArguments(), "prepare", "Prepare.")


def test_prepare_config_switches_stand_alone_or_with_a_value():
    assert configure("--stats").stats
    config = configure("--output", "x", "--drop-duplicates", "--data.tokenizer", "bytes")
    assert (config.drop_duplicates, config.stats, config.data.tokenizer) == (True, False, "bytes")
    assert not configure("--output", "x", "--drop_duplicates", "false").drop_duplicates


@pytest.mark.parametrize(
    ("output", "message"), [("", "--output PREFIX"), ("x/", "x/ is a folder; write a prefix such as x/tokens")]
)
def test_prepare_command_without_a_name_for_its_output_raises(output, message):
    with pytest.raises(ConfigError, match=message):
        prepare_command(DataConfig(), output, stats=False, drop_duplicates=False)


def test_prepare_command_prints_statistics_and_writes_files(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("hello\n")
    data = DataConfig(path=(f"{tmp_path}/x.txt",), tokenizer="bytes")
    prepare_command(data, "", stats=True, drop_duplicates=False)(SelfComm())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["documents", "1"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert [line.split()[-2:] for line in lines[-2:]] == [["letters", "83.333%"], ["whitespace", "16.667%"]]
    assert len(list(tmp_path.iterdir())) == 1
    prepare_command(data, f"{tmp_path}/o", stats=False, drop_duplicates=False)(SelfComm())
    assert "7 tokens of uint16 in 1 document; 0.86 bytes a token with bytes" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["source_bytes"] == 6


def test_count_scripts_by_bytes():
    assert count_scripts(Counter("ab 1,\x00+" + "é" * 2 + "Ж猫🐈ω한か\ufffd")) == {
        "LATIN letters": 4, "other symbols": 4, "CJK letters": 3, "HANGUL letters": 3, "HIRAGANA letters": 3, "U+FFFD": 3,
        "ASCII letters": 2, "GREEK letters": 2, "CYRILLIC letters": 2, "ASCII digits": 1, "ASCII whitespace": 1,
        "ASCII punctuation": 1, "ASCII symbols": 1, "ASCII control characters": 1,
    }  # fmt: skip


@given(text=st.text())
def test_count_scripts_counts_every_byte_once(text):
    assert count_scripts(Counter(text)).total() == len(text.encode())


def test_progress_line_is_silent_when_there_is_nothing_to_wait_for(capsys):
    line = ProgressLine("preparing text", "MB")
    for done in range(11):
        line(done, 10)
    assert capsys.readouterr().err == ""
    ProgressLine("preparing text", "MB", interval_s=0.0)(5, 10)
    assert "50% of 10 MB" in capsys.readouterr().err
