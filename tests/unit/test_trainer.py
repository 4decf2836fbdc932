"""Pure parts of the trainer: spikes, the budget of bad steps, and the errors that mean too little memory."""

import errno
import math
from types import SimpleNamespace

import pytest
import torch

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.config.schema import Config, FaultConfig, TrainConfig
from mpilm.config.settings import override
from mpilm.errors import NonFiniteError, is_out_of_memory
from mpilm.trainer.recovery.bad_steps import MIN_LOSSES, WINDOW, BadStepTracker
from mpilm.trainer.recovery.skip import _check_bad_step_budget

LOSSES = [3.0, 3.2] * (MIN_LOSSES // 2)  # median 3.1, median deviation 0.1


@pytest.mark.parametrize(
    ("changes", "losses", "threshold"),
    [
        ({}, LOSSES, 3.1 + 2.0 * 1.4826 * 0.1),
        ({"on_spike": "rewind"}, LOSSES, 3.1 + 2.0 * 1.4826 * 0.1),
        ({"spike_factor": 1e6}, LOSSES, 3.1 + 1e6 * 1.4826 * 0.1),
        ({}, [3.0] * MIN_LOSSES, 3.0 + 2.0 * 0.01 * 3.0),  # losses that hardly differ
        ({}, LOSSES[:-1], math.inf),  # too few losses
        ({"on_spike": "ignore"}, LOSSES, math.inf),
    ],
)
def test_spike_threshold_follows_losses_and_settings(changes, losses, threshold):
    tracker = BadStepTracker()
    for loss in losses:
        tracker.record(loss)
    train = TrainConfig(**{"on_spike": "skip", "spike_factor": 2.0, **changes})
    assert tracker.spike_threshold(train) == pytest.approx(threshold)


def test_bad_steps_survive_a_checkpoint_and_a_rewind():
    tracker = BadStepTracker()
    tracker.skip(3)
    for loss in range(2 * WINDOW):
        tracker.record(float(loss))
    assert tracker.losses == [float(loss) for loss in range(WINDOW, 2 * WINDOW)]
    restored = BadStepTracker.from_state(tracker.state_dict())
    assert restored == tracker
    restored.rewind(BadStepTracker(skipped=[3], losses=[1.0]), 8, 11)
    assert (restored.skipped, restored.bad, restored.losses) == ([3, 9, 10, 11], [3, 11], [1.0])
    assert BadStepTracker.from_state({"skipped": [2]}) == BadStepTracker([2], [2])  # written before spikes were counted


@pytest.mark.parametrize(("on_spike", "kinds"), [("ignore", "not finite: 2"), ("skip", "not finite or spikes: 2")])
def test_more_bad_steps_than_allowed_end_the_run(on_spike, kinds):
    config = override(Config(fault=FaultConfig(max_bad_steps=1)), train__on_spike=on_spike)
    run = SimpleNamespace(config=config, bad_steps=BadStepTracker(bad=[26]))
    _check_bad_step_budget(run, "step 26: loss 9.2")
    run.bad_steps.bad.append(28)
    with pytest.raises(CollectiveError, match=rf"step 28: loss 9\.2; steps that were {kinds}, and .*allows 1") as caught:
        _check_bad_step_budget(run, "step 28: loss 9.2")
    assert isinstance(caught.value.error, NonFiniteError)


def test_is_out_of_memory_knows_the_errors_of_the_kernel():
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert is_out_of_memory(ImportError("libtorch_cpu.so: failed to map segment from shared object"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (MemoryError(), 71, r"out of memory; .*raise the limit, start fewer ranks a node"),
        (FileNotFoundError(2, "No such file", b"runs/x"), 74, r"runs/x cannot be used: No such file \(on "),
        (OSError(12, "Cannot allocate memory", "x"), 71, "out of memory"),
    ],
)
def test_errors_of_the_machine_reach_all_ranks_as_one_message(error, code, message):
    def fail():
        raise error

    with pytest.raises(CollectiveError, match=message) as caught:
        run_on_root(SelfComm("world"), fail)
    assert caught.value.error.code == code
    with pytest.raises(ZeroDivisionError):
        run_on_root(SelfComm("world"), lambda: 1 / 0)
