"""Stored loss curves: what the numbers were, they stay.

Exactly so with the torch version and the kind of processor in the file's header, else within 1e-4. After a change that
is meant to change the numbers, write them anew, look at the difference, and say why in the commit:

    python tests/golden/test_golden.py
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])] if __name__ == "__main__" else []

from text import tiny_config, write_tokens  # noqa: E402

from mpilm.comm.threads import run_ranks  # noqa: E402
from mpilm.engine.hardware import processor_name
from mpilm.engine.step import train_step, validation_loss
from mpilm.trainer.build import build_run

STEPS = 40
CURVES = {
    "tied": {},
    "untied": {"model__tie_embeddings": False, "model__n_kv_heads": 4, "model__dropout": 0.0, "train__seed": 1},
}


def curve(name, ranks, folder):
    """The loss of each step, and the evaluation loss after the last."""
    config = tiny_config(write_tokens(folder / "data"), folder / "run", train__steps=STEPS, **CURVES[name])

    def body(comm):
        run = build_run(config, comm)
        return [train_step(run.model, run.batches, step).loss for step in range(STEPS)] + [
            validation_loss(run.model, run.batches, config.run.eval_batches)
        ]

    results = run_ranks(ranks, body)
    assert all(result == results[0] for result in results)
    return results[0]


def header():
    return {"torch": torch.__version__, "processor": processor_name()}


def read(name):
    """The header and the numbers of a stored curve."""
    lines = (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    made_with = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    return made_with, [float.fromhex(line.split()[0]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(("name", "ranks"), [("tied", 1), ("tied", 3), ("untied", 2)])
def test_the_curve_is_the_stored_one(tmp_path, name, ranks):
    made_with, stored = read(name)
    assert len(stored) == STEPS + 1
    assert stored[-2] < stored[0] - 1.0  # a curve that goes somewhere
    found = curve(name, ranks, tmp_path)
    if made_with == header():
        assert found == stored
    else:
        assert found == pytest.approx(stored, rel=1e-4)


def write_all():
    for name in CURVES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            losses = curve(name, 1, Path(folder))
        lines = [f"# {key}: {value}" for key, value in header().items()] + [f"{x.hex()}  {x:.6f}" for x in losses]
        (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{HERE / name}.txt: {losses[0]:.4f} to {losses[-2]:.4f}, evaluation {losses[-1]:.4f}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    write_all()
