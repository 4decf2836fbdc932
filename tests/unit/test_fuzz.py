"""The quick form of scripts/fuzz.py: a few seeded mutations of each kind of input, refused or harmless."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "scripts" / "fuzz.py"
SPEC = importlib.util.spec_from_file_location("fuzz", PATH)
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)
kinds = sys.modules["fuzzing.kinds"]


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_mutations_are_refused_or_harmless(name):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    counts, failures = fuzz.run_kind(name, range(4 if name == "metrics" else 12))
    assert not failures, "\n".join(
        f"scripts/fuzz.py --only {name} --first {n} --count 1\n{text}" for n, text in failures.items()
    )
    assert counts["refused"] + counts["accepted"] > 2


def test_what_should_fail_does(tmp_path, monkeypatch):
    def use(path, before):
        raise {0: ValueError, 1: RecursionError, 2: fuzz.HangError, 3: kinds.AcceptedError}[len(list(tmp_path.iterdir()))](
            "why"
        )

    kind = kinds.Kind("x", lambda folder: folder.joinpath("x").write_bytes(b"a") and None, lambda random, data: b"b", use)
    monkeypatch.setitem(fuzz.KINDS, "x", kind)
    for number in range(4):
        (folder := tmp_path / str(number)).mkdir()
        assert fuzz.run_case("x", 0, folder).verdict == "failed"
