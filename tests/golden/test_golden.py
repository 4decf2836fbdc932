"""Stored loss curves: the numbers stay what they were.

Exactly with the torch version and the processor in the header of a file, otherwise within 1e-4. After a change that is meant to
change the numbers, write the files again, look at the difference and give the reason in the commit message:

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

from runs import layout  # noqa: E402
from text import tiny_config, write_tokens  # noqa: E402
from thread_ranks import run_ranks  # noqa: E402

from mpilm.engine.hardware import processor_name  # noqa: E402
from mpilm.engine.step import train_step, validation_loss  # noqa: E402
from mpilm.trainer.build import build_run  # noqa: E402

STEPS = 40
CURVES = {  # with the kernels of torch, whose bits depend on its version and the processor alone
    "tied": {"train__kernels": "torch"},
    "untied": {
        "train__kernels": "torch",
        "model__tie_embeddings": False,
        "model__n_kv_heads": 4,
        "model__dropout": 0.0,
        "train__seed": 1,
    },
}


def train_curve(name, ranks, folder, **settings):
    """Return the loss of each step, and the validation loss after the last."""
    config = tiny_config(write_tokens(folder / "data"), folder / "run", train__steps=STEPS, **CURVES[name], **settings)

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


def read_curve(name):
    """Return the header and the numbers of a stored curve."""
    lines = (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    made_with = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    return made_with, [float.fromhex(line.split()[0]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize(
    ("name", "ranks", "settings"), [("tied", 1, {}), ("tied", 2, layout(2, "zero-bubble")), ("untied", 3, layout(zero=3))]
)
def test_loss_curve_equals_the_stored_one(tmp_path, name, ranks, settings):
    made_with, stored = read_curve(name)
    assert len(stored) == STEPS + 1
    assert stored[-2] < stored[0] - 1.0  # the model learns
    found = train_curve(name, ranks, tmp_path, **settings)
    if made_with == header():
        assert found == stored
    else:
        assert found == pytest.approx(stored, rel=1e-4)


def write_all():
    for name in CURVES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            losses = train_curve(name, 1, Path(folder))
        lines = [f"# {key}: {value}" for key, value in header().items()] + [f"{x.hex()}  {x:.6f}" for x in losses]
        (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{HERE / name}.txt: {losses[0]:.4f} to {losses[-2]:.4f}, evaluation {losses[-1]:.4f}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    write_all()
