"""A step that changed nothing, since it was not finite or a spike: why, and what becomes of the run."""

from __future__ import annotations

import math

from mpilm.checkpoint.format import read_json, step_of
from mpilm.checkpoint.verify import newest_valid, with_help
from mpilm.comm.together import AgreedError, on_root
from mpilm.errors import NonFiniteError
from mpilm.trainer.blame import blame
from mpilm.trainer.build import Training, restore
from mpilm.trainer.history import History
from mpilm.trainer.log import RunLog
from mpilm.trainer.saver import Saver
from mpilm.trainer.step import StepResult


def leave_out(run: Training, log: RunLog, saver: Saver, done: int, result: StepResult) -> bool:
    """Say where step `done` went wrong, and go on as long as there are few of them; whether the state is that of a checkpoint
    again. Collective."""
    what = f"step {done}: loss {result.loss}, gradient norm {result.grad_norm}"
    spike = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
    if spike:
        what += f" (a spike: above {run.history.limit(run.config.train):.4f})"
    else:
        what += f" ({blame(run.model, run.batches, done - 1)})"
    rewound = _rewind(run, saver, done) if spike and run.config.train.on_spike == "rewind" else None
    if rewound is None:
        run.history.leave_out(done)
    _refuse_many(run, what)
    log.left_out(done, what, done if rewound is None else rewound + 1)
    return rewound is not None


def _rewind(run: Training, saver: Saver, done: int) -> int | None:
    """Bring the newest checkpoint's state back; returns its step, None where there is none yet. Collective."""
    saver.finish()
    folder, world = run.folder.checkpoints, run.mesh.world
    path = with_help(world, lambda verify: newest_valid(folder, verify)[0])
    name = world.broadcast_json(path.name if path else "")
    if not name:
        return None
    step = step_of(folder / name)
    assert step is not None
    before = History.of(world.broadcast_json(on_root(world, lambda: read_json(folder / name / "trainer.json"))))
    restore(run.model, folder / name, step - len(before.skipped), world)
    run.history.rewind(before, step, done)
    return step


def _refuse_many(run: Training, what: str) -> None:
    bad, allowed = len(run.history.bad), run.config.fault.max_bad_steps
    if bad > allowed:
        spikes = ", or spikes" * (run.config.train.on_spike != "ignore")
        raise AgreedError(NonFiniteError(
            f"{what}; steps that were not finite{spikes}: {bad}, and --fault.max-bad-steps allows {allowed}. The newest "
            "checkpoint is from before; a lower --train.lr or a longer --train.warmup-steps may help"
        ))  # fmt: skip
