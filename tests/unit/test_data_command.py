"""python -m mpilm.prepare: what it takes and what it prints."""

import json

import pytest

from mpilm.comm.base import SelfComm
from mpilm.errors import ConfigError
from mpilm.prepare import command, configure


def test_switches_stand_alone_or_with_a_value():
    assert configure(["--stats"]).stats
    config = configure(["--output", "x", "--drop-duplicates", "--data.tokenizer", "bytes"])
    assert config.drop_duplicates
    assert not config.stats
    assert config.data.tokenizer == "bytes"
    assert not configure(["--output", "x", "--drop_duplicates", "false"]).drop_duplicates


def test_asking_for_nothing_says_what_to_ask_for():
    with pytest.raises(ConfigError, match="--output PREFIX"):
        configure([])


def test_stats_and_output(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("hello\n")
    command(configure(["--data.path", f"{tmp_path}/x.txt", "--data.tokenizer", "bytes", "--stats"]), SelfComm())
    assert "bytes per token" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1
    command(
        configure(["--data.path", f"{tmp_path}/x.txt", "--data.tokenizer", "bytes", "--output", f"{tmp_path}/o"]), SelfComm()
    )
    assert "7 tokens of uint16 in 1 documents" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["source_bytes"] == 6
