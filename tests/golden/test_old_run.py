"""A run folder written by version 0.1.0 resumes under this version, on other layouts, to the bits it would have reached then.

`run-0.1` holds the first four of eight steps, `expected.json` what 0.1.0 reached. Bits are compared if torch and processor are
those of `expected.json`, otherwise losses within 1e-4.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers import read_metrics
from thread_ranks import run_ranks

from mpilm.checkpoint.format import list_checkpoints
from mpilm.config.parse import merge_settings, read_toml
from mpilm.config.schema import Config
from mpilm.config.settings import override
from mpilm.engine.hardware import processor_name
from mpilm.trainer import loop

OLD = Path(__file__).with_name("run-0.1")


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (3, {"parallel__zero": 3}),
        (4, {"parallel__pipeline": 2, "parallel__schedule": "zero-bubble", "parallel__zero": 2}),
    ],
)
def test_old_run_resumes_to_the_same_bits(tmp_path, ranks, changes):
    run = tmp_path / "run"
    shutil.copytree(OLD, run, ignore=shutil.ignore_patterns("corpus.txt", "expected.json"))
    old = merge_settings(Config(), read_toml(run / "config.toml"), "config.toml")
    config = override(old, data__path=(str(OLD / "corpus.txt"),), run__dir=str(run), train__device="cpu", **changes)
    run_ranks(ranks, lambda comm: loop.train(config, comm))

    expected = json.loads((OLD / "expected.json").read_text())
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert newest.name == "step-00000008"
    assert losses == pytest.approx(expected["losses"], rel=1e-4)
    if (expected["torch"], expected["processor"]) == (torch.__version__, processor_name()):
        assert losses == expected["losses"]
        assert [row["eval_loss"] for row in rows if "eval_loss" in row][-1] == expected["eval_loss"]
        assert {name: sha256((newest / name).read_bytes()).hexdigest() for name in expected["sha256"]} == expected["sha256"]
