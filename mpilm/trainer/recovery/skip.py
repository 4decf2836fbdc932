"""Recovery from a step that changed nothing, because it was not finite or a spike: find the cause, then skip or rewind."""

import math
from typing import Any

import torch
from torch import Tensor

from mpilm.checkpoint.manager import CheckpointManager
from mpilm.checkpoint.verify import Verifier, find_newest_valid, run_on_root_with_verify
from mpilm.comm.collective_errors import CollectiveError
from mpilm.data.files import read_json
from mpilm.engine.step import MicrobatchSource, StepResult, forward_backward
from mpilm.engine.train_model import TrainModel, load_checkpoint_state
from mpilm.errors import NonFiniteError
from mpilm.trainer.log import RunLog
from mpilm.trainer.recovery.bad_steps import BadStepTracker
from mpilm.trainer.recovery.loss_scale import LEAST, loss_scale
from mpilm.trainer.run import Run


def skip_step(run: Run, log: RunLog, checkpoints: CheckpointManager, done: int, result: StepResult) -> bool:
    """Report and skip a bad step, or rewind; return whether a checkpoint was restored. Collective; raises after too many."""
    scale, loss_is_finite = run.model.loss_scale, math.isfinite(result.loss)
    if scale > LEAST and loss_is_finite and not math.isfinite(result.grad_norm):
        run.bad_steps.skip_overflow(done)
        following = loss_scale(run.config.train.dtype, run.bad_steps.overflows, done)
        cause = f"step {done}: a gradient overflows float16 at loss scale {scale:,.0f}; the next is {following:,.0f}"
        log.step_skipped(done, cause, done)
        return False
    is_spike = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    spike = f"a spike: above {run.bad_steps.spike_threshold(run.config.train):.4f}"
    detail = spike if is_spike else locate_nonfinite(run.model, run.batches, done - 1)
    cause = f"step {done}: loss {result.loss}, gradient norm {result.grad_norm} ({detail})"
    rewound_to = _rewind(run, checkpoints, done) if is_spike and run.config.train.on_spike == "rewind" else None
    if rewound_to is None:
        run.bad_steps.skip(done)
    _check_bad_step_budget(run, cause)
    log.step_skipped(done, cause, done if rewound_to is None else rewound_to + 1)
    return rewound_to is not None


def _rewind(run: Run, checkpoints: CheckpointManager, done: int) -> int | None:
    """Restore the newest checkpoint's state; return its step, or None if there is no checkpoint yet. Collective."""
    checkpoints.finish()
    folder, world = run.folder.checkpoints, run.mesh.world

    def find(verify: Verifier) -> list[Any] | None:
        newest, _ = find_newest_valid(folder, verify)
        return [newest.name, read_json(newest / "trainer.json")] if newest else None

    found = world.broadcast_json(run_on_root_with_verify(world, find))
    if found is None:
        return None
    name, trainer = found
    before, step = BadStepTracker.from_state(trainer), int(trainer["step"])
    load_checkpoint_state(run.model, folder / name, step - len(before.skipped), world)
    run.bad_steps.rewind(before, step, done)
    return step


def _check_bad_step_budget(run: Run, cause: str) -> None:
    bad, allowed = len(run.bad_steps.bad), run.config.fault.max_bad_steps
    if bad > allowed:
        spikes = " or spikes" * (run.config.train.on_spike != "ignore")
        count = f"steps that were not finite{spikes}: {bad}, and --fault.max-bad-steps allows {allowed}"
        advice = "The newest checkpoint is from before; a lower --train.lr or a longer --train.warmup-steps may help"
        raise CollectiveError(NonFiniteError(f"{cause}; {count}. {advice}"))


def locate_nonfinite(model: TrainModel, source: MicrobatchSource, step: int) -> str:
    """Repeat a step and name the rank, microbatch and tensor that are not finite. Collective; overwrites the gradient sums."""
    found: list[tuple[int, str]] = []

    def check(stage: int, microbatch: int, label: str, x: Tensor) -> None:
        if label in model.layouts and not torch.isfinite(x).all():
            found.append((microbatch, f"gradient of {label}"))

    with model.observing(check):
        forward_backward(model, source, step)
    losses = [(m, "loss") for m, loss in model.results().items() if not torch.isfinite(loss).all()]
    everyone = model.mesh.world.all_gather_json(min(losses or found, default=None))
    bad = [(rank, *first) for rank, first in enumerate(everyone) if first is not None]
    if not bad:
        return "not reproduced on recomputation: suspect a CPU or memory fault"
    names = [f"rank {rank}, microbatch {m}: {name}" for rank, m, name in sorted(bad, key=lambda item: item[1])]
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more ranks" if len(names) > 3 else "")
