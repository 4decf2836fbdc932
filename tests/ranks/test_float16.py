"""Training in float16: the loss scale, gradients that overflow, and equal bits on every layout. CPUs are slow at it."""

import json
import shutil

import pytest
from helpers import read_metrics
from runs import build_train_model, layout, small_config, train_to_end
from text import tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint.format import checkpoint_name
from mpilm.comm.base import SelfComm
from mpilm.config.check import check_config
from mpilm.engine.step import train_step
from mpilm.errors import ConfigError
from mpilm.trainer.recovery import loss_scale as rules
from mpilm.trainer.recovery.loss_scale import loss_scale
from mpilm.verification.arguments import AuditArguments
from mpilm.verification.audit import audit_run
from mpilm.verification.layouts import RandomTokens

SETTINGS = {"train__dtype": "float16", "train__steps": 14, "checkpoint__every": 1, "checkpoint__keep": 0, "run__eval_every": 0}


@pytest.mark.parametrize(
    ("overflows", "step", "scale"),
    [
        ([], 0, 2.0**16), ([], 1999, 2.0**16), ([], 2000, 2.0**17), ([], 10**6, 2.0**24),
        ([1], 0, 2.0**16), ([1], 1, 2.0**15), ([1, 2, 3], 3, 2.0**13), ([1, 2, 3], 2002, 2.0**13), ([1, 2, 3], 2003, 2.0**14),
        ([2001], 2000, 2.0**17), ([2001], 2001, 2.0**16), ([2001], 4001, 2.0**17), (list(range(1, 40)), 39, 1.0),
    ],
)  # fmt: skip
def test_loss_scale_halves_at_an_overflow_and_doubles_after_steps_without_one(overflows, step, scale):
    assert loss_scale("float16", overflows, step) == scale
    assert loss_scale("bfloat16", overflows, step) == 1.0


def test_loss_scale_changes_no_bit_of_the_step():
    """In float32, where nothing overflows or vanishes."""
    found = []
    for scale in (1.0, 2.0**10, 2.0**-6):
        model = build_train_model(small_config(), SelfComm())
        model.loss_scale = scale
        results = [train_step(model, RandomTokens(model.config), step) for step in range(3)]
        found.append([(result.loss, result.grad_norm) for result in results])
    assert found[0] == found[1] == found[2]


@pytest.fixture
def large_scale(monkeypatch):
    """A first scale at which gradients overflow for some steps."""
    monkeypatch.setattr(rules, "FIRST", 2.0**26)
    monkeypatch.setattr(rules, "LARGEST", 2.0**26)


def overflows_of(run, step):
    trainer = json.loads((run / "checkpoints" / checkpoint_name(step) / "trainer.json").read_text())
    assert trainer["skipped"] == trainer["overflows"]
    assert trainer["bad"] == []
    return trainer["overflows"]


def test_overflows_are_skipped_alike_on_all_layouts_and_after_a_resume(tmp_path, large_scale, monkeypatch):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))
    data = write_tokens(tmp_path / "data")
    settings = {**SETTINGS, "train__global_batch": 8, "model__n_layers": 2, "fault__max_bad_steps": 0}
    serial = train_to_end(tiny_config(data, tmp_path / "serial", **settings), 1)
    steps = overflows_of(tmp_path / "serial", 14)
    assert 3 < len(steps) < 14
    assert steps[:3] == [1, 2, 3]
    rows = [row for row in read_metrics(tmp_path / "serial" / "metrics.jsonl") if row.get("event") == "skipped"]
    assert [row["step"] for row in rows] == steps
    first = "step 1: a gradient overflows float16 at loss scale 67,108,864; the next is 33,554,432"
    assert rows[0]["why"] == first
    for size, changes in ((2, layout()), (3, layout(zero=3)), (2, layout(2))):
        run = tmp_path / f"{size}-{changes['parallel__pipeline']}"
        assert train_to_end(tiny_config(data, run, **settings, **changes), size) == serial, changes
    for path in (tmp_path / "serial" / "checkpoints").iterdir():
        if path.name > checkpoint_name(steps[-1] + 1):
            shutil.rmtree(path)
    assert train_to_end(tiny_config(data, tmp_path / "serial", **settings), 2) == serial


def test_run_in_float16_can_be_audited_from_its_start(tmp_path, large_scale, monkeypatch):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))
    data = write_tokens(tmp_path / "data")
    train_to_end(tiny_config(data, tmp_path / "run", **{**SETTINGS, "checkpoint__every": 0}), 1)
    printed = []
    arguments = AuditArguments(runs=(str(tmp_path / "run"),), steps="1:14")
    run_ranks(2, lambda comm: audit_run(arguments, comm, printed.append if comm.rank == 0 else lambda _: None))
    assert "these bits" in "\n".join(printed)


@pytest.mark.parametrize("changes", [{"parallel__wire_dtype": "bfloat16"}, {"parallel__powersgd_rank": 2}])
def test_compressed_messages_are_refused(changes):
    with pytest.raises(ConfigError, match=r"--train.dtype float16 scales the loss, .*: send float32"):
        check_config(small_config(train__dtype="float16", **changes))
