"""What a corpus is said to be made of."""

import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mpilm.data.duplicates import repeats
from mpilm.data.progress import ProgressLine
from mpilm.data.stats import BLOCKS, SCRIPTS, Statistics, by_script, count_scripts, length_distribution, table


def test_scripts_by_bytes():
    found = by_script(count_scripts("ab 1,\x00" + "é" * 2 + "Ж" + "猫" + "🐈" + "ω" + "한" + "か"))
    assert found == {
        "Latin extended": 4, "emoji": 4, "CJK": 3, "Hangul": 3, "Japanese kana": 3, "ASCII letters": 2, "Greek": 2,
        "Cyrillic": 2, "ASCII digits": 1, "ASCII whitespace": 1, "ASCII punctuation": 1, "control characters": 1,
    }  # fmt: skip


@given(text=st.text())
def test_every_byte_is_counted_once(text):
    assert count_scripts(text).sum() == len(text.encode())


def test_blocks_are_in_order():
    assert [start for start, _ in BLOCKS] == sorted({start for start, _ in BLOCKS})
    assert len(SCRIPTS) == len(set(SCRIPTS))


def test_length_distribution():
    found = length_distribution(np.arange(1, 102))
    assert found == {"min": 1, "median": 51, "mean": 51, "90%": 91, "99%": 100, "max": 101}


def test_the_first_of_equal_documents_is_kept():
    keys = np.array([[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [1, 2]])
    assert repeats(keys).tolist() == [False, False, True, False, True, True]


def test_the_table_lines_up():
    s = Statistics(2, 10, 40, "bytes", length_distribution(np.array([4, 6])), 1, 20, {"ASCII letters": 40})
    lines = table(s).splitlines()
    assert "exact duplicates" in table(s)
    assert "50.00% of the bytes" in table(s)
    assert "4.000" in table(s)
    assert lines[0].split() == ["documents", "2"]
    assert lines[-1].split()[-1] == "100.000%"


def test_progress_is_silent_when_there_is_nothing_to_wait_for():
    out = io.StringIO()
    line = ProgressLine(out=out)
    for done in range(10):
        line(done, 10)
    line(10, 10)
    assert out.getvalue() == ""
    eager = ProgressLine(out=out, every_s=0.0)
    eager(5_000_000, 10_000_000)
    assert "50% of 10 MB" in out.getvalue()
