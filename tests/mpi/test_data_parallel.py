"""One's own model and loop on real ranks: the example, dropout included, prints what one rank prints."""

import runpy
from pathlib import Path

import pytest

from mpilm.comm.base import Comm, SelfComm

EXAMPLE = Path(__file__).parents[2] / "scripts" / "own_model.py"


@pytest.mark.timeout(120)
def test_example_any_ranks_prints_and_saves_the_same(
    world: Comm, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    monkeypatch.setattr("sys.argv", ["own_model.py", str(tmp_path / "alone")])
    example["main"](SelfComm("world"))
    alone = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["own_model.py", str(shared / "ranks")])
    example["main"](world.with_options(gpu_aware=False, yield_while_waiting=True))
    assert capsys.readouterr().out == (alone if world.rank == 0 else "")
    assert alone.count("\n") == 8
    assert int(alone.split()[-2].rstrip("%")) > 80
    ours, theirs = (
        {path.name: path.read_bytes() for path in sorted((folder / "step-00000160").glob("*.safetensors"))}
        for folder in (tmp_path / "alone", shared / "ranks")
    )
    assert ours == theirs
    assert len(ours) == 2
